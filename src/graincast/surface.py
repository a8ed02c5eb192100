"""The surface of grains, drawn at random on a picture: what a morphology leaves open.

Relief and tones of the grains, texture on them, specks and scratches. The segmenter learns on crops that carry it, and so
tells a boundary from what only looks like one; the translator is shown it, so that it has something to make the
micrographs' own marks of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi
from skimage import draw

from graincast.labels import fill_lines

if TYPE_CHECKING:
    from graincast.config import Augment

MOTTLE_PX = (1.5, 4.0, 10.0, 25.0)
"""Correlation lengths (standard deviation of the smoothing Gaussian) of the texture on grains, px."""
VEIN_PX, VEIN_WIDTH = (5.0, 14.0), (0.1, 0.3)
"""Correlation lengths of the fields whose zero lines are veins, px, and the veins' widths, in the fields' values."""
SPECK_PX, SPECKS = (0.6, 1.6), 0.012
"""Radii of specks, px, and the largest number of them a pixel."""
MOST_SCRATCHES = 4
SUNKEN_SHARE = 0.15
"""Share of the grains that lie deep and so look dark, where there are any."""


def texture(grey: np.ndarray, labels: np.ndarray, config: Augment, rng: np.random.Generator) -> np.ndarray:
    """Give the grains of a picture relief, tones and texture, and their surface specks and scratches.

    Each effect is left out of half the crops, so that plain ones stay among them.

    Parameters
    ----------
    grey : ndarray
        float32 (height, width), in [0, 255].
    labels : ndarray
        Instance ids, int32 (height, width); 0 = boundary.
    config : graincast.config.Augment
        Largest strength of each effect.
    rng : numpy.random.Generator
        Draws everything.

    Returns
    -------
    ndarray
        float32 (height, width), beyond [0, 255] in places.
    """
    change = np.zeros_like(grey)
    if _coin(rng):
        change += _relief(labels, config.relief * rng.uniform(size=2), rng)
    if _coin(rng):
        change += _tones(labels, config.tones * rng.uniform(), rng)
    for length in MOTTLE_PX:
        if _coin(rng):
            change += config.mottle * rng.uniform() * smooth_field(grey.shape, length * rng.uniform(0.7, 1.4), rng)
    if _coin(rng):
        change += config.veins * rng.uniform(-1, 1) * _veins(labels, rng)
    if _coin(rng):
        change += config.specks * rng.uniform(-1, 1) * _specks(grey.shape, rng)
    if _coin(rng):
        change += config.scratches * rng.uniform(-1, 1) * _scratches(grey.shape, rng)
    return grey + 255 * change


def _coin(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def _relief(labels: np.ndarray, strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grains tilted (`strength[0]`) and domed or dished (`strength[1]`), each its own way: brightness on flanks and tops."""
    dense = fill_lines(labels)
    area = np.maximum(np.bincount(dense.ravel()), 1)
    rows, columns = np.indices(labels.shape, np.float32)
    radius = np.sqrt(area / np.pi)[dense]
    down, right, dome = rng.standard_normal((3, area.size))
    tilt = sum(slope[dense] * (axis - (np.bincount(dense.ravel(), axis.ravel()) / area)[dense]) for slope, axis in ((down, rows), (right, columns)))
    height = np.minimum(ndi.distance_transform_edt(labels > 0) / radius, 1)
    return (strength[0] * tilt / radius + strength[1] * dome[dense] * height).astype(np.float32)


def _tones(labels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Grains of other tones; some lie deep, in the shadow of their neighbours."""
    count = int(labels.max()) + 1
    tone = 0.3 * rng.standard_normal(count) - (rng.random(count) < SUNKEN_SHARE)
    tone[0] = 0
    return (strength * ndi.gaussian_filter(tone.astype(np.float32)[labels], 1.0)).astype(np.float32)


def smooth_field(shape: tuple[int, ...], length: float, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian random field.

    Parameters
    ----------
    shape : tuple of int
        Of the field, px.
    length : float
        Standard deviation of the Gaussian that correlates it, px; where that is large, the field is drawn coarse and enlarged.
    rng : numpy.random.Generator
        Draws it.

    Returns
    -------
    ndarray
        Unit variance, of the given shape.
    """
    step = max(int(length // 2), 1)
    coarse = ndi.gaussian_filter(rng.standard_normal([-(-side // step) + 2 for side in shape], np.float32), length / step, mode="wrap")
    field = ndi.zoom(coarse, step, order=1)[: shape[0], : shape[1]]
    return field / max(float(field.std()), 1e-6)


def _veins(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Curved lines on the grains that are no boundaries: zero lines of a smooth field."""
    field = smooth_field(labels.shape, rng.uniform(*VEIN_PX), rng)
    return np.exp(-((field / rng.uniform(*VEIN_WIDTH)) ** 2)) * (labels > 0)


def _specks(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Round spots (pits, dust, precipitates), peak up to 1."""
    count = rng.poisson(rng.uniform(0, SPECKS) * np.prod(shape))
    spots = np.zeros(shape, np.float32)
    spots[tuple(rng.integers(0, side, count) for side in shape)] = rng.uniform(0.2, 1, count)
    radius = rng.uniform(*SPECK_PX)
    return ndi.gaussian_filter(spots, radius) * np.float32(2 * np.pi * radius**2)


def _scratches(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Straight lines from side to side, each up to 1."""
    lines = np.zeros(shape, np.float32)
    for _ in range(rng.integers(1, MOST_SCRATCHES + 1)):
        start, end = (rng.integers(0, shape) for _ in range(2))
        rows, columns, cover = draw.line_aa(*start, *end)
        lines[rows, columns] = np.maximum(lines[rows, columns], cover * rng.uniform(0.3, 1))
    return lines


