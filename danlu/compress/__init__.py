"""Making a model small: number formats are tried, measured on this machine, and one that meets the target is kept."""
