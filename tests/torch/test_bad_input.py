"""Bad input to the PyTorch backend, row by row: a typed error names it, and the model is what it was before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import nn

import trainable_torch
from tests.bad_input import (
    DQA_ARGUMENTS,
    INF,
    NAN,
    RUBBISH,
    Row,
    activation_config,
    recipes,
    refused,
    refuses_a_document,
    refuses_an_argument,
    refuses_configs_it_is_not_for,
    row,
    table,
    weights_config,
)
from tests.torch.models import images, network, ready, recipe, train, weights_only
from trainable_core.constants import RANGE_MAX, RANGE_MIN, THRESHOLD
from trainable_core.errors import (
    CalibrationError,
    DocumentError,
    DocumentVersionError,
    InvalidArgumentError,
    ModelError,
    NothingQuantizedWarning,
    QuantizerStateError,
    RuleError,
    ShapeMismatchError,
    UnknownQuantizerError,
)
from trainable_torch import (
    ActivationQuantizationHolder,
    PytorchLinearAnnealingScheduler,
    QuantizationWrapper,
    advance_schedules,
    average_scalar_gradients,
    calibrate,
    describe,
    diagnose,
    distill,
    exclude_from_weight_decay,
    export,
    finalize,
    freeze_batch_norm,
    freeze_quant_params,
    load,
    parameter_groups,
    reconstruct,
    reestimate_batch_norm,
    register_layer,
    regularization,
    report,
    running,
    save,
    suggest,
    to_mctq,
    track,
    training_callback,
    verify,
    wrap,
)
from trainable_torch.quantizers import (
    BUILTIN,
    BasePytorchTrainableQuantizer,
    DqaWeightsQuantizer,
    LsqActivationQuantizer,
    LsqWeightsQuantizer,
)
from trainable_torch.serialization import digest

LSQ, DQA = recipe("LSQ", "UNIFORM"), recipe("DQA")
NAMES = "stem.conv, stem.relu, body, relu, head"


def uneven(model: nn.Module) -> nn.Module:
    """Return the model with modes that no single call to `train` or `eval` leaves behind."""
    model.train()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 1
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "float": lambda: uneven(network()),
    "wrapped": lambda: uneven(wrap(network(), LSQ)),
    "wrapped DQA": lambda: wrap(network(), DQA).train(),
    "calibrated": lambda: uneven(ready(network(), LSQ, images())),
    "trained": lambda: uneven(train(ready(network(), LSQ, images()), [images(4)])),
    "finalized": lambda: finalize(ready(network(), LSQ, images())),
}


def as_it_is(model: nn.Module) -> dict[str, Any]:
    """Return all there is to see of a model: values bit for bit, modes, objects, and what `describe` says."""
    seen: dict[str, Any] = {
        "values": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        "modules": {
            name: (id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)
        },
        "parameters": {
            name: (id(parameter), parameter.requires_grad, id(parameter.grad))
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
        "holders": [m.observer for m in model.modules() if isinstance(m, ActivationQuantizationHolder)],
        "wrappers": [m.quantizes_weights for m in model.modules() if isinstance(m, QuantizationWrapper)],
        "calibrated": [m.calibrated for m in model.modules() if isinstance(m, BasePytorchTrainableQuantizer)],
        "forward": type(model).forward,
    }
    if seen["holders"] or seen["wrappers"]:
        seen["description"] = str(describe(model))
    return seen


def check(state: str, call: Callable[[Any], object], error: type[Exception], facts: tuple[str, ...]) -> None:
    """Assert that a call on a model is refused, and that the model is as it was."""
    model = MODELS[state]()
    before = as_it_is(model)
    refused(lambda: call(model), error, facts)
    assert as_it_is(model) == before


# ---- wrap -----------------------------------------------------------------------------------------------------------


def wrapping(what: str, how: Any, error: type[Exception], *facts: str) -> Row:
    """Return a row of a recipe that doesn't go with the float model."""
    return row(what, "float", lambda model: wrap(model, how), error, *facts)


@table(
    row("a wrapped model", "wrapped", lambda m: wrap(m, LSQ), QuantizerStateError, "Sequential", "wrapped already"),
    row("a finalized model", "finalized", lambda m: wrap(m, LSQ), QuantizerStateError, "wrapped already"),
    row(
        "a model with a wrapped part",
        "calibrated",
        lambda m: wrap(nn.Sequential(m), LSQ),
        QuantizerStateError,
        "wrapped",
    ),
    wrapping(
        "a pattern for a layer's parent",
        {**LSQ, "rules": [{"match": {"name": "ste?"}, "skip": True}]},
        RuleError,
        "rules.0",
        "stem",
        NAMES,
    ),
    *(
        wrapping(what, how, error, *facts)
        for what, (how, error, facts) in recipes("torch", "stem.conv.weight", NAMES).items()
    ),
)
def test_wrap(state: str, call: Any, error: Any, facts: Any):
    check(state, call, error, facts)


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        (None, ("NoneType",)),
        (nn.Linear, ("type",)),
        (torch.relu, ("builtin_function",)),
        ({"weight": torch.zeros(1)}, ("dict",)),
        (nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), ("'1.weight'", "call the model once")),
        (nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)), ("'1.running_mean'", "call the model once")),
    ],
    ids=["nothing", "a class", "a function", "a state dict", "a lazy layer", "a lazy batch norm"],
)
def test_wrap_of_what_can_not_be_wrapped(given: Any, facts: tuple[str, ...]):
    refused(lambda: wrap(given, LSQ), ModelError, ("torch.nn.Module" if isinstance(given, dict) else "", *facts))


def test_wrap_of_a_model_that_can_not_be_copied():
    model = network()
    model.stream = (i for i in range(3))
    refused(lambda: wrap(model, LSQ), ModelError, ("Sequential", "copied", "generator"))
    assert next(model.stream) == 0


DISABLED = """
from torch import nn
import trainable_torch
try:
    trainable_torch.wrap(nn.Linear(2, 2), {"weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"}})
except trainable_core.TrainableError as error:
    print("REFUSED", type(error).__name__, error)
"""


def test_wrap_with_its_plugin_switched_off():
    # In a process of its own: what plugins there are is found out once per process.
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import trainable_core" + DISABLED],
        env={**os.environ, "TRAINABLE_DISABLE_PLUGINS": "torch"},
        capture_output=True,
        text=True,
        check=True,
    )
    refusal = finished.stdout.partition("REFUSED ")[2]
    assert refusal.startswith("UnknownBackendError")
    assert "'torch'" in refusal
    assert "switched off by TRAINABLE_DISABLE_PLUGINS" in refusal


# ---- calibrate ------------------------------------------------------------------------------------------------------


def calibrating(what: str, batches: Any, error: type[Exception], *facts: str, **options: Any) -> Row:
    """Return a row of `calibrate` on a wrapped model."""
    return row(what, "wrapped", lambda model: calibrate(model, batches, **options), error, *facts)


def report_of(model: Any, batches: Any) -> None:
    pytest.importorskip("matplotlib", reason="reports need matplotlib")
    report(model, "page.html", batches)


def labelled() -> tuple[Any, Any]:
    """Return inputs and labels, of which a list of one batch is to be made."""
    return images(), torch.zeros(len(images()))


def holed(value: float) -> torch.Tensor:
    """Return a batch with one value in it that is no number."""
    batch = images()
    batch[3, 0, 2, 2] = value
    return batch


@table(
    calibrating("no batches", None, CalibrationError, "batches", "3 activation quantizers"),
    calibrating("an empty list", [], CalibrationError, "the batches are empty"),
    calibrating("a spent generator", iter(()), CalibrationError, "the batches are empty", "generator"),
    calibrating("a batch instead of batches", images(), CalibrationError, "batches", "Tensor", "[batch]"),
    calibrating("a mapping instead of batches", {"input": images()}, CalibrationError, "batches", "dict"),
    calibrating("inputs and labels", labelled(), CalibrationError, "[(x, y)]", "inputs and labels"),
    calibrating("text instead of batches", "data", CalibrationError, "batches", "str"),
    calibrating("a number of batches", 8, CalibrationError, "batches", "int"),
    calibrating("an empty tuple for a batch", [images(), ()], CalibrationError, "a batch is an empty tuple"),
    calibrating(
        "batches without examples", [torch.zeros(0, 1, 6, 6)], CalibrationError, "stem.conv: input", "an empty tensor"
    ),
    calibrating("a NaN", [images(), holed(NAN)], CalibrationError, "stem.conv: input", "1 NaN", "bad batch"),
    calibrating("an infinity", [holed(-INF)], CalibrationError, "stem.conv: input", "1 infinite"),
    calibrating("a forward that is none", [images()], CalibrationError, "forward", "5", forward=5),
    calibrating(
        "a forward that skips the model",
        [images()],
        CalibrationError,
        "stem.conv: input",
        "no batch",
        forward=lambda *_: None,
    ),
    row("a float model", "float", lambda m: calibrate(m, [images()]), ModelError, "Sequential", "wrap"),
    row("no model", "float", lambda _: calibrate(None, [images()]), ModelError, "NoneType", "wrap"),
    row("twice", "calibrated", lambda m: calibrate(m, [images()]), QuantizerStateError, "6 quantizers", "force=True"),
    row("after training", "trained", lambda m: calibrate(m, [images()]), QuantizerStateError, "force=True"),
    row("after the end", "finalized", lambda m: calibrate(m, [images()], force=True), QuantizerStateError, "finalized"),
    row(
        "again, with a NaN", "trained", lambda m: calibrate(m, [holed(NAN)], force=True), CalibrationError, "stem.conv"
    ),
    row("again, with nothing", "trained", lambda m: calibrate(m, [], force=True), CalibrationError, "empty"),
)
def test_calibrate(state: str, call: Any, error: Any, facts: Any):
    check(state, call, error, facts)


def test_calibrate_with_weights_that_are_not_finite_names_the_weight_and_sets_no_threshold():
    model = wrap(network(), weights_only("LSQ"))
    with torch.no_grad():
        model.head.weight[1, 2] = NAN
    before = as_it_is(model)
    refused(lambda: calibrate(model), CalibrationError, ("head.weight", "1 NaN"))
    assert as_it_is(model) == before


@pytest.mark.parametrize("batches", [[images(), torch.zeros(2, 2)], [images(), None]], ids=["shape", "kind"])
def test_what_the_models_own_forward_raises_passes_and_the_model_is_as_it_was(batches: list[Any]):
    model = MODELS["wrapped"]()
    before = as_it_is(model)
    with pytest.raises((RuntimeError, TypeError)):
        calibrate(model, batches)
    assert as_it_is(model) == before


# ---- the other verbs ------------------------------------------------------------------------------------------------

FILE = "never-written.onnx"


@table(
    row("finalize a float model", "float", finalize, ModelError, "Sequential", "wrap"),
    row("finalize nothing", "float", lambda _: finalize(None), ModelError, "NoneType"),
    row("run a float model", "float", lambda m: running(m).__enter__(), ModelError, "Sequential", "wrap"),
    row("run nothing", "float", lambda _: running(None).__enter__(), ModelError, "NoneType"),
    row("a float model of mctq's classes", "float", to_mctq, ModelError, "Sequential", "wrap"),
    row("nothing of mctq's classes", "float", lambda _: to_mctq(None), ModelError, "NoneType"),
    row("export a float model", "float", lambda m: export(m, FILE, example=images()), ModelError, "Sequential", "wrap"),
    row("export nothing", "float", lambda _: export(None, FILE, example=images()), ModelError, "NoneType"),
    row("export before finalize", "calibrated", lambda m: export(m, FILE), QuantizerStateError, "finalize"),
    row(
        "export for a target that is not there",
        "finalized",
        lambda m: export(m, FILE, target="onnyx"),
        InvalidArgumentError,
        "'onnyx'",
        "did you mean 'onnx'",
    ),
    row("export to no path", "finalized", lambda m: export(m, None), DocumentError, "NoneType"),
    row("verify a float model", "float", lambda m: verify(m, FILE, [images()]), ModelError, "Sequential", "wrap"),
    row("verify nothing", "float", lambda _: verify(None, FILE, [images()]), ModelError, "NoneType"),
    row("verify before finalize", "calibrated", lambda m: verify(m, FILE, []), QuantizerStateError, "finalize"),
    row("verify with no batches", "finalized", lambda m: verify(m, FILE, []), InvalidArgumentError, "no batches"),
    row(
        "finalize before calibration",
        "wrapped",
        finalize,
        QuantizerStateError,
        "stem.conv.weight",
        "head: input",
        "calibrate",
    ),
    row(
        "call before calibration",
        "wrapped",
        lambda m: m(images()),
        QuantizerStateError,
        "stem.conv: input",
        "calibrate",
    ),
    row("train before calibration", "wrapped DQA", lambda m: m(images()), QuantizerStateError, "stem.conv: input"),
    row("describe a float model", "float", describe, ModelError, "Sequential", "wrap"),
    row("regularize a float model", "float", regularization, ModelError, "Sequential", "wrap"),
    row("freeze a float model", "float", freeze_quant_params, ModelError, "Sequential", "wrap"),
    row("freeze statistics of a float model", "float", freeze_batch_norm, ModelError, "Sequential", "wrap"),
    row(
        "no decay for a float model",
        "float",
        lambda m: exclude_from_weight_decay(torch.optim.SGD([torch.zeros(1)], lr=0.1), m),
        ModelError,
        "Sequential",
        "wrap",
    ),
    row("scalars of a float model", "float", average_scalar_gradients, ModelError, "Sequential", "wrap"),
    row(
        "statistics of a float model",
        "float",
        lambda m: reestimate_batch_norm(m, [images()]),
        ModelError,
        "Sequential",
        "wrap",
    ),
    row(
        "statistics without a batch norm",
        "calibrated",
        lambda m: reestimate_batch_norm(m, [images()]),
        ModelError,
        "no batch norm",
        "fold_batch_norm: after",
    ),
    row("a diagnosis of a float model", "float", lambda m: diagnose(m, [images()]), ModelError, "Sequential", "wrap"),
    row(
        "a diagnosis of a batch",
        "calibrated",
        lambda m: diagnose(m, labelled()),
        CalibrationError,
        "diagnose",
        "[(x, y)]",
    ),
    row(
        "widths for a batch", "calibrated", lambda m: suggest(m, labelled(), 4), CalibrationError, "suggest", "[(x, y)]"
    ),
    row(
        "tracking with a batch",
        "calibrated",
        lambda m: track(m, "run.csv", batches=labelled()),
        CalibrationError,
        "track",
        "[(x, y)]",
    ),
    row(
        "a report on a batch",
        "calibrated",
        lambda m: report_of(m, labelled()),
        CalibrationError,
        "report",
        "[(x, y)]",
    ),
    row("a diagnosis without a batch", "calibrated", lambda m: diagnose(m, []), CalibrationError, "empty", "fresh"),
    row(
        "a diagnosis by an unknown metric",
        "calibrated",
        lambda m: diagnose(m, [images()], metric="accuracy"),
        InvalidArgumentError,
        "metric",
        "'accuracy'",
    ),
    row("widths for a float model", "float", lambda m: suggest(m, [images()], 4), ModelError, "Sequential", "wrap"),
    row(
        "widths under a budget that is no number",
        "calibrated",
        lambda m: suggest(m, [images()], "small"),
        InvalidArgumentError,
        "budget",
    ),
    row("tracking a float model", "float", lambda m: track(m, "run.csv"), ModelError, "Sequential", "wrap"),
    row("tracking every 0 steps", "calibrated", lambda m: track(m, "run.csv", every=0), InvalidArgumentError, "every"),
    row(
        "tracking into a folder that is not there", "calibrated", lambda m: track(m, "no/run.csv"), DocumentError, "no"
    ),
    row("a report on a float model", "float", lambda m: report(m, "page.html"), ModelError, "Sequential", "wrap"),
    row("a report that is no page", "calibrated", lambda m: report(m, "page.pdf"), DocumentError, "page.pdf", ".html"),
    row("a callback for a float model", "float", training_callback, ModelError, "Sequential", "wrap"),
    row(
        "a callback with a name for a number",
        "calibrated",
        lambda m: training_callback(m, freeze_at="late"),
        InvalidArgumentError,
        "freeze_at",
        "'late'",
    ),
    row("reconstruct a float model", "float", lambda m: reconstruct(m, [images()]), ModelError, "Sequential", "wrap"),
    row(
        "reconstruct what learns no rounding",
        "calibrated",
        lambda m: reconstruct(m, [images()]),
        ModelError,
        "ADAROUND",
    ),
    row("distill into a float model", "float", lambda m: distill(m, m), ModelError, "Sequential", "wrap"),
    row("distill from nothing", "calibrated", lambda m: distill(m, None), ModelError, "NoneType"),
    row(
        "distill by a layer that is not there",
        "calibrated",
        lambda m: distill(m, m, features=["stem.cnov"]),
        InvalidArgumentError,
        "stem.cnov",
    ),
    row("schedules of a float model", "float", advance_schedules, ModelError, "Sequential", "wrap"),
    row("groups of a float model", "float", parameter_groups, ModelError, "Sequential", "wrap"),
    row(
        "params as an option",
        "calibrated",
        lambda m: parameter_groups(m, weights={"params": []}),
        InvalidArgumentError,
        "parameter_groups: weights",
        "'params'",
    ),
    row(
        "a name as an option",
        "calibrated",
        lambda m: parameter_groups(m, qparams={"lr": 0.1, "name": "mine"}),
        InvalidArgumentError,
        "parameter_groups: qparams",
        "'name'",
    ),
    row(
        "a number for options",
        "calibrated",
        lambda m: parameter_groups(m, weights=0.1),
        InvalidArgumentError,
        "parameter_groups: weights",
        "0.1",
    ),
    row(
        "a list of options",
        "calibrated",
        lambda m: parameter_groups(m, qparams=[("lr", 0.1)]),
        InvalidArgumentError,
        "parameter_groups: qparams",
    ),
)
def test_a_verb(state: str, call: Any, error: Any, facts: Any):
    check(state, call, error, facts)


# ---- save and load --------------------------------------------------------------------------------------------------

UNWRITABLE: dict[str, tuple[Any, str]] = {
    "a missing folder": ("missing/model", "missing"),
    "a folder": (".", "can't be written"),
    "below a file": ("file/model", "file"),
    "a name that is too long": ("x" * 300, "too long"),
    "a null character": ("a\0b", "null"),
    "nothing": (None, "NoneType"),
    "a number": (5, "int"),
}


@pytest.mark.parametrize(("name", "fact"), UNWRITABLE.values(), ids=UNWRITABLE)
@pytest.mark.parametrize("state", ["trained", "finalized"])
def test_save_where_nothing_can_be_written(state: str, name: Any, fact: str, tmp_path: Path):
    (tmp_path / "file").write_text("here already")
    path = tmp_path / name if isinstance(name, str) else name
    check(state, lambda model: save(model, path), DocumentError, (fact,))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "here already"


@pytest.mark.parametrize("path", ["", "/"])
def test_save_to_a_path_without_a_name(path: str):
    check("calibrated", lambda model: save(model, path), DocumentError, ("can't be written",))


def test_save_a_float_model(tmp_path: Path):
    check("float", lambda model: save(model, tmp_path / "model"), ModelError, ("Sequential", "wrap"))
    assert list(tmp_path.iterdir()) == []


class Keeps(nn.Module):
    """A module whose state is more than tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return x

    def get_extra_state(self) -> Any:
        """Return something that is no tensor."""
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        """Take it back."""


def test_save_a_state_that_is_more_than_tensors(tmp_path: Path):
    model = ready(nn.Sequential(nn.Linear(2, 2), Keeps()), weights_only())
    refused(lambda: save(model, tmp_path / "model"), ModelError, ("1._extra_state", "dict"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the content of a model's file."""
    path = tmp_path_factory.mktemp("saved") / "model"
    save(MODELS["trained"](), path)
    return path.read_bytes()


def header_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a file says of its model, and its tensors."""
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["trainable-torch"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping


def test_load_a_file_cut_anywhere(saved: bytes, tmp_path: Path):
    path = tmp_path / "model"
    model = MODELS["float"]()
    before = as_it_is(model)
    for size in {*range(0, 64, 8), *range(0, len(saved), len(saved) // 20), len(saved) - 1}:
        path.write_bytes(saved[:size])
        refused(lambda: load(path, model), DocumentError, (str(path), "truncated"))
    assert as_it_is(model) == before


FOREIGN: dict[str, bytes] = {
    "text": b"weights: 4 bits\n" * 100,
    "random bytes": np.random.default_rng(0).bytes(5000),
    "another program's file": to_bytes({"weight": torch.zeros(3)}),
    "a file of another program with notes": to_bytes({"weight": torch.zeros(3)}, {"format": "pt"}),
    "rubbish in the header": to_bytes({"weight": torch.zeros(3)}, {"trainable-torch": "{"}),
    "a list in the header": to_bytes({"weight": torch.zeros(3)}, {"trainable-torch": "[1]"}),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_load_a_foreign_file(content: bytes, tmp_path: Path):
    path = tmp_path / "model"
    path.write_bytes(content)
    check("float", lambda model: load(path, model), DocumentError, (str(path),))


def test_load_a_pickle(tmp_path: Path):
    torch.save(network().state_dict(), tmp_path / "model")
    check("float", lambda model: load(tmp_path / "model", model), DocumentError, ("model", "no safetensors file"))


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("missing", "no such file"),
        (".", "no safetensors file"),
        ("a\0b", "no such file"),
        (None, "NoneType"),
        (5, "int"),
    ],
)
def test_load_what_is_not_there(name: Any, fact: str, tmp_path: Path):
    path = tmp_path / name if isinstance(name, str) else name
    check("float", lambda model: load(path, model), DocumentError, (str(path), fact))


WRONG_HEADERS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a later version": ({"schema_version": 2}, DocumentVersionError, "2"),
    "no version": ({"schema_version": None}, DocumentVersionError, "None"),
    "a bool version": ({"schema_version": True}, DocumentVersionError, "True"),
    "no recipe": ({"recipe": None}, DocumentError, "'recipe'"),
    "a damaged recipe": ({"recipe": weights_only(n_bits=40)}, DocumentError, "weights.n_bits"),
    "a recipe of a later version": ({"recipe": {**LSQ, "schema_version": 2}}, DocumentError, "schema_version"),
    "a plugin's method": ({"recipe": weights_only("EWGS")}, UnknownQuantizerError, "EWGS"),
    "a rule for another model": (
        {"recipe": {**LSQ, "rules": [{"match": {"name": "neck"}, "skip": True}]}},
        RuleError,
        "neck",
    ),
    "another recipe": ({"recipe": weights_only("LSQ", "UNIFORM")}, DocumentError, "head.input_holders.input"),
    "another grid": ({"recipe": recipe("LSQ")}, DocumentError, "threshold"),
    "finalized by a word": ({"finalized": "no"}, DocumentError, "'finalized'"),
    "finalized by mistake": ({"finalized": True}, DocumentError, "grid_scale"),
    "training by a number": ({"training": 1}, DocumentError, "'training'"),
    "frozen that is not there": ({"frozen": ["neck"]}, DocumentError, "'neck'"),
    "frozen by number": ({"frozen": [3]}, DocumentError, "'frozen'"),
    "frozen lists": ({"frozen": [[]]}, DocumentError, "'frozen'"),
    "aliases that are a list": ({"aliases": []}, DocumentError, "'aliases'"),
    "aliases of lists": ({"aliases": {"a": []}}, DocumentError, "'aliases'"),
    "an alias of nothing": ({"aliases": {"neck.weight": "neck"}}, DocumentError, "'neck.weight'"),
    "an alias too many": ({"aliases": {"neck.weight": "head.weight"}}, DocumentError, "neck.weight"),
}


@pytest.mark.parametrize(("changes", "error", "fact"), WRONG_HEADERS.values(), ids=WRONG_HEADERS)
def test_load_a_file_with_a_wrong_header(
    changes: dict[str, Any], error: type[Exception], fact: str, saved: bytes, tmp_path: Path
):
    path = tmp_path / "model"
    path.write_bytes(saved)
    header, tensors = header_of(path)
    text = json.dumps({**header, **changes})
    path.write_bytes(to_bytes(tensors, {"trainable-torch": text, "sha256": digest(text, tensors)}))
    check("float", lambda model: load(path, model), error, (fact,))


def with_head(classes: int) -> nn.Module:
    """Return the network with another number of classes."""
    model = network()
    model.head = nn.Linear(16, classes)
    return model


OTHERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "fewer layers": (lambda: network()[:4], DocumentError, "head.weight"),
    "a wider layer": (lambda: with_head(4), DocumentError, "'head.weight'"),
    "one layer more": (lambda: nn.Sequential(network(), nn.Linear(3, 3)), DocumentError, "another architecture"),
    "no model": (lambda: None, ModelError, "NoneType"),
    "a wrapped model": (MODELS["wrapped"], QuantizerStateError, "wrapped already"),
}


@pytest.mark.parametrize(("make", "error", "fact"), OTHERS.values(), ids=OTHERS)
def test_load_into_another_architecture(make: Any, error: type[Exception], fact: str, saved: bytes, tmp_path: Path):
    path = tmp_path / "model"
    path.write_bytes(saved)
    model = make()
    before = None if model is None else as_it_is(model)
    refused(lambda: load(path, model), error, (fact,))
    assert (None if model is None else as_it_is(model)) == before
    assert path.read_bytes() == saved


# ---- quantizers, wrapper, holder ------------------------------------------------------------------------------------


PER_CHANNEL = {"weights_channels_axis": 0, "weights_per_channel_threshold": True}


@pytest.mark.parametrize("cls", BUILTIN, ids=lambda cls: cls.__name__)
def test_a_quantizer_of_a_config_it_is_not_for(cls: type[Any]):
    refuses_configs_it_is_not_for(cls)


def fresh(params: Any = None, shape: tuple[int, ...] = (2, 3), **fields: Any) -> LsqWeightsQuantizer:
    """Return an initialized weights quantizer called ``fc.weight``."""
    quantizer = LsqWeightsQuantizer(weights_config(params, **fields))
    quantizer.subject = "fc.weight"
    quantizer.initialize_quantization(shape, "weight", None)
    return quantizer


CHANNELS = {THRESHOLD: [1.0, 2.0]}
CALLS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], type[Exception], tuple[str, ...]]] = {
    "before calibration": (fresh, lambda q: q(torch.zeros(2, 3)), QuantizerStateError, ("fc.weight", "calibrate")),
    "converted before calibration": (fresh, lambda q: q.convert2inferable(), QuantizerStateError, ("fc.weight",)),
    "converted when switched off": (
        lambda: fresh({THRESHOLD: 1.0}, enable_weights_quantization=False),
        lambda q: q.convert2inferable(),
        QuantizerStateError,
        ("fc.weight", "off"),
    ),
    "one channel too many": (
        lambda: fresh(CHANNELS, **PER_CHANNEL),
        lambda q: q(torch.zeros(3, 3)),
        ShapeMismatchError,
        ("fc.weight", "2 channels", "(3, 3)"),
    ),
    "one dimension too few": (
        lambda: fresh(CHANNELS, (3, 2), weights_channels_axis=1, weights_per_channel_threshold=True),
        lambda q: q(torch.zeros(2)),
        ShapeMismatchError,
        ("fc.weight", "axis 1", "(2,)"),
    ),
    "integers": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q(torch.zeros(2, 3, dtype=torch.int64)),
        ShapeMismatchError,
        ("fc.weight", "int64"),
    ),
    "complex numbers": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q(torch.zeros(2, 3, dtype=torch.complex64)),
        ShapeMismatchError,
        ("fc.weight", "complex64"),
    ),
    "an array": (lambda: fresh({THRESHOLD: 1.0}), lambda q: q(np.zeros((2, 3))), ShapeMismatchError, ("fc.weight",)),
    "another shape": (
        lambda: fresh({THRESHOLD: 1.0}, **PER_CHANNEL),
        lambda q: q.initialize_quantization((3, 3), "weight", None),
        QuantizerStateError,
        ("fc.weight", "another shape"),
    ),
    "another width": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q.set_quantization_params({8: {THRESHOLD: 2.0}}),
        InvalidArgumentError,
        ("fc.weight", "[8]", "[4]"),
    ),
    "a wrong length": (
        lambda: fresh(CHANNELS, **PER_CHANNEL),
        lambda q: q.set_quantization_params({4: {THRESHOLD: [1.0, 2.0, 3.0]}}),
        ShapeMismatchError,
        ("fc.weight: threshold", "(2,)", "(3,)"),
    ),
    "a range for a threshold": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q.set_quantization_params({4: {RANGE_MIN: -1.0, RANGE_MAX: 1.0}}),
        InvalidArgumentError,
        ("fc.weight", "'range_min'"),
    ),
    "NaN for a threshold": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q.set_quantization_params({4: {THRESHOLD: NAN}}),
        InvalidArgumentError,
        ("fc.weight", "'threshold'", "finite"),
    ),
    "an unknown variable": (
        lambda: fresh({THRESHOLD: 1.0}),
        lambda q: q.get_quantizer_variable("treshold"),
        QuantizerStateError,
        ("fc.weight", "'treshold'", "did you mean 'threshold'"),
    ),
}


@pytest.mark.parametrize(("make", "call", "error", "facts"), CALLS.values(), ids=CALLS)
def test_a_call_of_a_quantizer(make: Any, call: Any, error: Any, facts: Any):
    quantizer = make()
    before = as_it_is(quantizer)
    refused(lambda: call(quantizer), error, facts)
    assert as_it_is(quantizer) == before


@pytest.mark.parametrize(("given", "fact"), RUBBISH.values(), ids=RUBBISH)
def test_a_document_of_rubbish(given: Any, fact: str):
    refuses_a_document(fresh({THRESHOLD: 1.0}), given, fact)


@pytest.mark.parametrize(("arguments", "fact"), DQA_ARGUMENTS.values(), ids=DQA_ARGUMENTS)
def test_an_argument_of_dqa(arguments: dict[str, Any], fact: str):
    refuses_an_argument(DqaWeightsQuantizer, arguments, fact)


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ((5, 5, 1.0, 0.0), "t_end must be greater than t_start"),
        ((5, 4, 1.0, 0.0), "t_end must be greater than t_start"),
        ((-1, 4, 1.0, 0.0), "t_start must not be negative"),
        ((0, 4, NAN, 0.0), "initial_val"),
    ],
)
def test_a_schedule_on_tensors(arguments: tuple[Any, ...], fact: str):
    refused(lambda: PytorchLinearAnnealingScheduler(*arguments), InvalidArgumentError, (fact,))


PARTS: dict[str, tuple[Callable[[nn.Module], object], tuple[str, ...]]] = {
    "an unknown weight": (lambda m: QuantizationWrapper(m, {"wieght": fresh(shape=(3, 2))}), ("'wieght'",)),
    "a weight by position": (lambda m: QuantizationWrapper(m, {0: fresh()}), ("weights_quantizers", "str", "[0]")),
    "a name for a constant": (
        lambda _: QuantizationWrapper(torch.add, {"other": fresh()}, {1: torch.zeros(2)}),
        ("weights_quantizers", "int", "'other'"),
    ),
    "a constant without value": (
        lambda _: QuantizationWrapper(torch.add, {0: fresh()}, {1: torch.zeros(2)}),
        ("positions [0]", "[1]"),
    ),
    "no quantizers": (lambda m: QuantizationWrapper(m, None), ("weights_quantizers", "NoneType")),
    "a number for a quantizer": (lambda m: QuantizationWrapper(m, {"weight": 5}), ("'weight'", "int")),
    "an activation quantizer for weights": (
        lambda m: QuantizationWrapper(m, {"weight": LsqActivationQuantizer(activation_config())}),
        ("'weight'", "Weights", "Activation"),
    ),
    "nothing to hold": (lambda _: ActivationQuantizationHolder(None), ("ActivationQuantizationHolder", "NoneType")),
    "a weights quantizer for activations": (
        lambda _: ActivationQuantizationHolder(LsqWeightsQuantizer(weights_config())),
        ("ActivationQuantizationHolder", "Activation", "Weights"),
    ),
}


@pytest.mark.parametrize(("call", "facts"), PARTS.values(), ids=PARTS)
def test_a_wrapper_or_holder(call: Any, facts: tuple[str, ...]):
    layer = nn.Linear(2, 3)
    before = as_it_is(layer)
    refused(lambda: call(layer), InvalidArgumentError, facts)
    assert as_it_is(layer) == before


# ---- layers ---------------------------------------------------------------------------------------------------------


class Mine(nn.Module):
    """A layer of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with the kernel."""
        return x @ self.kernel.T


LAYERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "a module": ((Mine(), "linear"), "Mine()"),
    "no class": (("Mine", "linear"), "'Mine'"),
    "a class that is no module": ((int, "linear"), "int"),
    "an unknown op": ((Mine, "dense"), "'dense'"),
    "no op": ((Mine, None), "None"),
    "a number for weights": ((Mine, "linear", 5), "weights"),
    "names without axes": ((Mine, "linear", ["kernel"]), "weights"),
    "a word for an axis": ((Mine, "linear", {"kernel": "first"}), "'first'"),
    "a bool axis": ((Mine, "linear", {"kernel": True}), "True"),
    "a number for a name": ((Mine, "linear", {5: 0}), "5"),
    "a word for inputs": ((Mine, "linear", {"kernel": 0}, "input"), "inputs"),
    "numbers for inputs": ((Mine, "linear", {"kernel": 0}, (0,)), "inputs"),
}


@pytest.mark.parametrize(("arguments", "fact"), LAYERS.values(), ids=LAYERS)
def test_a_layer_kind(arguments: tuple[Any, ...], fact: str):
    refused(lambda: register_layer(*arguments), InvalidArgumentError, ("register_layer", fact))
    # still unknown: nothing of it was kept
    with pytest.warns(NothingQuantizedWarning):
        qmodel = wrap(nn.Sequential(Mine()), weights_only())
    assert "no known kind" in describe(qmodel).left_out["0"]


@pytest.mark.parametrize(
    ("weights", "error", "facts"),
    [
        ({"kernle": 0}, ModelError, ("layer '0'", "'kernle'", "register_layer")),
        ({"kernel": 2}, ShapeMismatchError, ("0.kernel", "(3, 4)", "2")),
    ],
    ids=["an unknown weight", "an axis beyond the tensor"],
)
def test_a_layer_kind_that_does_not_fit_its_layer(weights: Any, error: type[Exception], facts: tuple[str, ...]):
    class Other(Mine):
        """Registered for this test only."""

    register_layer(Other, "linear", weights)
    model = nn.Sequential(Other())
    before = as_it_is(model)
    refused(lambda: wrap(model, weights_only()), error, facts)
    assert as_it_is(model) == before


def test_every_public_verb_is_tried():
    """A new verb needs its rows here."""
    tried = {
        ActivationQuantizationHolder,
        BasePytorchTrainableQuantizer,
        PytorchLinearAnnealingScheduler,
        QuantizationWrapper,
        advance_schedules,
        average_scalar_gradients,
        calibrate,
        describe,
        diagnose,
        distill,
        exclude_from_weight_decay,
        export,
        finalize,
        freeze_batch_norm,
        freeze_quant_params,
        load,
        parameter_groups,
        reconstruct,
        reestimate_batch_norm,
        register_layer,
        regularization,
        report,
        running,
        save,
        suggest,
        to_mctq,
        track,
        training_callback,
        verify,
        wrap,
    }
    assert {getattr(trainable_torch, name) for name in trainable_torch.__all__} - tried == {trainable_torch.Grid}
