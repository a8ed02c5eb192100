"""Simulated grain structures as ImageSets: the library that the loop trains on, and sequences of grain growth."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from skimage.segmentation import clear_border
from tqdm import tqdm

from graincast.config import Simulate
from graincast.errors import UserError
from graincast.simulate import structure
from graincast.store.imageset import ImageSet, ImageSetWriter, whole_folder

Morphology = tuple[np.ndarray, np.ndarray]


def simulate_library(config: Simulate, out: Path) -> dict[str, ImageSet]:
    """Grow the morphologies of all three purposes; no structure, and no volume, serves two of them.

    Parameters
    ----------
    config : Simulate
        The simulator's settings.
    out : pathlib.Path
        The folder to make; it appears when all sets in it are whole.

    Returns
    -------
    dict of str to ImageSet
        ``translator``, ``synthetic`` and ``validation``; see `simulate_set`.

    Raises
    ------
    UserError
        If the time step is unstable, the grains do not fit the size or the work the memory.
    """
    counts = {"translator": config.translator_structures, "synthetic": config.synthetic_structures,
              "validation": config.validation_structures}
    each = structure.slices(config)
    with whole_folder(out) as folder:
        first = 0
        for name, count in counts.items():
            simulate_set(config, count, folder / name, first)
            first += -(-count // each) * each
    return {name: ImageSet(Path(out) / name) for name in counts}


def simulate_set(config: Simulate, count: int, out: Path, first: int = 0) -> ImageSet:
    """Grow structures ``first`` to ``first + count - 1`` of a seed.

    Structures are grown on all processors, one on each: the solver releases Python's lock. On a device they are grown in
    batches (``config.device``).

    Parameters
    ----------
    config : Simulate
        The simulator's settings.
    count : int
        Number of morphologies.
    out : pathlib.Path
        The folder to make; it appears when it is whole.
    first : int, optional
        Index of the first structure, a multiple of `graincast.simulate.structure.slices`.

    Returns
    -------
    ImageSet
        Of kind ``morphologies``, with labels. Rows have the columns ``structure`` (its index), ``grains`` (ids in the image),
        ``mean_diameter_px`` (see `mean_grain_diameter`) and, where ``config.pixel_size_um`` is known, ``mean_diameter_um``.

    Raises
    ------
    UserError
        If the time step is unstable, the grains do not fit the size or the work the memory.
    """
    check(config)
    each = structure.slices(config)
    numbers = range(first // each, -(-(first + count) // each))
    grown = _grow_on_device(config, numbers) if _on_gpu(config) else _grow_on_processors(config, numbers)
    morphologies = tqdm(islice(grown, count), total=count, desc="simulate", unit="structure", disable=None)
    with ImageSetWriter(out, "morphologies", config=config.model_dump()) as writer:
        for index, (picture, labels) in enumerate(morphologies, first):
            writer.add(picture, id=f"structure-{index:05d}", labels=labels, source="phase field", seed=config.seed,
                       pixel_size_um=config.pixel_size_um, structure=index, grains=int(labels.max()),
                       **_diameters(_mean_diameter(labels), config))
    return ImageSet(out)


def simulate_sequences(config: Simulate, count: int, steps: Sequence[int], out: Path) -> ImageSet:
    """Grow structures 0 to ``count - 1`` and keep them at several times: sequences of grain growth with stable grain ids.

    Parameters
    ----------
    config : Simulate
        The simulator's settings; ``config.steps`` and ``config.device`` do not matter, all processors share a structure.
    count : int
        Number of structures.
    steps : sequence of int
        Time steps at which to look, rising, from 0 on.
    out : pathlib.Path
        The folder to make; it appears when it is whole.

    Returns
    -------
    ImageSet
        Of kind ``sequences``, with labels (see `graincast.simulate.structure.Frame`), frame after frame. Rows have the columns
        ``structure``, ``step``, ``time`` (in units of 1/L), ``grains`` (left in the field) and the mean diameters as in
        `simulate_set`, here exact: that of the circle of the field's area over ``grains``.

    Raises
    ------
    UserError
        As for `simulate_set`, and if the steps do not rise.
    """
    check(config)
    with ImageSetWriter(out, "sequences", config=config.model_dump()) as writer:
        for index in tqdm(range(count), desc="simulate", unit="structure", disable=None):
            for frame in structure.simulate_frames(config, index, steps):
                grains = len(np.unique(frame.labels[frame.labels > 0]))
                diameter = float(2 * np.sqrt(frame.labels.size / grains / np.pi))
                writer.add(frame.picture, id=f"structure-{index:05d}-step-{frame.step:06d}", labels=frame.labels, source="phase field",
                           seed=config.seed, pixel_size_um=config.pixel_size_um, structure=index, step=frame.step,
                           time=frame.step * config.time_step, grains=grains, **_diameters(diameter, config))
    return ImageSet(out)


def check(config: Simulate) -> None:
    """Refuse what cannot be simulated, or not on this machine.

    Raises
    ------
    UserError
        If the time step is unstable, the field does not hold the grains or obstacles, the free memory does not hold the field, or
        the device is not there.
    """
    _workers(config)
    _on_gpu(config)
    structure.draw_start(config, 0)  # what does not fit shows in one structure as in all


def _on_gpu(config: Simulate) -> bool:
    """Whether structures grow on a GPU."""
    if config.device == "cpu":
        return False
    from graincast.compute import pick_device  # torch takes seconds to import

    return pick_device(config.device).type == "cuda"


def _grow_on_processors(config: Simulate, numbers: Iterable[int]) -> Iterator[Morphology]:
    """Morphologies of structures (or volumes), in their order."""
    pool = ThreadPoolExecutor(_workers(config))
    try:
        yield from chain.from_iterable(pool.map(lambda number: structure.simulate(config, number, threads=1), numbers))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the structures still waiting are not grown


def _grow_on_device(config: Simulate, numbers: Iterable[int]) -> Iterator[Morphology]:
    """Morphologies of structures (or volumes), in their order; drawn and painted on the processors."""
    from graincast.simulate.batched import BatchedGrowth, structures_at_once

    shape = structure.field(config)
    with ThreadPoolExecutor(_workers(config)) as pool:
        waiting = iter(numbers)
        while batch := list(islice(waiting, structures_at_once(shape, config.device))):
            starts = list(pool.map(lambda number: structure.draw_start(config, number), batch))
            some = [start.obstacles for start in starts]
            obstacles = np.stack([field for field in some if field is not None]) if some[0] is not None else None
            growth = BatchedGrowth(np.stack([start.labels for start in starts]), config.time_step, stencil=structure.stencil(config),
                                   obstacles=obstacles, device=config.device)
            growth.advance(config.steps)
            fields = growth.picture(), growth.picture([start.greys for start in starts]), growth.labels()
            del growth  # the next batch is planned for the memory that is free
            yield from chain.from_iterable(pool.map(lambda grown: structure.render(config, *grown), zip(starts, *fields, strict=True)))


def _workers(config: Simulate) -> int:
    """Processors to use at a time: all, or as many as the free memory lets grow a structure each.

    Raises
    ------
    UserError
        If it does not do for one.
    """
    shape = structure.field(config)
    each = _bytes_per_cell(config)
    needed = each * math.prod(shape)
    free = psutil.virtual_memory().available
    if needed > free:
        side = math.isqrt(int(free / each / (config.depth or 1)))
        raise UserError(f"simulate.size: {' x '.join(map(str, shape))} px need about {needed / 1e9:.3g} GB of memory and "
                        f"{free / 1e9:.3g} GB are free; a size of at most {side} would be right")
    return min(os.cpu_count() or 1, int(free / needed))


def _bytes_per_cell(config: Simulate) -> float:
    """Memory that a cell of the field takes, all arrays counted: what a cell needs, and its share of the grains' windows.

    The smaller the grains, the more their windows overlap. Measured: 73 to 344 bytes in planes with mean grain areas from 3355
    down to 35 px, 103 and 337 in volumes with grains 41 and 13 px wide; the estimate is 1.1 to 1.6 times that.
    """
    shape = structure.field(config)
    width = (math.prod(shape) / config.grains) ** (1 / len(shape))
    trial = 1
    if config.grain_diameter_um and config.pixel_size_um:
        width, trial = config.grain_diameter_um / config.pixel_size_um, structure.LARGEST_TRIAL**2
    overlap = (1.15 + 8 / width) ** (len(shape) - 1) * (1.15 + 24 / width)  # a margin around, and whole vectors along lines
    return trial * (30 + 34 * overlap)


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


def _diameters(diameter_px: float, config: Simulate) -> dict[str, Any]:
    """Columns for a mean diameter."""
    um = {} if config.pixel_size_um is None else {"mean_diameter_um": diameter_px * config.pixel_size_um}
    return {"mean_diameter_px": diameter_px, **um}
