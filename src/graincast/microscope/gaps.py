"""How wide the boundaries of a micrograph are beside its grains, without labels.

Thin grooves, and boundaries that are but a step of tone, are lines between grains. Deep etching makes gaps of them, as
wide as a part of a grain. Top-hats of growing size gather what is dark and narrower than they are, and what is bright and as
narrow (a granulometry: Matheron 1975; Serra, Image Analysis and Mathematical Morphology, 1982). The one less the other is
the boundaries', for tones, relief and noise make as much of both; the size at which half of it is gathered is the width.
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
SIZES_PX = np.arange(3, 26, 2)
"""Sides of the squares of the top-hats, px: up to 0.7 of a grain."""
WIDEST_GRAINS, DEEPEST = 0.6, 95
"""Widest gap that is masked, in grain diameters, and percentile of its darkness that counts as its depth: half of it bounds a gap."""
NARROW_GRAINS = 0.3
"""Size, in grain diameters, up to which dark boundaries outweigh everything bright; dark grains between bright lines do not."""
LEAST_CONTRAST = 0.1
"""What narrow dark things must have on average over narrow bright ones, in standard deviations of the image, to have a width."""
WIDE = 0.195
"""Width, in grain diameters, from which boundaries are gaps. Measured, the estimate of the diameter being good to 15 %: 0.10 to
0.15 for the simulation's grooves and for etched iron, 0.15 to 0.18 for a perovskite film, none for the NBT ceramic; 0.20 to
0.23 for deeply etched 316L steel."""


def gap_width(images: Sequence[np.ndarray], grain_diameter_px: float) -> float:
    """Width of the dark boundaries of images, in grain diameters.

    Parameters
    ----------
    images : sequence of ndarray
        (height, width) each, grey values on any scale, boundaries dark; they count alike.
    grain_diameter_px : float
        Mean grain diameter, px.

    Returns
    -------
    float
        0.08 to 0.5, the smallest for lines; 0 where narrow dark things do not outweigh narrow bright ones, and where gaps are
        wider still, so that grains are what is narrow.
    """
    gathered = np.mean([_gathered(_middle(_view(image, grain_diameter_px))) for image in images], axis=0)
    if gathered[SIZES_PX <= NARROW_GRAINS * GRAIN_PX].max() <= 0 or gathered.max() < LEAST_CONTRAST:
        return 0.0
    half = int(np.argmax(gathered >= gathered.max() / 2))
    around = slice(max(half - 1, 0), half + 1)
    return float(np.interp(gathered.max() / 2, gathered[around], SIZES_PX[around]) / GRAIN_PX)


def gap_mask(image: np.ndarray, grain_diameter_px: float) -> np.ndarray:
    """Where an image is dark and narrow; bool (height, width). Parameters as in `gap_width`."""
    dark = ndi.black_tophat(_view(image, grain_diameter_px), size=(round(WIDEST_GRAINS * GRAIN_PX),) * 2)
    return transform.resize((dark > np.percentile(dark, DEEPEST) / 2).astype(np.float32), image.shape, order=1) > 0.5


def _view(image: np.ndarray, grain_diameter_px: float) -> np.ndarray:
    zoom = GRAIN_PX / grain_diameter_px
    return ndi.gaussian_filter(transform.rescale(np.asarray(image, np.float32), zoom, anti_aliasing=zoom < 1), DENOISE_PX)


def _middle(view: np.ndarray) -> np.ndarray:
    top, left = (max(side - WINDOW_PX, 0) // 2 for side in view.shape)
    return view[top : top + WINDOW_PX, left : left + WINDOW_PX]


def _gathered(view: np.ndarray) -> np.ndarray:
    """What is dark and narrower than each size, less what is bright and as narrow, in standard deviations; (sizes,)."""
    excess = [(ndi.black_tophat(view, size=(side, side)) - ndi.white_tophat(view, size=(side, side))).mean() for side in SIZES_PX.tolist()]
    return np.array(excess) / max(float(view.std()), 1e-6)
