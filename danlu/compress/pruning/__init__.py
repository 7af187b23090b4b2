"""Fewer weights: zeros, smaller shapes, fewer words."""
