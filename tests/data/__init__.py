"""Tests of danlu.data."""
