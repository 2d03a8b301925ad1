"""A precision for engine-recipes."""
