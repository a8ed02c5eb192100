"""Whether grain boundaries are brighter or darker than the grains, told from unlabelled micrographs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skimage import feature

SCALE_PX = 2.0
"""Standard deviation of the Gaussian derivatives, px: about half the width of a boundary at the simulation's scale."""
STRONGEST = 0.05
"""Fraction of the pixels, those with the strongest ridges, that decides."""


def boundaries_are_bright(images: Sequence[np.ndarray]) -> bool:
    """Compare the strongest bright ridges of the images with the strongest dark ones.

    Parameters
    ----------
    images : sequence of ndarray
        Prepared micrographs, uint8 (height, width), grains at the simulation's scale.

    Returns
    -------
    bool
        True where bright lines are the stronger (eigenvalues of the Hessian; Lindeberg 1998,
        doi:10.1023/A:1008097225773).
    """
    dark = bright = 0.0
    for image in images:
        hessian = feature.hessian_matrix(image.astype(np.float32), sigma=SCALE_PX, order="rc", use_gaussian_derivatives=True)
        high, low = feature.hessian_matrix_eigvals(hessian)
        count = max(1, int(image.size * STRONGEST))
        dark += float(np.sort(high.ravel())[-count:].sum())
        bright += float(np.sort(-low.ravel())[-count:].sum())
    return bright > dark
