"""Tests of the server and the terminal conversation, with a real model."""
