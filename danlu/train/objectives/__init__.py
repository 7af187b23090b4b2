"""Objectives that compare rows, or models."""
