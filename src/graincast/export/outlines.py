"""Exact outlines of grains: the polygons along pixel edges that enclose just the grain's pixels."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
from skimage.measure import points_in_poly

Polygon = list[np.ndarray]
"""A ring, then those of its holes: int32 (n, 2), corners as x, y in px, the first not repeated. x = column and y = row of the
pixel below and right of the corner, so the image reaches from (0, 0) to (width, height). The signed area, x to the right and
y as if upwards, is positive for the outer ring and negative for holes (RFC 7946, 3.1.6)."""


def outlines(labels: np.ndarray) -> Iterator[tuple[int, list[Polygon]]]:
    """Trace every grain of a map.

    Parameters
    ----------
    labels : (H, W) integer ndarray
        0 = no grain, 1..N = grains; may be memory-mapped.

    Yields
    ------
    label : int
        In ascending order, those that occur.
    polygons : list of Polygon
        One for each part that hangs together by pixel edges; mostly there is one. Rings are simple: where two pixels of a grain
        touch at a corner alone, rings meet in a point and do not cross. Their areas add up to the grain's pixels.
    """
    corners, starts, of_label, pinched = _trace(labels)
    rings: dict[int, list[np.ndarray]] = {}
    for ring, (label, touches_itself) in enumerate(zip(of_label.tolist(), pinched.tolist(), strict=True)):
        found = corners[starts[ring] : starts[ring + 1]]
        rings.setdefault(label, []).extend(_simple(found) if touches_itself else [found])
    for label in sorted(rings):
        yield label, _polygons(rings[label])


def _polygons(rings: list[np.ndarray]) -> list[Polygon]:
    """Each hole with the ring around it."""
    shells = [[ring] for ring in rings if _signed_area(ring) > 0]
    for hole in (ring for ring in rings if _signed_area(ring) < 0):
        around = shells if len(shells) == 1 else [shell for shell in shells if points_in_poly([_beside(hole)], shell[0])[0]]
        # of several around it, one within the other, the innermost
        min(around, key=lambda shell: _signed_area(shell[0])).append(hole)
    return shells


def _beside(hole: np.ndarray) -> np.ndarray:
    """A point within the grain, half a pixel above the middle of the hole's uppermost edge."""
    top = hole[hole[:, 1] == hole[:, 1].min()]
    return np.array([top[:, 0].min() + 0.5, top[0, 1] - 0.5])


def _signed_area(ring: np.ndarray) -> float:
    x, y = ring.T.astype(np.int64)
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


def _simple(ring: np.ndarray) -> list[np.ndarray]:
    """The simple rings of one that comes by a corner twice."""
    found: list[np.ndarray] = []
    path: list[tuple[int, int]] = []
    at: dict[tuple[int, int], int] = {}
    for x, y in ring.tolist():
        corner = (x, y)
        if corner in at:
            loop = path[at[corner] :]
            found.append(np.array(loop, np.int32))
            del path[at[corner] :]
            for passed in loop:
                del at[passed]
        at[corner] = len(path)
        path.append(corner)
    return [*found, np.array(path, np.int32)]


@numba.njit(cache=True, nogil=True)
def _trace(labels):  # type: ignore[no-untyped-def]
    """Follow every ring with its grain on the right as the image is seen, from an upper edge of a pixel back to it.

    Returns the rings' corners one after the other, where each begins, its label, and whether it comes by a corner twice.
    """
    height, width = labels.shape
    seen = np.zeros((height, width), np.bool_)  # upper edges of pixels; every ring has one
    corners, count = np.empty((1024, 2), np.int32), 0
    starts, of_label, pinched, rings = np.zeros(256, np.int64), np.zeros(256, np.int64), np.zeros(256, np.bool_), 0
    step_x, step_y = (1, 0, -1, 0), (0, 1, 0, -1)  # right, down, left, up
    ahead_right_x, ahead_right_y = (0, -1, -1, 0), (0, 0, -1, -1)  # from a corner to the pixel ahead on the right, by direction
    ahead_left_x, ahead_left_y = (0, 0, -1, -1), (-1, 0, 0, -1)
    for row in range(height):
        for column in range(width):
            label = labels[row, column]
            if label == 0 or seen[row, column] or (row > 0 and labels[row - 1, column] == label):
                continue
            if rings + 2 > starts.size:
                starts, of_label = np.append(starts, np.zeros_like(starts)), np.append(of_label, np.zeros_like(of_label))
                pinched = np.append(pinched, np.zeros_like(pinched))
            x, y, direction, closed, touches = column, row, 0, False, False
            while not closed:
                if direction == 0:
                    seen[y, x] = True
                x += step_x[direction]
                y += step_y[direction]
                right_x, right_y = x + ahead_right_x[direction], y + ahead_right_y[direction]
                left_x, left_y = x + ahead_left_x[direction], y + ahead_left_y[direction]
                on_right = 0 <= right_x < width and 0 <= right_y < height and labels[right_y, right_x] == label
                on_left = 0 <= left_x < width and 0 <= left_y < height and labels[left_y, left_x] == label
                if on_right and not on_left:
                    closed = direction == 0 and x == column and y == row
                    continue
                touches = touches or (on_left and not on_right)
                direction = (direction + (1 if not on_right else 3)) % 4
                if count == len(corners):
                    corners = np.concatenate((corners, np.empty_like(corners)))
                corners[count, 0], corners[count, 1] = x, y
                count += 1
                closed = direction == 0 and x == column and y == row
            of_label[rings], pinched[rings] = label, touches
            rings += 1
            starts[rings] = count
    return corners[:count], starts[: rings + 1], of_label[:rings], pinched[:rings]
