"""Every check of the repository: `nox` runs the default ones, `nox -l` lists all of them with what they do.

Each session prints what it does and how long it took; the run ends with a summary and the counts of tests. The
virtualenvs, and everything else that sessions are made of, are in `tasks/`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # nox loads this file by its path, which finds no `tasks` beside it

from tasks import benchmarks, wheels
from tasks.environments import (
    CORE,
    CORE_TESTS,
    CROSS_TESTS,
    EVIDENCE,
    FEWER_EXAMPLES,
    KERAS_2,
    KERAS_2_TESTS,
    KERAS_2_TF215_TESTS,
    KERAS_JAX_TESTS,
    KERAS_TESTS,
    KERAS_TORCH_TESTS,
    LINT,
    MAXIMUMS_KERAS,
    MAXIMUMS_TORCH,
    MINIMUMS,
    ONE_THREAD,
    PARALLEL,
    SOURCES,
    TENSORFLOW,
    TORCH_TESTS,
    keras_on,
    share,
)
from tasks.quickstart import Quickstart
from tasks.results import RESULTS
from tasks.sessions import check, pytest

nox.needs_version = ">=2024.4.15"

ARCHITECTURE = (
    "tests/architecture",
    "--ignore=tests/architecture/test_docs.py",
)  # the session `examples` runs that one
# PyTorch's version is the same in `tests-torch` and in `minimums`; what these are about depends on it alone.
OF_PYTORCH = [
    f"--ignore=tests/torch/test_{name}.py"
    for name in (
        "batch_norm",
        "bias",
        "conformance",
        "distributed",
        "eligible",
        "estimators",
        "fast_paths",
        "faults",
        "folding_structure",
        "fused_layer",
        "identity",
        "kernels",
        "lifecycle",
        "memory",
        "more_real_models",
        "moved_layers",
        "native",
        "real_models",
        "references",
        "reporting",
        "tracking",
    )
]
WITH_BOTH = "--ignore=tests/keras/test_which.py"  # about both in one process: the session `tests-cross` runs it
OF_KERAS_2 = ["tests/architecture/test_docstrings.py", "tests/architecture/test_matrix.py"]  # a process has one Keras


# What these are about does not depend on which kernels are used, or tries all of them.
NOT_ABOUT_KERNELS = [
    f"--ignore=tests/torch/test_{name}.py"
    for name in (
        "bad_input",
        "calibration",
        "callback",
        "description",
        "distributed",
        "document_fuzz",
        "eligible",
        "engines",
        "estimators",
        "export",
        "exporting",
        "folding",
        "folding_structure",
        "granularity",
        "layers",
        "mctq",
        "memory",
        "migration",
        "modifiers",
        "more_real_models",
        "moved_layers",
        "operations",
        "origins",
        "real_models",
        "reconstruction",
        "references",
        "reporting",
        "resuming",
        "serialization",
        "tracing",
        "weight_uses",
        "wrapping",
    )
]

# What a plain `nox` runs of each test's cases, so that all sessions together end within 50 minutes on two slow cores;
# `TRAINABLE_SHARE=1 nox` runs all of them, as the workflows do.
EIGHTH = share(8)

ON_EVERY_ENGINE = [f"tests/keras/test_{name}.py" for name in ("engines", "frozen", "plugins")]


@check("lint")
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff, and docstrings against signatures with numpydoc."""
    LINT.run(session, "-m", "ruff", "check", ".")
    LINT.run(session, "-m", "ruff", "format", "--check", ".")
    modules = [str(path.relative_to(ROOT)) for source in SOURCES for path in sorted((ROOT / source).rglob("*.py"))]
    LINT.run(session, "-m", "numpydoc", "lint", *modules)


@check("imports")
def imports(session: nox.Session) -> None:
    """Check which package and layer may import which, with import-linter."""
    # import-linter reads the sources without importing them, so no framework is needed.
    path = os.pathsep.join(str(ROOT / source) for source in SOURCES)
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    LINT.run(session, "-c", command, env={"PYTHONPATH": path})


@check("types")
def types(session: nox.Session) -> None:
    """Check types with mypy --strict, noxfile.py and tasks/ included."""
    TORCH_TESTS.run(session, "-m", "mypy", *SOURCES, "noxfile.py", "tasks")


@check("tests-core")
def tests_core(session: nox.Session) -> None:
    """Test trainable-core in an environment without any framework."""
    pytest(session, CORE_TESTS, *PARALLEL, "tests/core", "tests/artifacts", "tests/examples", "tests/architecture")


@check("tests-torch")
def tests_torch(session: nox.Session) -> None:
    """Test trainable-torch, and trainable-core beside an installed backend and ONNX Runtime."""
    tests = ["tests/torch", "tests/core", "tests/artifacts", "tests/examples"]
    pytest(session, TORCH_TESTS, *PARALLEL, *tests, env={**ONE_THREAD, **EIGHTH, "TRAINABLE_EXAMPLES": "20"})


@check("tests-torch-plain")
def tests_torch_plain(session: nox.Session) -> None:
    """Test trainable-torch again with every fast kernel switched off."""
    plain = {**ONE_THREAD, **FEWER_EXAMPLES, **EIGHTH, "TRAINABLE_TORCH_KERNELS": "plain"}
    pytest(session, TORCH_TESTS, *PARALLEL, "tests/torch", *NOT_ABOUT_KERNELS, env=plain)


@check("tests-keras")
def tests_keras(session: nox.Session) -> None:
    """Test trainable-keras on Keras 3 with the TensorFlow engine."""
    tests = ["tests/keras", "tests/artifacts", "tests/examples"]
    pytest(session, KERAS_TESTS, *PARALLEL, *tests, WITH_BOTH, env={**keras_on("tensorflow"), **EIGHTH})


@check("tests-keras-jax")
def tests_keras_jax(session: nox.Session) -> None:
    """Test trainable-keras on the JAX engine: wrap, calibrate, fit, finalize, save and load; layers, plugins."""
    tests = [*ON_EVERY_ENGINE, "tests/keras/test_folding.py"]
    pytest(session, KERAS_JAX_TESTS, *PARALLEL, *tests, env={**keras_on("jax"), **EIGHTH})


@check("tests-keras-torch")
def tests_keras_torch(session: nox.Session) -> None:
    """Test trainable-keras on the torch engine: wrap, calibrate, fit, finalize, save and load; layers, plugins."""
    pytest(session, KERAS_TORCH_TESTS, *PARALLEL, *ON_EVERY_ENGINE, env=keras_on("torch"))


@check("tests-keras-2")
def tests_keras_2(session: nox.Session) -> None:
    """Test trainable-keras on Keras 2, with TensorFlow 2.21 and tf-keras."""
    tests = ["tests/keras", "tests/artifacts", "tests/examples", *OF_KERAS_2]
    pytest(session, KERAS_2_TESTS, *PARALLEL, *tests, WITH_BOTH, env={**KERAS_2, **EIGHTH})


@check("tests-keras-2-tf215", default=False)  # takes as long as the session above; part of a release
def tests_keras_2_tf215(session: nox.Session) -> None:
    """Test trainable-keras on Keras 2, with TensorFlow 2.15, whose own Keras it is."""
    pytest(session, KERAS_2_TF215_TESTS, *PARALLEL, "tests/keras", "tests/artifacts", env=TENSORFLOW)


@check("tests-cross")
def tests_cross(session: nox.Session) -> None:
    """Test that one recipe and the same weights give the same integers in every backend, and the house's own rules."""
    litert = "tests/core/test_export_tflite.py"  # LiteRT is in this environment
    pytest(session, CROSS_TESTS, *PARALLEL, "tests/cross", *ARCHITECTURE, litert, env=keras_on("tensorflow"))
    pytest(session, CROSS_TESTS, "tests/cross", env=KERAS_2)
    # Both versions of Keras are installed here alone: models of both in one process, and what each says of the other's.
    for env in (keras_on("tensorflow"), KERAS_2):
        pytest(session, CROSS_TESTS, *PARALLEL, "tests/keras/test_which.py", env=env)


@check("examples")
def examples(session: nox.Session) -> None:
    """Run every code block of the README and the docs; none may be skipped."""
    pytest(session, CROSS_TESTS, *PARALLEL, "tests/architecture/test_docs.py", env=keras_on("tensorflow"))
    if RESULTS[session.name].skipped:
        session.error("a document was skipped, though everything that documents need is installed here")


@check("docs")
def docs(session: nox.Session) -> None:
    """Build the documentation site into .nox/docs/html and run its notebooks; a warning is an error."""
    folders = ["-d", ".nox/docs/doctrees", "-c", "docs", ".", ".nox/docs/html"]
    CROSS_TESTS.run(session, "-m", "sphinx", "-q", "-W", "--keep-going", *folders, env=keras_on("tensorflow"))


@check("minimums", default=False)  # what is lowest changes seldom
def minimums(session: nox.Session) -> None:
    """Test with the lowest versions that the distributions declare; constraints/minimums.txt says why not torch's."""
    tests = ["tests/core", "tests/torch", *OF_PYTORCH]
    pytest(session, MINIMUMS, *PARALLEL, *tests, env={**ONE_THREAD, **FEWER_EXAMPLES})


@check("maximums", default=False)  # what is newest changes without a change here
def maximums(session: nox.Session) -> None:
    """Test with the newest versions that the distributions' upper bounds allow."""
    pytest(session, MAXIMUMS_TORCH, *PARALLEL, "tests/core", "tests/torch", env={**ONE_THREAD, **FEWER_EXAMPLES})
    pytest(session, MAXIMUMS_KERAS, *PARALLEL, "tests/keras", env=keras_on("tensorflow"))


@check("build")
def build(session: nox.Session) -> None:
    """Build the wheels, install them where no source tree is on the path, import every module, run `trainable list`."""
    wheels.try_installed(session, wheels.build(session))


@check("planted")
def planted(session: nox.Session) -> None:
    """Require the conformance kit to reject every planted defect, first by the law that is about it."""
    pytest(session, TORCH_TESTS, *PARALLEL, "tests/planted/test_torch.py", env={**ONE_THREAD, **EIGHTH})
    log = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    pytest(session, KERAS_TESTS, *PARALLEL, "tests/planted/test_keras.py", env={**ONE_THREAD, **log, **EIGHTH})


@check("mutation", default=False)  # takes an hour
def mutation(session: nox.Session) -> None:
    """Break our own quantizers and kernels by machine, and count what the conformance kit rejects; `-- --write`."""
    TORCH_TESTS.run(session, "-m", "tasks.mutation", "torch", *session.posargs, env=ONE_THREAD)
    KERAS_TESTS.run(session, "-m", "tasks.mutation", "keras", *session.posargs, env=keras_on("tensorflow"))


@check("plugin")
def plugin(session: nox.Session) -> None:
    """Install the example plugin and a generated one as wheels, train with them, and try every law on them."""
    pytest(session, TORCH_TESTS, *PARALLEL, "tests/plugin", env=ONE_THREAD)
    pytest(session, KERAS_TESTS, *PARALLEL, "tests/plugin", env={**ONE_THREAD, "TF_CPP_MIN_LOG_LEVEL": "3"})


@check("quickstart", default=False)
def quickstart(session: nox.Session) -> None:
    """Quantize, train and deploy a small model on real digits; `-- --backend keras [--engine jax]` or `tf_keras`."""
    Quickstart.of(session.posargs).run(session)


@check("property", default=False)
def long_property(session: nox.Session) -> None:
    """Test again with a thousand random examples per property."""
    profile = {**ONE_THREAD, "HYPOTHESIS_PROFILE": "thorough"}
    pytest(session, TORCH_TESTS, *PARALLEL, "tests/core", "tests/torch", env=profile)


@check("pythons", default=False, python=["3.10", "3.11", "3.12", "3.13"])
def pythons(session: nox.Session) -> None:
    """Test trainable-core on every supported Python with the newest dependencies that it accepts."""
    session.install(*CORE)
    session.run("pytest", "tests/core", *session.posargs, env={"PYTHONPATH": None, "HYPOTHESIS_PROFILE": "ci"})


@check("bench", default=False)
def bench(session: nox.Session) -> None:
    """Measure imports, kernels, training steps and growth with layers; `-- --write` updates benchmarks/results."""
    benchmarks.measure_ours(session)


@check("bench_peers", default=False)
def bench_peers(session: nox.Session) -> None:
    """Measure other libraries' fake quantization and training steps beside ours; `-- --write` as for `bench`."""
    benchmarks.measure_peers(session)


@check("evidence", default=False)  # takes two hours
def evidence(session: nox.Session) -> None:
    """Train with every method, on four networks, in both frameworks, and write docs/evidence.md; `-- --short`."""
    EVIDENCE.run(session, "benchmarks/evidence", *session.posargs)
