"""Instance label maps: integers (height, width), 0 = boundary line, 1..N = grains."""

from __future__ import annotations

import numpy as np
from scipy import ndimage as ndi


def fill_lines(labels: np.ndarray, field: np.ndarray | None = None) -> np.ndarray:
    """Grow every grain over the boundary lines until the grains tile the field.

    Parameters
    ----------
    labels : (H, W) integer ndarray
        0 = boundary line, 1..N = grains.
    field : (H, W) bool ndarray, optional
        False where no specimen is seen, e.g. the info bar. Default: the whole image is field.

    Returns
    -------
    (H, W) ndarray of the dtype of `labels`
        Each zero inside the field has taken the label of the nearest grain (Euclidean distance), so that a
        line is shared between its neighbours. Outside the field, or without any grain, 0.

    Examples
    --------
    >>> fill_lines(np.array([[1, 1, 0, 0, 2]]))
    array([[1, 1, 1, 2, 2]])
    """
    inside = labels.copy() if field is None else np.where(field, labels, 0)
    lines = inside == 0 if field is None else field & (inside == 0)
    if not lines.any() or not inside.any():
        return inside
    nearest = ndi.distance_transform_edt(inside == 0, return_distances=False, return_indices=True)
    grown = inside[tuple(nearest)]
    return grown if field is None else np.where(field, grown, 0)


def boundary_mask(labels: np.ndarray) -> np.ndarray:
    """Boundary pixels of a grain map, (height, width), bool: those without an id."""
    return labels == 0
