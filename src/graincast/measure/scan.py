"""One pass over a grain map: everything that the measurements need of its pixels.

The map is read in bands of rows, so a memory-mapped one never lies in memory whole; the cost grows with the number of
pixels and hardly with the number of grains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numba
import numpy as np

from graincast.labels import fill_lines

SPACINGS = np.array([1.0, 1.0, math.sqrt(0.5), math.sqrt(0.5)])
"""Distance between neighbouring scan lines along the rows, the columns, the falling and the rising diagonals, px. The
step from pixel to pixel along them is its inverse."""
BAND_PX = 1 << 20
SPARSE = 4
"""Labels up to this many times the number of pixels are numbered by a table, larger ones by sorting."""


@dataclass(frozen=True)
class Scan:
    """What a pass over a map has found; grains are numbered 1..N in the order of their labels.

    Attributes
    ----------
    ids : (N,) int64 ndarray
        Labels of the grains.
    runs : (R, 4) int32 ndarray
        Pixels of a row that belong to one grain without a break: grain, row, first column, column after the last; row
        after row.
    crossings : (N, 4) int64 ndarray
        How often the scan lines of `SPACINGS` cross the outline of each grain.
    boundary_crossings, steps : (4,) int64 ndarray
        How often they cross from one grain to another, and how many steps from pixel to pixel they take inside the field.
    at_border : (N,) bool ndarray
        Grains with a side at the edge of the field.
    neighbours : (P, 2) int64 ndarray
        Pairs of grains that share at least one side of a pixel, the smaller number first.
    triple_junctions : int
        Corners of pixels at which three grains meet; one at which four meet counts twice.
    """

    ids: np.ndarray
    runs: np.ndarray
    crossings: np.ndarray
    boundary_crossings: np.ndarray
    steps: np.ndarray
    at_border: np.ndarray
    neighbours: np.ndarray
    triple_junctions: int

    @property
    def area_px2(self) -> np.ndarray:
        """Pixels of each grain, (N,) float."""
        return np.bincount(self.runs[:, 0], self.runs[:, 3] - self.runs[:, 2], len(self.ids) + 1)[1:]

    @property
    def boundary_per_area(self) -> float:
        """Length of the boundaries between grains per area of the field, 1/px: pi / 2 times the crossings per length of scan line
        (Crofton), the mean of the four directions."""
        return float(np.pi / 2 * np.mean(self.boundary_crossings * SPACINGS / np.maximum(self.steps, 1)))

    @property
    def boxes(self) -> np.ndarray:
        """Upright box around each grain: first row, first column, row and column after the last, (N, 4) px."""
        grain, row, start, stop = self.runs.T
        low, high = np.full((len(self.ids) + 1, 2), 1 << 40), np.zeros((len(self.ids) + 1, 2), np.int64)
        for axis, (first, last) in enumerate(((row, row + 1), (start, stop))):
            np.minimum.at(low[:, axis], grain, first)
            np.maximum.at(high[:, axis], grain, last)
        return np.hstack([low, high])[1:]


def border_weights(boxes: np.ndarray, field: Sequence[int]) -> np.ndarray:
    """Weights that make up for the grains which the border of a field cuts, large ones more often than small ones [1]_ [2]_.

    Parameters
    ----------
    boxes : (N, 4) int ndarray
        Boxes around whole grains, as `Scan.boxes`.
    field : sequence of 4 int
        The same of a rectangular field.

    Returns
    -------
    (N,) float ndarray
        Area of the field over that of the places at which the grain's box would lie a pixel from its edges at least. They add up
        to the number of grains of the field, on average over fields.

    References
    ----------
    .. [1] R. E. Miles, "On the elimination of edge effects in planar sampling", in: Stochastic Geometry, Wiley 1974, 228-247.
    .. [2] C. Lantuejoul, "On the estimation of mean values in individual analysis of particles", Microscopica Acta, Suppl. 4 (1980) 266-273.
    """
    top, left, bottom, right = field
    free = (bottom - top - 1 - boxes[:, 2] + boxes[:, 0]) * (right - left - 1 - boxes[:, 3] + boxes[:, 1])
    return (bottom - top) * (right - left) / free


def filled(labels: np.ndarray, field: np.ndarray | None = None) -> np.ndarray:
    """`graincast.labels.fill_lines`, but without a copy where there are no lines to fill."""
    complete = all(np.array_equal(labels[start:stop] > 0, np.ones_like(labels[start:stop], bool) if field is None else field[start:stop])
                   for start, stop in _rows(labels))
    return labels if complete else fill_lines(labels, field)


def scan(grown: np.ndarray) -> Scan:
    """Read a map whose lines are filled.

    Parameters
    ----------
    grown : (H, W) integer ndarray
        What `graincast.labels.fill_lines` returns: 0 = outside the field, else a grain's label. May be memory-mapped.

    Returns
    -------
    Scan
    """
    ids, number, grown = _numbering(grown)
    crossings, at_border = np.zeros((ids.size + 1, 4), np.int64), np.zeros(ids.size + 1, bool)
    totals = np.zeros((3, 4), np.int64)
    runs, pairs = [np.empty((0, 4), np.int32)], [np.empty(0, np.int64)]
    for top, rows in _bands(grown, number):
        found, touching = np.empty((rows.size, 4), np.int32), np.empty(2 * rows.size, np.int64)
        count, contacts = _compare(rows, top, crossings, at_border, totals, found, touching)
        runs.append(found[:count].copy())
        pairs.append(np.unique(touching[:contacts]))
    neighbours = np.stack(np.divmod(np.unique(np.concatenate(pairs)), ids.size + 1), axis=1)
    return Scan(ids, np.concatenate(runs), crossings[1:], totals[0], totals[1], at_border[1:], neighbours, int(totals[2, 0]))


def ferets(scanned: Scan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Largest and smallest extent of each grain, and the direction of the largest.

    Parameters
    ----------
    scanned : Scan

    Returns
    -------
    (N,) float ndarrays
        Diameter and width of the convex hull of the pixels' corners, px, and the direction of the diameter, degrees
        in [0, 180), counter-clockwise from the rows as the image is seen.
    """
    order = np.argsort(scanned.runs[:, 0], kind="stable")
    first = np.searchsorted(scanned.runs[order, 0], np.arange(1, len(scanned.ids) + 2))
    largest, smallest, x, y = _extents(scanned.runs[order], first)
    return largest, smallest, np.rad2deg(np.arctan2(-y, x)) % 180 % 180  # the first leaves 180 of a tiny negative


def _numbering(grown: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels that occur, the number of each label as a table, and the map to look up in that table."""
    if grown.max() > SPARSE * grown.size:
        labels, grown = np.unique(grown, return_inverse=True)
    else:
        labels = np.arange(int(grown.max()) + 1)
    present = np.zeros(len(labels), bool)
    for start, stop in _rows(grown):
        present[grown[start:stop]] = True
    present &= labels > 0
    number = np.where(present, np.cumsum(present), 0).astype(np.int32)
    return labels[present].astype(np.int64), number, grown


def _rows(grown: np.ndarray) -> Iterator[tuple[int, int]]:
    height, width = grown.shape
    step = max(1, BAND_PX // width)
    return ((start, min(start + step, height)) for start in range(0, height, step))


def _bands(grown: np.ndarray, number: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Bands of numbered rows: the row above comes first, zeros stand around the map; and which row the second one is."""
    above = np.zeros(grown.shape[1], np.int32)
    for start, stop in _rows(grown):
        band = np.zeros((1 + stop - start + (stop == len(grown)), grown.shape[1] + 2), np.int32)
        band[0, 1:-1] = above
        band[1 : 1 + stop - start, 1:-1] = number[grown[start:stop]]
        above = band[stop - start, 1:-1]
        yield start, band


@numba.njit(cache=True)
def _compare(rows: np.ndarray, top: int, crossings: np.ndarray, at_border: np.ndarray, totals: np.ndarray, runs: np.ndarray,
             touching: np.ndarray) -> tuple[int, int]:
    """Compare every pixel with those before it; writes to all arrays but the first, returns how many runs and contacts there are.

    `totals` has a row each for crossings between grains, steps inside the field and, in its first place, triple junctions.
    """
    count, contacts, within = 0, 0, 0
    base = len(at_border)
    for r in range(1, rows.shape[0]):
        start = 1
        for c in range(1, rows.shape[1]):
            here, left, above, corner = rows[r, c], rows[r, c - 1], rows[r - 1, c], rows[r - 1, c - 1]
            if here == left and here == above and here == corner:
                within += here > 0
                continue
            for direction, (one, other) in enumerate(((left, here), (above, here), (corner, here), (left, above))):
                inside = one > 0 and other > 0
                totals[1, direction] += inside
                if one == other:
                    continue
                crossings[one, direction] += 1
                crossings[other, direction] += 1
                totals[0, direction] += inside
                if direction < 2:  # across a side of the pixel
                    if inside:
                        touching[contacts] = min(one, other) * base + max(one, other)
                        contacts += 1
                    else:
                        at_border[max(one, other)] = True
            if here > 0 and left > 0 and above > 0 and corner > 0:
                others = (left != here) + (above != here and above != left) + (corner != here and corner != left and corner != above)
                totals[2, 0] += max(others - 1, 0)
            if here != left:
                if left > 0:
                    runs[count, 0], runs[count, 1], runs[count, 2], runs[count, 3] = left, top + r - 1, start - 1, c - 1
                    count += 1
                start = c
    totals[1] += within
    return count, contacts


@numba.njit(cache=True)
def _extents(runs: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Diameter and width of the hull of each grain's runs, and the vector of the diameter."""
    grains = len(first) - 1
    largest, smallest = np.zeros(grains), np.zeros(grains)
    along_x, along_y = np.zeros(grains), np.zeros(grains)
    for grain in range(grains):
        x, y = _hull(runs[first[grain] : first[grain + 1]])
        far, narrow = 0, np.inf
        for i in range(len(x)):
            for j in range(i):
                distance = (x[i] - x[j]) ** 2 + (y[i] - y[j]) ** 2
                if distance > far:
                    far, along_x[grain], along_y[grain] = distance, x[i] - x[j], y[i] - y[j]
            dx, dy = x[i] - x[i - 1], y[i] - y[i - 1]  # the side that ends here; before the first comes the last
            if dx != 0 or dy != 0:
                reach = 0
                for j in range(len(x)):
                    reach = max(reach, abs(dx * (y[j] - y[i]) - dy * (x[j] - x[i])))
                narrow = min(narrow, reach / math.sqrt(dx * dx + dy * dy))
        largest[grain], smallest[grain] = math.sqrt(far), narrow
    return largest, smallest, along_x, along_y


@numba.njit(cache=True)
def _hull(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the convex hull of one grain's runs: down its left side, up its right one."""
    top, levels = runs[0, 1], runs[-1, 1] - runs[0, 1] + 2
    sides = np.full((2, levels), 1 << 40)  # columns of the left side; of the right one, mirrored
    for run in runs:
        for level in (run[1] - top, run[1] - top + 1):
            sides[0, level] = min(sides[0, level], run[2])
            sides[1, level] = min(sides[1, level], -run[3])
    x, y = np.empty(2 * levels, np.int64), np.empty(2 * levels, np.int64)
    count = 0
    for side in range(2):
        begin = count
        for level in range(levels):
            column = sides[side, level]
            if column == 1 << 40:  # a gap between parts of a grain
                continue
            while count - begin > 1 and ((x[count - 1] - x[count - 2]) * (level - y[count - 2])
                                         >= (column - x[count - 2]) * (y[count - 1] - y[count - 2])):
                count -= 1
            x[count], y[count] = column, level
            count += 1
        if side:
            x[begin:count] = -x[begin:count][::-1]
            y[begin:count] = y[begin:count][::-1].copy()
    return x[:count], y[:count]
