"""Files for TensorFlow Lite (LiteRT), written operation by operation from a model's own numbers.

In the order of the way of the data:

`program`
    The operators and tensors of a file.
`flatbuffer`
    From a program to bytes and back, by the schema that comes with the runtime.
`lowering`
    From a model's operations to operators on codes; what integer kernels can't compute is refused.
`document`
    Metadata and digests; writing and reading.
`interpreter`
    NumPy on the integers of a written file, by the formulas of either family of kernels.
`runtime`
    LiteRT with every code visible, and which kernels ran.
`verification`
    The comparison of all of them, layer by layer.
"""
