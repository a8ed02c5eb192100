"""Label fidelity: do the boundaries of a translated image still lie where the morphology put them?

Along the normal of every labelled boundary the image's evidence for a boundary is read off; a boundary is kept where
the strongest evidence lies at the label and not beside it. No network is asked, so a translator that hides the
labels in its texture gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage as ndi
from skimage import feature, segmentation

REACH_PX = 6
"""Half length of the profiles across a boundary, px."""
TOLERANCE_PX = 2
"""Distance between label and strongest evidence that counts as kept, px."""
CHANCE = 0.29
"""Fraction kept in white noise, measured: below the 5 of 13 places, as a smooth random profile is highest at its ends."""
DERIVATIVE_PX, INTEGRATION_PX = 1.0, 2.0
"""Standard deviations of the Gaussian derivatives and of the window their energy is gathered over, px."""


AsLines = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Closes boundaries drawn as wide gaps in a map of an image, given its labels (`graincast.synthesise.base.Synthesiser.as_lines`)."""


def boundary_evidence(image: np.ndarray, labels: np.ndarray, as_lines: AsLines | None = None) -> np.ndarray:
    """Strength of boundary-like structure, whatever its kind: groove, bright line or step between two tones.

    Parameters
    ----------
    image : ndarray
        (height, width), uint8 or float.
    labels : ndarray
        Its instance ids, int (height, width).
    as_lines : callable, optional
        Closes gaps, where boundaries were drawn as such.

    Returns
    -------
    ndarray
        (height, width), float32, >= 0, squared grey levels: the gradient energy (trace of the structure tensor;
        Bigun & Granlund 1987). The window merges the two flanks of a line into one maximum on its centre.
    """
    energy = ndi.gaussian_gradient_magnitude(image.astype(np.float32), DERIVATIVE_PX) ** 2
    if as_lines is not None:
        energy = as_lines(energy, labels)
    return ndi.gaussian_filter(energy, INTEGRATION_PX)


def label_fidelity(image: np.ndarray, labels: np.ndarray, as_lines: AsLines | None = None) -> float:
    """Fraction of boundary pixels whose strongest evidence lies within `TOLERANCE_PX` of the label, above chance.

    Parameters
    ----------
    image : ndarray
        The translated image, uint8 (height, width).
    labels : ndarray
        Instance ids, int (height, width); 0 = boundary.
    as_lines : callable, optional
        Closes gaps, where boundaries were drawn as such: only their flanks show, and neither lies at the label.

    Returns
    -------
    float
        1: every boundary in place; 0: no better than chance; negative: worse. NaN for an image of one grain.
    """
    dense = segmentation.expand_labels(labels, REACH_PX)
    line = segmentation.find_boundaries(dense, mode="thick")
    line &= _away_from_junctions(dense) & _away_from_edge(line.shape)
    rows, columns = np.nonzero(line)
    if not len(rows):
        return float("nan")
    normal = _normals(line)[:, rows, columns]
    offsets = np.arange(-REACH_PX, REACH_PX + 1)
    points = np.stack([rows, columns])[:, :, None] + normal[:, :, None] * offsets
    profiles = ndi.map_coordinates(boundary_evidence(image, labels, as_lines), points, order=1, mode="nearest")
    kept = np.mean(np.abs(offsets[profiles.argmax(axis=1)]) <= TOLERANCE_PX)
    return float((kept - CHANCE) / (1 - CHANCE))


def _normals(line: np.ndarray) -> np.ndarray:
    """Unit vectors (row, column) across a line, sign arbitrary, from its structure tensor; (2, height, width)."""
    rr, rc, cc = feature.structure_tensor(line.astype(np.float32), sigma=2.0, order="rc")
    angle = 0.5 * np.arctan2(2 * rc, rr - cc)
    return np.stack([np.cos(angle), np.sin(angle)])


def _away_from_junctions(dense: np.ndarray) -> np.ndarray:
    """Where no more than two grains lie within reach, so that a profile crosses one boundary alone."""
    size = 2 * REACH_PX + 1
    high, low = ndi.maximum_filter(dense, size), ndi.minimum_filter(dense, size)
    between = (dense != high) & (dense != low)
    return ~ndi.maximum_filter(between, size)


def _away_from_edge(shape: tuple[int, ...]) -> np.ndarray:
    inside = np.zeros(shape, bool)
    inside[REACH_PX:-REACH_PX, REACH_PX:-REACH_PX] = True
    return inside
