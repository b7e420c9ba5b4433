"""Damaged and hostile model files: `load` gives back what was saved or raises one of the library's errors."""

from __future__ import annotations

import json

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from tests.mutations import INPUTS, mutated_bytes, mutated_value, seeded
from tests.torch.models import ready, recipe, same_state, spec
from trainable_core.errors import DocumentError, TrainableError
from trainable_torch import finalize, load, save
from trainable_torch.serialization import DIGEST, FORMAT, digest

RULES = [{"match": {"name": "2"}, "weights": {"n_bits": 8}}, {"match": {"op": "linear"}, "activations": {"n_bits": 6}}]


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


@pytest.fixture(scope="module", params=["wrapped", "finalized"])
def saved(request, tmp_path_factory):
    """Return a model and the bytes of its file."""
    how = recipe("LSQ", activations=spec("DQA", candidates=[4, 8]), rules=RULES)
    qmodel = ready(small(), how, torch.randn(8, 3))
    model = finalize(qmodel) if request.param == "finalized" else qmodel
    file = tmp_path_factory.mktemp("saved") / "model"
    save(model, file)
    return model, file.read_bytes()


def test_a_damaged_file_loads_as_it_was_or_is_refused(saved, tmp_path):
    model, content = saved
    path, rng, refused = tmp_path / "model", seeded("bytes"), 0
    for index in range(INPUTS):
        damaged = mutated_bytes(content, rng)
        path.write_bytes(damaged)
        try:
            loaded = load(path, small())
        except DocumentError:
            refused += 1
        except BaseException as error:
            message = f"input {index}: {type(error).__name__}: {error}\nfrom {damaged!r}"
            raise AssertionError(message) from error
        else:  # a stretch was replaced by itself
            assert same_state(loaded, model)
    assert refused > 0.9 * INPUTS


def is_written(dtype):
    """Return whether this safetensors can write a dtype; old releases know fewer."""
    try:
        to_bytes({"x": torch.zeros(1).to(dtype)})
    except KeyError:
        return False
    return True


KNOWN = (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
DTYPES = tuple(filter(is_written, KNOWN))


def mutated_tensors(tensors, rng):
    """Return tensors of which one is missing, renamed, of another shape, dtype or value; sometimes."""
    tensors = dict(tensors)
    name = rng.choice(list(tensors))
    way = rng.randrange(10)
    if way == 0:
        del tensors[name]
    elif way == 1:
        tensors[name + "x"] = tensors[name].clone()
    elif way == 2:
        tensors[name] = tensors[name].reshape(-1)[:1].clone()
    elif way == 3:
        tensors[name] = tensors[name].to(rng.choice(DTYPES))
    elif way == 4 and tensors[name].is_floating_point():
        tensors[name] = torch.full_like(tensors[name], rng.choice([0.0, -1.0, 1e38, float("nan"), float("inf")]))
    return tensors


@pytest.mark.filterwarnings("ignore::trainable_core.errors.NothingQuantizedWarning")  # a forged recipe may say so
def test_a_forged_file_loads_or_is_refused(saved, tmp_path):
    """Well formed, with the digest that belongs to it, and anything for a header and for tensors."""
    _, content = saved
    path, rng, refused = tmp_path / "model", seeded("forged"), 0
    path.write_bytes(content)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # they are mapped from the file
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
    x = torch.randn(4, 3)
    for index in range(INPUTS):
        damaged, others = mutated_value(header, rng), mutated_tensors(tensors, rng)
        try:
            text = json.dumps(damaged)
        except RecursionError:
            continue
        path.write_bytes(to_bytes(others, {FORMAT: text, DIGEST: digest(text, others)}))
        try:
            loaded = load(path, small())
            loaded(x)
        except TrainableError:
            refused += 1
        except BaseException as error:
            message = f"input {index}: {type(error).__name__}: {error}\nfrom {damaged!r:.2000}"
            raise AssertionError(message) from error
    assert refused > INPUTS / 4
