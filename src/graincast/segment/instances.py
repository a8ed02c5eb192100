"""From the network's maps to closed grains: a seeded watershed whose weak boundaries are taken out again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage as ndi
from skimage import graph, segmentation
from skimage.morphology import local_maxima, reconstruction

from graincast.errors import UserError

SMALLEST_SHARE = 0.04
"""Grains smaller than this, as a share of the training grains' mean area, are given to their neighbours."""
BESIDE_PX = 3
"""Side of the window whose highest boundary probability counts: the watershed's line may run beside the network's by a pixel."""
EIGHT = np.ones((3, 3), bool)
"""All eight neighbours of a pixel."""


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
    grains = _merge_weak(segmentation.watershed(landscape, seeds), ndi.maximum_filter(boundary, BESIDE_PX), cut.merge_level)
    small = np.bincount(grains.ravel()) < cut.smallest_px / scale**2
    small[0] = False
    if small.any() and not small[1:].all():
        grains = segmentation.watershed(landscape, np.where(small[grains], 0, grains))
    return segmentation.relabel_sequential(grains)[0].astype(np.int32)


def _peaks(depth: np.ndarray, rise: float) -> tuple[np.ndarray, int]:
    """Number each peak that rises by more than `rise`, with its surroundings down to that much below it, and count them.

    Not skimage's `h_maxima`, which keeps the highest pixels of a peak alone: those of a flat, noisy one are many and apart.
    """
    if float(np.ptp(depth)) <= rise:
        return np.zeros(depth.shape, np.int32), 0
    lowered = reconstruction(depth - rise, depth, method="dilation", footprint=EIGHT)
    return ndi.label(local_maxima(lowered, connectivity=2), EIGHT)


def _merge_weak(grains: np.ndarray, boundary: np.ndarray, level: float) -> np.ndarray:
    """Merge neighbours, those with the weakest boundary first, until every boundary's mean probability reaches `level`."""
    if grains.max() < 2:
        return grains
    neighbours = graph.rag_boundary(grains, boundary.astype(np.float64), connectivity=1)
    return 1 + graph.merge_hierarchical(grains, neighbours, level, rag_copy=False, in_place_merge=True,
                                        merge_func=lambda *_: None, weight_func=_joint_boundary)


def _joint_boundary(neighbours: graph.RAG, kept: int, merged: int, other: int) -> dict[str, Any]:
    """The boundary to a third grain after a merger: what both had with it, weighted by length."""
    nothing = {"weight": 0.0, "count": 0}
    parts = [neighbours[grain].get(other, nothing) for grain in (kept, merged)]
    count = sum(part["count"] for part in parts)
    return {"count": count, "weight": sum(part["count"] * part["weight"] for part in parts) / count}
