"""Grey levels that make simulated pictures like the micrographs before anything is trained, told without labels.

Two things are matched: how much grains differ from one another in tone (channelling, orientation and composition give
tones, etched boundaries alone give none), and the histogram.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi
from skimage import transform

from graincast.labels import fill_lines

Morphology = tuple[np.ndarray, np.ndarray]
"""Picture, uint8, and instance ids, int32, both (height, width)."""

DENOISE_PX = 1.5
"""Standard deviation of the Gaussian that takes the noise out of micrographs before their histogram is taken, px."""
GRAIN_PX, WINDOW_PX = 24, 9
"""Grain diameter at which tones are measured, px, and window of the median that takes lines and specks away, px."""
BACKGROUND_GRAINS = 1.5
"""Standard deviation of the Gaussian that makes the background, in grain diameters."""
SPREADS = np.array([0, 0.25, 0.5, 0.75, 1, 1.5, 2])
"""Multiples of the simulated spread of tones that are tried."""
MOST_IMAGES = 24
"""Pictures, and micrographs, that are looked at."""


@dataclass(frozen=True)
class Tones:
    """How pictures are given the tones of micrographs.

    Attributes
    ----------
    spread : float
        Factor on the differences in tone between grains, 0 to 2.
    curve : ndarray
        uint8 (256,): grey level in which each grey level is shown after that; monotone, falling where boundaries are bright.
    """

    spread: float
    curve: np.ndarray

    def apply(self, picture: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The morphology's picture, uint8 (height, width), in these tones."""
        return self.curve[spread_tones(picture, labels, self.spread)]


def match_tones(morphologies: Sequence[Morphology], micrographs: Sequence[np.ndarray], bright_boundaries: bool) -> Tones:
    """Find the tones that bring simulated pictures nearest to micrographs.

    Parameters
    ----------
    morphologies : sequence of (ndarray, ndarray)
        Simulated pictures, boundaries dark, and instance ids.
    micrographs : sequence of ndarray
        Prepared micrographs, uint8 (height, width), grains of about the simulation's size.
    bright_boundaries : bool
        Whether the micrographs' boundaries are brighter than their grains: pictures are then inverted, so that the
        translator never has to turn contrast round.

    Returns
    -------
    Tones
    """
    some = morphologies[:MOST_IMAGES]
    diameter = float(np.mean([np.sqrt(4 / np.pi * labels.size / max(labels.max(), 1)) for _, labels in some]))
    wanted = float(np.median([tone_share(image, diameter) for image in micrographs[:MOST_IMAGES]]))
    shares = [np.mean([tone_share(spread_tones(*morphology, spread), diameter) for morphology in some[:4]]) for spread in SPREADS]
    spread = float(np.interp(wanted, np.maximum.accumulate(shares), SPREADS))
    return Tones(spread, _curve([spread_tones(*morphology, spread) for morphology in morphologies], micrographs, bright_boundaries))


def tone_share(image: np.ndarray, grain_diameter_px: float) -> float:
    """Share of the grains' own tones in the contrast of an image.

    Parameters
    ----------
    image : ndarray
        (height, width), grey values on any scale.
    grain_diameter_px : float
        Mean grain diameter, px.

    Returns
    -------
    float
        s / (s + f) with the standard deviations s of the median over about a third of a grain, which lines and specks do
        not reach, and f of what the median takes away, both without the background: 0.25 to 0.85 for simulated pictures
        with a spread of tones of 0 to 0.16 of full scale; noise lowers it.
    """
    grey = transform.rescale(np.asarray(image, np.float32), GRAIN_PX / grain_diameter_px, anti_aliasing=grain_diameter_px > GRAIN_PX)
    grey = grey - ndi.gaussian_filter(grey, BACKGROUND_GRAINS * GRAIN_PX)
    tone = ndi.median_filter(grey, size=WINDOW_PX)
    own, fine = float(tone.std()), float((ndi.gaussian_filter(grey, 1.0) - tone).std())
    return own / max(own + fine, 1e-9)


def spread_tones(picture: np.ndarray, labels: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the differences in tone between the grains of a picture.

    Parameters
    ----------
    picture, labels : ndarray
        A `Morphology`.
    factor : float
        0: all grains alike; 1: as they are.

    Returns
    -------
    ndarray
        uint8, of the picture's shape; boundaries keep their darkness relative to the grains beside them.
    """
    if factor == 1 or not labels.any():
        return picture
    tones = ndi.median(picture, labels, np.arange(labels.max() + 1)).astype(np.float32)
    middle = float(np.median(tones[1:]))
    gain = np.clip(middle + factor * (tones - middle), 1, 255) / np.maximum(tones, 1)
    # between two grains the gain goes over from one to the other as the picture does
    smooth = ndi.gaussian_filter(gain[fill_lines(labels)], 1.0)
    return np.rint(np.clip(picture * smooth, 0, 255)).astype(np.uint8)


def _curve(pictures: Sequence[np.ndarray], micrographs: Sequence[np.ndarray], bright_boundaries: bool) -> np.ndarray:
    """Grey levels that give the pictures the histogram of the micrographs, noise apart."""
    shown = _rank(pictures)
    wanted = _rank([np.rint(ndi.gaussian_filter(image.astype(np.float32), DENOISE_PX)).astype(np.uint8) for image in micrographs])
    return np.rint(np.interp(1 - shown if bright_boundaries else shown, wanted, np.arange(256))).astype(np.uint8)


def _rank(images: Sequence[np.ndarray]) -> np.ndarray:
    """Share of the pixels below each grey level, half of those at it included; (256,), rising."""
    counts = sum((np.bincount(image.ravel(), minlength=256) for image in images), np.zeros(256))
    return (np.cumsum(counts) - counts / 2) / counts.sum()
