"""Tests of danlu.compress.searching."""
