"""The frozen base: load it, see its weights as sites, run packed documents through it."""
