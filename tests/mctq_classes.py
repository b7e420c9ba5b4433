"""What mct-quantizers finds of its classes: its own, whatever backend of ours is loaded."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

from mct_quantizers.common.get_all_subclasses import get_all_subclasses


def classes() -> Iterator[type]:
    """Yield every class that mct-quantizers defines in this process."""
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] == "mct_quantizers":
            for cls in vars(module).values():
                if inspect.isclass(cls) and cls.__module__ == name:
                    yield cls


def foreign() -> set[type]:
    """Return the classes that walking the subclasses of each of its classes finds, and that are not its own."""
    found = {subclass for cls in classes() for subclass in get_all_subclasses(cls)}
    return {cls for cls in found if cls.__module__.partition(".")[0] != "mct_quantizers"}
