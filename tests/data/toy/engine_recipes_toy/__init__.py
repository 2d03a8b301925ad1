"""A third-party package in pure Python: a family, a precision that can be told to misbehave, and an engine."""
