"""A whole training step by another library beside ours, in one process: ratios to the float model's.

Time of forward, backward and SGD, and the most memory that PyTorch's allocator held at once in a step. Every layer with
weights is quantized, as each library does it by itself: batch norm stays.

Run by ``nox -s bench_peers``, which gives each library an environment of its own; by hand, in such an environment:

Usage: ``python benchmarks/torch_peer_steps.py --peer NAME [--rounds N]``
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Callable

import torch
from measuring import interleaved, report, table
from models import cases
from torch import Tensor, nn
from torch_measuring import arguments, conditions, peak_bytes
from torch_steps import quantized, training_step

Make = Callable[[nn.Module, Tensor, int], dict[str, nn.Module]]
"""From a float model, a batch and the width of the weights to models that train quantized, by how they do."""
WIDTHS = (8, 4)


def _torchao(model: nn.Module, x: Tensor, n_bits: int) -> dict[str, nn.Module]:
    prepare = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e").prepare_qat_pt2e
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    if n_bits != 8:  # noqa: PLR2004 - the only width of its x86 quantizer
        message = "its x86 quantizer has 8 bits only"
        raise NotImplementedError(message)
    made: nn.Module = prepare(torch.export.export(model.train(), (x,)).module(), quantizer)
    importlib.import_module("torchao.quantization.pt2e").allow_exported_model_train_eval(made)
    return {"": made}


def _brevitas(model: nn.Module, x: Tensor, n_bits: int) -> dict[str, nn.Module]:
    layers, quant = importlib.import_module("brevitas.nn"), importlib.import_module("brevitas.quant")
    how = {
        "weight_quant": quant.Int8WeightPerChannelFloat,
        "weight_bit_width": n_bits,
        "input_quant": quant.Int8ActPerTensorFloat,
        "return_quant_tensor": False,
    }
    kinds = {nn.Conv2d: (layers.QuantConv2d, how), nn.Linear: (layers.QuantLinear, how)}
    quantize = importlib.import_module("brevitas.graph.quantize").layerwise_quantize
    made: nn.Module = quantize(copy.deepcopy(model), compute_layer_map=kinds)
    made.train()
    made(x)
    return {"": made}


def _modelopt(model: nn.Module, x: Tensor, n_bits: int) -> dict[str, nn.Module]:
    mtq = importlib.import_module("modelopt.torch.quantization")
    config = {
        "quant_cfg": [
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": n_bits, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
        ],
        "algorithm": "max",
    }
    made: nn.Module = mtq.quantize(copy.deepcopy(model), config, lambda each: each(x))
    return {"": made}


class _Whole(nn.Module):
    """Runs the model within it.

    Parameters
    ----------
    model : nn.Module
        What is run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output."""
        output: Tensor = self.model(x)
        return output


def _nncf(model: nn.Module, x: Tensor, n_bits: int) -> dict[str, nn.Module]:
    nncf = importlib.import_module("nncf")
    if n_bits != 8:  # noqa: PLR2004 - the only width of nncf.quantize
        message = "nncf.quantize has 8 bits only"
        raise NotImplementedError(message)
    # it hangs its hooks into the model as a child, which a Sequential would run
    made: nn.Module = nncf.quantize(_Whole(copy.deepcopy(model)).eval(), nncf.Dataset([x]), subset_size=1)
    return {"": made}


def _aimet(model: nn.Module, x: Tensor, n_bits: int) -> dict[str, nn.Module]:
    importlib.import_module("torchvision_names")
    quantsim = importlib.import_module("aimet_torch.quantsim")
    simulated = quantsim.QuantizationSimModel(
        copy.deepcopy(model).eval(), dummy_input=x, default_output_bw=8, default_param_bw=n_bits
    )
    simulated.compute_encodings(lambda each: each(x))
    made: nn.Module = simulated.model
    return {"": made}


def _mct(model: nn.Module, x: Tensor, n_bits: int) -> dict[str, nn.Module]:
    importlib.import_module("torchvision_names")
    qat = importlib.import_module("model_compression_toolkit").qat
    config = importlib.import_module("model_compression_toolkit.qat.common.qat_config")
    training = importlib.import_module("model_compression_toolkit.trainable_infrastructure.common.training_method")
    if n_bits != 8:  # noqa: PLR2004 - that of its default platform
        message = "its default target platform has 8 bits only"
        raise NotImplementedError(message)
    made: dict[str, nn.Module] = {}
    for name in ("STE", "LSQ"):
        method = getattr(training.TrainingMethod, name)
        how = config.QATConfig(weight_training_method=method, activation_training_method=method)
        init = qat.pytorch_quantization_aware_training_init_experimental
        made[name], _ = init(copy.deepcopy(model).eval(), lambda: iter([[x]]), qat_config=how)
    return made


PEERS: dict[str, Make] = {
    "torchao": _torchao,
    "brevitas": _brevitas,
    "nvidia-modelopt": _modelopt,
    "nncf": _nncf,
    "aimet-torch": _aimet,
    "model-compression-toolkit": _mct,
}


def main() -> None:
    """Print a row per model, width and library."""
    options = arguments(__doc__ or "", rounds=9, peers=PEERS)
    peer: str = options.peer
    version = importlib.metadata.version(peer)
    rows, reasons = [], []
    for name, (model, x) in cases().items():
        for n_bits in WIDTHS:
            models = {f"ours, {method}": quantized(model, x, method, n_bits) for method in ("STE", "LSQ")}
            try:
                models |= {f"{peer} {version} {how}": each for how, each in PEERS[peer](model, x, n_bits).items()}
            except Exception as error:  # noqa: BLE001 - whatever a library raises is its reason
                reasons.append(f"{peer}, {name}, W{n_bits}A8: {type(error).__name__}: {str(error)[:300]}")
            steps = {who: training_step(each, x) for who, each in models.items()}
            floating = training_step(copy.deepcopy(model), x)
            held = peak_bytes(floating)
            memory = {who: peak_bytes(run) / held for who, run in steps.items()}
            for who, ratio in interleaved(floating, steps, options.rounds).items():
                rows.append([name, f"W{n_bits}A8", who, ratio, memory[who]])
    text = table(["model", "quantization", "by", "step / float", "peak / float"], rows)
    notes = "".join(f"\n\nNot measured: {reason}" for reason in reasons)
    report(
        "torch_peer_steps",
        peer,
        f"{conditions()}; medians of {options.rounds} rounds.\n\n{text}{notes}",
        write=options.write,
    )


if __name__ == "__main__":
    main()
