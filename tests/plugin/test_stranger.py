"""A third party's plugin, as a stranger has it: wheels that pip installed, and no source tree on the path."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from trainable_core.cli import main

ROOT = Path(__file__).parents[2]
# Installed, not only importable: an environment has a backend's dependencies when it has its distribution.
INSTALLED = {distribution.name for distribution in metadata.distributions()}
BACKENDS = [name for name in ("torch", "keras") if f"trainable-{name}" in INSTALLED]
EXAMPLES = 2  # cases per law and quantizer: every law has its corner cases besides


@dataclass(frozen=True)
class Stranger:
    """A virtual environment, and a directory to work in."""

    python: Path
    home: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run its Python on arguments; fails with what was printed when that fails."""
        environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
        done = subprocess.run(
            [str(self.python), *arguments], cwd=self.home, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    def trainable(self, *arguments: str) -> str:
        """Run the command line and return what it printed."""
        return self.run("-m", "trainable_core.cli", *arguments).stdout


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The folder of a plugin that ``trainable new-plugin`` wrote."""
    folder = tmp_path_factory.mktemp("generated") / "trainable-fade"
    assert main(["new-plugin", "trainable-fade", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, generated):
    """An environment with third parties' packages of this one, and our wheels and the plugins' instead of sources."""
    if not BACKENDS:
        pytest.skip("needs PyTorch and trainable-torch, or Keras and trainable-keras")
    home = tmp_path_factory.mktemp("stranger")
    wheels = home / "wheels"
    sources = [ROOT / "packages/trainable-core", *(ROOT / f"packages/trainable-{name}" for name in BACKENDS)]
    plugins = [ROOT / f"examples/plugin-{name}" for name in ("ewgs", "log-threshold")]
    pip("wheel", "-q", "--no-deps", "-w", str(wheels), *map(str, [*sources, *plugins, generated]))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    python = home / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip("--python", str(python), "install", "-q", "--no-deps", "--no-index", *map(str, sorted(wheels.glob("*.whl"))))
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # After the wheels on the path, and without what its own .pth files add, such as editable installs.
    (Path(site) / "third_parties.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Stranger(python, home)


def test_nothing_comes_from_a_source_tree(stranger):
    names = ["trainable_core", "trainable_ewgs", "trainable_fade", *(f"trainable_{name}" for name in BACKENDS)]
    code = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {names}), sep='\\n')"
    files = stranger.run("-c", code).stdout.split()
    assert len(files) == len(names)
    assert all(Path(file).is_relative_to(stranger.python.parents[1]) for file in files), files


def test_the_plugins_are_discovered(stranger):
    rows = json.loads(stranger.trainable("list", "--json"))
    assert rows["failures"] == {}
    found = {(row["backend"], row["training_method"], row["distribution"]) for row in rows["quantizers"]}
    assert found >= {(name, "EWGS", "trainable-ewgs") for name in BACKENDS}
    assert found >= {(name, "FADE", "trainable-fade") for name in BACKENDS}
    assert found >= {
        (name, method, "trainable-log-threshold") for name in BACKENDS for method in ("LOG_THRESHOLD", "DSQ")
    }


@pytest.mark.parametrize("plugin", ["ewgs", "trainable_fade"])
def test_a_plugin_keeps_every_law(stranger, plugin):
    report = stranger.home / f"{plugin}.json"
    stranger.trainable("check", "--plugin", plugin, "--examples", str(EXAMPLES), "--json", str(report))
    document = json.loads(report.read_text())
    assert document["ok"] is True
    assert {verdict["backend"] for verdict in document["verdicts"]} == set(BACKENDS)
    assert document["cases"] > EXAMPLES * len(document["laws"])


@pytest.mark.parametrize("plugin", ["ewgs", "log-threshold", "fade"])
def test_the_plugins_own_tests_pass(stranger, generated, plugin):
    tests = stranger.home / f"{plugin}_tests"
    shutil.copytree((generated if plugin == "fade" else ROOT / f"examples/plugin-{plugin}") / "tests", tests)
    # the kit's part is done above with as many cases as time allows; two laws here, to see that the file works
    chosen = ["-k", "digits or delta or zero or tie_rule"]
    output = stranger.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tests), *chosen, str(tests))
    assert "passed" in output.stdout
