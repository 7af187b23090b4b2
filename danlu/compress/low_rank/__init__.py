"""Matrices and convolutions as products of thinner ones."""
