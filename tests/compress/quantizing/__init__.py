"""Tests of danlu.compress.quantizing."""
