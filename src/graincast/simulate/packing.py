"""Random discs and spheres that do not overlap, in a periodic field or volume.

Discs come one by one, each at a random place where there is room: random sequential addition, which jams when discs of
one size fill 0.55 of the field [1]_, or spheres 0.38 of the volume. To fill more, it is done with smaller discs, which
then swell and push each other apart.

A field is treated as a volume one voxel deep, with all centres at depth 0.

References
----------
.. [1] E. L. Hinrichsen, J. Feder, T. Jøssang, "Geometry of random sequential adsorption", J. Stat. Phys. 44 (1986) 793,
   doi:10.1007/BF01011908.
"""

from __future__ import annotations

import math

import numba
import numpy as np

ROOMY = {2: 0.38, 3: 0.2}
"""Share of a field, of a volume, up to which discs find room one by one within `DRAWS`."""

DRAWS = 40
"""Places tried for each disc on average."""

MOST_SWEEPS = 2000
"""Sweeps of pushing discs apart in a try; 100 do for 5000 discs that fill 0.73 of the field."""

ATTEMPTS = 20
"""Tries to place all discs; ten and more discs of one size that fill 0.73 of the field succeed at the first."""


def scatter_discs(shape: tuple[int, ...], radii: np.ndarray, rng: np.random.Generator, stretch: np.ndarray | None = None) -> np.ndarray | None:
    """Places for discs (spheres) of given radii, no two of which overlap.

    Parameters
    ----------
    shape : tuple of int
        (height, width) of a field, px, or (depth, height, width) of a volume, voxels; periodic.
    radii : numpy.ndarray
        (n,), float, px, none above `largest_radius`. Many discs find room soonest when the largest come first.
    rng : numpy.random.Generator
        Source of the places.
    stretch : numpy.ndarray, optional
        (dimensions, dimensions): positions times this are those where discs are round; identity when left out.

    Returns
    -------
    numpy.ndarray or None
        Centres, (n, dimensions), float64, px from the field's corner, 0 to below `shape`. None if not all found a place.

    Examples
    --------
    >>> centres = scatter_discs((64, 64), np.full(20, 5.0), np.random.default_rng(0))
    >>> apart = centres[:, None] - centres
    >>> apart -= 64 * np.rint(apart / 64)
    >>> distances = np.linalg.norm(apart, axis=2) + np.diag(np.full(20, np.inf))
    >>> bool(distances.min() >= 10)
    True
    """
    flat = 3 - len(shape)
    box, metric = np.ones(3), np.eye(3)
    box[flat:] = shape
    if stretch is not None:
        metric[flat:, flat:] = stretch
    reach = np.maximum(2 * radii.max() * _sides(metric), 1)  # within which two discs can overlap
    bins = tuple(int(count) for count in np.clip(box / reach, 1, 2 * len(radii) ** (1 / len(shape))))
    small = radii * min(1.0, ROOMY[len(shape)] / max(filled(shape, radii), 1e-9)) ** (1 / len(shape))
    for _ in range(ATTEMPTS):
        centres = _add_in_turn(small, flat, box, metric, bins, rng)
        if _push_apart(centres, radii, box, metric, np.empty(bins, np.int64), MOST_SWEEPS):
            return centres[:, flat:]
    return None


def filled(shape: tuple[int, ...], radii: np.ndarray) -> float:
    """Share of the field that discs (spheres) of these radii fill."""
    ball = math.pi if len(shape) == 2 else 4 / 3 * math.pi
    return float(ball * (radii ** len(shape)).sum() / math.prod(shape))


def largest_radius(shape: tuple[int, ...], stretch: np.ndarray | None = None) -> float:
    """Radius of discs of which two, side by side, reach half across the field: only nearest images can overlap."""
    return float((np.array(shape) / _sides(np.eye(len(shape)) if stretch is None else stretch)).min() / 4)


def _sides(metric: np.ndarray) -> np.ndarray:
    """Sides of the box around a disc of diameter 1."""
    return np.linalg.norm(np.linalg.inv(metric), axis=0)


def _add_in_turn(radii: np.ndarray, flat: int, box: np.ndarray, metric: np.ndarray, bins: tuple[int, ...],
                 rng: np.random.Generator) -> np.ndarray:
    """Centres (n, 3), each drawn anew while its disc overlaps one before; any for which that takes too long overlap."""
    places = rng.random((1 + DRAWS, len(radii), 3)) * box
    places[..., :flat] = 0
    centres, count = places[0], 0
    heads, links = np.full(bins, -1), np.empty(len(radii), np.int64)
    for candidates in places[1:]:
        count = _add(candidates, centres, radii, count, box, metric, heads, links)
    return centres


@numba.njit(cache=True, nogil=True)
def _add(candidates: np.ndarray, centres: np.ndarray, radii: np.ndarray, count: int, box: np.ndarray, metric: np.ndarray,
         heads: np.ndarray, links: np.ndarray) -> int:
    """Append those candidates whose discs have room, until all have a place; returns the number of those that have."""
    for candidate in candidates:
        if count == len(centres):
            break
        centres[count] = candidate
        if not _overlaps(count, centres, radii, box, metric, heads, links, False):
            _enlist(count, centres, box, heads, links)
            count += 1
    return count


@numba.njit(cache=True, nogil=True)
def _push_apart(centres: np.ndarray, radii: np.ndarray, box: np.ndarray, metric: np.ndarray, heads: np.ndarray, sweeps: int) -> bool:
    """Push discs apart until none overlap, if `sweeps` suffice."""
    links = np.empty(len(centres), np.int64)
    for _ in range(sweeps):
        heads[:] = -1
        for disc in range(len(centres)):
            _enlist(disc, centres, box, heads, links)
        overlap = False
        for disc in range(len(centres)):
            overlap |= _overlaps(disc, centres, radii, box, metric, heads, links, True)
        if not overlap:
            return True
    return False


@numba.njit(cache=True, nogil=True)
def _enlist(disc: int, centres: np.ndarray, box: np.ndarray, heads: np.ndarray, links: np.ndarray) -> None:
    """Put a disc into its bin: `heads` has the last disc of every bin, `links` the one before in the bin, -1 = none."""
    z, y, x = (centres[disc] / box * np.array(heads.shape)).astype(np.int64)
    links[disc] = heads[z, y, x]
    heads[z, y, x] = disc


@numba.njit(cache=True, nogil=True)
def _overlaps(disc: int, centres: np.ndarray, radii: np.ndarray, box: np.ndarray, metric: np.ndarray, heads: np.ndarray,
              links: np.ndarray, push: bool) -> bool:
    """Whether a disc overlaps an enlisted one; if `push`, such pairs are moved apart."""
    overlap = False
    apart = np.empty(3)
    first = (centres[disc] / box * np.array(heads.shape)).astype(np.int64) - 1
    for i in range(min(3, heads.shape[0])):
        for j in range(min(3, heads.shape[1])):
            for k in range(min(3, heads.shape[2])):
                other = heads[(first[0] + i) % heads.shape[0], (first[1] + j) % heads.shape[1], (first[2] + k) % heads.shape[2]]
                while other >= 0:
                    if other != disc:
                        for axis in range(3):
                            apart[axis] = centres[other, axis] - centres[disc, axis]
                            apart[axis] -= box[axis] * np.rint(apart[axis] / box[axis])
                        distance, least = _length(apart, metric), radii[disc] + radii[other]
                        if distance < least:
                            if not push:
                                return True
                            overlap = True
                            share = (1.001 * least / distance - 1) / 2  # a little too far, to be done some day
                            _shift(centres[other], share, apart, box)
                            _shift(centres[disc], -share, apart, box)
                    other = links[other]
    return overlap


@numba.njit(cache=True, nogil=True)
def _length(vector: np.ndarray, metric: np.ndarray) -> float:
    square = 0.0
    for axis in range(3):
        square += (vector[0] * metric[0, axis] + vector[1] * metric[1, axis] + vector[2] * metric[2, axis]) ** 2
    return math.sqrt(square)


@numba.njit(cache=True, nogil=True)
def _shift(disc: np.ndarray, share: float, vector: np.ndarray, box: np.ndarray) -> None:
    """Move a disc by a share of a vector within the periodic box."""
    for axis in range(3):
        place = (disc[axis] + share * vector[axis]) % box[axis]
        disc[axis] = place if place < box[axis] else 0.0  # the remainder of a tiny negative number rounds to the side
