"""The kit proves itself: every planted PyTorch defect is rejected, first by the law that is about its mistake."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("trainable_torch")

import torch
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from tests.planted import torch_defects, torch_strangers, torch_tables, torch_variables
from tests.planted.defect import DEFECTS, EXAMPLES, SEED, Defect, failures
from tests.planted.table import listed
from trainable_core.conformance import LAWS, adapter_of, try_law
from trainable_core.conformance.suite import subjects_of

PLANTED = DEFECTS["torch"]
BEFORE = 20  # cases of the laws that must hold
# For each law one defect that no other law sees: without the law it would pass the kit.
ALONE = {
    "bad_batches": "MeanOfNothing",
    "on_grid": "ShortTable",
    "level_count": "DeadZone",
    "idempotence": "DoubledOnTheWayIn",
    "zero": "NegativeZero",
    "saturation": "WrapAround",
    "monotonicity": "ComparedTheWrongWay",
    "tie_rule": "HalfUp",
    "per_channel": "FirstChannelsScale",
    "per_block": "ScatteredGroups",
    "channels_axis": "FirstAxisOnly",
    "locality": "DropsABadBatch",
    "reference_values": "BiasedMixture",
    "dtype_shape_device": "Float32Out",
    "no_mutation": "ClipsItsInput",
    "determinism": "ObservesInEval",
    "deployment": "ConvertsBeforeRounding",
    "training_equals_evaluation": "TextbookTrick",
    "input_gradient": "AnotherSurrogate",
    "gradient_at_ends": "OpenRange",
    "variable_gradients": "WrongSign",
    "declared_variables": "InAnotherGroup",
    "gradients_arrive": "DetachedVariable",
    "per_channel_gradients": "SummedOverChannels",
    "gradient_direction": "NegatedVariable",
    "bounded_thresholds": "NanThreshold",
    "freeze": "FreezeAfterTheFact",
    "variable_groups": "HiddenParameter",
    "schedule_resume": "StepNotSaved",
    "config_round_trip": "CandidatesLost",
    "state_round_trip": "SignNotSaved",
    "model_round_trip": "KeysWithoutPrefix",
    "deepcopy": "KeepsItsOutput",
    "refusals": "SilentBeforeCalibration",
    "memory_layout": "FastPathForContiguous",
    "tensor_size": "AnotherTieInTheFastPath",
    "nan_inputs": "NanToZero",
    "deployed_dtypes": "DeploysInTheInputsDtype",
    "evaluation_gradients": "RootInEval",
    "nonfinite_inputs": "MaskedByAProduct",
    "dtype_gradients": "HalfInBackward",
    "interleaved_calls": "MaskBuffer",
    "accumulation": "SetsItsGradient",
    "deploy_after_step": "DeploysTheLastForward",
    "convert_midway": "DeployedShares",
    "recalibration": "NewParametersAtCalibration",
    "load_then_deploy": "RemembersWhatItDeployed",
    "freeze_midway": "FreezeLeavesGradients",
    "training_by_default": "EvaluatesByDefault",
    "second_initialization": "InitializesAgain",
    "schedule_count": "CountsInForwardToo",
    "schedule_of_a_frozen_quantizer": "FrozenScheduleStops",
    "schedule_of_a_copy": "SharedStep",
    "regularization_gradient": "DetachedTerm",
    "regularization_once": "TermDecaysWhenItIsRead",
    "declared_penalty": "TermWithoutItsFactor",
    "incomplete_states": "LoadsWhatThereIs",
    "global_random_state": "SeedsEverything",
    "kept_memory": "KeepsItsInput",
    "fresh_output": "OutputBuffer",
    "upstream_unchanged": "MasksInPlace",
    "gradient_mode": "RecordsAlways",
    "second_derivatives": "CutInBackward",
    "pickling": "WeakReference",
    "threads": "OnlyInTheFirstThread",
    "cast_models": "HalvesItsThreshold",
    "inside_a_layer": "KeepsItsFirstWeights",
    "regularization_of_tensor": "TermOfHalfTheRoundings",
    "graph_execution": "UnroundedWhileTraced",
    "forward_derivatives": "TangentEverywhere",
    "vectorized_calls": "AnotherTieInABatch",
    "told_scale": "TellsItsFirstScale",
    "width_selection": "SelectsTheSmallest",
    "replaced_methods": "CallsByItsClass",
    "modifiers": "PassesModifiersOver",
    "modifier_state": "ForgetsWithTheCheckpoint",
    "gradient_of_a_frozen_quantizer": "PassesWhileFrozen",
    "gradient_reaches_the_input": "RoundsWithoutAGradient",
    "loss_scale": "ClipsWhatComesIn",
    "contexts": "KeepsTheGridOfAnEvaluation",
    "mode_of_the_call": "AsksTheModule",
    "several_quantizers": "OptionOfTheClass",
    "other_device": "AddsFromTheCpu",
    "random_values": "NoiseOfThePlace",
    "seeds": "SeedsTheNextLayer",
    "regularization_arrives": "TermWithoutAPath",
    "several_sizes": "KeepsItsFirstCount",
    "random_channels": "NoiseOfTheWidestChannel",
    "regularization_of_constants": "KurtosisOfEquals",
    "representation": "ShowsItsThreshold",
    "disabled": "AlwaysOn",
    "python_state": "WarmUpInPython",
    "process_settings": "SeedsItsStart",
    "freed": "RemembersAll",
}
# Laws without such a defect, and why.
NOT_ALONE = {
    "before_a_layer": "a layer looks behind our own quantizers alone; mutants of our kernels show it",
    "batched_gradients": "a backward pass sees one gradient at a time, or refuses; mutants of our kernels show it",
}


# Laws that try more situations, and meet some of these mistakes there before the law that is about them is tried.
EARLIER = {
    "AlwaysTheFirstAxis": "memory_layout",
    "ClipsItsInput": "on_grid",  # an expanded input can't be written into
    "NanThreshold": "gradients_arrive",
    "ArgumentsLost": "regularization_gradient",
    "ThresholdNotPersistent": "load_then_deploy",
    "SeedsTheNextLayer": "random_values",  # the seed is still set when the next case begins
    "SharedThreshold": "convert_midway",
    "KeysWithoutPrefix": "schedule_resume",  # a state is saved as that of a model which holds the quantizer
    "DeploysTheLastForward": "disabled",
    "CountsEvaluations": "determinism",
}
# Defects that were seen by one law only, and the laws on more situations that see them since as well.
ALSO = {
    "FirstChannelsScale": {"per_block"},
    "OutputBuffer": {"inside_a_layer"},
    "DropsABadBatch": {"nan_inputs", "nonfinite_inputs"},
    "WrapAround": {"nan_inputs"},
    "Float32Out": {"deployed_dtypes"},
    "ObservesInEval": {"second_initialization", "cast_models"},
    "WrongSign": {"evaluation_gradients", "gradient_at_ends"},
    "FreezeAfterTheFact": {"freeze_midway"},
    "SignNotSaved": {"incomplete_states"},
    "KeepsItsOutput": {"kept_memory"},
    "ConvertsBeforeRounding": {"deployed_dtypes", "deploy_after_step", "load_then_deploy", "cast_models", "contexts"},
    "RecordsAlways": {"contexts"},
    "TextbookTrick": {"nonfinite_inputs", "evaluation_gradients"},
    "TermDecaysWhenItIsRead": {"state_round_trip"},
    "StepNotSaved": {
        "state_round_trip",
        "incomplete_states",
        "other_device",
    },  # its term for the loss depends on the step
}
# These run a quantizer once more in another way, or several times at once, so they may see what the law sees that is
# about the mistake; by chance, where it depends on which thread is faster.
AGAIN = {
    "graph_execution",
    "replaced_methods",
    "forward_derivatives",
    "threads",
    "before_a_layer",
    "modifiers",
    "modifier_state",
}


@pytest.fixture(autouse=True)
def own_defaults():
    """Put back the settings of the process that planted defects change."""
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.all_cases
@pytest.mark.parametrize("defect", PLANTED, ids=str)
def test_a_planted_defect_is_rejected_by_the_law_that_is_about_it(defect: Defect):
    assert next(failures(defect.cls, defect.caught_by, 0), None) is not None, f"nothing rejects {defect}"


@pytest.mark.parametrize("defect", PLANTED, ids=str)
def test_no_other_law_is_the_first_to_reject_a_planted_defect(defect: Defect):
    found = failures(defect.cls, defect.caught_by, BEFORE if defect.before is None else defect.before)
    first = next(found, None)
    assert first is not None, f"nothing rejects {defect}: {defect.mistake}"
    assert first.law.name == EARLIER.get(str(defect), defect.caught_by), first.counterexample
    if ALONE.get(defect.caught_by) == str(defect) and str(defect) not in EARLIER:
        others = {verdict.law.name for verdict in found} - AGAIN
        assert others == ALSO.get(str(defect), set()), f"{defect} was to be seen by one law only, or by these"


@pytest.fixture
def leaking(monkeypatch):
    """A class whose module imports another framework."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "leak"))
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.delitem(sys.modules, "planted_leak", raising=False)
    module = importlib.import_module("planted_leak")
    monkeypatch.delitem(sys.modules, "jax")  # the made-up one must not stay
    return module.ImportsAnotherFramework


def test_a_framework_leak_is_rejected_by_its_law_alone(leaking):
    found = list(failures(leaking, "no_framework_leak", BEFORE))
    assert [verdict.law.name for verdict in found] == ["no_framework_leak"]
    assert found[0].counterexample is not None
    assert found[0].counterexample.got == "['jax']"


def test_every_law_is_the_only_one_to_catch_something():
    assert {*ALONE, *NOT_ALONE, "no_framework_leak"} == set(LAWS)
    assert not ALONE.keys() & NOT_ALONE.keys()
    assert set(ALONE.values()) <= {str(defect) for defect in PLANTED}


def test_the_documentation_lists_every_defect():
    assert listed("torch") == [(str(defect), defect.mistake, defect.caught_by) for defect in PLANTED]


def sound(cls):
    """Return a class that defects are planted in, as a subject; a mark has been put on its subclasses only."""
    marked = mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.SYMMETRIC], "SOUND")
    name = f"Marked{cls.__name__}"
    made = marked(type(name, (cls,), {"__module__": cls.__module__}))
    setattr(sys.modules[cls.__module__], name, made)  # where pickle looks for it
    return subjects_of(made, adapter_of("torch"))


@pytest.mark.parametrize(
    "subject",
    [
        *subjects_of(torch_defects.Sound, adapter_of("torch")),
        *subjects_of(torch_tables.SoundTable, adapter_of("torch")),
        *sound(torch_variables.Sound),
    ],
    ids=str,
)
def test_the_quantizer_that_defects_are_planted_in_is_sound(subject):
    verdicts = [try_law(law, subject, examples=EXAMPLES, seed=SEED) for law in LAWS.values() if law.about(subject)]
    assert [verdict.counterexample for verdict in verdicts if not verdict.holds] == []


@pytest.mark.parametrize(
    "subject", [s for cls in torch_strangers.SOUND for s in subjects_of(cls, adapter_of("torch"))], ids=str
)
def test_what_strangers_make_mistakes_in_is_sound(subject):
    verdicts = [try_law(law, subject, examples=8, seed=SEED) for law in LAWS.values() if law.about(subject)]
    assert [verdict.counterexample for verdict in verdicts if not verdict.holds] == []
