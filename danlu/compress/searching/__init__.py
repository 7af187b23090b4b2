"""The search for the best file that a device can hold, by what every choice is told to cost."""
