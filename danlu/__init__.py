"""Danlu: from raw data to a large model on hardware you own, with proof at every hop."""

__version__ = "0.1.0"
