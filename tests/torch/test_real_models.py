"""Models that were not written for this library: small random ones of transformers, from wrap to finalize."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import trainable_torch
from trainable_torch.structure.folding import fold_batch_norm
from trainable_torch.structure.observing import observe

transformers = pytest.importorskip("transformers", reason="the models are those of transformers")

RECIPE = {
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
    "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "LSQ"},
    "calibration": {"weights": "minmax", "activations": "minmax"},
}
TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGES = {
    "image_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 32, 32)}


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 99, (2, 12))}


def both_sides() -> dict[str, torch.Tensor]:
    return {**tokens(), "decoder_input_ids": torch.randint(0, 99, (2, 5))}


# model, inputs, number of quantized weights and of folded batch norms, both counted by hand from the configs
MODELS: dict[str, tuple[Callable[[Any], Any], Callable[[], dict[str, torch.Tensor]], int, int]] = {
    # embedder, two stages of a basic layer with two convolutions, the second with a shortcut convolution, classifier:
    # 1 + 2 * 2 + 1 + 1; every convolution is followed by a batch norm
    "resnet": (
        lambda t: t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        images,
        7,
        6,
    ),
    # with bottlenecks: embedder 1, two stages of a layer with 3 convolutions and a shortcut, and the classifier
    "resnet of bottlenecks": (
        lambda t: t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck")
        ),
        images,
        10,
        9,
    ),
    # stem 3, per inverted residual an expansion, a depthwise and a reducing convolution (16 blocks), the last 1x1, all
    # with batch norm, and the classifier
    "mobilenet_v2": (
        lambda t: t.MobileNetV2ForImageClassification(
            t.MobileNetV2Config(image_size=32, depth_multiplier=0.1, tf_padding=False)
        ),
        images,
        53,
        52,
    ),
    # patches, per layer query, key, value, output, two of the MLP, and the classifier
    "vit": (lambda t: t.ViTForImageClassification(t.ViTConfig(patch_size=8, **IMAGES)), images, 14, 0),
    # three embeddings, per layer the same six, pooler, classifier
    "bert": (lambda t: t.BertForSequenceClassification(t.BertConfig(**TEXT)), tokens, 17, 0),
    # two embeddings, per layer query, key, value, output, two of the MLP, and the head's transform and projector
    "distilbert": (
        lambda t: t.DistilBertForMaskedLM(
            t.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
        ),
        tokens,
        16,
        0,
    ),
    # two embeddings, per layer c_attn, c_proj, c_fc, c_proj, and the head tied to the first embedding
    "gpt2": (
        lambda t: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
        tokens,
        11,
        0,
    ),
    # embedding, per layer q, k, v, o, gate, up, down, and the head
    "llama": (lambda t: t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=1, **TEXT)), tokens, 16, 0),
    # patches, two stages of a block with query, key, value, output and two of the MLP, one merging, classifier
    "swin": (
        lambda t: t.SwinForImageClassification(
            t.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
        ),
        images,
        15,
        0,
    ),
    # stem, two stages of one layer (depthwise, two linear), one downsampling, classifier
    "convnext": (
        lambda t: t.ConvNextForImageClassification(
            t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
        ),
        images,
        9,
        0,
    ),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def train_one_step(qmodel: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    qmodel.train()
    optimizer = torch.optim.Adam(trainable_torch.parameter_groups(qmodel, qparams={"lr": 1e-2}), lr=1e-3)
    qmodel(**inputs).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    qmodel.eval()


def settled(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return the model in eval mode, its batch norms knowing what passes: else all activations fade to zero."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(**inputs)
    return model.eval()


def tensors(output: Any) -> list[torch.Tensor]:
    """Return every tensor of a model's output."""
    return [leaf for leaf in tree_leaves(tuple(output.values())) if isinstance(leaf, torch.Tensor)]


LEFT_OUT = {
    "vit": {"vit.embeddings": "ViTEmbeddings"},
    "convnext": {f"convnext.encoder.stages.{stage}.layers.0": "ConvNextLayer" for stage in (0, 1)},
    "llama": dict.fromkeys(
        (*(f"model.layers.{i}.{kind}_layernorm" for i in (0, 1) for kind in ("input", "post_attention")), "model.norm"),
        "LlamaRMSNorm",
    ),
    "swin": {
        f"swin.encoder.layers.{i}.blocks.0.attention.relative_position_bias": "SwinRelativePositionBias" for i in (0, 1)
    },
}
"""Modules with parameters of their own and of no known kind, by model; none in the others."""


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_out_is_told(name: str) -> None:
    description = trainable_torch.describe(trainable_torch.wrap(MODELS[name][0](transformers), RECIPE))
    expected = LEFT_OUT.get(name, {})
    assert description.left_out.keys() == expected.keys()
    assert all(kind in description.left_out[module] for module, kind in expected.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_is_deployed_bit_for_bit(name: str) -> None:
    build, make_inputs, weights, folded = MODELS[name]
    inputs = make_inputs()
    model = settled(build(transformers), inputs)
    with torch.no_grad():
        before = model(**inputs).logits
    qmodel = trainable_torch.wrap(model, RECIPE)
    trainable_torch.calibrate(qmodel, [inputs], progress=False)
    train_one_step(qmodel, inputs)
    deployed = trainable_torch.finalize(qmodel)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            outputs, expected = tensors(deployed(**inputs)), tensors(qmodel(**inputs))
        assert outputs
        assert all(map(torch.equal, outputs, expected))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)  # the given model is untouched
        assert not torch.equal(qmodel(**inputs).logits, before)
    description = trainable_torch.describe(deployed)
    assert sum(row.target == "Weights" for row in description.rows) == weights
    assert len(description.folded) == folded


def test_mobilenet_v2_keeps_the_batch_norms_that_no_trace_reaches_and_says_so() -> None:
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.1, tf_padding=True)
    inputs = images()
    model = settled(transformers.MobileNetV2ForImageClassification(config), inputs)
    qmodel = trainable_torch.wrap(model, RECIPE)
    trainable_torch.calibrate(qmodel, [inputs], progress=False)
    train_one_step(qmodel, inputs)
    deployed = trainable_torch.finalize(qmodel)
    with torch.no_grad():
        assert torch.equal(deployed(**inputs).logits, qmodel(**inputs).logits)
    description = trainable_torch.describe(qmodel)
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {name for name in description.left_out if name.endswith("normalization")} == set(norms)


def test_the_head_of_gpt2_stays_tied_to_its_embedding_and_shares_the_quantizer() -> None:
    build, make_inputs, _, _ = MODELS["gpt2"]
    qmodel = trainable_torch.wrap(build(transformers), RECIPE)
    assert qmodel.lm_head.weight is qmodel.transformer.wte.weight
    quantizers = qmodel.lm_head.weights_quantizers, qmodel.transformer.wte.weights_quantizers
    assert quantizers[0]["weight"] is quantizers[1]["weight"]
    trainable_torch.calibrate(qmodel, [make_inputs()], progress=False)
    deployed = trainable_torch.finalize(qmodel)
    assert deployed.lm_head.weights_quantizers["weight"] is deployed.transformer.wte.weights_quantizers["weight"]


def test_a_model_with_two_inputs_is_calibrated_by_keyword() -> None:
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model, inputs = transformers.T5ForConditionalGeneration(config).eval(), both_sides()
    qmodel = trainable_torch.wrap(model, RECIPE)
    trainable_torch.calibrate(qmodel, [inputs], progress=False)
    train_one_step(qmodel, inputs)
    with torch.no_grad():
        assert torch.equal(trainable_torch.finalize(qmodel)(**inputs).logits, qmodel(**inputs).logits)


# model, inputs, and number of batch norms, counted by hand from the configs; with an example every one is folded
FOLDED: dict[str, tuple[Callable[[Any], Any], Callable[[], dict[str, torch.Tensor]], int]] = {
    # stem, in each of seven blocks a depthwise and a projecting convolution, in six an expanding one, and the top:
    # 1 + 2 * 7 + 6 + 1
    "efficientnet": (
        lambda t: t.EfficientNetForImageClassification(
            t.EfficientNetConfig(
                image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_block_repeats=[1] * 7
            )
        ),
        images,
        22,
    ),
    # four convolutions for patches, in each of three attentions two linear layers, in two subsamplings three, in five
    # multilayer perceptrons two, and two heads that normalize before their linear layer: 4 + 2 * 3 + 3 * 2 + 2 * 5 + 2
    "levit": (
        lambda t: t.LevitForImageClassificationWithTeacher(
            t.LevitConfig(
                image_size=64,
                hidden_sizes=[16, 32, 48],
                num_attention_heads=[1, 2, 3],
                depths=[1, 1, 1],
                key_dim=[8, 8, 8],
                down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
            )
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
        28,
    ),
    # as above; the convolutions' inputs are padded by the module around them
    "mobilenet_v2 with padding": (
        lambda t: t.MobileNetV2ForImageClassification(t.MobileNetV2Config(image_size=32, depth_multiplier=0.1)),
        images,
        52,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FOLDED)
def test_with_an_example_every_batch_norm_is_folded(name: str) -> None:
    build, make_inputs, count = FOLDED[name]
    inputs = make_inputs()
    model = settled(build(transformers), inputs).double()
    inputs = {key: value.double() for key, value in inputs.items()}
    recipe = {"weights": {**RECIPE["weights"], "n_bits": 16}}
    qmodel = trainable_torch.wrap(model, recipe, example=inputs).eval()
    assert len(trainable_torch.describe(qmodel).folded) == count
    folded = copy.deepcopy(model)
    fold_batch_norm(folded, observe(folded, inputs))
    for expected, found in zip(tensors(model(**inputs)), tensors(folded(**inputs)), strict=True):
        # float64, at most 100 layers with sums of less than 2000 products: 100 * 2000 * 2**-53 of the largest value
        bound = 100 * 2000 * 2**-53 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


BEFORE_LAYERS = {"levit": 2}
"""Batch norms before a layer, which can be folded and not simulated: in the two heads."""


@pytest.mark.parametrize("name", FOLDED)
def test_with_an_example_every_batch_norm_behind_a_layer_is_simulated(name: str) -> None:
    """In training it takes in the statistics of the batch; what is evaluated then is deployed bit for bit."""
    build, make_inputs, all_of_them = FOLDED[name]
    count = all_of_them - BEFORE_LAYERS.get(name, 0)
    inputs = make_inputs()
    model = settled(build(transformers), inputs)
    recipe = {**RECIPE, "fold_batch_norm": "training"}
    qmodel = trainable_torch.calibrate(trainable_torch.wrap(model, recipe, example=inputs), [inputs], progress=False)
    assert str(trainable_torch.describe(qmodel)).count("as training simulates") == count
    before = {name: value.clone() for name, value in qmodel.named_buffers() if name.endswith("running_var")}
    train_one_step(qmodel, inputs)
    assert len(before) == all_of_them
    # a statistic may stay where all inputs of a layer of random weights are zero
    assert any(not torch.equal(value, before[name]) for name, value in qmodel.named_buffers() if name in before)
    deployed = trainable_torch.finalize(qmodel)
    with torch.no_grad():
        assert all(map(torch.equal, tensors(deployed(**inputs)), tensors(qmodel(**inputs))))
    assert len(trainable_torch.describe(deployed).folded) == count


OPERATIONS = {"bert", "llama", "swin"}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_rules_for_functional_operations_work_with_an_example(name: str) -> None:
    build, make_inputs, *_ = MODELS[name]
    inputs = make_inputs()
    eight = {"match": {"op": "add"}, "activations": {"n_bits": 8}}
    recipe = {**RECIPE, "rules": [eight, {"match": {"op": "matmul"}, "activations": {"n_bits": 8}}]}
    model = build(transformers).eval()
    qmodel = trainable_torch.wrap(model, recipe, example=inputs)
    assert type(qmodel) is type(model)
    rows = [row for row in trainable_torch.describe(qmodel).rows if row.op in ("add", "matmul")]
    assert len(rows) >= 2 * 2 * 3  # in two layers two sums and one product of two tensors at least
    trainable_torch.calibrate(qmodel, [inputs])
    train_one_step(qmodel, inputs)
    deployed = trainable_torch.finalize(qmodel)
    with torch.no_grad():
        pairs = zip(tensors(qmodel(**inputs)), tensors(deployed(**inputs)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
