"""The declarations of training methods, and what reads them."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest

from tests.core.numpy_backend import ADAPTER, NumpySte
from tests.golden import VECTORS, array, every_case, grid_of, tie_rule_of
from trainable_core import LinearAnnealingScheduler, TrainableQuantizerWeightsConfig
from trainable_core.conformance import check_quantizer
from trainable_core.conformance.suite import subjects_of
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TrainingMethod
from trainable_core.errors import InvalidArgumentError, QuantizerDefinitionError
from trainable_core.reference import dqa, lsq, ste
from trainable_core.reference.method import Method, Option
from trainable_core.reference.oracle import State
from trainable_core.registry.methods import (
    built_in_classes,
    built_in_methods,
    check_declared,
    declaration_of,
    declaring_classes,
)

METHODS = built_in_methods()
EXACT = 64 * 2.0**-53  # a few dozen float64 operations
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)


# ---- the built-ins --------------------------------------------------------------------------------------------------


def test_the_members_of_the_enum_are_built_in():
    assert {member.value for member in TrainingMethod} <= set(METHODS)


@every_method
def test_a_declaration_is_whole(method):
    assert method.title
    assert method.reference
    assert method.module.startswith("trainable_core.reference.")
    assert method.targets
    assert method.grids
    assert method.oracle is not None
    assert len({option.name for option in method.options}) == len(method.options)
    assert all(option.summary for option in method.options)
    for arguments in method.conformance_arguments:
        assert set(arguments) <= {option.name for option in method.options}
    assert (method.schedule_end is not None) == (method.training_forward != "deployed")


@every_method
def test_a_method_has_golden_vectors(method):
    assert (VECTORS / f"{method.module.rpartition('.')[2]}.json").exists()


@pytest.mark.parametrize(
    ("method", "case"),
    [
        pytest.param(method, case, id=f"{method.name}: {case['name']}")
        for method in METHODS.values()
        for case in every_case(method.module.rpartition(".")[2])
    ],
)
def test_the_oracle_agrees_with_the_golden_vectors(method: Method, case: dict[str, Any]):
    widths = case.get("widths", [case["n_bits"]])
    state = State(
        grids={width: grid_of(case, width) for width in widths},
        width=case.get("width", widths[0]),
        variables={name: np.asarray(case[name], np.float64) for name in method.own_names},
        arguments=case.get("arguments", {}),
        steps=case.get("steps", 0),
        tie_rule=tie_rule_of(case),
    )
    x, upstream = array(case["x"], np.float32), array(case["upstream"], np.float32)
    if "values" in case:
        found = method.oracle.values(x, state, True)
        np.testing.assert_allclose(found.values, array(case["values"]), rtol=2.0**-23)
    gradients = method.oracle.gradients(x, upstream, state)
    np.testing.assert_allclose(gradients.x, case["d_x"], rtol=EXACT)
    assert set(gradients.variables) == set(method.own_names)
    for name, value in gradients.variables.items():
        np.testing.assert_allclose(value, case[f"d_{name}"], rtol=EXACT)
    assert (gradients.grid is not None) == method.learns_grid
    if gradients.grid is not None:
        np.testing.assert_allclose(gradients.grid.scale, case["d_scale"], rtol=EXACT)
        np.testing.assert_allclose(gradients.grid.zero_point, case["d_zero_point"], rtol=EXACT)


# ---- what classes declare -------------------------------------------------------------------------------------------


class Declared(NumpySte):
    declaration = Method("MINE", options=(Option("rate", 0.5),), own_variables=("offset",), training_forward="soft")
    identifier = "MINE"

    def __init__(self, quantization_config, freeze_quant_params=False, rate=0.5):
        super().__init__(quantization_config, freeze_quant_params)


def test_a_class_takes_over_what_its_declaration_says():
    assert Declared.own_variables == ("offset",)
    assert Declared.training_forward == "soft"
    assert NumpySte.own_variables == ()


def test_the_declaration_of_a_class_is_its_own_or_the_built_ins_or_its_attributes():
    assert declaration_of(Declared, "MINE") is Declared.declaration
    assert declaration_of(NumpySte, "STE") is ste.METHOD

    class Plugin(NumpySte):
        learns_grid = True
        training_forward = "random"

    said = declaration_of(Plugin, "PLUGIN")
    assert (said.name, said.learns_grid, said.training_forward, said.oracle) == ("PLUGIN", True, "random", None)
    assert said.learns == ("thresholds", "ranges")


def test_a_subclass_under_another_name_inherits_all_but_the_oracle():
    class Child(NumpySte):
        declaration = lsq.METHOD

    class Grandchild(Child):
        pass

    said = declaration_of(Grandchild, "NEWER")
    assert said.learns_grid
    assert said.oracle is None


def test_arguments_of_a_plugins_constructor_are_its_options():
    assert declaration_of(Declared, "OTHER").options == (Option("rate", 0.5),)
    assert declaration_of(int, "A").options == ()  # the signature of a C type is not known


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"targets": (QuantizationTarget.Activation,)}, "Weights"),
        ({"grids": (QuantizationMethod.SYMMETRIC,)}, "UNIFORM"),
        ({"options": ()}, "rate"),
        ({"options": (Option("rate", 0.25),)}, "0.25"),
    ],
)
def test_a_class_that_departs_from_its_declaration_is_refused(changes, fact):
    fields = {"name": "MINE", "options": (Option("rate", 0.5),)}
    grids = (QuantizationMethod.SYMMETRIC, QuantizationMethod.UNIFORM)
    check_declared(Declared, Method(**fields), QuantizationTarget.Weights, grids)
    with pytest.raises(QuantizerDefinitionError, match=fact):
        check_declared(Declared, Method(**{**fields, **changes}), QuantizationTarget.Weights, grids)


def test_classes_are_collected_from_modules_of_the_methods_names(tmp_path, monkeypatch):
    package = tmp_path / "made_up_backend"
    package.mkdir()
    (package / "__init__.py").write_text("")
    text = "class Base: pass\nclass First(Base):\n    identifier = 'STE'\nclass Second(First): pass\n"
    (package / "ste.py").write_text(text)
    (package / "dqa.py").write_text("from made_up_backend.ste import First\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [cls.__name__ for cls in built_in_classes("made_up_backend")] == ["First"]
    lines = (
        "from trainable_core.reference import lsq\nclass Lsq:\n    declaration = lsq.METHOD\nclass Other(Lsq): pass\n"
    )
    (package / "lsq.py").write_text(lines)
    found = declaring_classes("made_up_backend")
    assert {name: cls.__name__ for name, cls in found.items()} == {"LSQ": "Lsq"}
    monkeypatch.delitem(sys.modules, "made_up_backend.lsq")
    (package / "lsq.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        built_in_classes("made_up_backend")


# ---- what the kit makes of it ---------------------------------------------------------------------------------------


class Dithered(NumpySte):
    """Adds noise before it rounds, while the model trains."""

    identifier = "DITHERED"
    training_forward = "random"

    def __call__(self, x, training=False):
        if not self.quantization_config.enabled:
            return super().__call__(x)
        noise = np.random.default_rng().random(np.shape(x), np.float32) - np.float32(0.5)
        scale = self.current_qparams().along(np.ndim(x)).scale
        return super().__call__((x + noise * scale).astype(x.dtype) if training else x)


def failing(cls: type[Any], *laws: str) -> set[str]:
    """Return which of some laws fail, or of all; few examples, none made smaller, because each law is tried."""
    verdicts = check_quantizer(cls, ADAPTER, laws=laws or None, examples=20, seed=0, shrink=False)
    return {verdict.law.name for verdict in verdicts if not verdict.holds}


def test_a_random_forward_is_taken_as_declared():
    assert failing(Dithered) == set()


def test_a_random_forward_that_nobody_declared_is_found():
    class Undeclared(Dithered):
        training_forward = "deployed"

    laws = "training_equals_evaluation", "schedule_resume"
    assert failing(Undeclared, *laws) == set(laws)


def test_a_declared_variable_that_does_not_learn_is_found():
    class Forgetful(NumpySte):
        identifier = "FORGETFUL"
        own_variables = ("offset",)

    assert failing(Forgetful) == {"variable_groups", "declared_variables"}


def test_a_declared_grid_that_does_not_learn_is_found():
    class Fixed(NumpySte):
        identifier = "FIXED"
        learns_grid = True

    assert failing(Fixed, "variable_groups") == {"variable_groups"}


def test_laws_on_the_reference_are_about_methods_with_an_oracle():
    (named, *_) = subjects_of(NumpySte, ADAPTER)
    (unnamed, *_) = subjects_of(Dithered, ADAPTER)
    assert named.method.oracle is not None
    assert unnamed.method.oracle is None


# ---- DQA's options --------------------------------------------------------------------------------------------------


def test_without_a_temperature_the_default_is_taken():
    assert dqa.temperature_schedule(LinearAnnealingScheduler, None, "q").to_dict() == dqa.TEMPERATURE


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        (3, "mapping"),
        ({"t_start": 0}, "missing"),
        ({**dqa.TEMPERATURE, "t_stop": 1}, "t_stop"),
        ({**dqa.TEMPERATURE, "t_end": 0}, "t_end"),
        ({**dqa.TEMPERATURE, "target_val": 0.0}, "positive"),
        ({**dqa.TEMPERATURE, "initial_val": -1.0}, "positive"),
    ],
)
def test_a_wrong_temperature_names_quantizer_and_argument(given, fact):
    with pytest.raises(InvalidArgumentError, match=fact) as caught:
        dqa.temperature_schedule(LinearAnnealingScheduler, given, "fc.weight")
    assert caught.value.subject == "fc.weight: temperature"


@pytest.mark.parametrize("weight", [0, 0.5, 3e38])
def test_a_bit_cost_weight_is_a_float(weight):
    assert isinstance(dqa.checked_bit_cost_weight(weight, "q"), float)
    assert dqa.checked_bit_cost_weight(weight, "q") == weight


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, 1e39, True, "much", None])
def test_a_wrong_bit_cost_weight_is_refused(weight):
    with pytest.raises(InvalidArgumentError, match="bit_cost_weight"):
        dqa.checked_bit_cost_weight(weight, "q")


def config(**more):
    return TrainableQuantizerWeightsConfig(
        weights_quantization_method="SYMMETRIC", weights_n_bits=4, weights_quantization_params={}, **more
    )


def test_widths_ascend_and_have_a_default():
    assert dqa.candidate_widths(config()) == (4, 8, 16)
    candidates = [{"n_bits": width} for width in (8, 2)]
    assert dqa.candidate_widths(config(weights_quantization_candidates=candidates)) == (2, 8)


@pytest.mark.parametrize(("t_end", "counted"), [(1, 2), (2.5, 3), (3, 4)])
def test_deployed_values_begin_with_the_step_after_the_soft_ones(t_end, counted):
    schedule = LinearAnnealingScheduler(0, t_end, 1.0, 0.1)
    assert dqa.schedule_end(schedule) == counted
    assert dqa.METHOD.schedule_end({"temperature": schedule.to_dict()}) == counted
