"""Every built-in method's golden vectors, in its PyTorch quantizers."""

import numpy as np
import torch

from tests.method_vectors import check_case, method_cases
from trainable_core.enums import TieRule


def run(quantizer, x, upstream):
    given = torch.tensor(x, requires_grad=True)
    values = quantizer.train()(given)
    values.backward(torch.tensor(upstream))
    gradients = {name: parameter.grad.numpy() for name, parameter in quantizer.named_parameters()}
    return values.detach().numpy(), np.asarray(given.grad), gradients


@method_cases("torch", TieRule.HALF_EVEN)
def test_golden_vectors(cls, case):
    check_case(cls, case, run)
