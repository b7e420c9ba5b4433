"""What users call has one name and one signature in both backends, and one module name; what differs says why."""

import ast
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
TORCH = PACKAGES / "trainable-torch" / "src" / "trainable_torch"
KERAS = PACKAGES / "trainable-keras" / "src" / "trainable_keras"
PARTS = (KERAS / "keras2", KERAS / "keras3")
"""What each version of Keras has for itself."""

NAMES = {
    "running": "PyTorch calls methods of a model that are no forward; Keras can't tell them from others",
    "average_scalar_gradients": "closes a gap of `fully_shard`; TensorFlow's strategies average every gradient",
}
"""Public names that only one backend has, and why; by their names in Keras."""

SIGNATURES = {
    "export": "a Keras model knows its graph, so no example is traced; TensorFlow Lite files can have packed weights",
    "wrap": "a Keras model knows its graph or is refused; PyTorch learns from an example what tracing can't see",
    "to_mctq": "Keras converts graphs alone, which tell all; PyTorch's code may have to be followed in a run",
    "register_layer": "the usual name of a layer's input is `input` in PyTorch and `inputs` in Keras",
}
"""Verbs whose arguments differ, and why."""

MODULES = {
    "graphs": "each engine of Keras 3 makes graphs in its own way; Keras 2 has TensorFlow's alone",
    "mctq": "mct-quantizers' wrapper and holder can't be built on Keras 3",
    "pullback": "each engine of Keras 3 has gradients of its own; Keras 2 has TensorFlow's alone",
}
"""Modules that only one version of Keras has, and why."""


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def public_names(package: Path) -> list[str]:
    """Return the names in a package's `__all__`, PyTorch's own prefix replaced by that of Keras."""
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree_of(package / "__init__.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return sorted(name.replace("Pytorch", "Keras") for name in names)


def home_of(package: Path) -> dict[str, Path]:
    """Return the file that each public name comes from, by the imports for type checkers."""
    blocks = [node for node in tree_of(package / "__init__.py").body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.name: package.parent / Path(*str(node.module).split(".")).with_suffix(".py")
        for node in imports
        for alias in node.names
    }


def verbs(package: Path) -> dict[str, str]:
    """Return the arguments of each public function."""
    return {
        node.name: arguments(node)
        for path in set(home_of(package).values())
        if path.exists()
        for node in tree_of(path).body
        if isinstance(node, ast.FunctionDef) and node.name in home_of(package)
    }


def arguments(function: ast.FunctionDef) -> str:
    """Return names, order, kinds and defaults of the arguments; annotations are each framework's own."""
    given = ast.parse(ast.unparse(function)).body[0].args
    for each in [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]:
        if each is not None:
            each.annotation = None
    return ast.unparse(given)


def modules(folder: Path) -> set[str]:
    """Return the names of the modules and packages in a folder."""
    return {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def test_public_names_are_the_same():
    assert set(public_names(TORCH)) ^ set(public_names(KERAS)) == set(NAMES)


def test_verbs_have_the_same_arguments():
    torch, keras = verbs(TORCH), verbs(KERAS)
    assert {"wrap", "calibrate", "finalize", "save", "load", "describe"} <= torch.keys() & keras.keys()
    assert torch.keys() ^ keras.keys() == set(NAMES)
    assert {name for name in torch.keys() & keras.keys() if torch[name] != keras[name]} == set(SIGNATURES)


def test_each_module_of_torch_with_a_public_name_has_a_namesake_in_keras():
    of_torch = {path.relative_to(TORCH).parts[0].removesuffix(".py") for path in home_of(TORCH).values()}
    of_keras = modules(KERAS).union(*map(modules, PARTS))
    assert of_torch
    assert of_torch - of_keras == {"reading"}  # of names that Keras lacks, see `NAMES`


def test_both_versions_of_keras_have_the_same_classes_and_modules():
    one, other = PARTS
    assert public_names(one) == public_names(other)
    assert modules(one) ^ modules(other) == set(MODULES)


@pytest.mark.parametrize("table", [NAMES, SIGNATURES, MODULES], ids=["names", "signatures", "modules"])
def test_every_difference_has_a_reason(table):
    assert all(len(reason.split()) >= 4 for reason in table.values())


def test_a_difference_is_seen():
    one, other = (ast.parse(f"def verb(model, {rest}): ...").body[0] for rest in ("force=False", "*, force=False"))
    assert arguments(one) != arguments(other)
