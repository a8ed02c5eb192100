"""How wide the boundaries of a micrograph are beside its grains, without labels.

Thin grooves, and boundaries that are but a step of tone, are lines between grains. Deep etching makes gaps of them, as
wide as a part of a grain. What is dark and narrower than `WIDEST_GRAINS` of a grain is found by a top-hat; its local
thickness (a granulometry: Matheron 1975; Serra, Image Analysis and Mathematical Morphology, 1982) tells gaps from
grooves. What is as bright and narrow counts against it, so that tones, relief and noise, which make as much of the one as
of the other, come out as nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage as ndi
from skimage import transform

GRAIN_PX, DENOISE_PX = 36.0, 1.5
"""Grain diameter at which boundaries are looked at, and standard deviation of the Gaussian that takes noise away, px."""
WINDOW_PX = 512
"""Side of the window in the middle of an image in which widths are measured, px; it holds some 250 grains."""
WIDEST_GRAINS = 0.6
"""Widest gap that is looked for, in grain diameters."""
NARROW_GRAINS = 0.3
"""Size, in grain diameters, below which boundaries outweigh grains."""
DEEPEST = 95
"""Percentile of the darkness that counts as the depth of boundaries; half of it bounds them, which leaves shading out."""
RADII_PX = np.arange(1, 14)
"""Radii of the granulometry, px."""
LEAST_AREA = 0.05
"""Share of the image that must be dark and narrow, beyond what is bright and narrow, for boundaries to have a width."""
WIDE = 0.15
"""Width, in grain diameters, from which boundaries are gaps. Measured: 0 for the simulation's grooves, the virtual SEM, a
perovskite film, etched iron and the NBT ceramic; 0.25 for deeply etched 316L steel."""


def gap_width(images: Sequence[np.ndarray], grain_diameter_px: float) -> float:
    """Mean width of the dark boundaries of images, in grain diameters.

    Parameters
    ----------
    images : sequence of ndarray
        (height, width) each, grey values on any scale, boundaries dark; they count alike.
    grain_diameter_px : float
        Mean grain diameter, px.

    Returns
    -------
    float
        0 to about 0.7; 0 where narrow dark things do not outweigh narrow bright ones.
    """
    views = [_middle(_view(image, grain_diameter_px)) for image in images]
    if np.mean([_balance(view) for view in views]) <= 0:
        return 0.0
    dark, bright = np.mean([_granulometry(view) for view in views], axis=0)
    left = np.minimum.accumulate(np.maximum(dark - bright, 0))
    if left[0] < LEAST_AREA:
        return 0.0
    return float(2 * np.trapezoid(left, dx=1.0) / left[0] / GRAIN_PX)


def gap_mask(image: np.ndarray, grain_diameter_px: float) -> np.ndarray:
    """Where an image is dark and narrow; bool (height, width). Parameters as in `gap_width`."""
    dark, _, depth = _narrow(_view(image, grain_diameter_px))
    return transform.resize((dark > depth / 2).astype(np.float32), image.shape, order=1) > 0.5


def _granulometry(view: np.ndarray) -> np.ndarray:
    """Shares of the image that are dark and narrow, and bright and narrow, and hold a disc of each radius from 0; (2, radii)."""
    dark, bright, depth = _narrow(view)
    return np.array([_thickness(part > depth / 2) for part in (dark, bright)])


def _view(image: np.ndarray, grain_diameter_px: float) -> np.ndarray:
    zoom = GRAIN_PX / grain_diameter_px
    return ndi.gaussian_filter(transform.rescale(np.asarray(image, np.float32), zoom, anti_aliasing=zoom < 1), DENOISE_PX)


def _middle(view: np.ndarray) -> np.ndarray:
    top, left = (max(side - WINDOW_PX, 0) // 2 for side in view.shape)
    return view[top : top + WINDOW_PX, left : left + WINDOW_PX]


def _balance(view: np.ndarray) -> float:
    """What is dark and much narrower than a grain, less what is bright and as narrow: the mean difference of their top-hats."""
    side = (round(NARROW_GRAINS * GRAIN_PX),) * 2
    return float((ndi.black_tophat(view, size=side) - ndi.white_tophat(view, size=side)).mean())


def _narrow(view: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Black and white top-hat, and the depth of boundaries."""
    side = (round(WIDEST_GRAINS * GRAIN_PX),) * 2
    dark, bright = ndi.black_tophat(view, size=side), ndi.white_tophat(view, size=side)
    return dark, bright, max(float(np.percentile(dark, DEEPEST)), 1e-6)


def _thickness(part: np.ndarray) -> np.ndarray:
    """Share of the image within discs of each radius that fit into `part`, from radius 0."""
    inside = ndi.distance_transform_edt(part)
    shares = np.zeros(len(RADII_PX) + 1)
    shares[0] = part.mean()
    for i, radius in enumerate(RADII_PX, start=1):
        centres = inside > radius
        if not centres.any():
            break
        shares[i] = (ndi.distance_transform_edt(~centres) <= radius).mean()
    return shares
