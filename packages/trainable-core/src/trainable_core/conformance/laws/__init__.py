"""The laws, one module per topic; importing this package registers them in the order in which they are tried."""

from importlib import import_module

# Laws that need a single call come first, then those that need several, then those on saved states and classes.
MODULES = (
    "forward",
    "channels",
    "elements",
    "tensors",
    "deployment",
    "gradients",
    "variables",
    "training",
    "documents",
    "classes",
)

for _module in MODULES:
    import_module(f"{__name__}.{_module}")
