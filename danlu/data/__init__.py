"""Rows in, token rows out: read, understand, clean, split, render, pack, and draw batches."""
