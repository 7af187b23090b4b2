"""Tests of danlu.evaluate."""
