"""Tests of danlu.compress.pruning."""
