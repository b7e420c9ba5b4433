"""Rules about the tree itself: names, and what no file may contain."""

import re
from pathlib import Path

import pytest

from trainable_core.registry.methods import built_in_methods

ROOT = Path(__file__).parents[2]
TEXT = {".cfg", ".in", ".json", ".md", ".py", ".rst", ".toml", ".txt", ".yaml", ".yml", ""}
GENERATED = {"__pycache__", "build", "dist"}
HIDDEN_BUT_OURS = {".ci", ".github"}
VAGUE = {"common", "helpers", "misc", "util", "utils"}
METHODS = {method.module.rpartition(".")[2] for method in built_in_methods().values()}
# Pieces, so that this file does not contain what it looks for.
MACHINE_PATHS = ["/".join(["", *parts]) for parts in (("root", ""), ("tmp", "envs"), ("work", ""), ("home", ""))]


def ours(directories: tuple[str, ...]) -> bool:
    """Tell whether the files of a directory are written by people, rather than by a tool or git."""
    return not any(name in GENERATED or (name.startswith(".") and name not in HIDDEN_BUT_OURS) for name in directories)


def files() -> list[Path]:
    return [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.is_file() and path.suffix in TEXT and path.name != ".git" and ours(path.relative_to(ROOT).parts[:-1])
    ]


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


FILES = files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
SOURCES = [path for path in PYTHON if path.is_relative_to(ROOT / "packages")]


def test_the_rules_see_the_tree():
    names = relative(FILES)
    assert {"noxfile.py", "LICENSE", ".ci/run", "packages/trainable-core/src/trainable_core/__init__.py"} <= set(names)


@pytest.mark.parametrize("path", relative(SOURCES))
def test_a_module_has_a_telling_name(path):
    assert not VAGUE & set(Path(path).with_suffix("").parts)
    assert Path(path).name != "base.py" or Path(path).parent.name == "quantizers"


def test_no_file_has_a_licence_header():
    pattern = re.compile(r"^#.*(copyright|licen[cs]ed under|SPDX)", re.IGNORECASE | re.MULTILINE)
    assert [path for path in relative(PYTHON) if pattern.search((ROOT / path).read_text(encoding="utf-8")[:2000])] == []


def test_no_file_names_a_directory_of_one_machine():
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(path)}" for path in MACHINE_PATHS))
    assert pattern.search("see " + MACHINE_PATHS[0])
    assert [path for path in relative(FILES) if pattern.search((ROOT / path).read_text(encoding="utf-8"))] == []


def test_every_package_directory_is_a_package():
    directories = {path.parent for path in SOURCES if "src" in path.parts}
    assert [directory for directory in directories if not (directory / "__init__.py").exists()] == []


@pytest.mark.parametrize("distribution", ["core", "keras", "torch"])
def test_a_training_method_has_one_module_name_everywhere(distribution):
    """`trainable_core.reference.lsq` defines what `trainable_torch.quantizers.lsq` computes."""
    folder = "reference" if distribution == "core" else "quantizers"
    source = ROOT / f"packages/trainable-{distribution}/src"
    assert METHODS
    assert {path.stem for path in source.rglob(f"{folder}/*.py")} >= METHODS
