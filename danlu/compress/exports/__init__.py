"""A model in the forms of other programs, each run and compared with the original, or refused with the reason."""
