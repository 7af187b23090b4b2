"""Tests, mirroring danlu/."""
