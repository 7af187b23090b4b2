"""What workers that train apart tell each other through a directory."""
