"""A concept has one module name, one public name and one signature in every backend; what differs says why."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
CORE = PACKAGES / "trainable-core" / "src" / "trainable_core"
MODEL = "torch"
"""The backend that the others are held against."""

PREFIX = {"torch": "Pytorch", "keras": "Keras", "tfkeras": "Keras"}
"""What stands in class names for the framework, after the seed's BasePytorchTrainableQuantizer."""

BACKENDS = [name for name in PREFIX if name != MODEL and (PACKAGES / f"trainable-{name}").exists()]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

EAGER = "PyTorch runs eagerly and gains by it; Keras compiles graphs, which fuse by themselves"
SHARDED = "a gap of PyTorch's `fully_shard`; a strategy of TensorFlow's averages every gradient"
LAYER = "part of a Keras layer"
COMPILED = "what `kernels` is to PyTorch: TensorFlow has a compiler to call, PyTorch's eager kernels are put together"
BY_CONFIG = "Keras saves models by config"
TOLD = "a Keras call is told whether it trains"
NAMED = "a Keras layer has a name"
CORES = "core's, for both Kerases to build on"

OF_TORCH = {
    "kernels": EAGER,
    "ranks": "Keras hides the processes of a job behind its strategies",
    "copying": "Keras has no copy of a live model: layers are made again from their configs",
}
"""Modules that PyTorch has and Keras has not, or the other way round."""

MODULES: dict[str, dict[str, str]] = {
    "keras": {
        **OF_TORCH,
        "fusion": COMPILED,
        "engine": "what keras.ops lacks is written for each engine that Keras runs on",
        "pullback": "each engine has its own way to gradients; PyTorch's tensors carry theirs",
    },
    "tfkeras": {
        **OF_TORCH,
        "fusion": COMPILED,
        "engine": "what Keras 2 lacks is TensorFlow's, and it is found out which Keras is in the process",
    },
}
"""Modules that only one of the two has, and why."""

NAMES: dict[str, dict[str, str]] = {
    "keras": {"average_scalar_gradients": SHARDED},
    "tfkeras": {"average_scalar_gradients": SHARDED},
}
"""Public names that only one of the two packages exports, and why."""

OF_PARTS = ("class_of", "keep", "keep_noted", "noted_config", "quantizer_of")
OF_HOLDERS = (*OF_PARTS, "observe", "start")
OF_WRAPPERS = (
    *OF_PARTS, "argument_names", "check", "deployed_quantizers", "find_weight", "initialize_quantizers", "of_config",
    "own_config", "quantize_inputs", "quantize_output", "value_of", "weight_of",
)  # fmt: skip

OF_KERAS = {
    **{f"ActivationQuantizationHolder.{name}": CORES for name in OF_HOLDERS},
    **{f"QuantizationWrapper.{name}": CORES for name in OF_WRAPPERS},
    "QuantizationWrapper.__init__": "mctq's six arguments are PyTorch's; a Keras layer has no positional constants",
    "QuantizationWrapper.build": LAYER,
    "QuantizationWrapper.call": "the method that Keras calls",
    "QuantizationWrapper.compute_mask": LAYER,
    "QuantizationWrapper.compute_output_shape": LAYER,
    "QuantizationWrapper.forward": "the method that PyTorch calls",
    "QuantizationWrapper.from_config": BY_CONFIG,
    "QuantizationWrapper.get_build_config": LAYER,
    "QuantizationWrapper.get_config": BY_CONFIG,
    "QuantizationWrapper.get_quantized_weights": TOLD,
    "QuantizationWrapper.train": TOLD,
    "ActivationQuantizationHolder.__init__": NAMED,
    "ActivationQuantizationHolder.build": LAYER,
    "ActivationQuantizationHolder.call": "the method that Keras calls",
    "ActivationQuantizationHolder.compute_output_shape": LAYER,
    "ActivationQuantizationHolder.forward": "the method that PyTorch calls",
    "ActivationQuantizationHolder.from_config": BY_CONFIG,
    "ActivationQuantizationHolder.get_config": BY_CONFIG,
    "BaseKerasTrainableQuantizer.call": "the method that Keras calls",
    "BaseKerasTrainableQuantizer.checked_rule": EAGER,
    "BaseKerasTrainableQuantizer.extra_repr": "PyTorch prints modules by it",
    "BaseKerasTrainableQuantizer.forward": "the method that PyTorch calls",
    "BaseKerasTrainableQuantizer.from_config": "core's, found again before Keras's own",
    "BaseKerasTrainableQuantizer.get_config": "core's, with the layer's name",
    "BaseKerasTrainableQuantizer.initialize_quantization": "core's, and the layer is built then",
    "BaseKerasTrainableQuantizer.load_own_variables": "Keras reads a layer's variables by it",
    "BaseKerasTrainableQuantizer.quantize": "every Keras 3 layer has a method of that name, for something else",
    "BaseKerasTrainableQuantizer.quantized": "what PyTorch's `quantize` does",
    "BaseKerasTrainableQuantizer.rule": EAGER,
    "BaseKerasTrainableQuantizer.save_own_variables": "Keras writes a layer's variables by it",
    "BaseKerasTrainableQuantizer.signed": "a property where a variable repeats it, for saved states",
    "Grid.leaf_gradients": EAGER,
    "Grid.leaves": EAGER,
    "Grid.numbers": EAGER,
    "Grid.served": EAGER,
    "Grid.tensors": EAGER,
    "average_scalar_gradients": SHARDED,
    "register_layer": "the usual name of a layer's input is `input` in PyTorch and `inputs` in Keras",
}

MEMBERS: dict[str, dict[str, str]] = {
    "keras": {
        **OF_KERAS,
        "QuantizationWrapper.around": "copies are made from configs, and a layer's class need not be registered",
        "QuantizationWrapper.build_from_config": LAYER,
        "QuantizationWrapper.compute_output_spec": LAYER,
        "ActivationQuantizationHolder.compute_output_spec": LAYER,
        "BaseKerasTrainableQuantizer.build": LAYER,
        "BaseKerasTrainableQuantizer.compute_output_spec": LAYER,
        "BaseKerasTrainableQuantizer.trainable": "a Keras layer's switch; frozen parameters stay frozen",
    },
    "tfkeras": {
        **OF_KERAS,
        "BaseKerasTrainableQuantizer.calibrated": "found out from the variables, however their values came",
        "BaseKerasTrainableQuantizer.compute_output_shape": LAYER,
        "BaseKerasTrainableQuantizer.non_trainable_weights": "where Keras 2 looks for frozen variables",
        "BaseKerasTrainableQuantizer.trainable_weights": "where Keras 2 looks for trained variables",
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
                tree = ast.parse(path.read_text(encoding="utf-8"))
                for node in tree.body:
                    if getattr(node, "name", None) == name:
                        found |= inherited(node, tree) | signatures(node)
        return found


def inherited(node: ast.stmt, tree: ast.Module) -> dict[str, str]:
    """Return the signatures of the methods that a class has of those core keeps for both Kerases.

    Of `trainable_core.quantizer` every backend inherits the same.
    """
    found: dict[str, str] = {}
    modules = {
        alias.name: each.module
        for each in tree.body
        if isinstance(each, ast.ImportFrom) and (each.module or "").startswith("trainable_core.keras_")
        for alias in each.names
    }
    for base in getattr(node, "bases", []):
        if isinstance(base, ast.Name) and base.id in modules:
            path = CORE / f"{modules[base.id].partition('.')[2]}.py"
            core = ast.parse(path.read_text(encoding="utf-8"))
            classes = {each.name: each for each in core.body if isinstance(each, ast.ClassDef)}
            of_base = [each.id for each in classes[base.id].bases if isinstance(each, ast.Name) and each.id in classes]
            for name in [*of_base, base.id]:
                methods = signatures(classes[name])
                found |= {f"{node.name}.{key.partition('.')[2]}": text for key, text in methods.items()}
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
    assert differences(backend)[0] - {"conformance"} == set(MODULES[backend])


@every_backend
def test_exported_names_are_the_same(backend):
    assert differences(backend)[1] == set(NAMES[backend])


@every_backend
def test_signatures_are_the_same(backend):
    assert differences(backend)[2] == set(MEMBERS[backend])


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
