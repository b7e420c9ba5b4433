"""What a backend may build on: the parts of core that exist for backends alone."""
