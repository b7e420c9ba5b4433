"""Files for deployment runtimes, and the proof that what is in them is the model: the same for every framework.

A backend gives an ONNX graph in which each quantizer is one node, ``trainable.Quantize``, and tells each quantizer's
grid and each quantized weight's codes. What follows, in the order of the way of the data:

`source`
    What a backend tells.
`graph`
    An ONNX graph that can be changed.
`passes`
    Rewrites that leave every value as it is and let integer kernels take the nodes.
`containers`
    How codes are stored: in 8 or 16 bits, shifted and clipped.
`lowering`
    From ``Quantize`` nodes to QuantizeLinear, Clip and DequantizeLinear with integer initializers.
`islands`
    Which nodes stay float, and why.
`qonnx`
    The same graph with ``Quant`` nodes of the true widths.
`files`
    Metadata and digests; writing and reading.
`interpreter`
    NumPy on the integers of a written file.
`runtime`
    ONNX Runtime with every code visible, and which kernels ran.
`verification`
    The comparison of all of them, layer by layer.

`libraries` imports onnx and the runtimes, when they are needed.
"""
