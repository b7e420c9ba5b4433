"""JSON documents of quantizers and models, and the files that hold them."""
