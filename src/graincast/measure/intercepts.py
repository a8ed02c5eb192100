"""Mean intercept length by test lines and test circles: the intercept procedures of ASTM E112.

A test line is a chain of neighbouring pixels, and it crosses a boundary where two pixels in succession belong to different
grains. Its length is that of the chain, so that a circle of pixels, some 5 % longer than the smooth one, counts as the
longer one it is. For a structure without a preferred direction that makes the count per length right on average
(Crofton); with one, circles take it in four directions alone.

Counted as ASTM E112-13 does by eye, "apparently" being a pixel here:

=============================================== ====================================
crossing from one grain to the next             1
crossing at a triple junction                   1.5; where four grains meet, 2
tangent: one pixel of a grain, and back         1
end of a line                                   0
=============================================== ====================================

Lines run from edge to edge of the field, so they end at no boundary (an end on one would count 1/2). For triple junctions on
circles a count of 2 is in use, too; 1.5, which is right on average, is taken throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

DIRECTIONS_DEG = (0, 45, 90, 135)
"""Directions of the test lines, counter-clockwise from the rows as the image is seen."""
LINES_PER_GRAIN = 2
"""Test lines of a direction that cross a grain of mean size."""
GOLDEN = (math.sqrt(5) - 1) / 2
ABRAMS = (1.0, 2 / 3, 1 / 3)
"""Radii of Abrams' three concentric, equally spaced circles, of the largest one."""

Path = tuple[np.ndarray, np.ndarray]  # rows and columns of successive pixels


@dataclass(frozen=True)
class Count:
    """What test lines have met.

    Attributes
    ----------
    intersections : float
        Crossings with boundaries, scored by the table above.
    length_px : float
        Length of the test lines inside the field.
    """

    intersections: float = 0.0
    length_px: float = 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(self.intersections + other.intersections, self.length_px + other.length_px)

    @property
    def mean_intercept_px(self) -> float | None:
        """Length per intersection, 1 / P_L; None without any."""
        return self.length_px / self.intersections if self.intersections else None


def count_lines(grown: np.ndarray, pitch_px: float) -> dict[int, Count]:
    """Heyn's procedure: parallel test lines from edge to edge, in four directions.

    Parameters
    ----------
    grown : (H, W) integer ndarray
        Map without lines, 0 = outside the field.
    pitch_px : float
        Mean distance of the lines. They are not equidistant, or a periodic structure might meet them all alike: each
        lies in its own strip, at a place by the golden ratio.

    Returns
    -------
    dict of int to Count
        One a direction of `DIRECTIONS_DEG`.
    """
    return {angle: sum((_count(grown, path) for path in _lines(grown.shape, angle, pitch_px)), Count()) for angle in DIRECTIONS_DEG}


def count_circles(grown: np.ndarray, box: Sequence[int], radii: tuple[float, ...] = (1.0,)) -> Count:
    """Hilliard's procedure, one circle; with the radii `ABRAMS` Abrams', three.

    Parameters
    ----------
    grown : (H, W) integer ndarray
        Map without lines, 0 = outside the field.
    box : sequence of 4 int
        Upright box around the field: first row, first column, row and column after the last.
    radii : tuple of float
        Of the concentric circles, as shares of the radius of the largest circle that fits into the box.
    """
    top, left, bottom, right = box
    centre = (top + bottom - 1) / 2, (left + right - 1) / 2
    largest = (min(bottom - top, right - left) - 1) / 2
    return sum((_count(grown, _circle(centre, share * largest)) for share in radii), Count())


def _lines(shape: tuple[int, ...], angle: int, pitch: float) -> Iterator[Path]:
    height, width = shape
    if angle in (0, 90):
        for place in _places(height if angle == 0 else width, pitch):
            along = np.arange(width if angle == 0 else height)
            across = np.full(len(along), place)
            yield (across, along) if angle == 0 else (along, across)
        return
    for place in _places(height + width - 1, pitch * math.sqrt(2)):  # which diagonal: column less row
        shift = place - (height - 1)
        first = max(0, -shift)
        rows = np.arange(first, min(height, width - shift))
        yield (rows if angle == 135 else height - 1 - rows), rows + shift


def _places(extent: int, pitch: float) -> np.ndarray:
    strips = np.arange(max(1, round(extent / pitch)))
    return np.floor((strips + (strips + 1) * GOLDEN % 1) * extent / len(strips)).astype(int)


def _circle(centre: tuple[float, float], radius: float) -> Path:
    """Pixels of a circle in order, the first once more at the end: one a column at top and bottom, one a row on the sides."""
    row, column = centre
    reach = radius / math.sqrt(2)
    rows, columns = (np.arange(math.ceil(middle - reach), math.floor(middle + reach) + 1) for middle in centre)
    high, wide = np.sqrt(radius**2 - (columns - column) ** 2), np.sqrt(radius**2 - (rows - row) ** 2)
    down = np.rint(np.concatenate([row - high, rows, (row + high)[::-1], rows[::-1]])).astype(int)
    across = np.rint(np.concatenate([columns, column + wide, columns[::-1], (column - wide)[::-1]])).astype(int)
    down, across = np.append(down, down[:1]), np.append(across, across[:1])
    new = np.append(True, (np.diff(down) != 0) | (np.diff(across) != 0))[: len(down)]  # the smallest has no pixel at all
    return down[new], across[new]


def _count(grown: np.ndarray, path: Path) -> Count:
    rows, columns = path
    along = grown[rows, columns]
    inside = (along[:-1] > 0) & (along[1:] > 0)
    steps = np.hypot(np.diff(rows), np.diff(columns))
    at = np.flatnonzero(inside & (along[:-1] != along[1:]))
    if not at.size:
        return Count(0.0, float(steps[inside].sum()))
    scores = 1 + _others(grown, path, at) / 2
    close = np.concatenate([[False], np.diff(at) == 1, [False]])  # a pixel alone between two crossings, before and after each
    lone = np.flatnonzero(close[1:-1] & ~close[:-2] & ~close[2:])
    scores[lone] = np.where(along[at[lone]] == along[at[lone + 1] + 1], 1.0, 1.5)
    scores[lone + 1] = 0
    scores[close[:-1] & close[1:]] = 1  # in rows of single pixels nothing can be told apart
    return Count(float(scores.sum()), float(steps[inside].sum()))


def _others(grown: np.ndarray, path: Path, at: np.ndarray) -> np.ndarray:
    """Number of further grains at the corners between the pixels before and after each crossing."""
    around = []
    for places, extent in zip(path, grown.shape, strict=True):
        low, high = np.maximum(places[at], places[at + 1]) - 1, np.minimum(places[at], places[at + 1]) + 1
        around.append([np.clip(place, 0, extent - 1) for place in (low, (low + high) // 2, high)])
    first, second = grown[path[0][at], path[1][at]], grown[path[0][at + 1], path[1][at + 1]]
    met = np.array([grown[row, column] for row in around[0] for column in around[1]])
    met = np.sort(np.where((met == first) | (met == second), 0, met), axis=0)  # zeros come first
    return (np.diff(met, axis=0, prepend=0) != 0).sum(axis=0)
