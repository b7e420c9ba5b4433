"""Building the wheels, and trying them where nothing else of this repository is installed."""

from __future__ import annotations

import shutil

import nox

from tasks.environments import CORE_TESTS, DISTRIBUTIONS, FOLDER, KERAS_2, Environment, keras_on

WHEELS = FOLDER / "dist"


def build(session: nox.Session) -> list[str]:
    """Build the wheel of each distribution and return their paths."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    wheel = ["-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", str(WHEELS)]
    CORE_TESTS.run(session, *wheel, *(f"./packages/trainable-{name}" for name in DISTRIBUTIONS))
    return sorted(map(str, WHEELS.glob("*.whl")))


def try_installed(session: nox.Session, wheels: list[str]) -> None:
    """Install the wheels in new environments, import every module that can be imported there, and list quantizers."""
    for name in ("build", "build-keras-2"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    # PyTorch is there for trainable-torch, so Keras 3 takes it for its engine.
    installed = Environment("build", wheels)
    packages = [f"trainable_{name}" for name in DISTRIBUTIONS]
    script = ["-I", "tests/architecture/installed.py"]
    installed.run(session, *script, *packages, "--without", "trainable_keras.keras2", env=keras_on("torch"))
    with session.chdir(WHEELS):
        session.run(str(installed.python.with_name("trainable")), "list", external=True)
    without_torch = [wheel for wheel in wheels if "trainable_torch" not in wheel]
    legacy = Environment("build-keras-2", [*without_torch, "tensorflow-cpu", "tf-keras"], "tensorflow-2.21")
    legacy.run(
        session, *script, "trainable_core", "trainable_keras", "--without", "trainable_keras.keras3", env=KERAS_2
    )
