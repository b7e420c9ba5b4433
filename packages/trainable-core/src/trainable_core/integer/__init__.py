"""Integer arithmetic as deployment runtimes carry it out, in NumPy: what a quantized layer gives, code by code.

`tensor`
    Codes together with their grid.
`requantization`
    From a 32-bit sum to codes of another grid: the two ways that runtimes do it.
`products`
    Layers that add up products: linear, matrix product, convolution, transposed convolution.
`elementwise`
    Quantize, dequantize, add, multiply, concatenate, clip, ReLU.
`pooling`
    Maximum and average pooling, and padding.
`lite`
    What TensorFlow Lite computes otherwise than ONNX Runtime.
`certificate`
    Whether a framework's float32 forward is bound to give the same codes.
"""
