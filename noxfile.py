"""Every check of the repository: `nox` runs the default ones, `nox -l` lists all with what they do.

Sessions share one virtualenv per set of dependencies (`.nox/<environment>`); an environment is made again when its
requirements, the constraints or a distribution's metadata change. Each session prints what it does and how long it
took; the run ends with a summary and the tests' counts.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import nox

nox.needs_version = ">=2024.4.15"

ROOT = Path(__file__).parent
ENVIRONMENTS = ROOT / ".nox"
WHEELS = ENVIRONMENTS / "dist"
DISTRIBUTIONS = ("core", "keras", "tfkeras", "torch")
METADATA = [ROOT / f"packages/trainable-{name}/pyproject.toml" for name in DISTRIBUTIONS]
SOURCES = [f"packages/trainable-{name}/src" for name in DISTRIBUTIONS]

CORE = ("-e", "packages/trainable-core[cli,conformance,yaml]")
# What users train with stands beside what is tested.
ENGINES = ("scikit-learn", "transformers", "lightning", "accelerate")
TORCH = (*CORE, "-e", "packages/trainable-torch[speed]", "torch", "pytest-xdist", *ENGINES)
KERAS = (*CORE, "-e", "packages/trainable-keras", "pytest-xdist", "scikit-learn", "tensorflow-cpu")
# One thread each for the two test processes: together they fill two cores, with more threads they wait for each other.
PARALLEL = ("-n", "2")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
NO_DOCUMENTS = "--ignore=tests/architecture/test_docs.py"  # the session `examples` runs these


def on(engine: str) -> dict[str, str]:
    """Return the settings that make Keras run on an engine, on one thread and without TensorFlow's log."""
    return {**ONE_THREAD, "KERAS_BACKEND": engine, "TF_CPP_MIN_LOG_LEVEL": "3", "TRAINABLE_EXAMPLES": "10"}


@dataclass(frozen=True)
class Environment:
    """One virtualenv that several sessions may share.

    Parameters
    ----------
    name : str
        Its directory under ``.nox``.
    requirements : sequence of str
        Arguments for ``pip install``.
    constraints : str
        Name of the constraints file.
    """

    name: str
    requirements: Sequence[str]
    constraints: str = "dev"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return ENVIRONMENTS / self.name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def run(self, session: nox.Session, *arguments: str, env: dict[str, str] | None = None) -> None:
        """Run its Python with these arguments; the environment is made first if it is not there or out of date."""
        self._install(session)
        # No PYTHONPATH: an environment holds what its distributions declare and nothing else.
        session.run(str(self.python), *arguments, env={"PYTHONPATH": None, **(env or {})}, external=True)

    def _install(self, session: nox.Session) -> None:
        constraints = ROOT / "constraints" / f"{self.constraints}.txt"
        made_from = hashlib.sha256("\n".join([sys.version, *self.requirements]).encode())
        for file in (constraints, *METADATA):
            made_from.update(file.read_bytes())
        stamp = ENVIRONMENTS / self.name / "made-from"
        if stamp.exists() and stamp.read_text() == made_from.hexdigest():
            return
        started = time.monotonic()
        print(f"[{session.name}] installing environment {self.name!r} ...", flush=True)
        virtualenv = [sys.executable, "-m", "virtualenv", "--quiet", "--clear", "--no-periodic-update"]
        session.run(*virtualenv, str(ENVIRONMENTS / self.name), external=True, silent=True)
        # Quiet twice: errors only; pip warns for every package that one of several configured indexes does not have.
        pip = [str(self.python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        session.run(*pip, "-c", str(constraints), *self.requirements, external=True)
        stamp.write_text(made_from.hexdigest())
        print(f"[{session.name}] environment {self.name!r} installed in {time.monotonic() - started:.0f} s", flush=True)


LINT = Environment("lint", ["ruff", "numpydoc", "import-linter"])
CORE_TESTS = Environment("core", CORE)
# The type checker is here too: it needs torch's own annotations, and a second gigabyte of torch buys nothing.
TORCH_TESTS = Environment("torch", [*TORCH, "mypy", "nox", "types-PyYAML"])
KERAS_TESTS = Environment("keras", KERAS)
# Keras's other engines; torch's environment has no TensorFlow, so that nothing can fall back on it.
KERAS_JAX = (*CORE, "-e", "packages/trainable-keras", "jax", "pytest-xdist")
KERAS_JAX_TESTS = Environment("keras-jax", KERAS_JAX)
KERAS_TORCH_TESTS = Environment("keras-torch", [*CORE, "-e", "packages/trainable-keras", "torch", "pytest-xdist"])
# Everything side by side: each backend must leave the others alone.
EVERYTHING = (*KERAS, "-e", "packages/trainable-torch", "-e", "packages/trainable-tfkeras", "torch", "tf-keras")
CROSS_TESTS = Environment("cross", EVERYTHING)
MINIMUMS = Environment("minimums", [*CORE, "-e", "packages/trainable-torch[speed]", "pytest-xdist"], "minimums")
TFKERAS = (*CORE, "-e", "packages/trainable-tfkeras", "pytest-xdist", "scikit-learn")
TFKERAS_TESTS = Environment("tfkeras", [*TFKERAS, "tensorflow-cpu", "tf-keras"], "tensorflow-2.21")
TFKERAS_215_TESTS = Environment("tfkeras-215", [*TFKERAS, "tensorflow-cpu"], "tensorflow-2.15")
# An eager call of TensorFlow costs milliseconds: fewer examples than elsewhere keep a session in minutes.
TENSORFLOW = {**ONE_THREAD, "TF_CPP_MIN_LOG_LEVEL": "3", "TRAINABLE_EXAMPLES": "10"}
LEGACY = {**TENSORFLOW, "TF_USE_LEGACY_KERAS": "1"}
QUICKSTART = Environment("quickstart", [*CORE, "-e", "packages/trainable-torch", "scikit-learn"])
QUICKSTART_KERAS = Environment("quickstart-keras", KERAS)
QUICKSTART_KERAS_JAX = Environment("quickstart-keras-jax", [*KERAS_JAX, "scikit-learn"])


@dataclass
class Result:
    """What one session did: filled while it runs, printed at the end."""

    name: str
    outcome: str = "failed"
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0


RESULTS: dict[str, Result] = {}


@contextmanager
def timed(session: nox.Session, purpose: str) -> Iterator[None]:
    """Print what a session does when it starts, and how it ended and after how long; keep both for the summary."""
    result = RESULTS[session.name] = Result(session.name)
    started = time.monotonic()
    print(f"[{session.name}] {purpose}", flush=True)
    try:
        yield
        result.outcome = "ok"
    finally:
        result.seconds = time.monotonic() - started
        print(f"[{session.name}] {result.outcome} after {result.seconds:.0f} s", flush=True)


def check(
    name: str, *, default: bool = True, python: Sequence[str] | None = None
) -> Callable[[Callable[[nox.Session], None]], Callable[[nox.Session], None]]:
    """Register a session that prints its purpose and its time; without `python` it uses the environments above."""

    def decorate(function: Callable[[nox.Session], None]) -> Callable[[nox.Session], None]:
        purpose = (inspect.getdoc(function) or name).partition("\n")[0]

        @functools.wraps(function)
        def run(session: nox.Session) -> None:
            with timed(session, purpose):
                function(session)

        backend = "virtualenv" if python else "none"
        nox.session(name=name, default=default, python=python, venv_backend=backend)(run)
        return run

    return decorate


def count(session: nox.Session, report: Path) -> None:
    """Add the counts of one pytest run to its session's result."""
    result = RESULTS[session.name]
    for suite in ET.parse(report).iter("testsuite"):  # noqa: S314 - the file was written by our own pytest
        tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("errors", 0)) + int(suite.get("failures", 0))
        result.failed += failed
        result.skipped += skipped
        result.passed += tests - failed - skipped


def pytest(session: nox.Session, environment: Environment, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run pytest in an environment and count its outcomes, whether it passes or not."""
    report = ENVIRONMENTS / f"{session.name}.xml"
    report.unlink(missing_ok=True)
    settings = {"HYPOTHESIS_PROFILE": "ci", **(env or {})}
    try:
        environment.run(session, "-m", "pytest", f"--junitxml={report}", *arguments, *session.posargs, env=settings)
    finally:
        if report.exists():
            count(session, report)


@atexit.register
def summary() -> None:
    """Print each session's outcome and time, and the tests' counts on the last line."""
    if not RESULTS:
        return
    print("\nsession        outcome  seconds  passed  failed  skipped")
    for result in RESULTS.values():
        counts = (result.passed, result.failed, result.skipped)
        cells = "".join(f"{number:8d}" for number in counts) if any(counts) else ""
        print(f"{result.name:14} {result.outcome:7} {result.seconds:8.0f}{cells}")
    print(f"all sessions   took    {sum(result.seconds for result in RESULTS.values()):8.0f} s")
    passed, failed, skipped = (
        sum(getattr(result, kind) for result in RESULTS.values()) for kind in ("passed", "failed", "skipped")
    )
    if passed or failed or skipped:
        print(f"total: {passed} passed, {failed} failed, {skipped} skipped", flush=True)


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
    # Read, not imported: the sources on the path are enough, no framework is needed.
    path = os.pathsep.join(str(ROOT / source) for source in SOURCES)
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    LINT.run(session, "-c", command, env={"PYTHONPATH": path})


@check("types")
def types(session: nox.Session) -> None:
    """Check types with mypy --strict, the noxfile included."""
    TORCH_TESTS.run(session, "-m", "mypy", *SOURCES, "noxfile.py")


@check("tests-core")
def tests_core(session: nox.Session) -> None:
    """Test trainable-core in an environment without any framework."""
    pytest(session, CORE_TESTS, "tests/core", "tests/architecture")


@check("tests-torch")
def tests_torch(session: nox.Session) -> None:
    """Test trainable-torch, and trainable-core again beside an installed backend."""
    tests = ["tests/core", "tests/torch", "tests/architecture"]
    pytest(session, TORCH_TESTS, *PARALLEL, *tests, NO_DOCUMENTS, env=ONE_THREAD)


@check("tests-keras")
def tests_keras(session: nox.Session) -> None:
    """Test trainable-keras on Keras 3 with the TensorFlow engine."""
    pytest(session, KERAS_TESTS, *PARALLEL, "tests/keras", "tests/architecture", NO_DOCUMENTS, env=on("tensorflow"))


@check("tests-keras-jax")
def tests_keras_jax(session: nox.Session) -> None:
    """Test trainable-keras on the JAX engine: wrap, calibrate, fit, finalize, save and load."""
    pytest(session, KERAS_JAX_TESTS, "tests/keras/test_engines.py", env=on("jax"))


@check("tests-keras-torch")
def tests_keras_torch(session: nox.Session) -> None:
    """Test trainable-keras on the torch engine: wrap, calibrate, fit, finalize, save and load."""
    pytest(session, KERAS_TORCH_TESTS, "tests/keras/test_engines.py", env=on("torch"))


@check("tests-cross")
def tests_cross(session: nox.Session) -> None:
    """Test that one recipe and the same weights give the same integers in every backend, on both Kerases."""
    pytest(session, CROSS_TESTS, "tests/cross", env=on("tensorflow"))
    pytest(session, CROSS_TESTS, "tests/cross", env=LEGACY)
    # what each Keras says to the other's models, while both are there
    pytest(session, CROSS_TESTS, "tests/keras/test_bad_input.py", "-k", "keras_2", env=on("tensorflow"))
    pytest(session, CROSS_TESTS, "tests/tfkeras/test_wrapping.py", "-k", "keras_3", env=LEGACY)


@check("tests-tfkeras")
def tests_tfkeras(session: nox.Session) -> None:
    """Test trainable-tfkeras on TensorFlow 2.21 with tf-keras."""
    pytest(session, TFKERAS_TESTS, *PARALLEL, "tests/tfkeras", "tests/architecture/test_matrix.py", env=LEGACY)


@check("tests-tfkeras-215", default=False)  # takes as long as the session above; part of a release
def tests_tfkeras_215(session: nox.Session) -> None:
    """Test trainable-tfkeras on TensorFlow 2.15, whose own Keras is Keras 2."""
    pytest(session, TFKERAS_215_TESTS, *PARALLEL, "tests/tfkeras", env=TENSORFLOW)


@check("examples")
def examples(session: nox.Session) -> None:
    """Run every code block of the README and the docs; none may be skipped."""
    pytest(session, CROSS_TESTS, "tests/architecture/test_docs.py", env=on("tensorflow"))
    if RESULTS[session.name].skipped:
        session.error("a document was skipped, though everything that documents need is installed here")


@check("minimums")
def minimums(session: nox.Session) -> None:
    """Test with the lowest versions that the distributions declare; constraints/minimums.txt says why not torch's."""
    pytest(session, MINIMUMS, *PARALLEL, "tests/core", "tests/torch", env={**ONE_THREAD, "TRAINABLE_EXAMPLES": "10"})


@check("build")
def build(session: nox.Session) -> None:
    """Build the wheels, install them where no source tree is on the path, import every module, run `trainable list`."""
    for old in (WHEELS, ENVIRONMENTS / "build", ENVIRONMENTS / "build-tfkeras"):
        shutil.rmtree(old, ignore_errors=True)
    wheel = ["-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", str(WHEELS)]
    CORE_TESTS.run(session, *wheel, *(f"./packages/trainable-{name}" for name in DISTRIBUTIONS))
    installed = Environment("build", sorted(map(str, WHEELS.glob("*.whl"))))
    # torch is there for trainable-torch, so Keras takes it for its engine; Keras 2 goes with TensorFlow only
    packages = [f"trainable_{name}" for name in DISTRIBUTIONS if name != "tfkeras"]
    installed.run(session, "-I", "tests/architecture/installed.py", *packages, env=on("torch"))
    wheels = [str(path) for name in ("core", "tfkeras") for path in WHEELS.glob(f"trainable_{name}-*.whl")]
    legacy = Environment("build-tfkeras", [*wheels, "tensorflow-cpu", "tf-keras"], "tensorflow-2.21")
    legacy.run(session, "-I", "tests/architecture/installed.py", "trainable_keras.keras2", env=LEGACY)
    with session.chdir(WHEELS):
        session.run(str(installed.python.with_name("trainable")), "list", external=True)


@check("quickstart", default=False)
def quickstart(session: nox.Session) -> None:
    """Run examples/quickstart_torch.py: quantize, train and deploy a small model on scikit-learn's digits."""
    QUICKSTART.run(session, "examples/quickstart_torch.py", *session.posargs)


@check("quickstart_keras", default=False)
def quickstart_keras(session: nox.Session) -> None:
    """Run examples/quickstart_keras.py: the same digits, network and recipe on Keras 3."""
    QUICKSTART_KERAS.run(session, "examples/quickstart_keras.py", *session.posargs, env=on("tensorflow"))


@check("quickstart_keras_jax", default=False)
def quickstart_keras_jax(session: nox.Session) -> None:
    """Run examples/quickstart_keras.py on the JAX engine, where no TensorFlow is installed."""
    QUICKSTART_KERAS_JAX.run(session, "examples/quickstart_keras.py", *session.posargs, env=on("jax"))


@check("quickstart_tfkeras_215", default=False)
def quickstart_tfkeras_215(session: nox.Session) -> None:
    """Run examples/quickstart_tfkeras.py on TensorFlow 2.15, whose own Keras is Keras 2."""
    TFKERAS_215_TESTS.run(session, "examples/quickstart_tfkeras.py", *session.posargs, env=TENSORFLOW)


@check("quickstart_tfkeras", default=False)
def quickstart_tfkeras(session: nox.Session) -> None:
    """Run examples/quickstart_tfkeras.py: the same digits, network and recipe on Keras 2."""
    TFKERAS_TESTS.run(session, "examples/quickstart_tfkeras.py", *session.posargs, env=LEGACY)


@check("property", default=False)
def long_property(session: nox.Session) -> None:
    """Test again with a thousand random examples per property."""
    profile = {**ONE_THREAD, "HYPOTHESIS_PROFILE": "thorough"}
    pytest(session, TORCH_TESTS, *PARALLEL, "tests/core", "tests/torch", env=profile)


@check("pythons", default=False, python=["3.10", "3.11", "3.12", "3.13"])
def pythons(session: nox.Session) -> None:
    """Test trainable-core on every supported Python with the newest dependencies it accepts."""
    session.install(*CORE)
    session.run("pytest", "tests/core", *session.posargs, env={"PYTHONPATH": None, "HYPOTHESIS_PROFILE": "ci"})


@check("planted")
def planted(session: nox.Session) -> None:
    """Require the conformance kit to reject every planted defect, first by the law that is about it."""
    pytest(session, TORCH_TESTS, *PARALLEL, "tests/planted/test_torch.py", env=ONE_THREAD)
    pytest(
        session, KERAS_TESTS, *PARALLEL, "tests/planted/test_keras.py", env={**ONE_THREAD, "TF_CPP_MIN_LOG_LEVEL": "3"}
    )


@check("plugin")
def plugin(session: nox.Session) -> None:
    """Install the example plugin and a generated one as wheels, train with them, and try every law on them."""
    pytest(session, TORCH_TESTS, "tests/plugin", env=ONE_THREAD)
    pytest(session, KERAS_TESTS, "tests/plugin", env={**ONE_THREAD, "TF_CPP_MIN_LOG_LEVEL": "3"})


BENCHMARKS = ("import_time", "torch_kernels", "torch_steps", "torch_linearity")
PEERS: dict[str, tuple[str, ...]] = {  # and what each needs, but doesn't declare
    "torchao": (),
    "brevitas": (),
    "nvidia-modelopt": ("requests", "huggingface-hub"),
    "nncf": ("ninja",),
    "aimet-torch": (),
    "model-compression-toolkit": ("torchvision",),
}
KERAS_PEERS = ("model-compression-toolkit",)  # its Keras is that of TensorFlow 2.15


KERAS_BENCHMARKS = ("keras_kernels", "keras_steps")
# Keras 3, and Keras 2 on both versions of TensorFlow: the same scripts, a table for each.
KERASES = ((KERAS_TESTS, on("tensorflow")), (TFKERAS_TESTS, LEGACY), (TFKERAS_215_TESTS, TENSORFLOW))


@check("bench", default=False)
def bench(session: nox.Session) -> None:
    """Measure import time, kernels, training steps and growth with layers; `-- --write` updates docs/performance.md."""
    for script in BENCHMARKS:
        TORCH_TESTS.run(session, f"benchmarks/{script}.py", *session.posargs, env=ONE_THREAD)
    for environment, settings in KERASES:
        for script in KERAS_BENCHMARKS:
            environment.run(session, f"benchmarks/{script}.py", *session.posargs, env=settings)


@check("bench_peers", default=False)
def bench_peers(session: nox.Session) -> None:
    """Measure other libraries' fake quantization and training steps beside ours, each in its own environment."""
    # NNCF compiles an extension when it is first used, and gives up after a minute unless told to wait; a build that
    # was broken off leaves a lock behind, so each run builds in a folder of its own.
    extensions = ENVIRONMENTS / "extensions"
    shutil.rmtree(extensions, ignore_errors=True)
    settings = {**ONE_THREAD, "PYTHONWARNINGS": "ignore"}
    settings |= {"NNCF_EXTENSION_LOAD_TIMEOUT": "900", "TORCH_EXTENSIONS_DIR": str(extensions)}
    for peer, needed in PEERS.items():
        requirements = [*CORE, "-e", "packages/trainable-torch[speed]", peer, *needed]
        environment = Environment(f"peer-{peer}", requirements, "peers")
        compare(session, environment, ("torch_peers", "torch_peer_steps"), peer, settings)
    for peer in KERAS_PEERS:
        requirements = [*CORE, "-e", "packages/trainable-tfkeras", "tensorflow-cpu", peer]
        environment = Environment(f"peer-keras-{peer}", requirements, "peers-keras")
        compare(session, environment, ("keras_peers",), peer, {**TENSORFLOW, "PYTHONWARNINGS": "ignore"})


def compare(
    session: nox.Session, environment: Environment, scripts: Sequence[str], peer: str, env: dict[str, str]
) -> None:
    """Run scripts beside a peer, or say why not."""
    path = os.pathsep.join([str(environment.python.parent), os.environ["PATH"]])  # ninja is called by name
    try:
        for script in scripts:
            environment.run(
                session, f"benchmarks/{script}.py", "--peer", peer, *session.posargs, env={**env, "PATH": path}
            )
    except nox.command.CommandFailed as error:
        print(f"[{session.name}] {peer} skipped: {error}; pip's or its own message is above", flush=True)
