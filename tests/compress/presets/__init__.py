"""Tests of danlu.compress.presets."""
