"""Mistral models for engine-recipes."""
