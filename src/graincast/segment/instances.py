"""From the network's maps to closed grains: a seeded watershed."""

from __future__ import annotations

import numpy as np
from scipy import ndimage as ndi
from skimage import segmentation

MIN_GRAIN_PX = 30
"""Grains smaller than this are given to their neighbours, px of the network's scale."""


def instances(maps: np.ndarray, seed_level: float, min_area: float = MIN_GRAIN_PX) -> np.ndarray:
    """Closed grains from boundary probability and depth.

    Parameters
    ----------
    maps : ndarray
        (2, height, width), float in [0, 1]: boundary probability and depth (`graincast.segment.network.targets`).
    seed_level : float
        Connected regions (4-neighbours) deeper than this seed one grain each.
    min_area : float
        Smaller grains are dissolved, px.

    Returns
    -------
    ndarray
        Instance ids 1..N, int32 (height, width), no zeros: the grains tile the image. All 1 where nothing seeds.
    """
    boundary, depth = maps
    seeds, count = ndi.label(depth > seed_level)
    if not count:
        return np.ones(boundary.shape, np.int32)
    landscape = boundary - depth
    grains = segmentation.watershed(landscape, seeds)
    small = np.bincount(grains.ravel(), minlength=count + 1) < min_area
    small[0] = False
    if small.any() and not small[1:].all():
        grains = segmentation.watershed(landscape, np.where(small[seeds], 0, seeds))
    return segmentation.relabel_sequential(grains)[0].astype(np.int32)
