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
DISTRIBUTIONS = ("core", "torch")
METADATA = [ROOT / f"packages/trainable-{name}/pyproject.toml" for name in DISTRIBUTIONS]
SOURCES = [f"packages/trainable-{name}/src" for name in DISTRIBUTIONS]

CORE = ("-e", "packages/trainable-core[cli,conformance,yaml]")
TORCH = (*CORE, "-e", "packages/trainable-torch", "torch", "pytest-xdist", "scikit-learn", "transformers")
# One thread each for the two test processes: together they fill two cores, with more threads they wait for each other.
PARALLEL = ("-n", "2")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


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
MINIMUMS = Environment("minimums", [*CORE, "-e", "packages/trainable-torch", "pytest-xdist"], "minimums")
QUICKSTART = Environment("quickstart", [*CORE, "-e", "packages/trainable-torch", "scikit-learn"])


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
    documents = "--ignore=tests/architecture/test_docs.py"  # the session `examples` runs these
    pytest(session, TORCH_TESTS, *PARALLEL, *tests, documents, env=ONE_THREAD)


@check("examples")
def examples(session: nox.Session) -> None:
    """Run every code block of the README and the docs; none may be skipped."""
    pytest(session, TORCH_TESTS, "tests/architecture/test_docs.py")
    if RESULTS[session.name].skipped:
        session.error("a document was skipped, though everything that documents need is installed here")


@check("minimums", default=False)  # not clean yet with tests/torch on the lowest versions; joins the default then
def minimums(session: nox.Session) -> None:
    """Test with the lowest versions that the distributions declare; constraints/minimums.txt says why not torch's."""
    pytest(session, MINIMUMS, *PARALLEL, "tests/core", "tests/torch", env={**ONE_THREAD, "TRAINABLE_EXAMPLES": "10"})


@check("build")
def build(session: nox.Session) -> None:
    """Build the wheels, install them where no source tree is on the path, import every module, run `trainable list`."""
    for old in (WHEELS, ENVIRONMENTS / "build"):
        shutil.rmtree(old, ignore_errors=True)
    wheel = ["-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", str(WHEELS)]
    CORE_TESTS.run(session, *wheel, *(f"./packages/trainable-{name}" for name in DISTRIBUTIONS))
    installed = Environment("build", sorted(map(str, WHEELS.glob("*.whl"))))
    installed.run(session, "-I", "tests/architecture/installed.py", "trainable_core", "trainable_torch")
    with session.chdir(WHEELS):
        session.run(str(installed.python.with_name("trainable")), "list", external=True)


@check("quickstart", default=False)
def quickstart(session: nox.Session) -> None:
    """Run examples/quickstart_torch.py: quantize, train and deploy a small model on scikit-learn's digits."""
    QUICKSTART.run(session, "examples/quickstart_torch.py", *session.posargs)


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


BENCHMARKS = ("import_time", "torch_kernels", "torch_steps", "torch_linearity")
PEERS: dict[str, tuple[str, ...]] = {  # and what each needs, but doesn't declare
    "torchao": (),
    "brevitas": (),
    "nvidia-modelopt": (),
    "nncf": (),
    "aimet-torch": (),
    "model-compression-toolkit": ("torchvision",),
}


@check("bench", default=False)
def bench(session: nox.Session) -> None:
    """Measure import time, kernels, training steps and growth with layers; `-- --write` updates docs/performance.md."""
    for script in BENCHMARKS:
        TORCH_TESTS.run(session, f"benchmarks/{script}.py", *session.posargs, env=ONE_THREAD)


@check("bench_peers", default=False)
def bench_peers(session: nox.Session) -> None:
    """Measure other libraries' fake quantization beside ours, each in an environment of its own."""
    # NNCF compiles an extension when it is imported first, and gives up after a minute unless told to wait.
    settings = {**ONE_THREAD, "NNCF_EXTENSION_LOAD_TIMEOUT": "0", "PYTHONWARNINGS": "ignore"}
    for peer, needed in PEERS.items():
        requirements = [*CORE, "-e", "packages/trainable-torch", peer, *needed]
        environment = Environment(f"peer-{peer}", requirements, "peers")
        try:
            environment.run(session, "benchmarks/torch_peers.py", "--peer", peer, *session.posargs, env=settings)
        except nox.command.CommandFailed as error:
            print(f"[{session.name}] {peer} skipped: {error}; pip's or its own message is above", flush=True)
