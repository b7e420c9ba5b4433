"""Groups for optimizers, terms for the loss, freezing, and counting steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.keras.framework import (
    ENGINE,
    apply_gradients,
    dtype_policy,
    internal,
    keras,
    kl,
    name_of,
    numpy,
    only_tensorflow,
    tensor,
    tf,
    value_of,
)
from tests.keras.models import (
    GRIDS,
    TRAINED_BY,
    call,
    dense,
    images,
    network,
    ready,
    recipe,
    spec,
    state,
    train,
    vectors,
    weights_only,
)
from trainable_core.errors import InvalidArgumentError, ModelError
from trainable_keras import (
    advance_schedules,
    calibrate,
    describe,
    exclude_from_weight_decay,
    finalize,
    freeze_quant_params,
    parameter_groups,
    regularization,
    wrap,
)
from trainable_keras.training import quantizers_of

SCHEDULE = {"t_start": 0, "t_end": 4, "initial_val": 1.0, "target_val": 0.1}
LEARNED = {"STE": set(), "LSQ": {"threshold", "range_min", "range_max"}, "DQA": {"logits"}}


def dqa(**arguments: Any) -> dict[str, Any]:
    return {"weights": spec("DQA", candidates=[2, 8], arguments={"temperature": SCHEDULE, **arguments})}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_quantizers_variables_are_one_group_and_everything_else_the_other(training_method: str, grid: str) -> None:
    qmodel = ready(dense(), recipe(training_method, grid), vectors(8, 4))
    groups = {group["name"]: group["params"] for group in parameter_groups(qmodel)}
    assert {name_of(variable) for variable in groups["WEIGHTS"]} == {"kernel", "bias"}
    assert {name_of(variable) for variable in groups.get("QPARAMS", [])} <= LEARNED[training_method]
    assert ("QPARAMS" in groups) is bool(LEARNED[training_method])
    listed = [id(variable) for group in groups.values() for variable in group]
    assert sorted(listed) == sorted(id(variable) for variable in qmodel.trainable_variables)


def test_frozen_weights_are_left_out() -> None:
    layers = [keras.Input((4,)), kl.Dense(4, name="frozen"), kl.Dense(3, name="trained")]
    qmodel = ready(keras.Sequential(layers), recipe("LSQ"), vectors(8, 4))
    qmodel.get_layer("frozen").trainable = False
    found = {group["name"]: [id(each) for each in group["params"]] for group in parameter_groups(qmodel)}
    trained = qmodel.get_layer("trained")
    assert found["WEIGHTS"] == [id(each) for each in (trained.kernel, trained.bias)]
    assert len(found["QPARAMS"]) == 2  # of its kernel and of its input


def test_options_go_to_their_group_and_thresholds_do_not_decay() -> None:
    qmodel = ready(dense(), recipe("LSQ"), vectors(8, 4))
    one, other = parameter_groups(qmodel, weights={"learning_rate": 0.1}, qparams={"learning_rate": 0.01})
    assert (one["learning_rate"], other["learning_rate"], other["weight_decay"]) == (0.1, 0.01, 0.0)
    assert "weight_decay" not in one
    (_, decayed) = parameter_groups(qmodel, qparams={"weight_decay": 0.1})
    assert decayed["weight_decay"] == 0.1
    (_, paced) = parameter_groups(qmodel, qparams={"learning_rate": 0.5}, pace="scale")
    assert paced["learning_rate"] == 0.5 * 4.0**3


@pytest.mark.parametrize("options", [{"weights": {"params": []}}, {"qparams": {"name": "mine"}}, {"weights": 0.1}])
def test_wrong_options_are_refused(options: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"parameter_groups: {next(iter(options))}"):
        parameter_groups(ready(dense(), recipe("LSQ"), vectors(8, 4)), **options)


def test_an_optimizer_for_each_group_moves_its_own() -> None:
    qmodel = ready(dense(), recipe("LSQ"), vectors(8, 4))
    for chosen, optimizer in (("WEIGHTS", keras.optimizers.SGD(0.1)), ("QPARAMS", keras.optimizers.SGD(0.1))):
        groups = {group["name"]: group["params"] for group in parameter_groups(qmodel)}
        before = {name: [numpy(v).copy() for v in variables] for name, variables in groups.items()}
        apply_gradients(optimizer, [tensor(np.ones(tuple(v.shape))) for v in groups[chosen]], groups[chosen])
        for name, variables in groups.items():
            moved = [not np.array_equal(numpy(v), old) for v, old in zip(variables, before[name], strict=True)]
            assert all(moved) if name == chosen else not any(moved)


def test_thresholds_can_be_kept_from_the_weight_decay_of_fit() -> None:
    qmodel = ready(dense(), recipe("LSQ"), vectors(8, 4))
    (_, learned) = parameter_groups(qmodel)
    optimizer = keras.optimizers.SGD(0.0, weight_decay=0.5)
    exclude_from_weight_decay(optimizer, qmodel)
    before = [numpy(v).copy() for v in learned["params"]]
    kernel = qmodel.layers[0].layer.kernel
    old = numpy(kernel).copy()
    optimizer.build(qmodel.trainable_variables)
    optimizer.learning_rate.assign(1.0)
    still = [tensor(np.zeros(tuple(v.shape))) for v in qmodel.trainable_variables]
    apply_gradients(optimizer, still, qmodel.trainable_variables)
    assert all(np.array_equal(numpy(v), kept) for v, kept in zip(learned["params"], before, strict=True))
    assert not np.array_equal(numpy(kernel), old)


LsqWeightsQuantizer = internal("quantizers").LsqWeightsQuantizer


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_without_a_term_regularization_is_zero() -> None:
    assert float(numpy(regularization(ready(dense(), recipe("LSQ"), vectors(8, 4))))) == 0.0


def test_the_terms_of_all_quantizers_are_summed() -> None:
    qmodel = ready(network(), dqa(bit_cost_weight=0.25))
    # three layers, logits all equal: the mean of 2 and 8 bits; exact in float32
    assert float(numpy(regularization(qmodel))) == 3 * 0.25 * 5.0


def test_a_quantizer_that_is_switched_off_adds_no_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LsqWeightsQuantizer, "regularization", lambda _: tensor(1.0))
    monkeypatch.setattr(LsqWeightsQuantizer, "regularization_of", lambda *_: tensor(1.0))
    off = [{"match": {"name": "head"}, "weights": {"enabled": False}}]
    terms = [regularization(ready(network(), weights_only("LSQ", rules=rules))) for rules in ([], off)]
    assert [float(numpy(each)) for each in terms] == [6.0, 4.0]  # of three layers, or of two: two terms each


@only_tensorflow("AutoGraph is TensorFlow's")
def test_verbs_of_a_loop_of_your_own_are_not_rewritten_by_autograph(caplog: pytest.LogCaptureFixture) -> None:
    dampened = spec("LSQ", modifiers={"oscillation_dampening": {"strength": {**SCHEDULE, "target_val": 2.0}}})
    qmodel = ready(dense(), {"weights": dampened, "activations": spec("LSQ", "UNIFORM")}, vectors(8, 4))
    mixed = ready(dense(), dqa(bit_cost_weight=0.25), vectors(8, 4))

    def step() -> Any:
        assert all(group["params"] for group in parameter_groups(qmodel))
        freeze_quant_params(qmodel, frozen=False)
        advance_schedules(qmodel)
        return regularization(qmodel) + regularization(mixed)

    with caplog.at_level("WARNING", logger="tensorflow"):
        found = tf.function(step)()
    assert "AutoGraph" not in caplog.text
    assert float(found) > 0.25 * 5.0  # the dampening has a term too
    assert float(found) == pytest.approx(float(regularization(qmodel) + regularization(mixed)), rel=1e-6)


def test_fit_minimizes_the_same_terms() -> None:
    qmodel = ready(dense(), dqa(bit_cost_weight=0.25))
    call(qmodel, vectors(8, 4))
    assert qmodel.losses == []
    call(qmodel, vectors(8, 4), training=True)
    (term,) = qmodel.losses
    assert float(numpy(term)) == float(numpy(regularization(qmodel))) == 0.25 * 5.0
    train(qmodel, vectors(8, 4), lr=0.5)
    (quantizer,) = quantizers_of(qmodel).values()
    logits = numpy(quantizer.logits)
    assert logits[0] > logits[1]  # fewer bits cost less


# ---- freezing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training_method", ["LSQ", "DQA"])
def test_what_is_frozen_stays_while_the_weights_train(training_method: str) -> None:
    qmodel = ready(dense(), recipe(training_method), vectors(8, 4))
    assert freeze_quant_params(qmodel) is qmodel
    qmodel.trainable = False
    qmodel.trainable = True  # Keras sets every layer's
    assert [group["name"] for group in parameter_groups(qmodel)] == ["WEIGHTS"]
    assert {row.state for row in describe(qmodel).rows} == {"frozen"}
    before = [row.params for row in describe(qmodel).rows]
    kernel = numpy(qmodel.layers[0].layer.kernel).copy()
    train(qmodel, vectors(8, 4), lr=0.5)
    assert [row.params for row in describe(qmodel).rows] == before
    assert not np.array_equal(numpy(qmodel.layers[0].layer.kernel), kernel)
    freeze_quant_params(qmodel, frozen=False)
    assert [group["name"] for group in parameter_groups(qmodel)] == ["WEIGHTS", "QPARAMS"]


def test_a_model_frozen_after_it_was_compiled_is_frozen_in_the_next_fit() -> None:
    qmodel = train(ready(dense(), recipe("LSQ"), vectors(8, 4)), vectors(8, 4), lr=0.5)
    freeze_quant_params(qmodel)
    before = [row.params for row in describe(qmodel).rows]
    train(qmodel, vectors(8, 4), lr=0.5)
    assert [row.params for row in describe(qmodel).rows] == before


# ---- schedules ------------------------------------------------------------------------------------------------------


def steps(qmodel: Any) -> list[int]:
    return [int(numpy(quantizer.step)) for quantizer in quantizers_of(qmodel).values()]


def test_fit_counts_one_step_for_each_batch_and_predict_none() -> None:
    qmodel = ready(dense(), dqa())
    qmodel.compile("sgd", "mse")
    qmodel.fit(vectors(8, 4), np.zeros((8, 3)), batch_size=2, epochs=2, verbose=0)
    assert steps(qmodel) == [8]
    qmodel.predict(vectors(8, 4), verbose=0)
    qmodel.evaluate(vectors(8, 4), np.zeros((8, 3)), verbose=0)
    assert steps(qmodel) == [8]


def test_advancing_counts_a_step_of_every_schedule() -> None:
    qmodel = ready(network(), dqa())
    advance_schedules(qmodel)
    advance_schedules(qmodel)
    assert steps(qmodel) == [2, 2, 2]


def test_at_the_end_of_its_schedule_a_model_trains_with_what_is_deployed() -> None:
    qmodel = ready(dense(), dqa())
    assert not np.array_equal(call(qmodel, vectors(8, 4), training=True)[0], call(qmodel, vectors(8, 4))[0])
    for _ in range(4):
        advance_schedules(qmodel)
    assert np.array_equal(call(qmodel, vectors(8, 4), training=True)[0], call(qmodel, vectors(8, 4))[0])


@pytest.mark.parametrize(
    "verb", [parameter_groups, regularization, freeze_quant_params, advance_schedules], ids=lambda verb: verb.__name__
)
def test_what_was_not_wrapped_is_refused(verb: Any) -> None:
    model = dense()
    before = state(model)
    with pytest.raises(ModelError, match=r"trainable_keras\.wrap"):
        verb(model)
    assert state(model) == before


def test_a_model_of_another_kind_is_calibrated_before_it_is_grouped() -> None:
    qmodel = wrap(network(), recipe("LSQ"))
    names = [group["name"] for group in parameter_groups(qmodel)]  # variables are there from the start
    calibrate(qmodel, [images()])
    assert [group["name"] for group in parameter_groups(qmodel)] == names == ["WEIGHTS", "QPARAMS"]


# ---- loops and compilers --------------------------------------------------------------------------------------------


@only_tensorflow("the loop is one of tf.function")
def test_a_training_loop_of_your_own_moves_weights_and_thresholds() -> None:
    qmodel = ready(network(), recipe("LSQ", "UNIFORM"), images())
    groups = parameter_groups(qmodel)
    optimizers = [keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.01)]
    for optimizer, group in zip(optimizers, groups, strict=True):
        optimizer.build(group["params"])

    @tf.function
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(qmodel(x, training=True) ** 2) + regularization(qmodel)
        variables = [[value_of(variable) for variable in group["params"]] for group in groups]
        for optimizer, group, found in zip(optimizers, groups, tape.gradient(loss, variables), strict=True):
            apply_gradients(optimizer, found, group["params"])
        return loss

    before = [numpy(variable).copy() for variable in groups[1]["params"]]
    losses = [float(step(tensor(images()))) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert any(not np.array_equal(numpy(v), old) for v, old in zip(groups[1]["params"], before, strict=True))


@only_tensorflow("XLA compiles what TensorFlow runs")
def test_xla_differs_by_no_more_than_a_step_next_to_ties() -> None:
    qmodel = ready(network(), {"weights": spec("LSQ")})
    quantizer = quantizers_of(qmodel)["stem.conv.kernel"]
    grid = quantizer.current_qparams().along(4)
    weight = np.random.default_rng(0).normal(size=(3, 3, 64, 4)).astype(np.float32) * 0.3
    compiled = tf.function(lambda x: quantizer(x, training=True), jit_compile=True)(tensor(weight))
    codes, eager = (np.rint(numpy(each) / grid.scale) for each in (compiled, quantizer(tensor(weight))))
    steps = weight.astype(np.float64) / grid.scale
    distance = np.abs(steps - np.floor(steps) - 0.5)
    assert (np.abs(codes - eager) <= 1).all()
    assert (distance[codes != eager] <= 2.0**4 * 2.0**-24).all()


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=["graph", "XLA", "eager"])
def test_fit_trains_weights_and_thresholds(options: dict[str, bool]) -> None:
    if ENGINE == "torch" and "jit_compile" in options:
        pytest.skip("Keras compiles nothing on the torch engine")
    qmodel = ready(network(), recipe("LSQ", "UNIFORM"), images())
    (_, learned) = parameter_groups(qmodel)
    before = [numpy(variable).copy() for variable in learned["params"]]
    qmodel.compile(keras.optimizers.SGD(0.05), "mse", **options)
    losses = qmodel.fit(images(), np.ones((8, 3), np.float32), epochs=4, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert any(not np.array_equal(numpy(v), old) for v, old in zip(learned["params"], before, strict=True))
    assert np.array_equal(call(finalize(qmodel), images())[0], call(qmodel, images())[0])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixed_policy_trains(policy: str) -> None:
    with dtype_policy(policy):
        qmodel = ready(network(), recipe("LSQ", "UNIFORM"), images())
        qmodel.compile(keras.optimizers.SGD(0.05), "mse")
        target = np.ones((8, 3), np.float32)
        losses = qmodel.fit(images(), target, epochs=3, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
