"""Built-in model families. Each writes only how it differs."""
