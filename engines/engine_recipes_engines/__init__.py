"""Built-in engines: what stage 2 compiles to, and how it is loaded again."""
