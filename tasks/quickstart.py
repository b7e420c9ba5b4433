"""Which example `nox -s quickstart` runs, and where: PyTorch's, unless another backend is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import nox

from tasks.environments import (
    KERAS_2,
    KERAS_2_TESTS,
    KERAS_JAX_TESTS,
    KERAS_TESTS,
    KERAS_TORCH_TESTS,
    ONE_THREAD,
    QUICKSTART,
    Environment,
    keras_on,
)

ENGINES = {"tensorflow": KERAS_TESTS, "jax": KERAS_JAX_TESTS, "torch": KERAS_TORCH_TESTS}
"""Environments of Keras 3, by its engine."""


@dataclass(frozen=True)
class Quickstart:
    """One example, where it runs and with which options.

    Parameters
    ----------
    example : str
        The file's path.
    environment : Environment
        Where it runs.
    env : mapping
        Environment variables.
    options : sequence of str
        What the example is called with.
    """

    example: str
    environment: Environment
    env: Mapping[str, str]
    options: Sequence[str]

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Quickstart:
        """Read ``--backend`` and ``--engine``; all other arguments are the example's."""
        parser = argparse.ArgumentParser(prog="nox -s quickstart --", add_help=False, allow_abbrev=False)
        parser.add_argument("--backend", choices=("torch", "keras", "tf_keras"), default="torch")
        parser.add_argument("--engine", choices=tuple(ENGINES))
        chosen, options = parser.parse_known_args(arguments)
        if chosen.engine and chosen.backend != "keras":
            parser.error("--engine chooses what Keras 3 runs on; it goes with --backend keras only")
        if chosen.backend == "torch":
            return cls("examples/quickstart_torch.py", QUICKSTART, ONE_THREAD, options)
        if chosen.backend == "tf_keras":
            return cls("examples/quickstart_keras.py", KERAS_2_TESTS, KERAS_2, options)
        engine = chosen.engine or "tensorflow"
        return cls("examples/quickstart_keras.py", ENGINES[engine], keras_on(engine), options)

    def run(self, session: nox.Session) -> None:
        """Run the example."""
        self.environment.run(session, self.example, *self.options, env=self.env)
