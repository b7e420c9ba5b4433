"""The whole plugin API: three hooks, and what a backend says about itself.

A plugin is an entry point of group ``trainable``, the hooks it has something to say to, and its quantizer classes::

    [project.entry-points."trainable"]
    my_plugin = "my_package.plugin"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import pluggy

from trainable_core.enums import TieRule
from trainable_core.key import is_readable

PROJECT: Final = "trainable"
"""Entry point group, and pluggy's name of the project."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Backend:
    """What a backend says about itself, without importing its framework.

    Parameters
    ----------
    name : str
        What users pass as ``backend=``, e.g. ``"torch"``.
    distribution : str
        What to install for it, e.g. ``"trainable-torch"``.
    framework : tuple of str
        Distributions whose versions decide what it does, e.g. ``("torch", "mct-quantizers")``.
    tie_rule : TieRule
        Where its deployed kernels send a value half way between two codes.
    verbs : str
        Import path of the module with ``wrap``, ``calibrate``, ``finalize`` …, e.g. ``"trainable_torch"``.
    conformance : str, optional
        Import path of the module with the adapter for the conformance kit; by default ``<verbs>.conformance``.
    remarks : str, optional
        Import path of a function that ``trainable doctor`` calls, e.g. ``"trainable_torch.kernels.eligible:remarks"``:
        without arguments it returns a list of sentences about this installation, such as what is slower than it could
        be.
    quantizer_base : str, optional
        Import path of the class that its quantizers are subclasses of, e.g.
        ``"trainable_torch:BasePytorchTrainableQuantizer"``; other classes are refused when the backend is asked for.
    """

    name: str
    distribution: str
    framework: tuple[str, ...]
    tie_rule: TieRule
    verbs: str
    conformance: str = ""
    remarks: str = ""
    quantizer_base: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not is_readable(self.name):
            message = f"name {self.name!r} is blank, begins or ends with a space, or holds what can't be printed"
            raise TypeError(message)
        if isinstance(self.framework, str):  # a str is a sequence too: of letters
            message = f"framework must be a tuple of distribution names, got the string {self.framework!r}"
            raise TypeError(message)


@hookspec
def trainable_register_quantizers(backend: str) -> list[type[Any]]:
    """Return the quantizer classes this plugin has for `backend`; an empty list if it has none.

    Called once per backend asked for. Import the framework inside, and for your own name only: looking up torch must
    not import keras. A plugin may have quantizers for a backend that another plugin provides.
    """
    raise NotImplementedError(backend)  # a specification: pluggy reads its signature and never calls it


@hookspec
def trainable_register_modifiers(backend: str) -> list[type[Any]]:
    """Return the subclasses of `trainable_core.modifier.Modifier` this plugin has for `backend`; an empty list if none.

    Called once per backend asked for, when a recipe has modifiers; import the framework inside, as for quantizers.
    """
    raise NotImplementedError(backend)  # a specification, as above


@hookspec
def trainable_register_backend() -> Backend | None:
    """Return what this plugin says about the backend it provides; only backends implement it. Import nothing heavy."""
    raise NotImplementedError  # a specification, as above
