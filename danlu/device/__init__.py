"""The machine a model must run on: what it can do, running a GGUF there, and the certificate of what was measured."""
