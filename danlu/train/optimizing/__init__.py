"""The parts of learning that are no loop: settings, groups of weights, and rules that update them."""
