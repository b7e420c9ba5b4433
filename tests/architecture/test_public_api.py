"""The public names: which they are, that each is explained, and that the documentation knows each."""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import trainable_core
from trainable_core import hookspecs

ROOT = Path(__file__).parents[2]
PACKAGES = {
    name: ROOT / f"packages/{name.replace('_', '-')}/src/{name}"
    for name in ("trainable_core", "trainable_keras", "trainable_torch")
}

CORE = {
    "Backend",
    "BaseTrainableQuantizer",
    "CalibrationMethod",
    "LinearAnnealingScheduler",
    "QuantizationMethod",
    "QuantizationRecipe",
    "QuantizationTarget",
    "TieRule",
    "TrainableError",
    "TrainableQuantizerActivationConfig",
    "TrainableQuantizerCandidateConfig",
    "TrainableQuantizerWeightsConfig",
    "TrainingMethod",
    "VariableGroup",
    "get_trainable_quantizer_class",
    "hookimpl",
    "list_quantizers",
}
VERBS = {"calibrate", "describe", "finalize", "load", "parameter_groups", "save", "wrap"}
CONFIGS = sorted(name for name in CORE if name.endswith("Config"))
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("trainable_"))


def exported(package: str) -> list[str]:
    """Read `__all__` from the source, so that no framework is needed."""
    for node in ast.parse((PACKAGES[package] / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


NAMES = [(package, name) for package in PACKAGES for name in exported(package)]


def public_object(package: str, name: str) -> object:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return getattr(importlib.import_module(package), name)


@pytest.fixture(scope="module")
def documentation() -> str:
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def mentions(text: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", text) is not None


def test_core_exports_exactly_the_documented_names():
    assert set(trainable_core.__all__) == CORE


@pytest.mark.parametrize(
    ("package", "base"),
    [("trainable_keras", "BaseKerasTrainableQuantizer"), ("trainable_torch", "BasePytorchTrainableQuantizer")],
)
def test_a_backend_exports_the_verbs_of_every_backend(package, base):
    assert set(exported(package)) >= VERBS | {base}


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_are_sorted_and_exist(package):
    names = exported(package)
    assert names == sorted(names)
    for name in names:
        public_object(package, name)


@pytest.mark.parametrize(("package", "name"), [pair for pair in NAMES if pair[1] != "hookimpl"])  # pluggy's own
def test_a_public_name_is_explained(package, name):
    value = public_object(package, name)
    summary = (value.__doc__ or "").strip().partition("\n\n")[0]
    assert summary.endswith("."), f"{name}: the docstring opens with a sentence"


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_the_documentation_mentions_a_public_name(package, name, documentation):
    assert mentions(documentation, name), f"{package}.{name} is in neither README.md nor docs/"


@pytest.mark.parametrize("hook", HOOKS)
def test_the_documentation_mentions_a_hook_and_its_arguments(hook, documentation):
    for word in [hook, *inspect.signature(getattr(hookspecs, hook)).parameters]:
        assert mentions(documentation, word), f"{word} is in neither README.md nor docs/"


@pytest.mark.parametrize("config", CONFIGS)
def test_the_documentation_mentions_every_config_field(config, documentation):
    missing = [field for field in getattr(trainable_core, config).model_fields if not mentions(documentation, field)]
    assert not missing, f"fields of {config} in neither README.md nor docs/"


def test_the_documentation_mentions_every_constant(documentation):
    constants = importlib.import_module("trainable_core.constants")
    missing = [name for name in vars(constants) if name.isupper() and not mentions(documentation, name)]
    assert not missing


def test_there_are_hooks_and_configs_to_look_for():
    assert len(HOOKS) == 3
    assert len(CONFIGS) == 3
