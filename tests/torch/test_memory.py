"""A model that fits into memory once: wrapped on the meta device, filled from a file, calibrated, deployed.

Each stage runs in a process of its own whose memory is limited; what it prints is its peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WIDTH, LAYERS = 2048, 24
BYTES = WIDTH * WIDTH * LAYERS * 4  # 403 MB of float32 weights

SETUP = f"""
import json, resource, sys
import torch
from torch import nn
torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def network():
    return nn.Sequential(*(nn.Linear({WIDTH}, {WIDTH}, bias=False) for _ in range({LAYERS})))

one = {{"method": "SYMMETRIC", "n_bits": 8, "training_method": "LSQ"}}
recipe = {{"weights": one, "activations": one, "calibration": {{"weights": "minmax", "activations": "minmax"}}}}
from trainable_torch import calibrate, wrap
small = calibrate(wrap(nn.Linear(4, 4), recipe), [torch.randn(2, 4)])
small(torch.randn(2, 4)).sum().backward()  # everything is imported and warm
start = peak()

def limit(size):
    '''Let this process have no more than so many bytes of address space beside what it has.'''
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + size, held + size))
"""


def run(body):
    """Return what a process prints as JSON."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = SETUP + textwrap.dedent(body)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux limits a process's memory")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a file with the float weights."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    run(f"torch.save(network().state_dict(), {str(path)!r}); print(json.dumps(0))")
    yield path
    path.unlink()


def test_wrapping_on_the_meta_device_takes_no_memory_for_weights():
    grown = run("""
        limit(200_000_000)  # half of the weights
        with torch.device("meta"):
            qmodel = wrap(network(), recipe)
        assert all(value.is_meta for value in qmodel.parameters())
        print(json.dumps(peak() - start))
    """)
    assert grown < BYTES / 8


def test_the_same_limit_stops_a_model_with_weights():
    """So the limit is one."""
    assert run("""
        limit(200_000_000)
        try:
            wrap(network(), recipe)
        except (MemoryError, RuntimeError) as error:
            print(json.dumps("memory" in str(error)))
    """)


FILL = {
    # the mapped file counts as address space, and as memory where it is the only copy
    "assigned": (
        "state = torch.load({path!r}, weights_only=True, mmap=True); limit({more})",
        "qmodel.load_state_dict(state, strict=False, assign=True)",
        1,
    ),
    "in place": (
        "limit({more})",
        "qmodel.to_empty(device='cpu'); [nn.init.normal_(p, std=0.02) for p in qmodel.parameters() if p.dim() == 2]",
        0,
    ),
}


@pytest.mark.parametrize("way", FILL)
def test_a_model_that_fits_once_is_filled_and_calibrated(way, weights):
    """Never twice: 1.6 times the weights are more than one copy and a few layers, and less than two copies."""
    first, fill, mapped = FILL[way]
    grown = run(f"""
        {first.format(path=str(weights), more=int(BYTES * (1.6 + mapped)))}
        with torch.device("meta"):
            qmodel = wrap(network(), recipe)
        {fill}
        calibrate(qmodel, [torch.randn(2, {WIDTH})], force={not mapped})
        with torch.no_grad():  # in training mode quantized weights come and go, layer by layer
            assert qmodel.train()(torch.randn(2, {WIDTH})).isfinite().all()
        print(json.dumps(peak() - start))
    """)
    assert grown < 1.6 * BYTES
