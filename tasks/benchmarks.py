"""Running the benchmarks: ours, and other libraries beside ours, each in an environment of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence

import nox

from tasks.environments import (
    CORE,
    FOLDER,
    KERAS_2,
    KERAS_2_TESTS,
    KERAS_2_TF215_TESTS,
    KERAS_TESTS,
    ONE_THREAD,
    TENSORFLOW,
    TORCH_TESTS,
    Environment,
    keras_on,
)

TORCH_SCRIPTS = (
    "import_time",
    "calibration_cost",
    "torch_kernels",
    "torch_steps",
    "torch_linearity",
    "torch_hops",
    "torch_small_layers",
    "torch_export",
    "torch_diagnosis",
    "torch_suggestion",
    "torch_reconstruction",
)
KERAS_SCRIPTS = ("keras_kernels", "keras_steps", "keras_export")
KERAS_VERSIONS = ((KERAS_TESTS, keras_on("tensorflow")), (KERAS_2_TESTS, KERAS_2), (KERAS_2_TF215_TESTS, TENSORFLOW))
"""Keras 3, and Keras 2 on both versions of TensorFlow: the same scripts, a table for each."""

TORCH_PEERS: dict[str, tuple[str, ...]] = {
    "torchao": ("transformers", "scikit-learn"),
    "brevitas": (),
    "nvidia-modelopt": ("requests", "huggingface-hub"),
    "nncf": ("ninja",),
    "aimet-torch": (),
    "model-compression-toolkit": ("torchvision",),
}
"""Other libraries, and what each, or a script about it, needs but does not declare."""
KERAS_PEERS = ("model-compression-toolkit",)
"""Other libraries for Keras; this one's is the Keras of TensorFlow 2.15."""
TORCH_PEER_SCRIPTS = ("torch_peers", "torch_peer_steps", "torch_peer_small_layers")
TORCHAO_SCRIPTS = ("torch_peer_language_model",)
KERAS_PEER_SCRIPTS = ("keras_peers",)


def measure_ours(session: nox.Session) -> None:
    """Run every script that measures this library alone."""
    for script in TORCH_SCRIPTS:
        TORCH_TESTS.run(session, f"benchmarks/{script}.py", *session.posargs, env=ONE_THREAD)
    for environment, settings in KERAS_VERSIONS:
        for script in KERAS_SCRIPTS:
            environment.run(session, f"benchmarks/{script}.py", *session.posargs, env=settings)


def measure_peers(session: nox.Session) -> None:
    """Run the scripts that measure another library beside ours, for each library that can be installed."""
    # NNCF compiles an extension when it is first used, and gives up after a minute unless told to wait; a build that
    # was interrupted leaves a lock behind, so each run builds in a folder of its own.
    extensions = FOLDER / "extensions"
    shutil.rmtree(extensions, ignore_errors=True)
    quiet = {"PYTHONWARNINGS": "ignore"}
    settings = {**ONE_THREAD, **quiet, "NNCF_EXTENSION_LOAD_TIMEOUT": "900", "TORCH_EXTENSIONS_DIR": str(extensions)}
    for peer, needed in TORCH_PEERS.items():
        requirements = [*CORE, "-e", "packages/trainable-torch[speed]", peer, *needed]
        environment = Environment(f"peer-{peer}", requirements, "peers")
        scripts = (*TORCH_PEER_SCRIPTS, *(TORCHAO_SCRIPTS if peer == "torchao" else ()))
        _measure_peer(session, environment, scripts, peer, settings)
    for peer in KERAS_PEERS:
        requirements = [*CORE, "-e", "packages/trainable-keras", "tensorflow-cpu", peer]
        environment = Environment(f"peer-keras-{peer}", requirements, "peers-keras")
        _measure_peer(session, environment, KERAS_PEER_SCRIPTS, peer, {**TENSORFLOW, **quiet})


def _measure_peer(
    session: nox.Session, environment: Environment, scripts: Sequence[str], peer: str, env: Mapping[str, str]
) -> None:
    """Run scripts beside a library, or say why it was skipped."""
    path = os.pathsep.join([str(environment.python.parent), os.environ["PATH"]])  # ninja is called by name
    try:
        for script in scripts:
            environment.run(
                session, f"benchmarks/{script}.py", "--peer", peer, *session.posargs, env={**env, "PATH": path}
            )
    except nox.command.CommandFailed as error:
        print(f"[{session.name}] {peer} skipped: {error}; pip's or its own message is above", flush=True)
