"""Tests of danlu.compress.learning."""
