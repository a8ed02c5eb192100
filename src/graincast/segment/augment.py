"""Augmentation: other specimens and other microscopes than those that the training images show.

Every crop gets a scale, an orientation, bent boundaries, a surface (`graincast.surface`), gain, brightness, focus, shot
and scan-line noise of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi
from skimage import transform

from graincast.compute import dihedral, random_crop
from graincast.surface import smooth_field, texture

if TYPE_CHECKING:
    from graincast.config import Augment

WARP_PX = (12.0, 30.0)
"""Correlation lengths of the displacements that bend boundaries, px."""


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
    if not strength or rng.random() >= 0.5:
        return grey, labels
    length = rng.uniform(*WARP_PX)
    amount = strength * length * rng.uniform()
    places = np.indices(grey.shape, np.float32) + amount * np.stack([smooth_field(grey.shape, length, rng) for _ in range(2)])
    return ndi.map_coordinates(grey, places, order=1, mode="reflect"), ndi.map_coordinates(labels, places, order=0, mode="reflect")


def _nearest(labels: np.ndarray, side: int) -> np.ndarray:
    index = ((np.arange(side) + 0.5) * labels.shape[0] / side).astype(int)
    return labels[np.ix_(index, index)]
