"""What a small quantized layer costs by another library beside ours, in one process.

Microseconds for each of ten linear layers of 32 by 32, weights and inputs quantized to 8 bits: forward and backward in
training, and a forward in evaluation, of ours after `finalize`. As in `torch_small_layers`, the least time counts.

Usage: ``python benchmarks/torch_peer_small_layers.py --peer NAME [--rounds N]``
"""

from __future__ import annotations

import importlib.metadata

import torch
from measuring import report, table
from torch import nn
from torch_measuring import arguments, conditions
from torch_peer_steps import PEERS
from torch_small_layers import FEATURES, LAYERS, METHODS, forward, least, step

import trainable_torch

BATCH = 16


def main() -> None:
    """Print a row per library."""
    options = arguments(__doc__ or "", rounds=400, peers=PEERS)
    peer: str = options.peer
    torch.manual_seed(0)
    x = torch.randn(BATCH, FEATURES)
    layers = nn.Sequential(*[nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS)])
    training: dict[str, nn.Module] = {"float": layers}
    for method in METHODS:
        spec = {"method": "SYMMETRIC", "n_bits": 8, "training_method": method}
        qmodel = trainable_torch.wrap(layers, {"weights": spec, "activations": spec})
        training[f"ours, {method}"] = trainable_torch.calibrate(qmodel, [x])
    note, theirs = "", {}
    try:
        version = importlib.metadata.version(peer)
        theirs = {f"{peer} {version} {how}".strip(): each for how, each in PEERS[peer](layers, x, 8).items()}
    except Exception as error:  # noqa: BLE001 - whatever a library raises is its reason
        note = f"\n\nNot measured: {peer}: {type(error).__name__}: {str(error)[:300]}"
    deployed = {
        name: model if name == "float" else trainable_torch.finalize(model) for name, model in training.items()
    } | theirs
    trained = least({who: step(each.train(), x) for who, each in (training | theirs).items()}, options.rounds)
    evaluated = least({who: forward(each.eval(), x) for who, each in deployed.items()}, options.rounds)
    rows = [[who, f"{trained[who]:.1f}", f"{evaluated[who]:.1f}"] for who in trained]
    text = table(["by", "training step, us", "evaluation, us"], rows)
    report("torch_peer_small_layers", peer, f"{conditions()}.\n\n{text}{note}", write=options.write)


if __name__ == "__main__":
    main()
