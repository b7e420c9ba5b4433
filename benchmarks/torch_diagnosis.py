"""What `diagnose` puts first in networks of which one layer was damaged on purpose, and what it costs.

For each seed a network of depthwise-separable convolutions is trained on a split of its own, and wrapped with 8-bit
weights and activations. Then one layer, chosen at random, is damaged: its weights get 2 bits; or the thresholds of its
weight or of its input are divided by ten; or its type is registered with thresholds along the axis of the inputs. It
counts as found where the first finding names the layer (and of a threshold also the tensor). In the network without
damage, no range and no axis may be found to be wrong.

The models of transformers have the dimensions of small ones and random weights, which time and memory don't depend on.

Usage: ``python benchmarks/torch_diagnosis.py [--rounds SEEDS] [--write]``
"""

from __future__ import annotations

import copy
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import small_networks
import torch
import transformers
from measuring import report, table
from torch import Tensor, nn
from torch_measuring import PART, arguments, conditions

import trainable_torch
from trainable_torch.training import quantizers_of

RECIPE: dict[str, Any] = {
    "weights": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "LSQ"},
    "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "LSQ"},
}
EPOCHS = 3
LAYERS = ["stem.conv", *(f"{kind}{index}.conv" for index in (1, 2, 3) for kind in ("depth", "point")), "head"]
HEALTHY, BITS, THRESHOLD, AXIS = (
    "none",
    "2 bits among 8",
    "thresholds ten times too small",
    "thresholds along the inputs",
)


class AlongInputs(nn.Conv2d):
    """A convolution that is registered with the wrong axis."""


class LinearAlongInputs(nn.Linear):
    """A linear layer that is registered with the wrong axis."""


trainable_torch.register_layer(AlongInputs, "conv", weights={"weight": 1})
trainable_torch.register_layer(LinearAlongInputs, "linear", weights={"weight": 1})


def network(seed: int) -> tuple[nn.Module, list[Tensor]]:
    """Return a trained network, and batches of its training images."""
    data = small_networks.digits.load(seed)
    torch.manual_seed(seed)
    model = small_networks.depthwise()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    small_networks.train(model, data, EPOCHS, seed, optimizer)
    images, _ = small_networks.tensors(data.train_x[:256], data.train_y[:256])
    return model, list(images.split(64))


def with_few_bits(model: nn.Module, batches: list[Tensor], chosen: random.Random) -> tuple[nn.Module, str, str]:
    """Return a model with 2 bits for the weights of one layer, and its name."""
    layer = chosen.choice(LAYERS)
    recipe = {**RECIPE, "rules": [{"match": {"name": layer}, "weights": {"n_bits": 2}}]}
    return ready(model, batches, recipe), layer, ""


def with_small_threshold(model: nn.Module, batches: list[Tensor], chosen: random.Random) -> tuple[nn.Module, str, str]:
    """Return a model with thresholds of one quantizer divided by ten, and the names of layer and tensor."""
    qmodel = ready(model, batches, RECIPE)
    name, quantizer = chosen.choice(list(quantizers_of(qmodel).items()))
    with torch.no_grad():
        for variable in quantizer.variable_names:
            quantizer.get_quantizer_variable(variable).mul_(0.1)
    weight = ".weights_quantizers." in name
    layer = name.partition(".weights_quantizers." if weight else ".input_holders.")[0]
    return qmodel, layer, "weight" if weight else "input"


def with_wrong_axis(model: nn.Module, batches: list[Tensor], chosen: random.Random) -> tuple[nn.Module, str, str]:
    """Return a model with thresholds along the inputs in one layer, and its name."""
    layer, changed = chosen.choice(LAYERS), copy.deepcopy(model)
    changed.get_submodule(layer).__class__ = LinearAlongInputs if layer == "head" else AlongInputs
    return ready(changed, batches, RECIPE), layer, ""


DAMAGES: Mapping[str, Callable[..., tuple[nn.Module, str, str]]] = {
    BITS: with_few_bits,
    THRESHOLD: with_small_threshold,
    AXIS: with_wrong_axis,
}


def ready(model: nn.Module, batches: list[Tensor], recipe: Any) -> nn.Module:
    """Return the model wrapped and calibrated."""
    return trainable_torch.calibrate(trainable_torch.wrap(model, recipe), batches, progress=False)


def found(qmodel: nn.Module, batches: list[Tensor], layer: str, tensor: str) -> bool:
    """Return whether the first finding names a layer, and a tensor where one is given."""
    findings = trainable_torch.diagnose(qmodel, batches, gradients=False, progress=False).findings
    return bool(findings) and findings[0].layer == layer and tensor in ("", findings[0].tensor)


def damaged(seeds: Iterable[int]) -> Counter[str]:
    """Return in how many networks the damage was found, by its kind."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        model, batches = network(seed)
        whole = trainable_torch.diagnose(ready(model, batches, RECIPE), batches, gradients=False, progress=False)
        counts[HEALTHY] += not any(each.kind in {"axis", "range"} for each in whole.findings)
        for name, damage in DAMAGES.items():
            qmodel, layer, tensor = damage(model, batches, random.Random(seed))  # noqa: S311 - no secret
            counts[name] += found(qmodel, batches, layer, tensor)
    return counts


def mobilenet() -> tuple[nn.Module, Tensor]:
    """Return transformers' MobileNetV2 of half its width, and a batch of 8 small images."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.5, image_size=96, num_labels=100)
    return transformers.MobileNetV2ForImageClassification(config), torch.randn(8, 3, 96, 96)


def bert() -> tuple[nn.Module, Tensor]:
    """Return transformers' BERT of four layers, as BERT-mini, and a batch of 8 texts of 64 tokens."""
    config = transformers.BertConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, num_labels=2
    )
    return transformers.BertForSequenceClassification(config), torch.randint(0, config.vocab_size, (8, 64))


def cost(make: Callable[[], tuple[nn.Module, Tensor]], count: int) -> list[object]:
    """Return what a diagnosis of so many batches costs: layers, seconds, those of a forward, and growth in memory."""
    torch.manual_seed(0)
    model, batch = make()
    batches = [batch] * count
    qmodel = trainable_torch.calibrate(trainable_torch.wrap(model.eval(), RECIPE), batches[:1], progress=False)
    with torch.no_grad():
        for _ in range(2):
            started = time.process_time()
            qmodel(batch)
            forward = time.process_time() - started
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    diagnosis = trainable_torch.diagnose(qmodel, batches, progress=False)
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    size = sum(each.numel() * each.element_size() for each in model.parameters()) / 2**20
    return [len(diagnosis.layers), count, seconds, 1000 * forward, size, grown]


def main() -> None:
    """Count what is found, and measure time and memory."""
    options = arguments(__doc__, 100)
    counts = damaged(range(options.rounds))
    rows = [[name, counts[name], options.rounds] for name in (BITS, THRESHOLD, AXIS, HEALTHY)]
    text = f"{conditions()}\n\n{table(['damage', 'found first', 'networks'], rows)}"
    report("torch_diagnosis", f"{PART}, damaged networks", text, write=options.write)
    names = {"MobileNetV2, half width, 96 pixels": mobilenet, "BERT, 4 layers of 256": bert}
    costs = [[name, *cost(make, count)] for name, make in names.items() for count in (1, 4)]
    header = ["model", "layers", "batches", "diagnose, s", "forward, ms", "parameters, MiB", "peak grows by, MiB"]
    report("torch_diagnosis", f"{PART}, cost", f"{conditions()}\n\n{table(header, costs)}", write=options.write)


if __name__ == "__main__":
    main()
