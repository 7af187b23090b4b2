"""What is computed: one decoder, its families, its files."""
