"""Whether grain boundaries are brighter or darker than the grains, told from unlabelled micrographs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage as ndi
from skimage.morphology import black_tophat, disk, white_tophat

LINE_PX = 4
"""Half the largest width of a boundary line, px, at the simulation's scale; grains are several times wider."""


def boundaries_are_bright(images: Sequence[np.ndarray]) -> bool:
    """Compare what is thin and bright in the images with what is thin and dark.

    Parameters
    ----------
    images : sequence of ndarray
        Prepared micrographs, uint8 (height, width), grains at the simulation's scale.

    Returns
    -------
    bool
        True where the white top-hats (Meyer 1979; what an opening removes) outweigh the black ones.
    """
    disc = disk(LINE_PX)
    balance = 0.0
    for image in images:
        smooth = ndi.gaussian_filter(image.astype(np.float32), 1.0)
        white, black = white_tophat(smooth, disc), black_tophat(smooth, disc)
        balance += float(white.mean() - black.mean()) * image.size
    return balance > 0
