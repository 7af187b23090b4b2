"""Tests of danlu.compress.exports."""
