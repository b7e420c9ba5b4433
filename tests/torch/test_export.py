"""`torch.export` of trained and of deployed models: the program gives what the model gives, bit for bit."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from tests.torch.models import GRIDS, TRAINED_BY, images, moved, network, ready, recipe, spec, train
from trainable_torch import finalize

MINMAX = {"weights": "minmax", "activations": "minmax"}


def trained(training_method, grid="SYMMETRIC", placement="inputs"):
    activations = spec(training_method, grid, placement=placement)
    how = recipe(training_method, grid, activations=activations, calibration=MINMAX)
    return moved(train(ready(network(), how, images()), [images()])).eval()


def exported(model, x, **more):
    with torch.no_grad():
        return torch.export.export(model, (x,), **more)


@pytest.mark.parametrize("deployed", [False, True], ids=["trained", "deployed"])
@pytest.mark.parametrize("placement", ["inputs", "outputs"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("training_method", ["STE", "LSQ"])
def test_the_program_gives_what_the_model_gives(training_method, grid, placement, deployed):
    qmodel = trained(training_method, grid, placement)
    model = finalize(qmodel) if deployed else qmodel
    program = exported(model, images()).module()
    assert torch.equal(program(images()), qmodel(images()))
    other = images() * 3  # other values, beyond the calibrated ranges
    assert torch.equal(program(other), qmodel(other))


@pytest.mark.parametrize("deployed", [False, True], ids=["trained", "deployed"])
@pytest.mark.parametrize("grid", GRIDS)
def test_so_does_a_model_that_chose_its_widths(grid, deployed):
    qmodel = trained("DQA", grid)
    program = exported(finalize(qmodel) if deployed else qmodel, images()).module()
    assert torch.equal(program(images()), qmodel(images()))


@pytest.mark.parametrize("training_method", TRAINED_BY)
def test_a_deployed_program_takes_any_batch_and_comes_back_from_a_file(training_method):
    qmodel = trained(training_method)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = exported(finalize(qmodel), images(), dynamic_shapes={"input": {0: batch}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for count in (2, 5, 33):
        assert torch.equal(again(images(count)), qmodel(images(count)))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_program_of_the_training_has_the_models_gradients(grid):
    """Exported with gradients, it trains: thresholds learn as in the model."""
    qmodel = trained("LSQ", grid).train()
    program = torch.export.export(qmodel, (images(),)).module()
    for model in (qmodel, program):
        model(images()).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in program.named_parameters()}
    learned = {name: parameter for name, parameter in qmodel.named_parameters() if parameter.grad is not None}
    assert any("quantizer" in name for name in learned)
    for name, parameter in learned.items():
        assert torch.equal(gradients[name], parameter.grad), name


def test_every_number_of_the_deployed_program_is_a_buffer_of_the_model():
    """So that what is moved or saved with the program is complete; nothing is baked in as a constant."""
    deployed = finalize(trained("LSQ"))
    program = exported(deployed, images())
    scales = [name for name in program.state_dict if name.endswith("grid_scale")]
    assert len(scales) == sum(isinstance(getattr(m, "grid_scale", None), torch.Tensor) for m in deployed.modules())
    assert isinstance(program.module(), nn.Module)
