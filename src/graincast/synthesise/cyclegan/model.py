"""The networks of the CycleGAN.

Generators follow Johnson et al. 2016 / Zhu et al. 2017 (strided convolutions, residual blocks) with three changes:
nearest-neighbour upsampling + convolution in place of transposed convolution (no checkerboards; Odena et al. 2016,
doi:10.23915/distill.00003), a skip of the input to the last layers so that boundaries stay where they are, and, for
simulation -> SEM, a noise channel that supplies the texture a smooth morphology cannot determine.
"""

from __future__ import annotations

import torch
from torch import nn


class Generator(nn.Module):
    """Image to image, (batch, 1, height, width) in [-1, 1] on both sides; sides must be multiples of 4.

    Parameters
    ----------
    filters : int
        Filters of the first layer; doubled at each of the two downsamplings.
    residual_blocks : int
        Residual blocks at a quarter of the resolution.
    noise : bool
        Take a second input channel of Gaussian noise.
    """

    def __init__(self, filters: int, residual_blocks: int, noise: bool) -> None:
        super().__init__()
        self.noise = noise
        inputs = 2 if noise else 1
        self.stem = _conv(inputs, filters, 5)
        self.down = nn.Sequential(_conv(filters, 2 * filters, 3, stride=2), _conv(2 * filters, 4 * filters, 3, stride=2))
        self.blocks = nn.Sequential(*(_Residual(4 * filters) for _ in range(residual_blocks)))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), _conv(4 * filters, 2 * filters, 3),
                                nn.Upsample(scale_factor=2), _conv(2 * filters, filters, 3))
        self.head = nn.Sequential(nn.Conv2d(filters + inputs, filters, 3, padding=1), nn.ReLU(inplace=True),
                                  nn.Conv2d(filters, 1, 3, padding=1), nn.Tanh())

    def forward(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        if self.noise:
            image = torch.cat([image, noise if noise is not None else torch.randn_like(image)], dim=1)
        coarse = self.up(self.blocks(self.down(self.stem(image))))
        return self.head(torch.cat([coarse, image], dim=1))


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one realism score a patch of about 34 px, (batch, 1, h', w')."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, filters, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True),
            *_patch_layer(filters, 2 * filters, stride=2), *_patch_layer(2 * filters, 4 * filters, stride=1),
            nn.Conv2d(4 * filters, 1, 4, padding=1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


class _Residual(nn.Module):
    def __init__(self, filters: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(filters, filters, 3), nn.Conv2d(filters, filters, 3, padding=1),
                                  nn.InstanceNorm2d(filters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2),
                         nn.InstanceNorm2d(outputs), nn.ReLU(inplace=True))


def _patch_layer(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return (nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1), nn.InstanceNorm2d(outputs), nn.LeakyReLU(0.2, inplace=True))
