"""Learning again, or to answer early, or in many shapes: recipes of the one training loop."""
