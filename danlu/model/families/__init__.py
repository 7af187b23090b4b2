"""Families of models: how Hugging Face and GGUF name their configuration and weights."""
