"""The laws, one module per topic; importing this package registers them in the order in which they are tried."""

from importlib import import_module

# Laws that compare a quantizer with itself on another tensor come first: what they find is not blamed on the values.
# Then come laws that need a single call, those that need several, and those on saved states and classes.
MODULES = (
    "memory",
    "forward",
    "channels",
    "elements",
    "tensors",
    "deployment",
    "gradients",
    "variables",
    "precision",
    "training",
    "sequences",
    "schedules",
    "regularization",
    "documents",
    "surroundings",
    "contexts",
    "randomness",
    "transforms",
    "replacements",
    "modifiers",
    "classes",
)

for _module in MODULES:
    import_module(f"{__name__}.{_module}")
