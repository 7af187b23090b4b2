"""Tests of danlu.train."""
