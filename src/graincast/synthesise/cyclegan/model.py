"""The networks of the CycleGAN.

Generators follow Johnson et al. 2016 / Zhu et al. 2017 (strided convolutions, residual blocks) with three changes:
nearest-neighbour upsampling + convolution in place of transposed convolution (no checkerboards; Odena et al. 2016,
doi:10.23915/distill.00003), the input added to the output at full resolution so that a generator starts as the
identity and boundaries stay where they are, and, for simulation -> SEM, noise that supplies what a smooth morphology
cannot determine. It is added at the end, as a detector adds it: coloured by a learned filter, with a learned strength
at every pixel. It is no input, or the generator would learn to cancel it for the cycle's sake.
"""

from __future__ import annotations

import torch
from torch import nn

NOISE_RANGE = 0.5
"""How far the learned strength of the noise may leave the level measured in the micrographs; natural logarithm."""


class Generator(nn.Module):
    """Image to image, (batch, 1, height, width) in [-1, 1] on both sides; sides must be multiples of 4.

    Parameters
    ----------
    filters : int
        Filters of the first layer; doubled at each of the two downsamplings.
    residual_blocks : int
        Residual blocks at a quarter of the resolution.
    noise : bool
        Add noise to the output.

    Attributes
    ----------
    noise_level : Tensor
        Standard deviation of the added noise, as measured in the micrographs, in units of half the grey scale.
    """

    noise_level: torch.Tensor

    def __init__(self, filters: int, residual_blocks: int, noise: bool) -> None:
        super().__init__()
        self.register_buffer("noise_level", torch.tensor(0.0))
        self.stem = _conv(1, filters, 5)
        self.down = nn.Sequential(_conv(filters, 2 * filters, 3, stride=2), _conv(2 * filters, 4 * filters, 3, stride=2))
        self.blocks = nn.Sequential(*(_Residual(4 * filters) for _ in range(residual_blocks)))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), _conv(4 * filters, 2 * filters, 3),
                                nn.Upsample(scale_factor=2), _conv(2 * filters, filters, 3))
        self.head = nn.Sequential(nn.Conv2d(filters + 1, filters, 3, padding=1), nn.ReLU(inplace=True),
                                  nn.Conv2d(filters, 2 if noise else 1, 3, padding=1))
        self.colour = nn.Conv2d(1, 1, 5, padding=2, bias=False) if noise else None

    def initialise(self) -> None:
        """Draw the weights anew (normal, 0.02, as Zhu et al. 2017); the noise starts white and weak."""
        self.apply(_initialise)
        if self.colour is not None:
            nn.init.dirac_(self.colour.weight)

    def forward(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        content, added = self.parts(image, noise)
        return torch.tanh(content + added)

    def parts(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the output is the hyperbolic tangent of the sum of: the content and the added noise."""
        if self.colour is None:
            return image + self._head(image), torch.zeros_like(image)
        noise = torch.randn_like(image) if noise is None else noise
        change, strength = self._head(image).chunk(2, dim=1)
        return image + change, self.noise_level * torch.exp(NOISE_RANGE * torch.tanh(strength)) * self.colour(noise).float()

    def _head(self, image: torch.Tensor) -> torch.Tensor:
        coarse = self.up(self.blocks(self.down(self.stem(image))))
        return self.head(torch.cat([coarse, image], dim=1)).float()


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one realism score a patch of about 34 px, (batch, 1, h', w')."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, filters, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True),
            *_patch_layer(filters, 2 * filters, stride=2), *_patch_layer(2 * filters, 4 * filters, stride=1),
            nn.Conv2d(4 * filters, 1, 4, padding=1))

    def initialise(self) -> None:
        """Draw the weights anew (normal, 0.02)."""
        self.apply(_initialise)

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


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
