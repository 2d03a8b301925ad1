"""Built-in precisions: what stage 1 does to the weights."""
