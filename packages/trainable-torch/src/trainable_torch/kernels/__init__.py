"""What makes PyTorch fast: every fast path of this package, and nothing that decides a number."""
