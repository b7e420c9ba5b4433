"""Private names of PyTorch: without one everything works the plain way, with the same bits, and doctor says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainable_core.errors import InvalidArgumentError
from trainable_torch import ops
from trainable_torch.kernels import eligible, native, tier

ROOT = Path(__file__).parents[2]

NAMES = {
    "torch._C._are_functorch_transforms_active": False,
    "torch._C._len_torch_dispatch_stack": False,
    "torch._C._get_tracing_state": False,
    "torch._C._functorch.is_legacy_batchedtensor": False,
    "torch.Tensor._version": False,
    "torch.nn.modules.module._has_any_global_hook": False,
    "torch._C._len_torch_function_stack": False,
    "torch._C._autograd._top_saved_tensors_default_hooks": False,
    "torch._C._autograd._saved_tensors_hooks_is_enabled": False,
    "torch._C._current_graph_task_id": True,
    "torch.ops.aten.convolution_backward.default": False,
    "torch.nn.modules.batchnorm._NormBase": True,
    "torch._C._will_engine_execute_node": True,
    "torch.nn.Module._call_impl": True,
    "torch.autograd.Function._backward_cls": True,
    "torch._C._functorch.is_functorch_wrapped_tensor": True,
    "torch._C._functorch.get_unwrapped": True,
    "torch._C._DisableFuncTorch": True,
}
"""Every private name, and whether a layer and its quantizers are one node without it."""

WITHOUT = """
import builtins, functools, hashlib, json, sys
sys.modules["tensorflow"] = None  # mctq would import it, which takes longer than all the rest
import torch
from torch import nn

name = sys.argv[1]
real_getattr, real_hasattr = builtins.getattr, builtins.hasattr
*path, last = name.split(".")
owner = functools.reduce(real_getattr, path[1:], torch)

def lacks(of, attribute):
    function = isinstance(of, type) and issubclass(of, torch.autograd.Function)
    return attribute == last and (of is owner or (function and last == "_backward_cls"))

def getattr_(of, attribute, *default):
    if not lacks(of, attribute):
        return real_getattr(of, attribute, *default)
    if default:
        return default[0]
    raise AttributeError(attribute)

def hasattr_(of, attribute):
    return not lacks(of, attribute) and real_hasattr(of, attribute)

if name:
    builtins.getattr, builtins.hasattr = getattr_, hasattr_  # not all of these names can be deleted
import trainable_torch
from trainable_torch.kernels.eligible import remarks

builtins.getattr, builtins.hasattr = real_getattr, real_hasattr

torch.manual_seed(0)
torch.set_num_threads(1)
one = {"method": "UNIFORM", "training_method": "STE", "n_bits": 4}
recipe = {"weights": {**one, "per_channel": True}, "activations": one, "fold_batch_norm": False}
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
x = torch.randn(4, 3, 9, 9, requires_grad=True)
qmodel = trainable_torch.calibrate(trainable_torch.wrap(model, recipe), [x.detach()]).train()
y = qmodel[0](x)
fused = "FusedLayer" in y.grad_fn.name()
qmodel(x).square().sum().backward()
deployed = trainable_torch.finalize(qmodel)
tensors = [y, x.grad, *(each.grad for each in qmodel.parameters() if each.grad is not None), deployed(x.detach())]
digest = hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in tensors)).hexdigest()
print(json.dumps({"digest": digest, "fused": fused, "remarks": remarks()}))
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    """Return what a new process prints."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def with_all_names() -> dict[str, object]:
    """Return what a step gives with every private name."""
    return json.loads(run(WITHOUT, ""))


def test_this_pytorch_has_every_private_name() -> None:
    """When this fails, a new release of PyTorch has renamed something: find the new name, or take it out."""
    assert eligible.remarks() == []


def test_the_table_of_names_is_complete() -> None:
    source = Path(eligible.__file__).read_text(encoding="utf-8")
    assert all(name in source for name in NAMES)
    assert source.count("_private(") - 1 + source.count('_missing["') == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_private_name_everything_works_with_the_same_bits_and_is_reported(
    name: str, with_all_names: dict[str, object]
) -> None:
    found = json.loads(run(WITHOUT, name))
    assert found["digest"] == with_all_names["digest"]
    assert found["fused"] == (NAMES[name] and with_all_names["fused"])
    assert [name in remark for remark in found["remarks"]] == [True]


def test_doctor_reports_a_missing_name() -> None:
    code = """
import sys
from trainable_core import cli
from trainable_torch.kernels import eligible
eligible._missing["torch._C._planted"] = eligible.PLAIN_WAY
sys.exit(cli.main(["doctor"]) not in (0, 1))
"""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    remark = f"torch: PyTorch {torch.__version__} has no torch._C._planted: tensors are quantized the plain way"
    assert remark in done.stdout


# ---- the switch -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """Set the switch as for a new process."""

    def ask(value: str) -> None:
        monkeypatch.setenv(tier.VARIABLE, value)
        monkeypatch.setattr(tier, "wanted", tier.wanted.__wrapped__)
        monkeypatch.setattr(native, "compiled", native.compiled.__wrapped__)

    return ask


@pytest.mark.parametrize("value", ["fast", "Plain", "none"])
def test_a_wrong_value_of_the_switch_is_refused_with_the_choices(value, asked) -> None:
    asked(value)
    with pytest.raises(InvalidArgumentError, match=f"'{value}' is not one of: plain, passes, native"):
        ops.snap(torch.ones(3), torch.tensor(0.5), -8, 7)


def test_plain_switches_every_fast_path_off(asked) -> None:
    asked("plain")
    assert not eligible.fits(torch.ones(3))
    assert native.compiled() is None


def test_passes_leaves_the_compiled_loops_aside(asked) -> None:
    asked("passes")
    assert eligible.fits(torch.ones(3))
    assert native.compiled() is None


def test_native_without_numba_is_refused(asked, monkeypatch: pytest.MonkeyPatch) -> None:
    asked("native")
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(InvalidArgumentError, match=r"'native' needs numba.*\n.*trainable-torch\[speed\]"):
        native.compiled()


STEP = """
import hashlib, sys
sys.modules["tensorflow"] = None  # as above
import torch
from torch import nn
import trainable_torch

torch.manual_seed(0)
torch.set_num_threads(1)
one = {"method": "UNIFORM", "training_method": "STE", "n_bits": 4}
recipe = {"weights": {**one, "per_channel": True}, "activations": one, "fold_batch_norm": False}
x = torch.randn(4, 3, 9, 9, requires_grad=True)
model = trainable_torch.calibrate(trainable_torch.wrap(nn.Sequential(nn.Conv2d(3, 8, 3)), recipe), [x.detach()]).train()
model(x).square().sum().backward()
tensors = [x.grad, *(each.grad for each in model.parameters()), model.eval()(x)]
print(hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in tensors)).hexdigest())
"""


def test_every_tier_gives_the_same_bits() -> None:
    digests = {value: run(STEP, **{tier.VARIABLE: value}) for value in ("plain", "passes", "")}
    assert len(set(digests.values())) == 1, digests
