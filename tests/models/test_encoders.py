"""What stands before the encoders' layers."""

from __future__ import annotations

import torch
from torch import nn

from tap_flower.models.encoders import PatchProjection


def test_a_projection_of_patches_is_the_convolution() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, kernel_size=4, stride=4)
    projection = PatchProjection(convolution)
    assert list(projection.state_dict()) == list(convolution.state_dict())
    images = torch.randn(2, 3, 8, 12)
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for module in (convolution, projection):
        pixels = images.clone().requires_grad_()
        output = module(pixels)
        output.square().sum().backward()
        found.append((output, pixels.grad))
    torch.testing.assert_close(found[1], found[0])
