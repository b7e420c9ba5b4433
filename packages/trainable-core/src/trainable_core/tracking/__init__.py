"""Following a training: what is measured of each quantizer, where it is written, and what is warned of."""
