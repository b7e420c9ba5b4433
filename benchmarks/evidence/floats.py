"""The float models that every method starts from: PyTorch trains one for each network and seed, for both frameworks."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
from problems import Array

FOLDER = Path(__file__).parent
CACHE = FOLDER.parents[1] / ".nox" / "evidence"


def file_of(network: str, seed: int) -> Path:
    """Return where the weights of a float model are kept."""
    return CACHE / f"{network}-{seed}.npz"


def digest(network: str, seed: int) -> str:
    """Return a name for the weights of a float model; another machine trains others, which differ by rounding first."""
    values = [value.tobytes() for _, value in sorted(weights(network, seed).items())]
    return hashlib.sha256(b"".join(values)).hexdigest()[:8]


def weights(network: str, seed: int) -> dict[str, Array]:
    """Return the state dict of PyTorch's float model, trained in a process of its own where it is not kept yet."""
    file = file_of(network, seed)
    if not file.exists():
        # This process may have another framework, whose threads and PyTorch's don't always get along.
        subprocess.run([sys.executable, str(FOLDER / "torch_runs.py"), network, str(seed)], check=True)  # noqa: S603 - ours
    with np.load(file) as saved:
        return {name: saved[name] for name in saved.files}
