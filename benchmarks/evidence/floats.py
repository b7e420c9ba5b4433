"""The float models that every method starts from: PyTorch trains one for each network and seed, for both frameworks."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
from problems import PROBLEMS, Array, load

FOLDER = Path(__file__).parent
CACHE = FOLDER.parents[1] / ".nox" / "evidence"


@functools.cache
def digest_of_data(network: str, seed: int) -> str:
    """Return a name for a network's data: every release of Python brings another text."""
    arrays = vars(load(PROBLEMS[network], seed)).values()
    return hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in arrays)).hexdigest()[:8]


def file_of(network: str, seed: int) -> Path:
    """Return where the weights of a float model are kept."""
    return CACHE / f"{network}-{seed}-{digest_of_data(network, seed)}.npz"


def digest(network: str, seed: int) -> str:
    """Return a name for what every run begins with: the weights of a float model, and the data.

    Another machine trains other weights, which differ by rounding first.
    """
    values = [value.tobytes() for _, value in sorted(weights(network, seed).items())]
    return hashlib.sha256(b"".join([*values, digest_of_data(network, seed).encode()])).hexdigest()[:8]


def weights(network: str, seed: int) -> dict[str, Array]:
    """Return the state dict of PyTorch's float model, trained in a process of its own where it is not kept yet."""
    file = file_of(network, seed)
    if not file.exists():
        # This process may have another framework, whose threads and PyTorch's don't always get along.
        subprocess.run([sys.executable, str(FOLDER / "torch_runs.py"), network, str(seed)], check=True)  # noqa: S603 - ours
    with np.load(file) as saved:
        return {name: saved[name] for name in saved.files}
