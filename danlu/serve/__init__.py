"""Talking to a finished model: an OpenAI-compatible server and a conversation in the terminal."""
