"""What makes PyTorch fast. Nothing here decides a number: the formula in `plain` does, and everything else repeats it.

What the rest of the package calls is imported below: `fake_quantize` and `snap` for tensors with a grid,
`FakeQuantization` and `apply` for a quantizer's tensors, `call_layer` and `evaluate_layer` for a layer with its
quantizers, `recomputed` and `evaluated` for a wrapper's weights. A quantizer's author needs none of it: the rules `Ste`
and `Lsq` are in `trainable_torch.ops`.

Which file does what, from the bottom up:

``tier``
    The switch ``TRAINABLE_TORCH_KERNELS``: ``plain``, ``passes`` or ``native``.
``eligible``
    May the fast kernels take these tensors, and does anybody watch? All private names of PyTorch are here, guarded.
``plain``
    The formula as tensor expressions: for compilers, transforms, other devices, and whatever the others don't take.
``passes``
    The formula by PyTorch's operations in place.
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

from trainable_torch.kernels.cache import Dependencies, dependencies_of, evaluated, forget
from trainable_torch.kernels.eligible import remarks
from trainable_torch.kernels.fake_quantization import FakeQuantization, Snapping, apply, fake_quantize, snap, snapping
from trainable_torch.kernels.layer import call as call_layer
from trainable_torch.kernels.layer import evaluate as evaluate_layer
from trainable_torch.kernels.plain import Lsq, Rule, Ste
from trainable_torch.kernels.recomputing import recomputed

__all__ = [
    "Dependencies",
    "FakeQuantization",
    "Lsq",
    "Rule",
    "Snapping",
    "Ste",
    "apply",
    "call_layer",
    "dependencies_of",
    "evaluate_layer",
    "evaluated",
    "fake_quantize",
    "forget",
    "recomputed",
    "remarks",
    "snap",
    "snapping",
]
