"""8-bit weights and activations for engine-recipes."""
