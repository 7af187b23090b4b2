"""Tests of danlu.compress.low_rank."""
