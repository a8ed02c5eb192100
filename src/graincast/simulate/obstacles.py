"""Pores and second-phase particles: what grains cannot enter and boundaries catch on."""

from __future__ import annotations

import math

import numpy as np

from graincast.errors import UserError
from graincast.simulate.packing import filled, largest_radius, scatter_discs

DIAMETER_SPREAD = 0.25
"""Coefficient of variation of the diameters, that of particles ripened or pores left by sintering, roughly."""

SMALLEST_DIAMETER = 3.0
"""Smallest mean diameter, px; smaller obstacles would be lost between the cells of the grid."""

GAP = 2.0
"""Least distance between the rims of two obstacles, px: between their edges, 1 px wide, there is material."""

DENSEST = {2: 0.6, 3: 0.45}
"""Largest share of a field, of a volume, that obstacles and half the gaps around them may fill. Random packings jam
at 0.84 and 0.64."""


def scatter_obstacles(shape: tuple[int, ...], fraction: float, diameter: float, rng: np.random.Generator, key: str = "obstacles") -> np.ndarray:
    """Random discs, in volumes spheres, that do not overlap.

    Parameters
    ----------
    shape : tuple of int
        (height, width) of the field, px, or (depth, height, width) of a volume, voxels; periodic.
    fraction : float
        Share of the field that obstacles fill, 0 (none) to what can be packed.
    diameter : float
        Mean diameter, px, `SMALLEST_DIAMETER` to a fifth of the shortest side. Diameters are lognormal with the
        coefficient of variation `DIAMETER_SPREAD`, and scaled so that the fraction is met.
    rng : numpy.random.Generator
        Source of sizes and places.
    key : str, optional
        What they are called in messages.

    Returns
    -------
    numpy.ndarray
        Share of each cell inside an obstacle, `shape`, float32, 0 to 1; edges are about 1 px wide.

    Raises
    ------
    UserError
        If the obstacles cannot be resolved, do not fit, or there is not even one.

    Examples
    --------
    >>> field = scatter_obstacles((128, 128), 0.1, 8, np.random.default_rng(0))
    >>> field.dtype, round(float(field.mean()), 2)
    (dtype('float32'), 0.1)
    """
    _check(shape, fraction, diameter, key)
    field = np.zeros(shape, np.float32)
    if fraction == 0:
        return field
    radii = _draw_radii(shape, fraction, diameter, rng, key)
    centres = scatter_discs(shape, np.minimum(radii + GAP / 2, largest_radius(shape)), rng)
    if centres is None:
        raise UserError(f"{key}.fraction: {fraction:g} could not be packed at a diameter of {diameter:g} px, want less")
    for centre, radius in zip(centres, radii, strict=True):
        _paint(field, centre, radius)
    return field


def _check(shape: tuple[int, ...], fraction: float, diameter: float, key: str = "obstacles") -> None:
    """Refuse what cannot be made, naming the limit."""
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise UserError(f"simulate.size: {shape} is no field, want two or three positive numbers of px")
    if not SMALLEST_DIAMETER <= diameter <= min(shape) / 5:
        raise UserError(f"{key}.diameter: {diameter:g} px is outside {SMALLEST_DIAMETER:g} px (as small as the grid resolves) "
                        f"to {min(shape) / 5:g} px (a fifth of the field's side)")
    densest = DENSEST[len(shape)] * (diameter / (diameter + GAP)) ** len(shape)
    if not 0 <= fraction <= densest:
        raise UserError(f"{key}.fraction: {fraction:g} is outside 0 to {math.floor(100 * densest) / 100:g}, as much as can be "
                        f"packed at a diameter of {diameter:g} px")


def _draw_radii(shape: tuple[int, ...], fraction: float, diameter: float, rng: np.random.Generator, key: str) -> np.ndarray:
    """Radii of obstacles that fill the fraction, px, the largest first."""
    dimensions = len(shape)
    width = math.sqrt(math.log(1 + DIAMETER_SPREAD**2))  # of the logarithm's normal distribution
    typical = diameter / 2 * math.exp(width**2 * (dimensions - 1) / 2)  # radius of the obstacle of mean area
    one = filled(shape, np.array([typical]))
    count = round(fraction / one)
    if count == 0:
        raise UserError(f"{key}.fraction: {fraction:g} is less than one obstacle of {diameter:g} px, which fills {one:.2g}")
    sizes = np.sort(np.exp(width * np.clip(rng.standard_normal(count), -2.5, 2.5)))[::-1]
    return sizes * (fraction / filled(shape, sizes)) ** (1 / dimensions)


def _paint(field: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """Add a disc to the field."""
    radius -= (field.ndim - 1) / (24 * radius)  # what the blurred edge of a curved rim adds
    cells = [np.arange(math.floor(place - radius - 1), math.ceil(place + radius + 1)) for place in centre]
    away = np.ix_(*(cell + 0.5 - place for cell, place in zip(cells, centre, strict=True)))
    distance = np.sqrt(sum(along**2 for along in away))
    field[np.ix_(*(cell % side for cell, side in zip(cells, field.shape, strict=True)))] += np.clip(radius + 0.5 - distance, 0, 1)
