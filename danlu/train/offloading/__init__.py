"""What training keeps outside of memory: weights, gradients, the optimizer's state, and activations."""
