"""Lets libraries that import torchvision do so beside a PyTorch that its compiled part was not built for.

There is no torchvision for every build of PyTorch; the kernels are not needed here, but importing it fails where their
names are unknown.
"""

from __future__ import annotations

import torch

_NAMES = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _NAMES.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
