"""The distributions' metadata agree with each other, with the code, and with what the checks install."""

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.frameworks import FRAMEWORKS

if sys.version_info >= (3, 11):
    import tomllib
else:
    pytest.skip("reading pyproject.toml needs tomllib, which is in Python 3.11", allow_module_level=True)

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = ("trainable-core", "trainable-keras", "trainable-torch")
UNTESTED = {name.replace("_", "-") for name in FRAMEWORKS}
"""Requirements whose lower bounds are not tested; constraints/minimums.txt says why."""
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
        if requirement.name in {*UNTESTED, *DISTRIBUTIONS}:
            continue
        lowest = next(specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
        assert Version(tested[requirement.name]) == Version(lowest)


def allowed(texts: list[str], file: str) -> list[str]:
    """Check requirements against the versions that a constraints file pins; return the names that it does not pin."""
    pinned, unpinned = pins(file), []
    if "tensorflow-cpu" in pinned:
        pinned["tensorflow"] = pinned["tensorflow-cpu"]  # the same modules under another name
    for requirement in map(Requirement, texts):
        if requirement.name in DISTRIBUTIONS:
            continue
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
        else:
            unpinned.append(requirement.name)
    return unpinned


@every_distribution
@pytest.mark.parametrize("file", ["dev.txt", "minimums.txt"])
def test_what_is_pinned_is_allowed(name, file):
    project = PROJECTS[name]["project"]
    extras = [text for extra in project.get("optional-dependencies", {}).values() for text in extra]
    unpinned = allowed([*project["dependencies"], *extras], file)
    assert unpinned == (["tf-keras"] if (name, file) == ("trainable-keras", "minimums.txt") else [])


@pytest.mark.parametrize(("file", "unpinned"), [("tensorflow-2.15.txt", ["tf-keras"]), ("tensorflow-2.21.txt", [])])
def test_what_is_pinned_for_keras_2_is_allowed(file, unpinned):
    """TensorFlow 2.15 brings Keras 2 itself; with a newer one, Keras 2 is the package tf-keras."""
    project = PROJECTS["trainable-keras"]["project"]
    assert allowed([*project["dependencies"], *project["optional-dependencies"]["legacy"]], file) == unpinned


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
