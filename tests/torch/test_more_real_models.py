"""Further models of transformers, small and random: attention of many kinds, state spaces, experts, detection."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import trainable_torch
from trainable_core.errors import UnsupportedConfigError
from trainable_torch import QuantizationWrapper

transformers = pytest.importorskip("transformers", reason="the models are those of transformers")

RECIPE = {
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
    "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "LSQ"},
    "calibration": {"weights": "minmax", "activations": "minmax"},
}
TEXT = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
POSITIONS = {**TEXT, "max_position_embeddings": 32}
KEYS = {**POSITIONS, "num_key_value_heads": 1}
GPT = {"vocab_size": 99, "hidden_size": 16, "n_layer": 1, "n_head": 2}
IMAGE = {**TEXT, "image_size": 32, "patch_size": 8}
del IMAGE["vocab_size"]
LATENT = {
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "first_k_dense_replace": 0,
}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
STAGES = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
BITS = {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "num_groups": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 16, "num_queries": 5,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

# class of the model, of its config, and the config's arguments
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**POSITIONS, "embedding_size": 8}),
    "bloom": ("BloomForCausalLM", "BloomConfig", GPT),
    "deberta": ("DebertaForSequenceClassification", "DebertaConfig", {**POSITIONS, **DISENTANGLED}),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**POSITIONS, **DISENTANGLED, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**KEYS, **LATENT, "num_key_value_heads": 2}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**POSITIONS, "embedding_size": 8}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {k: v for k, v in TEXT.items() if k != "intermediate_size"}),
    "fnet": ("FNetForSequenceClassification", "FNetConfig", {k: v for k, v in POSITIONS.items() if "heads" not in k}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**KEYS, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", POSITIONS),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**KEYS, "head_dim": 8, "num_local_experts": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**KEYS, "num_local_experts": 4}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**{k: v for k, v in POSITIONS.items() if k != "intermediate_size"}, "ffn_dim": 24, "word_embed_proj_dim": 8},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", POSITIONS),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", KEYS),
    "squeezebert": ("SqueezeBertForSequenceClassification", "SqueezeBertConfig", {**POSITIONS, "embedding_size": 16}),
    "bit": ("BitForImageClassification", "BitConfig", BITS),
    "convnext_v2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", {**STAGES, "image_size": 32}),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", IMAGE),
    "detr": ("DetrForObjectDetection", "DetrConfig", DETR),
    "glpn": (
        "GLPNForDepthEstimation",
        "GLPNConfig",
        {**STAGES, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8},
    ),
    "swin_v2": ("Swinv2ForImageClassification", "Swinv2Config", SWIN),
    "yolos": ("YolosForObjectDetection", "YolosConfig", {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 3}),
}
OF_EXPERTS = ("deepseek_v3", "mixtral", "gpt_oss")
OF_IMAGES = ("bit", "convnext_v2", "deit", "detr", "glpn", "swin_v2", "yolos")


def build(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, config, arguments = MODELS[name]
    arguments = copy.deepcopy(arguments)
    if name == "detr":
        arguments["backbone_config"] = transformers.ResNetConfig(**RESNET)
    built = getattr(transformers, model)(getattr(transformers, config)(**arguments)).eval()
    for module in built.modules():  # else the weights learn of another output than the float ones
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)} if name in OF_IMAGES else {}
    return built, inputs or {"input_ids": torch.randint(3, 99, (2, 8))}


def tensors(output: Any) -> list[torch.Tensor]:
    leaves = [leaf for leaf in tree_leaves(tuple(output.values())) if isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def learned_by(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> set[str]:
    torch.manual_seed(0)
    sum(each.square().sum() for each in tensors(model.train()(**inputs)) if each.requires_grad).backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.eval()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_as_in_float_and_is_deployed_bit_for_bit(name: str) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        before = tensors(model(**inputs))
    qmodel = trainable_torch.wrap(model, RECIPE if name not in OF_EXPERTS else {**RECIPE, "target": "native"})
    trainable_torch.calibrate(qmodel, [inputs], progress=False)
    folded = trainable_torch.describe(qmodel).folded
    learned = learned_by(qmodel, inputs)
    assert {
        each for each in learned_by(copy.deepcopy(model), inputs) if each.rpartition(".")[0] not in folded
    } <= learned
    torch.optim.SGD(qmodel.parameters(), lr=1e-3).step()
    deployed = trainable_torch.finalize(qmodel)
    with torch.no_grad():
        expected = tensors(qmodel(**inputs))
        assert all(map(torch.equal, tensors(deployed(**inputs)), expected))
        for module in deployed.modules():  # Q(w) in the place of w: what a forward reads otherwise would change
            if isinstance(module, QuantizationWrapper):
                for _, weight, quantizer in module.get_weights_vars():
                    weight.copy_(quantizer(weight))
        assert all(map(torch.equal, tensors(deployed(**inputs)), expected))
        assert not all(map(torch.equal, expected, before))
        assert all(map(torch.equal, tensors(model(**inputs)), before))


def test_standardized_weights_are_told() -> None:
    model, _ = build("bit")
    left_out = trainable_torch.describe(trainable_torch.wrap(model, RECIPE)).left_out
    convolutions = {f"{name}.weight" for name, each in model.named_modules() if isinstance(each, torch.nn.Conv2d)}
    assert {
        name for name, reason in left_out.items() if "batch_norm" in reason and "on no grid" in reason
    } == convolutions


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_the_matrices_of_all_experts_are_quantized(name: str) -> None:
    model, _ = build(name)
    recipe = {"weights": {**RECIPE["weights"], "group_size": 8}, "target": "native"}
    qmodel = trainable_torch.calibrate(trainable_torch.wrap(model, recipe))
    quantized = {
        id(weight): weight.numel()
        for module in qmodel.modules()
        if isinstance(module, QuantizationWrapper)
        for _, weight, _ in module.get_weights_vars()
    }
    # what stays float: norms, biases, and routers that are parameters of no layer
    assert sum(quantized.values()) > 0.95 * sum(p.numel() for p in model.parameters())
    rows = [row for row in trainable_torch.describe(qmodel).rows if row.tensor == "down_proj"]
    (_, *shape) = model.get_submodule(rows[0].layer).down_proj.shape
    outputs, inputs_axis = (2, 1) if name == "gpt_oss" else (1, 2)
    assert rows[0].granularity == f"expert (axis 0), channel (axis {outputs}), group of 8 (axis {inputs_axis})"
    assert len(rows[0].params["threshold"]) == 4 * shape[outputs - 1] * shape[inputs_axis - 1] // 8


def test_experts_are_refused_before_training_where_a_target_has_no_scales_for_them() -> None:
    with pytest.raises(UnsupportedConfigError, match=r"experts.gate_up_proj.*experts, and mctq.*\n.*target: native"):
        trainable_torch.wrap(build("mixtral")[0], RECIPE)
