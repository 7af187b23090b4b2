"""Tests of danlu.device."""
