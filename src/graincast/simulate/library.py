"""Labelled grain structures, one at a time and as a library of ImageSets."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from scipy import ndimage as ndi
from skimage.measure import label
from skimage.segmentation import clear_border
from tqdm import tqdm

from graincast.config import Simulate
from graincast.simulate.phase_field import GrainGrowth
from graincast.simulate.tessellation import regularised_voronoi
from graincast.store.imageset import ImageSet, ImageSetWriter, whole_folder

MEAN_GREY = 0.75
"""Mean grey level of the grains, fraction of full scale: room above for the spread, boundaries dark below."""

DARKEST_GREY = 0.3
"""Lowest grey level of a grain, fraction of full scale; a darker one would look like boundary."""

SMALLEST_PART = 16
"""Parts of a grain map below this, px, count as boundary: a spot no wider than a boundary line is no grain to
see. They stem from grains about to vanish and from corners of grains that the image border cuts off."""


def simulate_structure(config: Simulate, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Grow one grain structure.

    Parameters
    ----------
    config : Simulate
        The simulator's settings.
    index : int
        Which structure; together with ``config.seed`` it decides every random number.

    Returns
    -------
    picture : numpy.ndarray
        (size, size), uint8: the mean of the grains' grey levels, weighted with their squared order parameters, times
        phi, which darkens the boundaries, each more or less (``config.boundary_fading``). Grey levels are normally
        distributed around 0.75 of full scale with standard deviation ``config.grey_spread``.
    labels : numpy.ndarray
        (size, size), int32: 0 where phi is below ``config.boundary_level``, otherwise ids 1..N without gaps.
        Each id is one 4-connected part of the image (a grain that the border of the periodic field cuts shows
        up as several), and no two ids are 4-neighbours: the boundary lines are closed.

    Raises
    ------
    UserError
        If the time step is unstable or the grains are too many for the size.

    Examples
    --------
    >>> picture, labels = simulate_structure(Simulate(size=64, grains=8, steps=50), index=0)
    >>> picture.dtype, labels.dtype, labels.max() >= 8
    (dtype('uint8'), dtype('int32'), np.True_)
    """
    rng = np.random.default_rng([config.seed, index])
    start = regularised_voronoi((config.size, config.size), config.grains, config.area_spread, rng)
    growth = GrainGrowth(start, config.time_step)
    growth.advance(config.steps)
    greys = np.clip(rng.normal(MEAN_GREY, config.grey_spread, growth.grains), DARKEST_GREY, 1)
    phi, dense = growth.picture(), growth.labels()
    visible = _visibility(dense, config.boundary_fading, rng)
    picture = growth.picture(greys) / phi * (1 - visible * (1 - phi))
    picture = np.clip(np.rint(255 * picture), 0, 255).astype(np.uint8)
    return picture, separate(np.where(phi < config.boundary_level, 0, dense))


def _visibility(dense: np.ndarray, fading: float, rng: np.random.Generator) -> np.ndarray:
    """How much of its darkness each boundary keeps, (size, size) in [1 - `fading`, 1]; one value a pair of grains.

    Boundaries of low energy are hardly grooved, and a segmenter that has only seen plain ones misses them.
    """
    window = 9  # px, wider than a boundary
    low, high = ndi.minimum_filter(dense, window, mode="wrap"), ndi.maximum_filter(dense, window, mode="wrap")
    _, pair = np.unique(low.astype(np.int64) * (dense.max() + 1) + high, return_inverse=True)
    visible = 1 - fading * rng.random(pair.max() + 1)
    return ndi.gaussian_filter(visible[pair.reshape(dense.shape)], 1.5, mode="wrap")


def separate(labels: np.ndarray) -> np.ndarray:
    """Make a grain map one of an image: connected ids, closed boundary lines, no crumbs.

    Parameters
    ----------
    labels : numpy.ndarray
        (height, width), integer ids, 0 = boundary; ids may have several parts and touch one another.

    Returns
    -------
    numpy.ndarray
        (height, width), int32, ids 1..N in raster order: the 4-connected parts of at least `SMALLEST_PART`
        px, of which no two are 4-neighbours.
    """
    labels = labels.copy()
    # Of two different grains side by side, the upper or left cell becomes boundary.
    for here, there in ((labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:])):
        here[(here != there) & (there != 0)] = 0
    parts = label(labels, connectivity=1)
    large = np.bincount(parts.ravel()) >= SMALLEST_PART
    large[0] = False
    return np.where(large, np.cumsum(large), 0).astype(np.int32)[parts]


def simulate_library(config: Simulate, out: Path) -> dict[str, ImageSet]:
    """Grow the morphologies of all three purposes; no structure serves two of them.

    Structures are grown on all processors, one on each: the solver releases Python's lock. (Sharing out one
    structure among the processors would make them wait for each other at every step.)

    Parameters
    ----------
    config : Simulate
        The simulator's settings.
    out : pathlib.Path
        The folder to make; it appears when all sets in it are whole.

    Returns
    -------
    dict of str to ImageSet
        ``translator``, ``synthetic`` and ``validation``, of kind ``morphologies``, with labels. Rows have the
        columns ``structure`` (its index), ``grains`` (ids in the image) and ``mean_diameter_px`` (see
        `mean_grain_diameter`).

    Raises
    ------
    UserError
        If the time step is unstable or the grains are too many for the size.
    """
    counts = {"translator": config.translator_structures, "synthetic": config.synthetic_structures,
              "validation": config.validation_structures}
    total = sum(counts.values())
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        grown = pool.map(lambda index: simulate_structure(config, index), range(total))
        structures = enumerate(tqdm(grown, total=total, desc="simulate", unit="structure", disable=None))
        with whole_folder(out) as folder:
            for name, count in counts.items():
                with ImageSetWriter(folder / name, "morphologies", config=config.model_dump()) as writer:
                    for index, (picture, labels) in islice(structures, count):
                        writer.add(picture, id=f"structure-{index:05d}", labels=labels, source="phase field",
                                   seed=config.seed, structure=index, grains=int(labels.max()),
                                   mean_diameter_px=_mean_diameter(labels))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the structures still waiting are not grown
    return {name: ImageSet(Path(out) / name) for name in counts}


def mean_grain_diameter(morphologies: ImageSet) -> float:
    """Mean grain size of a set as a diameter, px: what `graincast.microscope.scale` estimates in micrographs.

    Parameters
    ----------
    morphologies : ImageSet
        A set that `simulate_library` made.

    Returns
    -------
    float
        Diameter of the circle of mean grain area, boundary lines included, averaged over the images.
    """
    return float(morphologies.rows["mean_diameter_px"].mean())


def _mean_diameter(labels: np.ndarray) -> float:
    """Diameter of the circle of mean area, px, the grains at the border counting half (ASTM E112, planimetric)."""
    whole = len(np.unique(clear_border(labels))) - 1
    count = whole + (labels.max() - whole) / 2
    return float(2 * np.sqrt(labels.size / count / np.pi))
