"""The classical baseline that the learned segmenter has to beat."""

from __future__ import annotations

import numpy as np
from scipy import ndimage as ndi
from skimage import filters, measure
from skimage.morphology import remove_small_objects

MIN_AREA_PX = 30  # specks below this are dropped


def local_threshold_segment(image: np.ndarray, window: int = 51, sigma: float = 1.5,
                            offset: float = 0.02) -> np.ndarray:
    """Segment grains with dark boundaries by a local threshold.

    Gaussian smoothing, threshold against the Gaussian-weighted local mean, connected components of what is
    not darker, specks dropped.

    Parameters
    ----------
    image : (H, W) uint8 ndarray
        Micrograph in which the grain boundaries are darker than the grains.
    window : int
        Window of the local mean, px; an even one counts as the odd one above it.
    sigma : float
        Standard deviation of the smoothing, px.
    offset : float
        How far below the local mean a boundary lies at least, fraction of full scale.
        The defaults of all three reproduce published figures of two labelled fields (tests/test_evaluate.py);
        they were chosen with the masks in view, which flatters the baseline there.

    Returns
    -------
    (H, W) int32 ndarray
        0 = boundary, 1..N = grains (4-connected).

    Raises
    ------
    ValueError
        If the image is not 2-D uint8.
    """
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"want a 2-D uint8 image, got {image.dtype} {image.shape}")
    smooth = ndi.gaussian_filter(image.astype(float), sigma)
    grain = smooth >= filters.threshold_local(smooth, window | 1, offset=offset * 255)
    grain = remove_small_objects(grain, max_size=MIN_AREA_PX - 1, connectivity=1)
    return measure.label(grain, connectivity=1).astype(np.int32)
