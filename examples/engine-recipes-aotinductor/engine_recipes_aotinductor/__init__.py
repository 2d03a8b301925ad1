"""PyTorch AOTInductor packages (.pt2) as engines for engine-recipes."""
