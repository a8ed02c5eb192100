"""Boundary lines drawn over the micrograph."""

from __future__ import annotations

import numpy as np
from skimage import segmentation
from skimage.morphology import dilation, skeletonize

from graincast.labels import fill_lines

# Okabe and Ito's palette, told apart by colour-blind eyes and from every grey
# (https://jfly.uni-koeln.de/color/).
PREDICTED = (230, 159, 0)  # orange
TRUE = (86, 180, 233)  # sky blue
BOTH = (0, 158, 115)  # bluish green


def overlay(image: np.ndarray, labels: np.ndarray, truth: np.ndarray | None = None, *,
            field: np.ndarray | None = None) -> np.ndarray:
    """Draw predicted grain boundaries, and the true ones, over a micrograph.

    Parameters
    ----------
    image : (H, W) uint8 ndarray
    labels : (H, W) integer ndarray
        Predicted grains; 0 = boundary line, 1..N = grains.
    truth : (H, W) bool ndarray, optional
        True on the true boundary lines.
    field : (H, W) bool ndarray, optional
        False where no specimen is seen, e.g. the info bar; no predicted line is drawn there.

    Returns
    -------
    (H, W, 3) uint8 ndarray
        RGB: the image in grey, predicted lines orange, true lines sky blue, pixels on both green. Lines are
        two pixels wide, however thick the masks are.

    Raises
    ------
    ValueError
        If the image is not 2-D uint8 or the shapes differ.
    """
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"want a 2-D uint8 image, got {image.dtype} {image.shape}")
    if any(mask is not None and mask.shape != image.shape for mask in (labels, truth, field)):
        raise ValueError(f"labels, truth and field must have the image's shape {image.shape}")
    inside = np.ones(image.shape, bool) if field is None else field
    # Grown beyond the field as well, so that the field's edge does not count as a boundary.
    predicted = segmentation.find_boundaries(fill_lines(labels * inside), mode="inner") & inside
    true = np.zeros_like(predicted) if truth is None else _thin(truth)
    picture = np.repeat(image[..., None], 3, axis=2)
    picture[predicted] = PREDICTED
    picture[true] = TRUE
    picture[predicted & true] = BOTH
    return picture


def _thin(boundary: np.ndarray) -> np.ndarray:
    return dilation(skeletonize(boundary), np.ones((2, 2), bool))
