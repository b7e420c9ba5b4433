"""The laws, one module per part of a quantizer's life; importing this package registers them in order."""

from importlib import import_module

# In the order they are tried: what one call shows first, then what needs several, then what outlives the process.
MODULES = ("forward", "channels", "elements", "tensors", "deployment", "gradients", "training", "documents", "classes")

for _module in MODULES:
    import_module(f"{__name__}.{_module}")
