"""The virtualenvs that sessions run in, and the settings of frameworks that go with them.

Sessions share one virtualenv per set of dependencies (``.nox/<name>``). It is made again when its requirements, its
constraints or a distribution's metadata change.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".nox"
DISTRIBUTIONS = ("core", "keras", "torch")
METADATA = [ROOT / f"packages/trainable-{name}/pyproject.toml" for name in DISTRIBUTIONS]
SOURCES = [f"packages/trainable-{name}/src" for name in DISTRIBUTIONS]


@dataclass(frozen=True)
class Environment:
    """One virtualenv that several sessions may share.

    Parameters
    ----------
    name : str
        Its directory under ``.nox``.
    requirements : sequence of str
        Arguments for ``pip install``.
    constraints : str or None
        Name of the constraints file; None takes the newest versions there are, and makes the environment again once a
        day.
    bases : sequence of Environment
        Environments whose packages are seen here too, so that frameworks of gigabytes are not installed once more. What
        `requirements` repeats of them is not installed again, but the distributions of this repository are.
    """

    name: str
    requirements: Sequence[str]
    constraints: str | None = "dev"
    bases: Sequence[Environment] = ()

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return FOLDER / self.name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def packages(self) -> Path:
        """Its folder of installed packages."""
        inside = "Lib" if os.name == "nt" else f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
        return FOLDER / self.name / inside / "site-packages"

    def run(self, session: nox.Session, *arguments: str, env: Mapping[str, str | None] | None = None) -> None:
        """Run its Python with these arguments, after making the environment if it is missing or out of date."""
        self._install(session)
        # No PYTHONPATH: an environment holds what its distributions declare and nothing else.
        session.run(str(self.python), *arguments, env={"PYTHONPATH": None, **(env or {})}, external=True)

    def made_from(self) -> str:
        """Return a digest of everything that decides what is installed."""
        bases = [base.made_from() for base in self.bases]
        digest = hashlib.sha256("\n".join([sys.version, *bases, *self.requirements]).encode())
        for file in METADATA:
            digest.update(file.read_bytes())
        today = str(dt.datetime.now(dt.timezone.utc).date())
        digest.update(self._constraints.read_bytes() if self._constraints else today.encode())
        return digest.hexdigest()

    def _install(self, session: nox.Session) -> None:
        for base in self.bases:
            base._install(session)  # noqa: SLF001 - another of its own kind
        stamp, digest = FOLDER / self.name / "made-from", self.made_from()
        if stamp.exists() and stamp.read_text() == digest:
            return
        started = time.monotonic()
        print(f"[{session.name}] installing environment {self.name!r} ...", flush=True)
        virtualenv = [sys.executable, "-m", "virtualenv", "--quiet", "--clear", "--no-periodic-update"]
        session.run(*virtualenv, str(FOLDER / self.name), external=True, silent=True)
        if self.bases:
            # A file of such a name is read last, so an environment's own packages go before those of its bases.
            see = "".join(f"import site; site.addsitedir({str(base.packages)!r})\n" for base in self.bases)
            (self.packages / "zz-bases.pth").write_text(see, encoding="utf-8")
        # Quiet twice: errors only; pip warns for every package that one of several configured indexes does not have.
        # Most modules of a framework are never imported, so Python compiles those that are when they are.
        pip = [str(self.python), "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check"]
        limits = ["-c", str(self._constraints)] if self._constraints else []
        session.run(*pip, *limits, *self.requirements, external=True)
        if (mctq := self.packages / "mct_quantizers").exists():  # compiling it warns, and warnings are errors in tests
            session.run(str(self.python), "-m", "compileall", "-qq", str(mctq), external=True)
        stamp.write_text(digest)
        print(f"[{session.name}] environment {self.name!r} installed in {time.monotonic() - started:.0f} s", flush=True)

    @property
    def _constraints(self) -> Path | None:
        return ROOT / "constraints" / f"{self.constraints}.txt" if self.constraints else None


# What each environment has installed.
CORE = ("-e", "packages/trainable-core[cli,conformance,suggest,yaml]")
WITH_TORCH = (*CORE, "-e", "packages/trainable-torch[speed]", "torch", "pytest-xdist")
TRAINERS = ("scikit-learn", "transformers", "lightning", "accelerate")  # the libraries that people train PyTorch with
WITH_KERAS = (*CORE, "-e", "packages/trainable-keras", "pytest-xdist", "scikit-learn")

WITH_REPORT = ("-e", "packages/trainable-core[report]")

LINT = Environment("lint", ["ruff", "numpydoc", "import-linter"])
CORE_TESTS = Environment("core", [*CORE, *WITH_REPORT, "pytest-xdist"])
# The type checker is here because it needs torch's own annotations, and a second installation of torch is a gigabyte.
WITH_ONNX = ("-e", "packages/trainable-core[onnx]", "-e", "packages/trainable-torch[onnx]")
# Elsewhere TensorFlow is there, which has an interpreter of its own: the tests run with either.
WITH_LITERT = ("-e", "packages/trainable-core[tflite]", "-e", "packages/trainable-keras[tflite]")
TORCH_TESTS = Environment(
    "torch", [*WITH_TORCH, *WITH_ONNX, *WITH_REPORT, *TRAINERS, "pandas", "mypy", "nox", "types-PyYAML"]
)
KERAS_TESTS = Environment("keras", [*WITH_KERAS, *WITH_REPORT, "keras", "tensorflow-cpu"])
# The other engines of Keras 3 have no TensorFlow beside them, so nothing can fall back on it.
KERAS_JAX_TESTS = Environment("keras-jax", [*WITH_KERAS, "keras", "jax"])
KERAS_TORCH_TESTS = Environment("keras-torch", [*WITH_KERAS, "keras", "torch"], bases=(TORCH_TESTS,))
KERAS_2_TESTS = Environment(
    "keras-2", [*WITH_KERAS, *WITH_REPORT, "tensorflow-cpu", "tf-keras"], "tensorflow-2.21", (KERAS_TESTS,)
)
KERAS_2_TF215_TESTS = Environment("keras-2-tf215", [*WITH_KERAS, "tensorflow-cpu"], "tensorflow-2.15")
# The documentation is about all frameworks, and so is the environment that its site is built in.
SITE = ("furo", "ipykernel", "latex2mathml", "matplotlib", "myst-nb", "sphinx", "sphinx-copybutton")
# All frameworks together: each backend must leave the others alone.
WITH_ALL = ("-e", "packages/trainable-torch[speed]", "keras", "tensorflow-cpu", "tf-keras", "torch")
CROSS_TESTS = Environment(
    "cross",
    [*WITH_KERAS, *WITH_ALL, *WITH_ONNX, *WITH_LITERT, *TRAINERS, *WITH_REPORT, *SITE],
    bases=(TORCH_TESTS, KERAS_TESTS),
)
# A data set of statsmodels is what recurrent networks are tried on; nothing else needs it.
EVIDENCE = Environment("evidence", [*WITH_KERAS, *WITH_ALL, "statsmodels"], bases=(TORCH_TESTS, KERAS_TESTS))
MINIMUMS = Environment("minimums", WITH_TORCH, "minimums")
MAXIMUMS_TORCH = Environment("maximums-torch", WITH_TORCH, None)
MAXIMUMS_KERAS = Environment("maximums-keras", [*WITH_KERAS, "keras", "tensorflow-cpu"], None)
QUICKSTART = Environment("quickstart", [*CORE, "-e", "packages/trainable-torch", *WITH_ONNX, "scikit-learn"])

# One thread for each of the two test processes: together they use two cores; with more they wait for each other.
# Tests that share what takes long to make are in one group, and so in one process.
PARALLEL = ("-n", "2", "--dist", "loadgroup")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# An eager call of Keras costs milliseconds: fewer random examples than elsewhere keep a session within minutes.
FEWER_EXAMPLES = {"TRAINABLE_EXAMPLES": "10"}


def share(parts: int) -> dict[str, str]:
    """Return the setting that runs one of so many parts of each test's cases, unless TRAINABLE_SHARE says otherwise."""
    return {"TRAINABLE_SHARE": os.environ.get("TRAINABLE_SHARE", str(parts))}


TENSORFLOW = {**ONE_THREAD, **FEWER_EXAMPLES, "TF_CPP_MIN_LOG_LEVEL": "3"}
"""TensorFlow without its log, on one thread."""
KERAS_2 = {**TENSORFLOW, "TF_USE_LEGACY_KERAS": "1"}
"""Keras 2 where TensorFlow is newer than 2.15."""


def keras_on(engine: str) -> dict[str, str]:
    """Return the settings of Keras 3 on an engine: ``tensorflow``, ``jax`` or ``torch``."""
    return {**TENSORFLOW, "KERAS_BACKEND": engine}
