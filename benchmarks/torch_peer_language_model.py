"""A small Qwen3 with weights of 4 and 2 bits in groups of 32: what training wins back, by torchao and by this library.

The model of transformers has random weights; it is trained on the text that comes with Python in float, then quantized
and trained on by each library with the same batches, steps, optimizer and learning rate. All linear layers are
quantized, as torchao's `quantize_` does; embeddings and norms are not. Scores are those of what each library deploys:
perplexity per character of text that no training saw.

Run by ``nox -s bench_peers``, which gives torchao an environment of its own; by hand, in such an environment:

Usage: ``python benchmarks/torch_peer_language_model.py --peer torchao [--rounds SEEDS] [--write]``
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import report, table
from torch import Tensor, nn
from torch_measuring import PART, arguments, conditions

import trainable_torch

sys.path.append(str(Path(__file__).parent / "evidence"))

import problems

TEXT = problems.PROBLEMS["transformer"]
FLOAT_STEPS, STEPS = 1500, 200
FLOAT_RATE, RATE = 3e-3, 1e-3
GROUP = 32

Batch = tuple[Tensor, Tensor]
Training = Callable[[nn.Module, Any], None]
"""Trains a model's parameters, or groups of them."""
Peer = Callable[[nn.Module, Training | None, int, bool], nn.Module]
"""From a float model, its training or None, the bits of weights and whether activations have 8: what is deployed."""
PEERS = ("torchao",)
SCHEMES: Mapping[str, tuple[int, bool]] = {"W4": (4, False), "W4, 8-bit activations": (4, True), "W2": (2, False)}


def model_of(seed: int) -> nn.Module:
    """Return a Qwen3 of two layers with random weights."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=problems.VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=problems.CONTEXT,
        tie_word_embeddings=False,
        use_cache=False,
    )
    made: nn.Module = transformers.Qwen3ForCausalLM(config)
    return made


def batches(steps: int, seed: int) -> Iterator[Batch]:
    """Yield batches of characters, and of those that follow."""
    for x, y in problems.batches(TEXT, problems.load(TEXT, seed), steps=steps, seed=seed):
        yield torch.from_numpy(x), torch.from_numpy(y)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(input_ids=x).logits
    return found


def train(model: nn.Module, groups: Any, rate: float, steps: int, seed: int) -> None:
    """Train with Adam, whose learning rate falls to zero by a cosine."""
    optimizer = torch.optim.Adam(groups, lr=rate)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    model.train()
    for x, y in batches(steps, seed):
        loss = nn.functional.cross_entropy(_logits(model, x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
    model.eval()


@torch.no_grad()
def perplexity(model: nn.Module) -> float:
    """Return the perplexity per character of the text for testing."""
    data = problems.load(TEXT, 0)
    logits = _logits(model.eval(), torch.from_numpy(data.test_x))
    return float(2.0 ** problems.score(TEXT, logits.numpy(), data.test_y))


def torchao(model: nn.Module, training: Training | None, n_bits: int, activations: bool) -> nn.Module:  # noqa: FBT001
    """Return what torchao deploys: its configuration for integers of any width, symmetric, in groups."""
    quantization = importlib.import_module("torchao.quantization")
    qat = importlib.import_module("torchao.quantization.qat")
    dtype = getattr(torch, f"int{n_bits}")
    granularity = quantization.PerGroup(GROUP)
    deployed = (
        quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
        if activations
        else quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    )
    made = copy.deepcopy(model)
    if training is None:
        quantization.quantize_(made, deployed)
        return made
    weights = qat.IntxFakeQuantizeConfig(dtype, group_size=GROUP, is_symmetric=True)
    inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if activations else None
    prepared = qat.QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
    quantization.quantize_(made, prepared)
    training(made, made.parameters())
    quantization.quantize_(made, qat.QATConfig(deployed, step="convert"))
    return made


def ours(method: str, calibration: str, group_size: int | None = GROUP) -> Peer:
    """Return how this library does it, by a training method and a calibration; without groups, per channel."""

    def deploy(model: nn.Module, training: Training | None, n_bits: int, activations: bool) -> nn.Module:  # noqa: FBT001
        recipe: dict[str, Any] = {
            "target": "native",
            "calibration": {"weights": calibration},
            "weights": {"method": "SYMMETRIC", "n_bits": n_bits, "training_method": method},
            "rules": [{"match": {"op": "embedding"}, "weights": {"enabled": False}}],
        }
        if group_size is not None:
            recipe["weights"]["group_size"] = group_size
        if activations:
            recipe["activations"] = {"method": "UNIFORM", "n_bits": 8, "training_method": "DYNAMIC"}
            recipe["activations"]["arguments"] = {"granularity": "token"}
        qmodel = trainable_torch.wrap(model, recipe)
        qmodel = trainable_torch.calibrate(qmodel, [x for x, _ in batches(8, 100)], progress=False)
        if training is not None:
            training(qmodel, trainable_torch.parameter_groups(qmodel, qparams={"lr": RATE / 10}))
        return trainable_torch.finalize(qmodel)

    return deploy


def candidates(peer: str) -> dict[str, tuple[Peer, bool]]:
    """Return how models are quantized, and whether they are trained then, by what tables call it."""
    theirs = {"torchao": torchao}[peer]
    version = importlib.metadata.version(peer)
    return {
        f"{peer} {version}, post-training": (theirs, False),
        "this library, post-training (minmax)": (ours("STE", "minmax"), False),
        "this library, post-training (mse)": (ours("STE", "mse"), False),
        f"{peer} {version}, trained": (theirs, True),
        "this library, STE (mse)": (ours("STE", "mse"), True),
        "this library, LSQ (minmax)": (ours("LSQ", "minmax"), True),
        "this library, LSQ (mse)": (ours("LSQ", "mse"), True),
        "this library, per channel, post-training (mse)": (ours("STE", "mse", None), False),
        "this library, per channel, LSQ (mse)": (ours("LSQ", "mse", None), True),
    }


def measured(peer: str, seeds: Iterable[int]) -> dict[tuple[str, str], list[float]]:
    """Return perplexities by scheme and by who quantized, for each seed."""
    found: dict[tuple[str, str], list[float]] = {}
    for seed in seeds:
        model = model_of(seed)
        train(model, model.parameters(), FLOAT_RATE, FLOAT_STEPS, seed)
        longer = copy.deepcopy(model)
        train(longer, longer.parameters(), RATE, STEPS, seed + 1)
        found.setdefault(("float", "float"), []).append(perplexity(model))
        found.setdefault(("float", "float, trained on"), []).append(perplexity(longer))
        for scheme, (n_bits, activations) in SCHEMES.items():
            for name, (deploy, trained) in candidates(peer).items():
                deployed = deploy(model, _training(seed + 1) if trained else None, n_bits, activations)
                found.setdefault((scheme, name), []).append(perplexity(deployed))
                print(seed, scheme, name, found[scheme, name][-1], flush=True)
    return found


def _training(seed: int) -> Training:
    def run(model: nn.Module, groups: Any) -> None:
        train(model, groups, RATE, STEPS, seed)

    return run


def summary(found: Mapping[tuple[str, str], list[float]]) -> str:
    """Return means and standard deviations as a table, and the gaps to the float model, as it was and trained on."""
    rows: list[list[object]] = []
    for (scheme, name), values in found.items():
        gaps = [
            _spread([value - best for value, best in zip(values, found["float", of], strict=True)], "+")
            for of in ("float", "float, trained on")
        ]
        rows.append([scheme, name, _spread(values), *gaps])
    return table(["weights", "by", "perplexity", "gap to float", "gap to float, trained on"], rows)


def _spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{spread}"


def main() -> None:
    """Measure one library beside ours."""
    options = arguments(__doc__, 3, PEERS)
    found = measured(options.peer, range(options.rounds))
    report("torch_peer_language_model", PART, f"{conditions()}\n\n{summary(found)}", write=options.write)


if __name__ == "__main__":
    main()
