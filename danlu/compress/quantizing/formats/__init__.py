"""GGML's number formats: how a run of weights is put on a grid, and how that lies in a file."""
