"""Augmentation: other specimens and other microscopes than those that the training images show.

What a morphology leaves open is drawn anew for every crop: the relief and the tones of its grains, texture on them,
specks and scratches; then scale, orientation, gain, brightness, focus, shot and scan-line noise. A segmenter that has
seen all this tells a boundary from what only looks like one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi
from skimage import draw, transform

from graincast.compute import dihedral, random_crop
from graincast.labels import fill_lines

if TYPE_CHECKING:
    from graincast.config import Augment

WARP_PX = (12.0, 30.0)
"""Correlation lengths of the displacements that bend boundaries, px."""
MOTTLE_PX = (1.5, 4.0, 10.0, 25.0)
"""Correlation lengths (standard deviation of the smoothing Gaussian) of the texture on grains, px."""
VEIN_PX, VEIN_WIDTH = (5.0, 14.0), (0.1, 0.3)
"""Correlation lengths of the fields whose zero lines are veins, px, and the veins' widths, in the fields' values."""
SPECK_PX, SPECKS = (0.6, 1.6), 0.004
"""Radii of specks, px, and the largest number of them a pixel."""
MOST_SCRATCHES = 4
SUNKEN_SHARE = 0.15
"""Share of the grains that lie deep and so look dark, where there are any."""


def augmented_crop(image: np.ndarray, labels: np.ndarray, side: int, config: Augment, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of an image and its instance ids, zoomed, turned, textured and imaged anew.

    Parameters
    ----------
    image : ndarray
        uint8 (height, width).
    labels : ndarray
        int32 (height, width); 0 = boundary.
    side : int
        Side of the crop, px; at most the image's smaller side.
    config : graincast.config.Augment
        Largest strength of each effect.
    rng : numpy.random.Generator
        Draws everything.

    Returns
    -------
    image, labels : ndarray
        float32 in [0, 255] and int32, both (side, side).
    """
    zoom = float(np.exp(rng.uniform(-1, 1) * np.log(config.zoom)))
    source = min(round(side / zoom), *image.shape)
    window = random_crop(image, source, rng)
    symmetry = int(rng.integers(8))
    grey = dihedral(image[window], symmetry).astype(np.float32)
    ids = np.ascontiguousarray(dihedral(labels[window], symmetry))
    if source != side:
        grey = transform.resize(grey, (side, side), order=1, anti_aliasing=source > side, preserve_range=True).astype(np.float32)
        ids = _nearest(ids, side)
    grey, ids = _warped(grey, ids, config.warp, rng)
    return imitate(texture(grey, ids, config, rng), config, rng), ids


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
            change += config.mottle * rng.uniform() * _smooth_field(grey.shape, length * rng.uniform(0.7, 1.4), rng)
    if _coin(rng):
        change += config.veins * rng.uniform(-1, 1) * _veins(labels, rng)
    if _coin(rng):
        change += config.specks * rng.uniform(-1, 1) * _specks(grey.shape, rng)
    if _coin(rng):
        change += config.scratches * rng.uniform(-1, 1) * _scratches(grey.shape, rng)
    return grey + 255 * change


def imitate(grey: np.ndarray, config: Augment, rng: np.random.Generator) -> np.ndarray:
    """Image a grey picture, float32 (height, width) in [0, 255], with other gain, offset, gamma, focus and noise."""
    grey = ndi.gaussian_filter(grey, rng.uniform(0, config.blur_px))
    grey = grey * np.exp(rng.uniform(-1, 1) * np.log1p(config.gain)) + 255 * rng.uniform(-1, 1) * config.offset
    grey = 255 * (np.clip(grey, 0, 255) / 255) ** np.exp(rng.uniform(-1, 1) * np.log(config.gamma))
    # shot noise: variance proportional to the signal, `noise` being its strength at mid grey
    strength = 255 * rng.uniform(0, config.noise)
    grey = grey + strength * np.sqrt(grey / 127.5) * rng.standard_normal(grey.shape, np.float32)
    grey = grey + 255 * rng.uniform(0, config.line_noise) * rng.standard_normal((grey.shape[0], 1), np.float32)
    return np.clip(grey, 0, 255).astype(np.float32)


def _warped(grey: np.ndarray, labels: np.ndarray, strength: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bend image and labels together, in half the crops: simulated boundaries are straighter than many real ones."""
    if not strength or not _coin(rng):
        return grey, labels
    length = rng.uniform(*WARP_PX)
    amount = strength * length * rng.uniform()
    places = np.indices(grey.shape, np.float32) + amount * np.stack([_smooth_field(grey.shape, length, rng) for _ in range(2)])
    return ndi.map_coordinates(grey, places, order=1, mode="reflect"), ndi.map_coordinates(labels, places, order=0, mode="reflect")


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


def _smooth_field(shape: tuple[int, ...], length: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian random field of unit variance, smooth over `length` px; drawn coarse and enlarged where it is very smooth."""
    step = max(int(length // 2), 1)
    coarse = ndi.gaussian_filter(rng.standard_normal([-(-side // step) + 2 for side in shape], np.float32), length / step, mode="wrap")
    field = ndi.zoom(coarse, step, order=1)[: shape[0], : shape[1]]
    return field / max(float(field.std()), 1e-6)


def _veins(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Curved lines on the grains that are no boundaries: zero lines of a smooth field."""
    field = _smooth_field(labels.shape, rng.uniform(*VEIN_PX), rng)
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


def _nearest(labels: np.ndarray, side: int) -> np.ndarray:
    index = ((np.arange(side) + 0.5) * labels.shape[0] / side).astype(int)
    return labels[np.ix_(index, index)]
