"""From the network's maps to closed grains: a seeded watershed whose weak boundaries are taken out again."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi
from skimage import segmentation
from skimage.morphology import local_maxima

from graincast.errors import UserError

SMALLEST_SHARE = 0.04
"""Grains smaller than this, as a share of the training grains' mean area, are given to their neighbours."""
BESIDE_PX = 3
"""Side of the window whose highest boundary probability counts: the watershed's line may run beside the network's by a pixel."""
EIGHT = np.ones((3, 3), bool)
"""All eight neighbours of a pixel."""
LEVELS = np.iinfo(np.uint16).max
"""Steps between depth 0 and 1 in which its peaks are sought."""
BAND_PX = 2**18  # that are reconstructed at a time, so that they stay in the processor's cache
ROUNDS = 4  # of a reconstruction between looking whether anything has changed


@dataclass(frozen=True)
class Cut:
    """How maps are cut into grains.

    Attributes
    ----------
    smallest_px : float
        Smaller grains are dissolved, px of the network's scale.
    rise : float
        A peak of the depth seeds a grain where it rises this far above every way to a higher one, 0 to 1
        (the contour's dynamics, Grimaud 1992). So a line with a gap still parts two grains, where a fixed level of
        the depth would let their seeds flow together. Above 0.
    merge_level : float
        Neighbours are one grain where the mean, along the line between them, of the highest boundary probability within a
        pixel lies below this, 0 to 1. The mean makes a boundary with gaps hold and a false one of a few dark spots go.

    Notes
    -----
    The defaults are what ``python -m benchmarks.cut`` finds best on synthetic images imaged anew by the augmentation.
    """

    smallest_px: float
    rise: float = 0.1
    merge_level: float = 0.4


def instances(maps: np.ndarray, cut: Cut, scale: float = 1.0) -> np.ndarray:
    """Closed grains from boundary probability and depth.

    Parameters
    ----------
    maps : ndarray
        (2, height, width), float in [0, 1]: boundary probability and depth (`graincast.segment.network.targets`).
    cut : Cut
        Rise, level and smallest grain.
    scale : float
        Pixels of the network's scale per pixel of `maps`.

    Returns
    -------
    ndarray
        Instance ids 1..N, int32 (height, width), no zeros: the grains tile the image. All 1 where nothing seeds.

    Raises
    ------
    UserError
        If a map is not finite, as that of damaged weights may be.
    """
    if not np.isfinite(maps).all():
        raise UserError("the network's maps are not finite: its weights are damaged; an undamaged copy, or training anew, would be right")
    boundary, depth = maps
    seeds, count = _peaks(depth, cut.rise)
    if not count:
        return np.ones(boundary.shape, np.int32)
    landscape = boundary - depth
    grains = _merge_weak(_flood(landscape, seeds), ndi.maximum_filter(boundary, BESIDE_PX), cut.merge_level)
    small = np.bincount(grains.ravel()) < cut.smallest_px / scale**2
    small[0] = False
    if small.any() and not small[1:].all():
        grains = _flood_rest(landscape, np.where(small[grains], 0, grains))
    present = np.bincount(grains.ravel()) > 0
    return np.cumsum(present, dtype=np.int32)[grains]


def _peaks(depth: np.ndarray, rise: float) -> tuple[np.ndarray, int]:
    """Number each peak that rises by more than `rise`, with its surroundings down to that much below it, and count them.

    Not skimage's `h_maxima`, which keeps the highest pixels of a peak alone: those of a flat, noisy one are many and apart.
    """
    if float(np.ptp(depth)) <= rise:
        return np.zeros(depth.shape, np.int32), 0
    steps = np.rint(np.clip(depth, 0, 1) * LEVELS).astype(np.uint16)
    lowered = _reconstructed(steps - np.minimum(steps, np.uint16(round(rise * LEVELS))), steps)
    return ndi.label(local_maxima(lowered, connectivity=2), EIGHT)


def _reconstructed(marker: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Greyscale reconstruction of `mask` from `marker`, both uint16, the latter overwritten: its geodesic dilations until they stand still.

    The same as skimage's `reconstruction`, which sorts all pixels first. Here each dilation of a band is a few passes over what lies
    in the cache, and there are hardly more of them than the widest grain has pixels (definition: Vincent 1993, doi:10.1109/83.217222).
    """
    height, width = marker.shape
    rows = max(BAND_PX // width, 1)
    bands = [slice(max(top - 1, 0), top + rows + 1) for top in range(0, height, rows)]
    while sum(_settle(marker[band], mask[band]) for band in bands):  # every band each time, where `any` would leave off
        pass
    return marker


def _settle(marker: np.ndarray, mask: np.ndarray) -> bool:
    """Dilate `marker` under `mask` in place until it stands still; whether it has moved at all."""
    wide, moved = np.empty_like(marker), False
    while True:
        before = marker.copy()
        for _ in range(ROUNDS):
            for here, there in ((marker, wide), (marker.T, wide.T)):  # a 3 x 3 maximum, each axis in two steps
                there[0] = here[0]
                np.maximum(here[1:], here[:-1], out=there[1:])
                np.maximum(there[1:], there[:-1], out=here[:-1])
                here[-1] = there[-1]
            np.minimum(marker, mask, out=marker)
        if np.array_equal(before, marker):
            return moved
        moved = True


def _flood(landscape: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Watershed of a landscape from numbered seeds.

    What lies below 0, and so inside the lines, and has a single seed is that seed's whatever the order in which it is flooded; so
    pixels wait in skimage's queue only for the rest, a quarter of a map.
    """
    basins, count = ndi.label(landscape < 0)
    owner = np.zeros(count + 1, seeds.dtype)
    at, ids = basins[seeds > 0], seeds[seeds > 0]
    owner[at] = ids
    owner[at[owner[at] != ids]] = 0  # of several
    owner[0] = 0
    return _flood_rest(landscape, np.where(seeds > 0, seeds, owner[basins]))


def _flood_rest(landscape: np.ndarray, grains: np.ndarray) -> np.ndarray:
    """Watershed from numbered grains of the pixels that are 0 in `grains`; only they and those beside them take part."""
    rest = grains == 0
    mask = _across(rest, np.logical_or)
    return np.where(rest, segmentation.watershed(landscape, np.where(mask, grains, 0), mask=mask), grains)


def _merge_weak(grains: np.ndarray, boundary: np.ndarray, level: float) -> np.ndarray:
    """Merge neighbours, those with the weakest boundary first, until every boundary's mean probability reaches `level`.

    The same as skimage's `rag_boundary` and `merge_hierarchical` (the mean over the pixels of either grain that have the other
    beside them, after each merger anew), but with sums in arrays and dictionaries in place of a networkx graph.
    """
    neighbours = _boundaries(grains, boundary)
    weak = [(total / length, one, other) for one, beside in neighbours.items() for other, (total, length) in beside.items()
            if one < other and total / length < level]
    heapq.heapify(weak)
    into = np.arange(int(grains.max()) + 1)
    while weak:
        mean, gone, kept = heapq.heappop(weak)
        total, length = neighbours.get(gone, {}).get(kept, (np.inf, 1))
        if total / length != mean:  # one of the two is merged already, or their boundary has grown since
            continue
        into[gone] = kept
        for other, (total, length) in neighbours.pop(gone).items():
            del neighbours[other][gone]
            if other != kept:
                before = neighbours[kept].get(other, (0.0, 0))
                joint = before[0] + total, before[1] + length
                neighbours[kept][other] = neighbours[other][kept] = joint
                if joint[0] / joint[1] < level:
                    heapq.heappush(weak, (joint[0] / joint[1], kept, other))
    while not np.array_equal(into, into[into]):
        into = into[into]
    return into[grains]


def _boundaries(grains: np.ndarray, boundary: np.ndarray) -> dict[int, dict[int, tuple[float, int]]]:
    """Of each pair of neighbours, both ways round: the sum of `boundary` over their pixels beside each other, and how many these are."""
    lower, upper = _across(grains, np.minimum), _across(grains, np.maximum)
    at_lower, at_upper = lower != grains, upper != grains
    pairs = np.concatenate([np.stack([lower[at_lower], grains[at_lower]]), np.stack([grains[at_upper], upper[at_upper]])], axis=1)
    values = np.concatenate([boundary[at_lower], boundary[at_upper]])
    ids = int(grains.max()) + 1
    keys, inverse = np.unique(pairs[0].astype(np.int64) * ids + pairs[1], return_inverse=True)
    found: dict[int, dict[int, tuple[float, int]]] = {}
    for key, total, length in zip(keys.tolist(), np.bincount(inverse, values).tolist(), np.bincount(inverse).tolist(), strict=True):
        one, other = divmod(key, ids)
        found.setdefault(one, {})[other] = found.setdefault(other, {})[one] = total, length
    return found


def _across(values: np.ndarray, extreme: np.ufunc) -> np.ndarray:
    """`extreme` (minimum, maximum, logical or) of every pixel and its four neighbours; several times faster than ndimage's with a footprint."""
    found = values.copy()
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:-1], np.s_[1:]), (np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :-1], np.s_[:, 1:])):
        extreme(found[here], values[there], out=found[here])
    return found
