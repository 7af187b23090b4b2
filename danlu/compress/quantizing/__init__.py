"""Fewer bits a weight: GGML's formats, rounding to them, whole files."""
