"""The distributions' metadata agree with each other, with the code, and with what the checks install."""

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    pytest.skip("reading pyproject.toml needs tomllib, which is in Python 3.11", allow_module_level=True)

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = ("trainable-core", "trainable-keras", "trainable-tfkeras", "trainable-torch")
FRAMEWORKS = {"jax", "keras", "tensorflow", "tf-keras", "torch"}
"""Whose lower bounds constraints/minimums.txt does not prove; it says why."""
PROJECTS = {name: tomllib.loads((ROOT / f"packages/{name}/pyproject.toml").read_text()) for name in DISTRIBUTIONS}


def requirements(name: str) -> list[Requirement]:
    project = PROJECTS[name]["project"]
    extras = project.get("optional-dependencies", {}).values()
    return [Requirement(text) for group in [project["dependencies"], *extras] for text in group]


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / file).read_text().splitlines()
    return {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, _, version in (line.partition("==") for line in lines if line and not line.startswith("#"))
    }


every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)


@every_distribution
def test_metadata_is_complete(name):
    project = PROJECTS[name]["project"]
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert project["requires-python"] == ">=3.10"
    assert "Typing :: Typed" in project["classifiers"]
    assert not [classifier for classifier in project["classifiers"] if classifier.startswith("License ::")]  # PEP 639
    assert project["dependencies"] == sorted(project["dependencies"])


@every_distribution
def test_files_of_a_distribution_are_there(name):
    folder = ROOT / "packages" / name
    assert (folder / "src" / name.replace("-", "_") / "py.typed").exists()
    assert (folder / "README.md").exists()
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@every_distribution
def test_the_version_is_said_once_and_repeated_right(name):
    source = (ROOT / f"packages/{name}/src/{name.replace('-', '_')}/__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert version
    assert version[1] == PROJECTS[name]["project"]["version"]


@every_distribution
def test_every_requirement_has_both_bounds(name):
    for requirement in requirements(name):
        assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}, requirement


@every_distribution
def test_the_lowest_versions_are_the_ones_tested(name):
    tested = pins("minimums.txt")
    for requirement in requirements(name):
        if requirement.name in {*FRAMEWORKS, *DISTRIBUTIONS}:
            continue
        lowest = next(specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
        assert Version(tested[requirement.name]) == Version(lowest)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((name, file) for name in DISTRIBUTIONS[:2] for file in ("dev.txt", "minimums.txt")),
        # Keras 2 comes in two ways, which exclude each other
        ("trainable-tfkeras", "tensorflow-2.15.txt"),
        ("trainable-tfkeras", "tensorflow-2.21.txt"),
        ("trainable-torch", "dev.txt"),
        ("trainable-torch", "minimums.txt"),
    ],
)
def test_what_is_pinned_is_allowed(name, file):
    pinned = pins(file)
    for requirement in requirements(name):
        if requirement.name in {"tensorflow", "tf-keras"}:  # pinned in constraints/tensorflow-*.txt
            continue
        if requirement.name not in DISTRIBUTIONS:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


@pytest.mark.parametrize(("file", "extra"), [("tensorflow-2.15.txt", "tensorflow"), ("tensorflow-2.21.txt", "legacy")])
def test_what_is_pinned_for_tensorflow_is_allowed(file, extra):
    pinned, project = pins(file), PROJECTS["trainable-tfkeras"]["project"]
    pinned["tensorflow"] = pinned["tensorflow-cpu"]  # the same module under another name
    for text in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        requirement = Requirement(text)
        if requirement.name not in DISTRIBUTIONS:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


@pytest.mark.parametrize("backend", [name for name in DISTRIBUTIONS if name != "trainable-core"])
def test_a_backend_accepts_the_core_of_this_tree(backend):
    requirement = next(one for one in requirements(backend) if one.name == "trainable-core")
    assert requirement.specifier.contains(PROJECTS["trainable-core"]["project"]["version"])


@every_distribution
def test_entry_points_lead_to_what_is_there(name):
    project = PROJECTS[name]["project"]
    targets = [*project.get("scripts", {}).values(), *project.get("entry-points", {}).get("trainable", {}).values()]
    assert targets
    for target in targets:
        module = target.partition(":")[0]
        assert (ROOT / "packages" / name / "src" / Path(*module.split("."))).with_suffix(".py").exists()


@every_distribution
def test_what_is_installed_is_what_is_declared(name):
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        pytest.skip(f"{name} is not installed")
    try:
        installed = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is on the path without being installed")
    assert installed.version == PROJECTS[name]["project"]["version"]
    declared = {point for group in ("scripts",) for point in PROJECTS[name]["project"].get(group, {})}
    declared |= set(PROJECTS[name]["project"].get("entry-points", {}).get("trainable", {}))
    assert {point.name for point in installed.entry_points} == declared


@every_distribution
def test_change_fragments_have_a_declared_type(name):
    config = PROJECTS[name]["tool"]["towncrier"]
    types = {kind["directory"] for kind in config["type"]}
    for fragment in (ROOT / "packages" / name / config["directory"]).glob("[!.]*"):
        assert fragment.name.split(".")[-2] in types, fragment.name
        assert fragment.read_text().startswith(f"{name}: "), "the package is named first"


def test_the_commit_hooks_use_the_pinned_tools():
    pinned = pins("dev.txt")
    hooks = re.findall(r"\[([\w-]+)==([\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in hooks} == {"ruff", "numpydoc"}
    assert [(name, version) for name, version in hooks if pinned[name] != version] == []
