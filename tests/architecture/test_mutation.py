"""The tool that breaks our own code by machine: which mutants it makes, and that it runs them."""

import ast
import importlib
import sys

import pytest

from tasks import mutation

SOURCE = '''
"""A module."""
def f(x: int, y=2) -> float:
    """Return something."""
    if x < y and y:
        return g(x, -y) * 3
    if not x:
        raise ValueError("x " + str(x))
    return x.h(1)
'''


def changes() -> list[str]:
    return [mutant.change for mutant, _ in mutation.mutants("made_up", SOURCE)]


@pytest.mark.parametrize(
    "change",
    [
        "2 -> 3",
        "x < y and y -> not (x < y and y)",
        "x < y and y -> x < y or y",
        "x < y -> x <= y",
        "g(x, -y) * 3 -> g(x, -y) / 3",
        "g(x, -y) -> x",
        "g(x, -y) -> g(-y, x)",
        "-y -> y",
        "x.h(1) -> x",
    ],
)
def test_a_mutant_changes_one_expression(change):
    assert change in changes()


def test_texts_annotations_and_errors_are_left_alone():
    assert not any("ValueError" in change or "str(x)" in change or "int" in change for change in changes())


def test_every_mutant_is_another_program():
    codes = {code.co_code + repr(code.co_consts).encode() for _, code in mutation.mutants("made_up", "a = 1 + 2 * b\n")}
    assert len(codes) == 4


def test_a_module_is_imported_from_other_code(monkeypatch, tmp_path):
    (tmp_path / "made_up_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code = compile(ast.parse("value = 2\n"), "made_up_module", "exec")
    monkeypatch.setattr(sys, "meta_path", [mutation.Finder("made_up_module", code), *sys.meta_path])
    assert importlib.import_module("made_up_module").value == 2
    monkeypatch.delitem(sys.modules, "made_up_module")


def test_every_target_is_a_module_of_ours():
    for backend, targets in mutation.TARGETS.items():
        for target in targets:
            assert target.module.startswith(f"trainable_{backend}.")
            assert mutation.path_of(target.module).is_file()
