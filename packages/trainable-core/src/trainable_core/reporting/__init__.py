"""A report on a model or a file: one self-contained page of what is quantized, how well it fits, and what is not."""
