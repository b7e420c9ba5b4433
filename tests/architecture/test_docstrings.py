"""Docstrings tell the truth: their examples run, and the parameters they name are those of the signature."""

import doctest
import importlib
import importlib.util
import inspect
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

from trainable_core.errors import FrameworkError

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / f"packages/trainable-{name}/src" for name in ("core", "keras", "torch")]


def module_names() -> list[str]:
    return sorted(
        ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
        for source in SOURCES
        for path in source.rglob("*.py")
    )


@pytest.fixture
def module(request) -> ModuleType:
    package = request.param.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if request.param.startswith("trainable_keras.keras3") and os.environ.get("TF_USE_LEGACY_KERAS") == "1":
        pytest.skip("this process uses Keras 2")
    try:
        return importlib.import_module(request.param)
    except FrameworkError as error:
        if not request.param.startswith("trainable_keras.keras"):
            raise
        pytest.skip(f"this process uses another Keras: {error}")


every_module = pytest.mark.parametrize("module", module_names(), indirect=True)


def documented_parameters(text: str) -> list[str]:
    """Return the names in a numpydoc Parameters section, in order."""
    section = re.search(
        r"^Parameters\n-+\n(.*?)(?=^\w[^\n]*\n-{3,}\n|\Z)", inspect.cleandoc(text), re.DOTALL | re.MULTILINE
    )
    if not section:
        return []
    heads = re.findall(r"^(\S[^:\n]*?)(?: :|$)", section[1], re.MULTILINE)
    return [name.strip().lstrip("*") for head in heads for name in head.split(",")]


def functions_and_classes(module: ModuleType) -> list[object]:
    """Return what the module defines itself, and the methods its classes define."""
    found = []
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            found.append(value)
        elif inspect.isclass(value):
            found += [value, *(method for method in vars(value).values() if inspect.isfunction(method))]
    return found


def untruths(module: ModuleType) -> list[str]:
    problems = []
    for value in functions_and_classes(module):
        documented = documented_parameters(value.__doc__ or "")
        if not documented:
            continue
        parameters = inspect.signature(value).parameters.values()
        actual = [parameter.name for parameter in parameters if parameter.name != "self"]
        # A model's fields are keyword-only, and inherited ones come first whatever the docstring does.
        ordered = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
        if not set(documented) <= set(actual):
            problems.append(f"{value.__qualname__} documents {sorted(set(documented) - set(actual))}, takes {actual}")
        elif [name for name in documented if name in ordered] != [name for name in ordered if name in documented]:
            problems.append(f"{value.__qualname__} documents {documented} in another order than {actual}")
    return problems


@every_module
def test_parameters_are_those_of_the_signature(module):
    assert untruths(module) == []


@every_module
def test_examples_run(module):
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0, "the output above says which example"


@pytest.fixture
def planted():
    module = ModuleType("planted")
    exec(  # noqa: S102 - a module with known faults
        "def renamed(a):\n    '''Do.\n\n    Parameters\n    ----------\n    b : int\n        B.\n    '''\n"
        "def swapped(a, b):\n    '''Do.\n\n    Parameters\n    ----------\n    b, a : int\n        Both.\n    '''\n"
        "def right(a, b):\n    '''Do.\n\n    Parameters\n    ----------\n    a, b : int\n        Both.\n"
        "\n    Returns\n    -------\n    int\n        C.\n    '''\n"
        "def wrong_example():\n    '''Do.\n\n    >>> 1 + 1\n    3\n    '''\n",
        vars(module),
    )
    return module


def test_planted_faults_are_found(planted, capsys):
    assert [problem.split()[0] for problem in untruths(planted)] == ["renamed", "swapped"]
    assert doctest.testmod(planted).failed == 1
    capsys.readouterr()
