"""What makes PyTorch fast. Nothing here decides a number: the formula in `plain` does, and everything else repeats it.

What the rest of the package calls is imported below:

- for tensors with a grid, `fake_quantize` and `snap`;
- for a quantizer, `FakeQuantization` in training and `Snapping` in evaluation;
- for a wrapped layer, `call_layer` with its quantizers as one function, or `recomputed` and `evaluated` for its weights
  one by one; `forget` drops what evaluation keeps.

A quantizer's author needs none of it: the rules `Ste` and `Lsq` are in `trainable_torch.ops`.

Which file does what, from the bottom up:

``tier``
    The switch ``TRAINABLE_TORCH_KERNELS``: ``plain``, ``passes`` or ``native``.
``eligible``
    May the fast kernels take these tensors, and does anybody watch? All private names of PyTorch are here, guarded.
``plain``
    The formula as tensor expressions: for compilers, transforms, other devices, and whatever the others don't take.
``passes``
    The formula by PyTorch's operations in place.
``memory``
    How numbers lie in the memory that the loops are given.
``native``, ``loops``, ``grid_loops``, ``layer_loops``
    The formula, and the one that makes grids, in one pass over memory, compiled by numba; for small layers at once.
``fake_quantization``
    One tensor's fake quantization as one autograd node; chooses between the tiers.
``layer``
    A convolution or linear layer and its quantizers as one autograd node.
``recomputing``
    Other layers keep of a quantized tensor how to make it again.
``cache``
    In evaluation weights are quantized and grids made once, and again when something changed.

To add a fast path for an operation, write it beside `layer`'s and hold it against `plain` in ``tests/torch``; to add a
method, nothing here has to change.
"""

from trainable_torch.kernels.cache import evaluated, forget
from trainable_torch.kernels.fake_quantization import FakeQuantization, Snapping, fake_quantize, snap
from trainable_torch.kernels.layer import call as call_layer
from trainable_torch.kernels.recomputing import recomputed

__all__ = [
    "FakeQuantization",
    "Snapping",
    "call_layer",
    "evaluated",
    "fake_quantize",
    "forget",
    "recomputed",
    "snap",
]
