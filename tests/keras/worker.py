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


def main(path: str, index: str, *ports: str) -> None:
    """Train a wrapped model one epoch and write what it started and ended with."""
    if ports:
        cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": int(index)}})
    import tensorflow as tf

    strategy: Any = tf.distribute.MultiWorkerMirroredStrategy() if ports else None  # before anything else of TensorFlow

    import trainable_keras.keras2
    from tests.tfkeras.models import LSQ, output, small, values

    x, target = values(16, 6, 6, 2), np.ones((16, 3), np.float32)
    with strategy.scope() if ports else nullcontext():
        qmodel = trainable_keras.keras2.calibrate(trainable_keras.keras2.wrap(small(), LSQ), [x])
        qmodel.compile(tf.keras.optimizers.SGD(0.5), "mse")
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices((x, target)).batch(16).with_options(options)
    found = {"names": [each.name for each in qmodel.weights]}
    for when in ("start", "end", "later"):
        found |= {f"{when} {index}": each.numpy() for index, each in enumerate(qmodel.weights)}
        qmodel.fit(batches, epochs=1, verbose=0)
    deployed = trainable_keras.keras2.finalize(qmodel)
    np.savez(path, **found, same=np.array_equal(output(deployed, x), output(qmodel, x)))


if __name__ == "__main__":
    main(*sys.argv[1:])
