"""A family of models for engine-recipes."""
