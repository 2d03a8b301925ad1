"""Gemma models for engine-recipes."""
