"""Tests of danlu.compress."""
