"""What an import loads: core no framework, one backend never another's."""

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import trainable_core
from tests.frameworks import FRAMEWORKS, NOT_FOR_CORE

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[2]
EXTRAS = {"hypothesis", "onnx", "onnxruntime", "onnxscript", "pytest", "rich", "scipy", "yaml"}

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("trainable_torch") is None, reason="trainable-torch is not installed"
)


def modules_loaded_by(code: str, *path: Path) -> set[str]:
    """Run `code` in a new interpreter with `path` first on its import path; return the top-level names it loaded."""
    names = "sorted({name.partition('.')[0] for name in sys.modules})"
    report = f"\nimport json, sys; print(json.dumps({names}), file=sys.stderr)"
    search = os.pathsep.join([*map(str, path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": search, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code + report], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def core_modules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(trainable_core.__path__, "trainable_core.")]


def test_importing_core_loads_no_framework_and_no_extra():
    assert not modules_loaded_by("import trainable_core") & (NOT_FOR_CORE | EXTRAS)


def test_importing_every_module_of_core_loads_no_framework():
    modules = [name for name in core_modules() if not name.endswith(".__main__")]
    assert "trainable_core.cli" in modules
    assert not modules_loaded_by("\n".join(f"import {name}" for name in modules)) & NOT_FOR_CORE


def test_the_check_sees_what_is_loaded():
    assert {"json", "fractions"} <= modules_loaded_by("import fractions")


@pytest.fixture
def planted_plugin(tmp_path):
    """A made-up framework and a plugin that imports it when its backend is asked for."""
    (tmp_path / "planted_framework.py").write_text("")
    (tmp_path / "planted_plugin.py").write_text(
        "from trainable_core import Backend, TieRule, hookimpl\n"
        "@hookimpl\n"
        "def trainable_register_backend():\n"
        "    return Backend('planted', 'planted', ('numpy',), TieRule.HALF_UP, 'planted_plugin')\n"
        "@hookimpl\n"
        "def trainable_register_quantizers(backend):\n"
        "    if backend == 'planted':\n"
        "        import planted_framework\n"
        "    return []\n"
    )
    metadata = tmp_path / "planted-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[trainable]\nplanted = planted_plugin\n")
    return tmp_path


@needs_torch
def test_listing_torch_loads_torch_and_no_other_framework(planted_plugin):
    loaded = modules_loaded_by(
        "from trainable_core.cli import main\nassert main(['list', '--backend', 'torch']) == 0", planted_plugin
    )
    assert {"planted_plugin", "torch"} <= loaded
    assert "planted_framework" not in loaded


def test_asking_for_another_backend_loads_its_framework_and_not_torch(planted_plugin):
    asked = "from trainable_core import list_quantizers\nlist_quantizers('planted')"
    loaded = modules_loaded_by(asked, planted_plugin)
    assert {"planted_plugin", "planted_framework"} <= loaded
    assert "torch" not in loaded


@pytest.mark.parametrize(
    "module",
    ["trainable_keras", "trainable_keras.keras2.plugin", "trainable_keras.keras3.plugin", "trainable_torch.plugin"],
)
def test_importing_a_plugin_loads_no_framework(module):
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert not modules_loaded_by(f"import {module}") & NOT_FOR_CORE


OWN = {"trainable_core": set(), "trainable_keras": {"keras"}, "trainable_torch": {"torch"}}
"""Which frameworks a package may import anywhere in it."""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reading pyproject.toml needs tomllib, which is in Python 3.11")
@pytest.mark.parametrize("package", OWN)
def test_the_import_contracts_forbid_every_other_framework(package):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    assert package in settings["root_packages"]
    forbidden = set()
    for contract in settings["contracts"]:
        if contract["type"] == "forbidden" and package in contract["source_modules"]:
            forbidden |= set(contract["forbidden_modules"])
    assert FRAMEWORKS - OWN[package] <= forbidden


def test_the_conformance_kit_forbids_every_framework():
    pytest.importorskip("hypothesis", reason="the conformance kit needs the extra `conformance`")
    from trainable_core.conformance.laws import classes

    assert set(classes.FRAMEWORKS) == FRAMEWORKS
