"""One of the worker processes of `test_workers`, or the lone process they are compared with.

Arguments: the file to write, this worker's number and the ports of all; no ports: one process, no strategy.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np

MINMAX = {"weights": "minmax", "activations": "minmax"}


def main(path: str, index: str, *ports: str) -> None:
    """Train a wrapped model one epoch and write what it started and ended with."""
    if ports:
        cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": int(index)}})
    import tensorflow as tf

    strategy: Any = tf.distribute.MultiWorkerMirroredStrategy() if ports else None  # before anything else of TensorFlow

    import trainable_keras
    from tests.keras.models import call, images, network, ready, recipe, same

    x, target = images(16), np.ones((16, 3), np.float32)
    with strategy.scope() if ports else nullcontext():
        qmodel = ready(network(), recipe("LSQ", "UNIFORM", calibration=MINMAX), x)
        qmodel.compile(tf.keras.optimizers.SGD(0.5), "mse")
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices((x, target)).batch(16).with_options(options)
    found = {"names": [each.name for each in qmodel.weights]}
    for when in ("start", "end", "later"):
        found |= {f"{when} {index}": each.numpy() for index, each in enumerate(qmodel.weights)}
        qmodel.fit(batches, epochs=1, verbose=0)
    deployed = trainable_keras.finalize(qmodel)
    np.savez(path, **found, same=same(call(deployed, x), call(qmodel, x)))


if __name__ == "__main__":
    main(*sys.argv[1:])
