"""What a backend builds on: the only room of core, beside the top-level modules, that exists for backends."""
