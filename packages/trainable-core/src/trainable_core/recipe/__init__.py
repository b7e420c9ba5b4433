"""Recipes: one document that says which tensors of a model are quantized, on which grid, and trained how."""
