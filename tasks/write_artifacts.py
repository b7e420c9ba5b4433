"""Writes `tests/artifacts/<version>/`: files of this version, which later versions must read.

Run it once per release from the repository's root, in environments that have the backends:

    python -m tasks.write_artifacts core
    python -m tasks.write_artifacts torch
    KERAS_BACKEND=tensorflow python -m tasks.write_artifacts keras
    TF_USE_LEGACY_KERAS=1 python -m tasks.write_artifacts keras

Files that are there already are left alone, unless ``--again`` says that their version is not released yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainable_core
from tests.artifacts import documents, model, quantizers
from trainable_core import QuantizationRecipe
from trainable_core.cli import main as trainable
from trainable_core.documents.plan import plan_document

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests/artifacts" / trainable_core.__version__


def write_json(path: Path, document: object) -> None:
    """Write a JSON document."""
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def write_core(folder: Path) -> None:
    """Write configs, a recipe in JSON and in YAML, the plans it gives, and the schemas."""
    write_json(
        folder / "configs.json", {name: each.model_dump(mode="json") for name, each in documents.CONFIGS.items()}
    )
    recipe = QuantizationRecipe.model_validate(documents.RECIPE)
    write_json(folder / "recipe.json", recipe.model_dump(mode="json", exclude_unset=True))
    (folder / "recipe.yaml").write_text(documents.RECIPE_IN_YAML, encoding="utf-8")
    write_json(folder / "plans.json", [plan_document(plan) for plan in recipe.resolve(documents.LAYERS)])
    if trainable(["schema", "--output", str(folder / "schemas.json")]):
        sys.exit("the schemas can't be written")


def write_quantizers(folder: Path, backend: str, run: Callable[[Any], Any]) -> None:
    """Write the document of every built-in quantizer of a backend, and what it makes of a tensor."""
    found = [
        {"key": key, "config": quantizer.get_config(), "output": quantizers.listed(run(quantizer))}
        for key, quantizer in quantizers.built_in(backend)
    ]
    lines = ",\n".join(json.dumps(each) for each in found)  # a line for each
    (folder / "quantizers.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_torch(folder: Path) -> None:
    """Write the quantizers' documents and the files of a wrapped and of a finalized PyTorch model."""
    import torch  # noqa: PLC0415 - only this part needs it

    import trainable_torch  # noqa: PLC0415 - the same
    from tests.artifacts import torch_model  # noqa: PLC0415 - the same

    write_quantizers(folder, "torch", lambda quantizer: quantizer.eval()(torch.from_numpy(quantizers.TENSOR)).detach())
    x = torch_model.images()
    qmodel = trainable_torch.calibrate(trainable_torch.wrap(torch_model.network(), model.RECIPE), [x])
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=model.LEARNING_RATE)
    qmodel.train()
    for _ in range(model.STEPS):
        optimizer.zero_grad()
        qmodel(x).square().mean().backward()
        optimizer.step()
    qmodel.eval()
    with torch.no_grad():
        write_json(folder / "output.json", quantizers.listed(qmodel(x).numpy()))
    trainable_torch.save(qmodel, folder / "wrapped.safetensors")
    trainable_torch.save(trainable_torch.finalize(qmodel), folder / "finalized.safetensors")


def write_keras(folder: Path) -> None:
    """Write the quantizers' documents, and both kinds of files of a wrapped and of a finalized Keras model."""
    import numpy as np  # noqa: PLC0415 - only this part needs them

    import trainable_keras  # noqa: PLC0415 - the same
    from tests.artifacts import keras_model  # noqa: PLC0415 - the same

    keras = keras_model.keras
    write_quantizers(folder, keras_model.BACKEND, lambda quantizer: np.asarray(quantizer(quantizers.TENSOR)))
    x = keras_model.images()
    qmodel = trainable_keras.calibrate(trainable_keras.wrap(keras_model.network(), model.RECIPE), [x])
    qmodel.compile(keras.optimizers.SGD(model.LEARNING_RATE), "mse")
    qmodel.fit(x, np.zeros((len(x), 5), np.float32), batch_size=len(x), epochs=model.STEPS, verbose=0)
    deployed = trainable_keras.finalize(qmodel)
    write_json(folder / "output.json", quantizers.listed(qmodel.predict(x, verbose=0)))
    for name, each in (("wrapped", qmodel), ("finalized", deployed)):
        trainable_keras.save(each, folder / f"{name}.npz")
        each.save(folder / f"{name}.keras")


def main() -> None:
    """Write one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=("core", "torch", "keras"))
    parser.add_argument("--again", action="store_true", help="replace what is there")
    options = parser.parse_args()
    name = options.part
    if name == "keras":
        from tests.artifacts.keras_model import BACKEND as name  # noqa: N811, PLC0415 - which Keras it is, that one knows
    folder = FOLDER / name
    if folder.exists() and not options.again:
        sys.exit(f"{folder.relative_to(ROOT)} is there already; --again replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    {"core": write_core, "torch": write_torch, "keras": write_keras}[options.part](folder)
    for path in sorted(folder.iterdir()):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
