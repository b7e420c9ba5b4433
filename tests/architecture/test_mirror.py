"""A concept has one module name, one public name and one signature in every backend; what differs says why."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
MODEL = "torch"
"""The backend that the others are held against."""

PREFIX = {"torch": "Pytorch", "keras": "Keras", "tfkeras": "Keras"}
"""What stands in class names for the framework, after the seed's BasePytorchTrainableQuantizer."""

BACKENDS = [name for name in PREFIX if name != MODEL and (PACKAGES / f"trainable-{name}").exists()]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

EAGER = "PyTorch runs eagerly and gains by it; Keras compiles graphs, which fuse by themselves"
SHARDED = "a gap of PyTorch's `fully_shard`; a strategy of TensorFlow's averages every gradient"

MODULES: dict[str, dict[str, str]] = {
    "keras": {
        "cache": EAGER,
        "kernels": EAGER,
        "layout": EAGER,
        "scalars": EAGER,
        "ranks": "Keras hides the processes of a job behind its strategies",
        "copying": "Keras has no copy of a live model: layers are made again from their configs",
        "engine": "what keras.ops lacks is written for each engine that Keras runs on",
        "pullback": "each engine has its own way to gradients; PyTorch's tensors carry theirs",
    },
    "tfkeras": {
        "cache": EAGER,
        "kernels": EAGER,
        "layout": EAGER,
        "scalars": EAGER,
        "ranks": "Keras hides the processes of a job behind its strategies",
        "copying": "Keras has no copy of a live model: layers are made again from their configs",
        "engine": "which of two modules Keras 2 is, is found out in one place",
    },
}
"""Modules that only one of the two has, and why."""

NAMES: dict[str, dict[str, str]] = {
    "keras": {"average_scalar_gradients": SHARDED},
    "tfkeras": {"average_scalar_gradients": SHARDED},
}
"""Public names that only one of the two packages exports, and why."""

BOTH = {
    "QuantizationWrapper.__init__": "mctq's six arguments are PyTorch's; a Keras layer has no positional constants",
    "QuantizationWrapper.call": "the method that Keras calls",
    "QuantizationWrapper.forward": "the method that PyTorch calls",
    "QuantizationWrapper.train": "a Keras call is told whether it trains",
    "QuantizationWrapper.get_quantized_weights": "a Keras call is told whether it trains",
    "QuantizationWrapper.build": "part of a Keras layer",
    "QuantizationWrapper.compute_mask": "part of a Keras layer",
    "QuantizationWrapper.compute_output_shape": "part of a Keras layer",
    "QuantizationWrapper.from_config": "Keras saves models by config",
    "QuantizationWrapper.get_build_config": "part of a Keras layer",
    "QuantizationWrapper.get_config": "Keras saves models by config",
    "ActivationQuantizationHolder.__init__": "a Keras layer has a name",
    "ActivationQuantizationHolder.call": "the method that Keras calls",
    "ActivationQuantizationHolder.forward": "the method that PyTorch calls",
    "ActivationQuantizationHolder.build": "part of a Keras layer",
    "ActivationQuantizationHolder.compute_output_shape": "part of a Keras layer",
    "ActivationQuantizationHolder.from_config": "Keras saves models by config",
    "ActivationQuantizationHolder.get_config": "Keras saves models by config",
    "BaseKerasTrainableQuantizer.call": "the method that Keras calls",
    "BaseKerasTrainableQuantizer.forward": "the method that PyTorch calls",
    "BaseKerasTrainableQuantizer.extra_repr": "PyTorch prints modules by it",
    "BaseKerasTrainableQuantizer.quantize": "every Keras layer has a method of that name, for something else",
    "BaseKerasTrainableQuantizer.quantized": "what PyTorch's `quantize` does",
    "BaseKerasTrainableQuantizer.from_config": "core's, found again before Keras's own",
    "BaseKerasTrainableQuantizer.get_config": "core's, with the layer's name",
    "BaseKerasTrainableQuantizer.initialize_quantization": "core's, and the layer is built then",
    "BaseKerasTrainableQuantizer.load_own_variables": "Keras reads a layer's variables by it",
    "BaseKerasTrainableQuantizer.save_own_variables": "Keras writes a layer's variables by it",
    "BaseKerasTrainableQuantizer.signed": "PyTorch's quantizers forget cached weights when it changes",
    "Grid.leaf_gradients": EAGER,
    "Grid.leaves": EAGER,
    "Grid.numbers": EAGER,
    "Grid.served": EAGER,
    "Grid.tensors": EAGER,
    "average_scalar_gradients": SHARDED,
    "register_layer": "the usual name of a layer's input is `input` in PyTorch and `inputs` in Keras",
}
"""What Keras 2 and Keras 3 have in common here."""

MEMBERS: dict[str, dict[str, str]] = {
    "keras": {
        **BOTH,
        "QuantizationWrapper.around": "copies are made from configs, and a layer's class need not be registered",
        "QuantizationWrapper.build_from_config": "part of a Keras layer",
        "QuantizationWrapper.compute_output_spec": "part of a Keras layer",
        "ActivationQuantizationHolder.compute_output_spec": "part of a Keras layer",
        "BaseKerasTrainableQuantizer.build": "part of a Keras layer",
        "BaseKerasTrainableQuantizer.compute_output_spec": "part of a Keras layer",
        "BaseKerasTrainableQuantizer.trainable": "a Keras layer's switch; frozen parameters stay frozen",
    },
    "tfkeras": {
        **BOTH,
        "BaseKerasTrainableQuantizer.calibrated": "Keras 2 fills variables from a file and tells no layer of it",
        "BaseKerasTrainableQuantizer.compute_output_shape": "part of a Keras layer",
        "BaseKerasTrainableQuantizer.non_trainable_weights": "a Keras 2 variable can't be switched off, its layer can",
        "BaseKerasTrainableQuantizer.trainable_weights": "a Keras 2 variable can't be switched off, its layer can",
        "QuantizationWrapper.is_weights_quantization": "mctq's Keras wrapper has it, and it is right",
        "QuantizationWrapper.num_weights_quantizers": "mctq's Keras wrapper has it, and it is right",
    },
}
"""Members of exported classes, and exported functions, that differ or are in one of the two only, and why."""


@dataclass(frozen=True)
class Backend:
    """One backend's source, read without importing it."""

    name: str

    @property
    def root(self) -> Path:
        return PACKAGES / f"trainable-{self.name}" / "src" / f"trainable_{self.name}"

    def modules(self) -> set[str]:
        return {".".join(path.relative_to(self.root).with_suffix("").parts) for path in self.root.rglob("*.py")}

    def exported(self) -> dict[str, str]:
        """Return the module of each name in `__all__`."""
        tree = ast.parse((self.root / "__init__.py").read_text(encoding="utf-8"))
        imports = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]
        return {
            alias.name: node.module.partition(".")[2]
            for node in imports
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def members(self) -> dict[str, str]:
        """Return the signature of each exported function, and of each public method of an exported class."""
        found = {}
        for name, module in self.exported().items():
            for path in [self.root / f"{module}.py", *sorted((self.root / module).glob("*.py"))]:
                if not path.exists():
                    continue
                for node in ast.parse(path.read_text(encoding="utf-8")).body:
                    if getattr(node, "name", None) == name:
                        found |= signatures(node)
        return found


def signatures(node: ast.stmt) -> dict[str, str]:
    if isinstance(node, ast.FunctionDef):
        return {node.name: signature(node)}
    assert isinstance(node, ast.ClassDef)
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
    shown = [each for each in methods if each.name == "__init__" or not each.name.startswith("_")]
    return {f"{node.name}.{each.name}": signature(each) for each in shown}


def signature(node: ast.FunctionDef) -> str:
    """Return names, order, kinds and defaults of the arguments; annotations are each framework's own."""
    arguments = ast.parse(ast.unparse(node)).body[0].args
    for each in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if each is not None:
            each.annotation = None
    return ast.unparse(arguments)


def as_in(backend: str, name: str) -> str:
    """Return the name that a backend has for the model backend's."""
    return name.replace(PREFIX[MODEL], PREFIX[backend])


def differences(backend: str) -> tuple[set[str], set[str], set[str]]:
    """Return the modules, the exported names and the members in which a backend differs from the model."""
    model, other = Backend(MODEL), Backend(backend)
    modules = model.modules() ^ other.modules()
    names = {as_in(backend, name) for name in model.exported()} ^ set(other.exported())
    mine = {as_in(backend, name): text for name, text in model.members().items()}
    theirs = other.members()
    members = {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}
    return modules, names, members


@every_backend
def test_modules_are_the_same(backend):
    assert differences(backend)[0] - {"conformance"} == set(MODULES.get(backend, {}))


@every_backend
def test_exported_names_are_the_same(backend):
    assert differences(backend)[1] == set(NAMES.get(backend, {}))


@every_backend
def test_signatures_are_the_same(backend):
    assert differences(backend)[2] == set(MEMBERS.get(backend, {}))


def test_every_absence_has_a_reason():
    reasons = [reason for table in (MODULES, NAMES, MEMBERS) for each in table.values() for reason in each.values()]
    assert all(len(reason.split()) >= 4 for reason in reasons)


def test_the_verbs_are_compared():
    assert {"wrap", "calibrate", "finalize", "save", "load", "describe", "Grid"} <= set(Backend(MODEL).exported())
    assert Backend(MODEL).members()["finalize"] == "qmodel"
    assert BACKENDS


def test_a_difference_is_seen():
    one, other = (ast.parse(f"def verb(model, {rest}): ...").body[0] for rest in ("force=False", "*, force=False"))
    assert signatures(one) != signatures(other)
