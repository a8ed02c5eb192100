"""Width of boundaries and grey levels that make simulated pictures like the micrographs before anything is trained, told
without labels.

Three things are matched: how wide boundaries are (deep etching makes gaps of them), how much grains differ from one
another in tone (channelling, orientation and composition give tones, etched boundaries alone give none), and the histogram.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi
from skimage import transform

from graincast.labels import fill_lines
from graincast.microscope.gaps import WIDE, gap_width
from graincast.surface import smooth_field

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
WIDTHS = np.array([0, 0.07, 0.13, 0.2, 0.3, 0.4])
"""Widenings that are tried, in grain diameters."""
VARIATION, VARIATION_GRAINS = 0.5, 0.45
"""Standard deviation of the logarithm of the width along the specimen, and its correlation length in grain diameters."""
ROUNDING = 0.15
"""Standard deviation of the Gaussian that rounds the corners of grains, in widths of the gap."""
FLANK_PX = 1.5
"""Distance over which a simulated groove rises half way to the grain, px."""
LEAST_GRAIN = 0.4
"""Share of a grain's inner radius that gaps leave of it."""
MOST_IMAGES = 24
"""Pictures, and micrographs, that are looked at."""


@dataclass(frozen=True)
class Tones:
    """How pictures are given the tones of micrographs.

    Attributes
    ----------
    width : float
        Mean width by which boundaries are widened, px; 0 leaves them as they are.
    spread : float
        Factor on the differences in tone between grains, 0 to 2.
    curve : ndarray
        uint8 (256,): grey level in which each grey level is shown after that; monotone, falling where boundaries are bright.
    place : int or None
        Seed of the width along the specimen, for several pictures of one place; None: each picture has its own.
    """

    width: float
    spread: float
    curve: np.ndarray
    place: int | None = None

    def apply(self, picture: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The morphology's picture, uint8 (height, width), in these tones."""
        return self.curve[widen(spread_tones(picture, labels, self.spread), labels, self.width, self.place)]


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
    some, shown = morphologies[:4], micrographs[:: -(-len(micrographs) // MOST_IMAGES)]
    diameter = float(np.mean([_diameter(labels) for _, labels in morphologies[:MOST_IMAGES]]))
    width = _matched_width(some, [255 - image for image in shown] if bright_boundaries else shown, diameter)

    def drawn(morphology: Morphology, spread: float) -> np.ndarray:
        return widen(spread_tones(*morphology, spread), morphology[1], width)

    wanted = float(np.median([tone_share(image, diameter) for image in shown]))
    shares = [np.mean([tone_share(drawn(morphology, spread), diameter) for morphology in some]) for spread in SPREADS]
    spread = float(np.interp(wanted, np.maximum.accumulate(shares), SPREADS))
    return Tones(width, spread, _curve([drawn(morphology, spread) for morphology in morphologies], micrographs, bright_boundaries))


def _matched_width(morphologies: Sequence[Morphology], micrographs: Sequence[np.ndarray], diameter: float) -> float:
    """Widening, px, that makes the boundaries of simulated pictures as wide as the dark ones of micrographs, if those are wide."""
    wanted = gap_width(micrographs, diameter)
    if wanted < WIDE:
        return 0.0
    plain = [(spread_tones(*morphology, 0), morphology[1]) for morphology in morphologies]  # tones would blur the measure
    widths = [gap_width([widen(*morphology, width * diameter) for morphology in plain], diameter) for width in WIDTHS]
    return float(diameter * np.interp(wanted, np.maximum.accumulate(widths), WIDTHS))


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


def widen(picture: np.ndarray, labels: np.ndarray, width: float, place: int | None = None) -> np.ndarray:
    """Make gaps of the boundaries of a picture; the labels' lines stay in the middle of them.

    Parameters
    ----------
    picture, labels : ndarray
        A `Morphology`.
    width : float
        Width that is added, px, on average over the image. It varies smoothly along the specimen, and is less beside small
        grains.
    place : int, optional
        Seed of that variation; None: drawn from `labels`.

    Returns
    -------
    ndarray
        uint8, of the picture's shape. A gap is as dark as its boundary was, so that faded ones stay faded.
    """
    if not width or labels.all() or not labels.any():
        return picture
    gaps = _gaps(labels, width, place)
    beyond = ndi.gaussian_filter(gaps.distance - gaps.half_width, ROUNDING * width)
    line = labels == 0
    bottomed = np.where(line, _along(line, ndi.grey_erosion(picture, (3, 3))), picture)
    return np.rint(gaps.sampled(bottomed, np.maximum(beyond, 0))).astype(np.uint8)


def narrow(values: np.ndarray, labels: np.ndarray, width: float, place: int | None = None) -> np.ndarray:
    """Close the gaps that `widen` makes to lines again, in a map (height, width) of a picture that has such gaps."""
    if not width or labels.all() or not labels.any():
        return values
    gaps = _gaps(labels, width, place)
    # beside the line comes the flank; the way from there to the middle of the grain is stretched over the grain
    flank = np.minimum(gaps.half_width + FLANK_PX, gaps.radius)
    onwards = np.clip((gaps.distance - 1) / np.maximum(gaps.radius - 1, 1), 0, 1)
    return gaps.sampled(values, np.minimum(gaps.distance, 1) * flank + (gaps.radius - flank) * onwards)


@dataclass(frozen=True)
class _Gaps:
    """Distance from each pixel to the nearest line, place of that, (2, height, width), half the gap's width there, and the inner
    radius of the pixel's grain, px."""

    distance: np.ndarray
    line: np.ndarray
    half_width: np.ndarray
    radius: np.ndarray

    def sampled(self, picture: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Each pixel's value taken from where, on its way from the line, the line is `distance` away."""
        ratio = distance / np.maximum(self.distance, 1)
        places = self.line + (np.indices(picture.shape) - self.line) * ratio
        return ndi.map_coordinates(picture, places, order=1, mode="nearest")


def _gaps(labels: np.ndarray, width: float, place: int | None) -> _Gaps:
    line, diameter = labels == 0, _diameter(labels)
    distance, nearest = ndi.distance_transform_edt(~line, return_indices=True)
    filled = fill_lines(labels)
    radius = ndi.maximum(distance, filled, np.arange(filled.max() + 1))[filled]
    rng = np.random.default_rng(zlib.crc32(np.ascontiguousarray(labels).tobytes()) if place is None else place)
    varied = np.exp(VARIATION * smooth_field(labels.shape, VARIATION_GRAINS * diameter, rng))
    half = np.minimum(width / 2 * varied / varied.mean(), (1 - LEAST_GRAIN) * ndi.minimum_filter(radius, 5))
    return _Gaps(distance, nearest, _along(line, half)[tuple(nearest)], radius)


def _along(line: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values smoothed along a line, over what junctions make jump."""
    return ndi.gaussian_filter(values * line.astype(np.float32), 3.0) / np.maximum(ndi.gaussian_filter(line.astype(np.float32), 3.0), 1e-6)


def _diameter(labels: np.ndarray) -> float:
    """Diameter of the circle of mean grain area, px."""
    return float(np.sqrt(4 / np.pi * labels.size / max(labels.max(), 1)))


def _curve(pictures: Sequence[np.ndarray], micrographs: Sequence[np.ndarray], bright_boundaries: bool) -> np.ndarray:
    """Grey levels that give the pictures the histogram of the micrographs, noise apart."""
    shown = _rank(pictures)
    wanted = _rank([np.rint(ndi.gaussian_filter(image.astype(np.float32), DENOISE_PX)).astype(np.uint8) for image in micrographs])
    return np.rint(np.interp(1 - shown if bright_boundaries else shown, wanted, np.arange(256))).astype(np.uint8)


def _rank(images: Sequence[np.ndarray]) -> np.ndarray:
    """Share of the pixels below each grey level, half of those at it included; (256,), rising."""
    counts = sum((np.bincount(image.ravel(), minlength=256) for image in images), np.zeros(256))
    return (np.cumsum(counts) - counts / 2) / counts.sum()
