"""Look-up tables: trained, deployed, saved, and given to mct-quantizers bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.keras.framework import ENGINE, KERAS_VERSION, keras, kl, numpy, pull_back, tensor, tf
from tests.keras.models import call, dense, quantizer_at, ready, train, vectors
from tests.table_models import ACTIVATIONS, RECIPES, REFUSED_OF_ACTIVATIONS, refused
from trainable_core.errors import TrainableError
from trainable_core.reference import affine, dkm
from trainable_core.reference.oracle import State
from trainable_keras import describe, finalize, load, save, to_mctq, wrap
from trainable_keras.training import quantizers_of


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_trained_is_what_mctqs_own_class_computes(recipe: dict[str, Any], tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), kl.Dense(6, activation="relu"), kl.Dense(3)])
    qmodel = ready(model, recipe, vectors(4, 8))
    learned = [
        variable
        for variable in qmodel.trainable_variables
        if "threshold" in variable.name or "centroids" in variable.name
    ]
    before = [numpy(variable).copy() for variable in learned]
    train(qmodel, vectors(4, 8))
    assert any(not np.array_equal(numpy(v), old) for v, old in zip(learned, before, strict=True))
    x = vectors(16, 8)
    deployed = finalize(qmodel)
    expected = call(qmodel, x)
    np.testing.assert_array_equal(call(deployed, x), expected)
    save(deployed, tmp_path / "deployed.keras")
    np.testing.assert_array_equal(call(load(tmp_path / "deployed.keras", model), x), expected)
    if KERAS_VERSION == 2:
        np.testing.assert_array_equal(call(to_mctq(deployed), x), expected)
    elif ENGINE == "tensorflow":
        (quantizer,) = deployed.layers[0].weights_quantizers.values()
        kernel = numpy(deployed.layers[0].kernel)
        stock = quantizer.to_mctq()(tf.constant(kernel))
        np.testing.assert_array_equal(numpy(stock), numpy(quantizer(tf.constant(kernel))))


@pytest.mark.parametrize("n_bits", [1, 3])
def test_soft_values_and_their_gradients_are_the_reference_s(n_bits: int) -> None:
    arguments = {"temperature": {"t_start": 0, "t_end": 9, "initial_val": 0.3, "target_val": 0.1}}
    weights = {"method": "LUT_SYM_QUANTIZER", "n_bits": n_bits, "training_method": "DKM", "arguments": arguments}
    random = np.random.default_rng(n_bits)
    qmodel = ready(dense(40), {"weights": weights}, vectors(4, 40))
    quantizer = quantizer_at(qmodel, "fc.kernel")
    centroids = random.uniform(-140, 140, 2**n_bits).astype(np.float32)  # some are clipped
    quantizer.assign(quantizer.centroids, centroids)
    x, upstream = (random.normal(0, size, (40, 3)).astype(np.float32) for size in (0.1, 1.0))
    x[:4, 0] = np.nan, np.inf, -np.inf, 0.0
    state = State({n_bits: quantizer.current_qparams()}, n_bits, {"centroids": centroids}, quantizer.get_arguments(), 1)
    quantizer.advance()

    def soft(given: Any) -> Any:
        return quantizer.quantized(given, True)

    d_x, d_centroids = pull_back(soft, [tensor(x)], tensor(upstream), [quantizer.centroids])
    expected = dkm.METHOD.oracle.values(x, state, True)
    found = numpy(soft(tensor(x)))
    assert np.array_equal(np.isnan(found), np.isnan(x))
    assert (np.abs(found - expected.values) <= expected.allowed)[~np.isnan(x)].all()
    right = dkm.METHOD.oracle.gradients(x, upstream, state)
    assert (np.abs(d_x - right.x) <= right.x_allowed).all()
    off = np.abs(d_centroids - right.variables["centroids"])
    assert (off <= right.variables_allowed["centroids"]).all()


@pytest.mark.parametrize("jit", [False, True] if ENGINE == "tensorflow" else [False])
def test_learned_levels_are_read_in_a_graph(jit: bool, tmp_path: Path) -> None:
    """The table of a compiled function is that of the variable as it is now, not as it was when it was traced."""
    qmodel = ready(dense(8), RECIPES["learned LUT_SYM_QUANTIZER per channel"], vectors(4, 8))
    quantizer, x = quantizer_at(qmodel, "fc.kernel"), vectors(4, 8)
    qmodel.compile("sgd", "mse", jit_compile=jit)
    qmodel.predict(x, verbose=0)
    quantizer.assign(quantizer.centroids, np.array([50.2, -60.0, 49.9, 100.0], np.float32))
    assert quantizer.levels == (-60, 50, 100)
    save(finalize(qmodel), tmp_path / "deployed")
    loaded = load(tmp_path / "deployed", dense(8))
    assert [q.levels for q in loaded.layers[0].weights_quantizers.values()] == [(-60, 50, 100)]
    # XLA may add the products of the layer in another order: eight of them, of magnitude 1 at most
    deployed = finalize(qmodel).predict(x, verbose=0)
    np.testing.assert_allclose(qmodel.predict(x, verbose=0), deployed, rtol=0, atol=8 * 8 * 2.0**-23 if jit else 0)


# ---- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_trained_activations_are_what_mctqs_own_class_computes(recipe: dict[str, Any], tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), kl.Dense(6), kl.ReLU(), kl.Dense(3)])
    qmodel = ready(model, recipe, vectors(4, 8))
    quantizers = list(quantizers_of(qmodel).values())
    assert [quantizer.signed for quantizer in quantizers] == [True, False]
    before = [numpy(quantizer.threshold).copy() for quantizer in quantizers]
    train(qmodel, vectors(4, 8))
    learns = recipe["activations"]["training_method"] == "APOT"
    assert [numpy(q.threshold) != old for q, old in zip(quantizers, before, strict=True)] == [learns] * 2
    x = vectors(16, 8)
    deployed = finalize(qmodel)
    expected = call(qmodel, x)
    np.testing.assert_array_equal(call(deployed, x), expected)
    for name, saved in (("deployed", deployed), ("trained", qmodel)):
        save(saved, tmp_path / name)
        np.testing.assert_array_equal(call(load(tmp_path / name, model), x), expected)
    tables = [row.params for row in describe(deployed).rows]
    assert [table["is_signed"] for table in tables] == [True, False]
    if KERAS_VERSION == 2:
        np.testing.assert_array_equal(call(to_mctq(deployed), x), expected)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("n_bits", "method"), [(2, "APOT"), (5, "APOT"), (3, "DKM")])
def test_every_activation_gets_mctqs_level_and_passes_its_gradient(signed: bool, n_bits: int, method: str) -> None:
    section = {"method": "LUT_POT_QUANTIZER", "n_bits": n_bits, "training_method": method, "signed": signed}
    qmodel = ready(dense(50), {"activations": section}, np.linspace(-1.0, 1.9, 50, dtype=np.float32)[None])
    (quantizer,) = quantizers_of(qmodel).values()
    quantizer.assign(quantizer.threshold, np.float32(0.3))  # rounded up to 0.5
    steps, (first, last) = (128, (-128, 127)) if signed else (256, (0, 255))
    codes = np.arange(-4 * 300, 4 * 300, dtype=np.float32) / 4  # every level, every tie, beyond the ends
    x = codes / steps * np.float32(0.5)
    deployed = quantizer.convert2inferable()
    values = numpy(quantizer(tensor(x)))
    np.testing.assert_array_equal(values, affine.fake_quantize(x, quantizer.current_qparams()))
    np.testing.assert_array_equal(numpy(deployed(tensor(x))), values)
    if ENGINE == "tensorflow" or KERAS_VERSION == 2:
        np.testing.assert_array_equal(numpy(deployed.to_mctq()(tf.constant(x))), values)
    again = type(deployed).from_config(deployed.get_config())
    assert (again.levels, again.quant_min) == (deployed.levels, deployed.quant_min) == (quantizer.levels, first)
    np.testing.assert_array_equal(numpy(again(tensor(x))), values)
    extreme = numpy(deployed(tensor(np.array([np.inf, -np.inf, np.nan], np.float32))))
    assert extreme[:2].tolist() == [quantizer.levels[-1] / steps * 0.5, quantizer.levels[0] / steps * 0.5]
    assert np.isnan(extreme[2])
    for each in [deployed, *([quantizer] if method == "DKM" else [])]:
        (d_x,) = pull_back(each, [tensor(x)], tensor(np.ones_like(x)), [])
        np.testing.assert_array_equal(d_x, (codes >= first) & (codes <= last))


@pytest.mark.parametrize("signed", [True, False])
def test_soft_activations_and_their_gradients_are_the_reference_s(signed: bool) -> None:
    arguments = {"temperature": {"t_start": 0, "t_end": 9, "initial_val": 0.3, "target_val": 0.1}}
    section = {"method": "LUT_POT_QUANTIZER", "n_bits": 3, "training_method": "DKM", "arguments": arguments}
    random = np.random.default_rng(3)
    qmodel = ready(dense(40), {"activations": {**section, "signed": signed}}, vectors(4, 40))
    (quantizer,) = quantizers_of(qmodel).values()
    centroids = random.uniform(-140, 270, 8).astype(np.float32)  # some are clipped
    quantizer.assign(quantizer.centroids, centroids)
    x, upstream = random.normal(0, 2, (9, 40)).astype(np.float32), random.normal(0, 1, (9, 40)).astype(np.float32)
    x[0, :4] = np.nan, np.inf, -np.inf, 0.0
    state = State({3: quantizer.current_qparams()}, 3, {"centroids": centroids}, quantizer.get_arguments(), 1)
    quantizer.advance()

    def soft(given: Any) -> Any:
        return quantizer.quantized(given, True)

    d_x, d_centroids = pull_back(soft, [tensor(x)], tensor(upstream), [quantizer.centroids])
    expected = dkm.METHOD.oracle.values(x, state, True)
    found = numpy(soft(tensor(x)))
    assert (np.abs(found - expected.values) <= expected.allowed)[~np.isnan(x)].all()
    right = dkm.METHOD.oracle.gradients(x, upstream, state)
    assert (np.abs(d_x - right.x) <= right.x_allowed).all()
    assert (np.abs(d_centroids - right.variables["centroids"]) <= right.variables_allowed["centroids"]).all()
    assert np.abs(right.variables["centroids"]).max() > 10 * right.variables_allowed["centroids"].max()


@pytest.mark.parametrize(("activations", "others", "fact"), REFUSED_OF_ACTIVATIONS)
def test_activations_that_there_are_not_are_refused(
    activations: dict[str, Any], others: dict[str, Any], fact: str
) -> None:
    with pytest.raises(TrainableError, match=fact):
        wrap(dense(2), refused(activations, others))
