"""Every error is a `TrainableError` and a builtin, keeps its facts, and tells them."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

from trainable_core import errors
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.errors import TrainableError, nearest
from trainable_core.key import Key

KEY = Key("torch", QuantizationTarget.Weights, "LSQ", QuantizationMethod.SYMMETRIC)
OTHER = Key("torch", QuantizationTarget.Weights, "LSQQ", QuantizationMethod.UNIFORM)


class Unmarked:
    """A class that the registry refuses."""


# error, builtin, facts by name, and what the message says of them
LEAVES: list[tuple[type[TrainableError], type[Exception], dict[str, Any], list[str]]] = [
    (
        errors.UnknownQuantizerError,
        LookupError,
        {"key": KEY, "known": [OTHER], "failed": {"broken": "ImportError: libx"}},
        [str(KEY), str(OTHER), "broken", "ImportError: libx"],
    ),
    (
        errors.DuplicateQuantizerError,
        ValueError,
        {"key": KEY, "providers": ["a.Lsq (a 1.0)", "b.Lsq (b 2.0)"]},
        [str(KEY), "a.Lsq (a 1.0)", "b.Lsq (b 2.0)", "TRAINABLE_DISABLE_PLUGINS"],
    ),
    (
        errors.UnknownBackendError,
        LookupError,
        {"backend": "jax", "known": ["keras", "torch"], "failed": {"broken": "ImportError: libx"}},
        ["'jax'", "keras, torch", "broken", "ImportError: libx", "come with their own plugins"],
    ),
    (
        errors.QuantizerDefinitionError,
        TypeError,
        {"cls": Unmarked, "problem": "argument 'x' has no default"},
        ["Unmarked", "argument 'x' has no default", "@mark_quantizer"],
    ),
    (
        errors.InvalidArgumentError,
        ValueError,
        {"subject": "LinearAnnealingScheduler", "problem": "t_end must be a number, got 'soon'"},
        ["LinearAnnealingScheduler: t_end", "'soon'"],
    ),
    (
        errors.UnsupportedConfigError,
        ValueError,
        {"subject": "LsqQuantizer", "problem": "9 bits"},
        ["LsqQuantizer: 9 bits"],
    ),
    (
        errors.FrameworkError,
        ImportError,
        {"backend": "tf_keras", "problem": "Keras 3 is in this process", "hint": "set TF_USE_LEGACY_KERAS=1."},
        ["tf_keras", "Keras 3 is in this process", "set TF_USE_LEGACY_KERAS=1."],
    ),
    (
        errors.ShapeMismatchError,
        ValueError,
        {"subject": "conv1.weight", "expected": (8,), "got": (16,)},
        ["conv1.weight", "expected (8,)", "got (16,)"],
    ),
    (
        errors.QuantizerStateError,
        RuntimeError,
        {"subject": "LsqQuantizer", "problem": "not calibrated"},
        ["LsqQuantizer: not calibrated"],
    ),
    (
        errors.CalibrationError,
        ValueError,
        {"subject": "relu1", "problem": "no values were seen"},
        ["relu1: no values were seen"],
    ),
    (
        errors.UnseenTensorsError,
        ValueError,
        {"reasons": {"aux: input": "no batch reached it", "fc: input": "it got a dict"}, "ways_out": ["skip", "force"]},
        ["2 tensors", "aux: input: no batch reached it", "fc: input: it got a dict", "- skip", "- force"],
    ),
    (
        errors.RuleError,
        ValueError,
        {"rule": "rules[2]", "problem": "matches no layer", "layers": ["stem", "head"]},
        ["rules[2]: matches no layer", "stem, head"],
    ),
    (
        errors.FrameworkError,
        ImportError,
        {"backend": "tf_keras", "problem": "tf.keras is Keras 3", "hint": "pip install tf-keras"},
        ["'tf_keras'", "tf.keras is Keras 3", "pip install tf-keras"],
    ),
    (
        errors.IntegerRangeError,
        OverflowError,
        {"subject": "fc.bias", "channel": 3, "count": 2, "value": 1e9, "scale": 1e-3},
        ["fc.bias", "channel 3", "beyond int32", "1 more channel"],
    ),
    (
        errors.MissingLibraryError,
        ImportError,
        {"library": "onnx", "purpose": "export", "problem": "No module named 'onnx'", "install": "pip install onnx"},
        ["export needs onnx", "No module named 'onnx'", "Hint: pip install onnx"],
    ),
    (errors.ModelError, TypeError, {"problem": "not a wrapped model"}, ["not a wrapped model"]),
    (
        errors.DocumentError,
        ValueError,
        {"path": "model.trainable", "problem": "truncated"},
        ["model.trainable: truncated"],
    ),
    (
        errors.DocumentVersionError,
        ValueError,
        {"path": "model.trainable", "found": 7, "supported": [1, 2]},
        ["model.trainable", "version 7", "[1, 2]", "trainable-core"],
    ),
    (
        errors.DuplicateBackendError,
        ValueError,
        {"backend": "torch", "providers": ["a 1.0, plugin 'a'", "b 2.0, plugin 'b'"]},
        ["'torch'", "a 1.0, plugin 'a'", "b 2.0, plugin 'b'", "TRAINABLE_DISABLE_PLUGINS"],
    ),
    (
        errors.PluginError,
        TypeError,
        {"plugin": "mine", "problem": "it has no hook"},
        ["'mine'", "it has no hook", "trainable_register_quantizers"],
    ),
]

NAMES = [error.__name__ for error, *_ in LEAVES]


@pytest.mark.parametrize(("error", "builtin"), [leaf[:2] for leaf in LEAVES], ids=NAMES)
def test_it_is_ours_and_a_builtin(error: type[TrainableError], builtin: type[Exception]) -> None:
    assert issubclass(error, TrainableError)
    assert issubclass(error, builtin)


@pytest.mark.parametrize(("error", "facts"), [(error, facts) for error, _, facts, _ in LEAVES], ids=NAMES)
def test_it_keeps_its_facts(error: type[TrainableError], facts: dict[str, Any]) -> None:
    caught = error(**facts)
    assert {name: getattr(caught, name) for name in facts} == facts


@pytest.mark.parametrize(("error", "facts", "said"), [(leaf[0], *leaf[2:]) for leaf in LEAVES], ids=NAMES)
def test_it_tells_its_facts(error: type[TrainableError], facts: dict[str, Any], said: list[str]) -> None:
    message = str(error(**facts))
    assert [fact for fact in said if fact not in message] == []


def test_every_error_of_the_module_is_checked_here() -> None:
    defined = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, TrainableError)}
    assert defined - {error for error, *_ in LEAVES} == {TrainableError}


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgumentError,
        errors.UnsupportedConfigError,
        errors.QuantizerStateError,
        errors.CalibrationError,
        errors.DocumentError,
    ],
)
def test_a_hint_comes_last_and_only_when_given(error: type[TrainableError]) -> None:
    assert str(error("it", "is wrong", "do this.")).endswith("\nHint: do this.")
    assert "Hint" not in str(error("it", "is wrong"))


def test_a_model_error_ends_with_its_hint() -> None:
    assert str(errors.ModelError("not wrapped", "call wrap first.")).endswith("\nHint: call wrap first.")


def test_a_miss_in_a_backend_that_is_not_there_says_what_to_install() -> None:
    assert "pip install trainable-torch" in str(errors.UnknownQuantizerError(KEY, [], {}))


def test_a_miss_in_an_installed_backend_names_the_nearest_training_method() -> None:
    message = str(errors.UnknownQuantizerError(KEY, [OTHER], {}, known_backends=["torch"]))
    assert "did you mean 'LSQQ'" in message
    assert "pip install" not in message


def test_a_miss_with_nothing_near_points_to_the_command_line() -> None:
    message = str(errors.UnknownQuantizerError(KEY, [], {}, known_backends=["torch"]))
    assert "trainable doctor" in message
    assert "registered for this backend: none" in message


def test_a_miss_in_an_installed_backend_knows_the_built_in_methods() -> None:
    asked = Key("torch", QuantizationTarget.Weights, "LQS", QuantizationMethod.SYMMETRIC)
    message = str(errors.UnknownQuantizerError(asked, [], {}, known_backends=["torch"], built_in=["LSQ", "STE"]))
    assert "did you mean 'LSQ'" in message


def test_a_miss_of_a_method_on_another_grid_names_its_grids_and_the_methods_of_that_grid() -> None:
    known = [
        KEY._replace(quantizer_id=name, method=QuantizationMethod[grid], target=target)
        for name, grid, target in (
            ("DKM", "LUT_SYM_QUANTIZER", QuantizationTarget.Weights),
            ("DKM", "LUT_POT_QUANTIZER", QuantizationTarget.Weights),
            ("LSQ", "SYMMETRIC", QuantizationTarget.Weights),
            ("PACT", "SYMMETRIC", QuantizationTarget.Activation),
        )
    ]

    def hint(**asked: Any) -> str:
        error = errors.UnknownQuantizerError(KEY._replace(**asked), known, {}, known_backends=["torch"])
        return str(error).splitlines()[-1]

    assert hint(quantizer_id="DKM") == (
        "Hint: DKM needs method: LUT_POT_QUANTIZER or LUT_SYM_QUANTIZER; SYMMETRIC has LSQ."
    )
    assert hint(method=QuantizationMethod.POWER_OF_TWO) == "Hint: LSQ needs method: SYMMETRIC."
    assert hint(target=QuantizationTarget.Activation) == "Hint: LSQ is a training method for Weights alone."


WARNINGS = [
    errors.NothingQuantizedWarning("Net", {"skipped by a rule": ["fc", "head"]}),
    errors.ThresholdsKeptWarning({"aux: input": "no batch reached its layer"}),
    errors.GradientMissingWarning({"fc.weight": "no gradient at 3 records in a row"}),
    errors.StatisticsRunAwayWarning({"norm": "variance went from 1 to 1e+06"}),
    errors.RecordsLostWarning({"run.csv": "it can't be written"}),
    errors.ThresholdCollapsedWarning({"fc.weight": "its step fell from 0.1, down to 1e-06"}),
]


@pytest.mark.parametrize("warning", WARNINGS, ids=lambda warning: type(warning).__name__)
def test_a_warning_is_ours_and_survives_pickle(warning: errors.TrainableWarning) -> None:
    assert isinstance(warning, UserWarning)
    copied = pickle.loads(pickle.dumps(warning))  # noqa: S301 - made in the line itself
    assert (type(copied), str(copied), vars(copied)) == (type(warning), str(warning), vars(warning))


def test_a_warning_lists_names_by_reason_and_only_the_first_ones() -> None:
    names = [f"layer{index}" for index in range(errors.LISTED + 2)]
    text = str(errors.NothingQuantizedWarning("Net", {"skipped": names, "unknown": ["head"]}))
    assert "Net: nothing is quantized" in text
    assert f"layer{errors.LISTED - 1} and 2 more: skipped\n" in text
    assert "  head: unknown\n" in text
    assert "no layers" in str(errors.NothingQuantizedWarning("Net", {}))


@pytest.mark.parametrize("backend", errors.INSTALL)
def test_a_backend_of_this_project_says_how_it_is_installed(backend: str) -> None:
    assert errors.INSTALL[backend] in str(errors.UnknownBackendError(backend, [], {}))


@pytest.mark.parametrize("asked", ["evil; rm", "nowhere", "torch && curl", "../x", ""])
def test_nothing_that_was_typed_becomes_a_command(asked: str) -> None:
    key = Key(asked, QuantizationTarget.Weights, "LSQ", QuantizationMethod.SYMMETRIC)
    for message in (str(errors.UnknownBackendError(asked, [], {})), str(errors.UnknownQuantizerError(key, [], {}))):
        assert "pip install" not in message
        assert "keras, tf_keras, torch" in message


def test_a_backend_nearly_spelt_right_is_named_instead_of_an_installation() -> None:
    message = str(errors.UnknownBackendError("troch", ["torch"], {}))
    assert "did you mean 'torch'" in message
    assert "pip install" not in message


@pytest.mark.parametrize(("asked", "named"), [("treshold", "threshold"), ("zzz", "")])
def test_the_nearest_word_is_named_only_when_it_is_near(asked: str, named: str) -> None:
    hint = nearest(asked, ["threshold", "range_min"])
    assert (named in hint) if named else not hint
