"""An engine for engine-recipes."""
