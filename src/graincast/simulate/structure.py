"""One grain structure, from the drawing of its start to a picture with labels."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage as ndi
from skimage.measure import label

from graincast.config import Particles, Pores, Simulate
from graincast.errors import UserError
from graincast.simulate.free_energy import ISOTROPIC, OBSTACLE, VOLUME_KERNEL, Stencil, anisotropic_stencil, check_time_step
from graincast.simulate.obstacles import scatter_obstacles
from graincast.simulate.phase_field import GrainGrowth
from graincast.simulate.tessellation import SMALLEST_MEAN_AREA, tessellate

MEAN_GREY = 0.75
"""Mean grey level of the grains, fraction of full scale: room above for the spread, boundaries dark below."""

DARKEST_GREY = 0.3
"""Lowest grey level of a grain, fraction of full scale; a darker one would look like boundary."""

PORE_GREY = 0.05
"""Grey level of pores, fraction of full scale: hardly an electron leaves a hole."""

SMALLEST_PART = 16
"""Parts of a grain map below this, px, count as boundary: a spot no wider than a boundary line is no grain to
see. They stem from grains about to vanish and from corners of grains that the image border cuts off."""

FEWEST_GRAINS = 4
"""Fewest grains that a wanted diameter may lead to; fewer would meet themselves across the periodic border."""

TRIAL_GRAINS = 400
"""Grains left in a trial; their number scatters by about 2 %."""

TRIAL_TOLERANCE = 0.02
"""Relative error of the mean grain area that ends the trials."""

LARGEST_TRIAL = 2
"""Side of the field of a trial by that of a structure, at most."""

MOST_TRIALS = 5
"""Trials after which the last correction has to do; two or three are usual."""


class Start(NamedTuple):
    """All that is random about a structure (or a volume), but for how visible its boundaries are.

    Attributes
    ----------
    labels : numpy.ndarray
        Dense grain ids 1..N, (height, width) or (depth, height, width), int32.
    pores, particles : numpy.ndarray or None
        Share of each cell inside one, of the labels' shape, float32; None where there are none at all.
    greys : numpy.ndarray
        Grey levels of the grains, (N,), float, fraction of full scale.
    fading : numpy.ndarray
        (N,), float, 0 to 1: the boundary of grains i and j loses the fraction ``fading[i] + fading[j]`` modulo 1 of
        `Simulate.boundary_fading` of its darkness; uniform from boundary to boundary and the same at all times.
    """

    labels: np.ndarray
    pores: np.ndarray | None
    particles: np.ndarray | None
    greys: np.ndarray
    fading: np.ndarray

    @property
    def obstacles(self) -> np.ndarray | None:
        """What the solver takes as obstacles: energy density, of the labels' shape, float32."""
        some = [field for field in (self.pores, self.particles) if field is not None]
        return OBSTACLE * np.minimum(np.sum(some, axis=0, dtype=np.float32), 1) if some else None


class Frame(NamedTuple):
    """A structure at one time of its growth.

    Attributes
    ----------
    step : int
        Time steps taken so far.
    picture : numpy.ndarray
        As `simulate_structure` returns it.
    labels : numpy.ndarray
        (size, size), int32: 0 where phi is below ``config.boundary_level``, otherwise the grain's id, the same in all
        frames. A grain that the border of the periodic field cuts has the same id on both sides.
    """

    step: int
    picture: np.ndarray
    labels: np.ndarray


def simulate_structure(config: Simulate, index: int, threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Grow one grain structure.

    Parameters
    ----------
    config : Simulate
        The simulator's settings.
    index : int
        Which structure; together with ``config.seed`` it decides every random number. Of a volume (``config.depth``),
        `slices` consecutive structures are slices.
    threads : int, optional
        Processors to use, default all; the result does not depend on it.

    Returns
    -------
    picture : numpy.ndarray
        (size, size), uint8: the mean of the grains' grey levels, weighted with their squared order parameters, times
        phi, which darkens the boundaries, each more or less (``config.boundary_fading``). Grey levels are normally
        distributed around 0.75 of full scale with standard deviation ``config.grey_spread``.
    labels : numpy.ndarray
        (size, size), int32: 0 where phi is below ``config.boundary_level`` (boundaries, pores, particles), otherwise
        ids 1..N without gaps. Each id is one 4-connected part of the image (a grain that the border of the periodic
        field cuts shows up as several), and no two ids are 4-neighbours: the boundary lines are closed.

    Raises
    ------
    UserError
        If the time step is unstable or the grains or obstacles do not fit the field.

    Examples
    --------
    >>> picture, labels = simulate_structure(Simulate(size=64, grains=8, steps=50), index=0)
    >>> picture.dtype, labels.dtype, labels.max() >= 8
    (dtype('uint8'), dtype('int32'), np.True_)
    """
    number, place = divmod(index, slices(config))
    return simulate(config, number, threads)[place]


def simulate(config: Simulate, number: int, threads: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """All `slices` structures that volume `number` gives; in the plane the one structure `number`."""
    start = draw_start(config, number)
    growth = grow(config, start, threads)
    growth.advance(config.steps)
    return render(config, start, growth.picture(), growth.picture(start.greys), growth.labels())


def simulate_frames(config: Simulate, index: int, steps: Sequence[int], threads: int | None = None) -> Iterator[Frame]:
    """Watch one grain structure grow.

    Parameters
    ----------
    config : Simulate
        The simulator's settings; ``config.steps`` does not matter.
    index : int
        Which structure, as for `simulate_structure`: the same grains, greys and boundaries.
    steps : sequence of int
        Time steps at which to look, rising, from 0 on. At step 0 boundaries are sharp: no pixel is boundary yet.
    threads : int, optional
        Processors to use, default all; ``config.device`` does not matter.

    Yields
    ------
    Frame
        One for each of `steps`.

    Raises
    ------
    UserError
        As for `simulate_structure`, and if the steps do not rise or the structure is a slice of a volume.
    """
    if not len(steps) or min(steps) < 0 or any(late <= early for early, late in itertools.pairwise(steps)):
        raise UserError(f"frames: {', '.join(map(str, steps)) or 'none'} would have to rise, from 0 on, e.g. 0, 100, 1000")
    if config.depth:
        raise UserError("simulate.depth: frames are of growth in the plane, null would be right")
    start = draw_start(config, index)
    growth = grow(config, start, threads)
    done = 0
    for step in steps:
        growth.advance(step - done)
        done = step
        phi, dense = growth.picture(), growth.labels()
        picture = _paint(config, start, phi, growth.picture(start.greys), dense, start.pores, start.particles)
        yield Frame(step, picture, np.where(phi < config.boundary_level, 0, dense))


@cache
def starting_grains(config: Simulate) -> int:
    """Number of grains at the start: ``config.grains``, or what grows to ``config.grain_diameter_um``.

    The latter is found by growing trial structures of up to `TRIAL_GRAINS` grains. Once grains vanish their mean area rises
    at a rate that hardly depends on the start, so what is missing at the end is what has to be added at the start.

    Raises
    ------
    UserError
        If grains grow beyond that diameter from any start, or the field holds too few of them.
    """
    if config.grain_diameter_um is None or config.pixel_size_um is None:
        return config.grains
    wanted = math.pi / 4 * (config.grain_diameter_um / config.pixel_size_um) ** 2
    if wanted < SMALLEST_MEAN_AREA:
        raise UserError(f"simulate.grain_diameter_um: {config.grain_diameter_um:g} um are only {math.sqrt(4 / math.pi * wanted):.2g} px, want at "
                        f"least {math.sqrt(4 / math.pi * SMALLEST_MEAN_AREA):.2g} px; a smaller pixel_size_um would be right")
    left = round(config.size**2 / wanted)
    if left < FEWEST_GRAINS:
        raise UserError(f"simulate.grain_diameter_um: a field of {config.size * config.pixel_size_um:g} um holds only {left} grains of "
                        f"{config.grain_diameter_um:g} um, want at least {FEWEST_GRAINS}; raise size or pixel_size_um")
    start = wanted
    for _ in range(MOST_TRIALS):
        reached = _trial(config, start, wanted)
        if abs(reached / wanted - 1) < TRIAL_TOLERANCE:
            break
        start += wanted - reached
        if start < SMALLEST_MEAN_AREA:
            raise UserError(f"simulate.grain_diameter_um: {config.grain_diameter_um:g} um are only {math.sqrt(4 / math.pi * wanted):.0f} px, and "
                            f"grains outgrow them in {config.steps} steps; fewer steps or a smaller pixel_size_um would be right")
    return round(config.size**2 / start)


def _trial(config: Simulate, start: float, wanted: float) -> float:
    """Mean grain area at the end, px, of a structure that starts with the mean area `start`."""
    size = min(math.ceil(math.sqrt(TRIAL_GRAINS * wanted)), LARGEST_TRIAL * config.size)
    trial = config.model_copy(update={"size": size, "grains": round(size**2 / start), "grain_diameter_um": None})
    growth = grow(trial, draw_start(trial, 0))
    growth.advance(config.steps)
    return size**2 / len(np.unique(growth.labels()))


def field(config: Simulate) -> tuple[int, ...]:
    """Shape of the periodic field that grains grow in, (height, width) or (depth, height, width), px."""
    plane = (config.size, config.size)
    return (config.depth, *plane) if config.depth else plane


def slices(config: Simulate) -> int:
    """Structures that one volume gives, about a grain diameter apart; 1 for growth in the plane."""
    if config.depth is None:
        return 1
    return max(1, int(config.depth / _diameter(field(config), config.grains)))


def draw_start(config: Simulate, number: int) -> Start:
    """Draw structure (or volume) `number`.

    Raises
    ------
    UserError
        If the time step is unstable or the grains or obstacles do not fit the field.
    """
    _check_scheme(config)
    rng = np.random.default_rng([config.seed, number])
    shape, grains = field(config), starting_grains(config)
    labels = tessellate(shape, grains, rng, regularity=config.regularity, area_spread=config.area_spread, coarse_share=config.coarse_share,
                        coarse_ratio=config.coarse_ratio, elongation=config.elongation, elongation_deg=config.elongation_deg)
    greys = np.clip(rng.normal(MEAN_GREY, config.grey_spread, grains), DARKEST_GREY, 1)
    fading = rng.random(grains)
    scattered = {key: scatter_obstacles(shape, part.fraction, part.diameter * _diameter(shape, grains), rng, key)
                 for key, part in _obstacles(config).items()}
    return Start(labels, scattered.get("simulate.pores"), scattered.get("simulate.particles"), greys, fading)


def _check_scheme(config: Simulate) -> None:
    """Refuse what the solver would, before anything is drawn for it."""
    weights = stencil(config)
    kernel = VOLUME_KERNEL if config.depth else weights.kernel
    check_time_step(config.time_step, kernel, bool(_obstacles(config)))
    if config.depth and weights != ISOTROPIC:
        raise UserError("simulate.boundary_anisotropy: not available for volumes (simulate.depth), 1 would be right")


def _obstacles(config: Simulate) -> dict[str, Pores | Particles]:
    """The kinds of obstacles there are, by key."""
    kinds: dict[str, Pores | Particles] = {"simulate.pores": config.pores, "simulate.particles": config.particles}
    return {key: kind for key, kind in kinds.items() if kind.fraction > 0}


def _diameter(shape: tuple[int, ...], grains: int) -> float:
    """Diameter of the circle or sphere of mean grain size, px."""
    content = math.prod(shape) / grains
    return math.sqrt(4 / math.pi * content) if len(shape) == 2 else (6 / math.pi * content) ** (1 / 3)


def grow(config: Simulate, start: Start, threads: int | None = None) -> GrainGrowth:
    """The structure's growth, at step 0."""
    return GrainGrowth(start.labels, config.time_step, stencil=stencil(config), obstacles=start.obstacles, threads=threads or os.cpu_count() or 1)


def stencil(config: Simulate) -> Stencil:
    """Weights of the gradient term."""
    return anisotropic_stencil(config.boundary_anisotropy, config.boundary_anisotropy_deg)


def render(config: Simulate, start: Start, phi: np.ndarray, weighted: np.ndarray, dense: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures and labels of a grown structure, of each slice of a volume; as `simulate_structure` returns them.

    Parameters
    ----------
    config : Simulate
        The simulator's settings.
    start : Start
        What it grew from.
    phi, weighted : numpy.ndarray
        Sum of the squared order parameters, plain and weighted with ``start.greys``, float32.
    dense : numpy.ndarray
        Id of the largest order parameter, integer.
    """
    planes = (_planes(config, field) for field in (phi, weighted, dense, start.pores, start.particles))
    return [(_paint(config, start, phi, weighted, dense, pores, particles), separate(np.where(phi < config.boundary_level, 0, dense)))
            for phi, weighted, dense, pores, particles in zip(*planes, strict=True)]


def _planes(config: Simulate, field: np.ndarray | None) -> list[Any]:
    """The slices of a volume's field; a plane's field itself; None for each where there is no field."""
    count = slices(config)
    if field is None:
        return [None] * count
    return [field] if config.depth is None else [field[config.depth * k // count] for k in range(count)]


def _paint(config: Simulate, start: Start, phi: np.ndarray, weighted: np.ndarray, dense: np.ndarray, pores: np.ndarray | None,
           particles: np.ndarray | None) -> np.ndarray:
    """The picture of a plane, (height, width), uint8."""
    visible = 1 - config.boundary_fading * _fading(dense, start.fading)
    picture = weighted / np.maximum(phi, 1e-6) * (1 - visible * (1 - phi))
    for field, grey in ((pores, PORE_GREY), (particles, config.particles.grey)):
        if field is not None:
            picture += (grey - picture) * field
    return np.clip(np.rint(255 * picture), 0, 255).astype(np.uint8)


def _fading(dense: np.ndarray, fading: np.ndarray) -> np.ndarray:
    """How much darkness each boundary loses, (height, width) in 0 to 1.

    Boundaries of low energy are hardly grooved, and a segmenter that has only seen plain ones misses them.
    """
    window = 9  # px, wider than a boundary
    low, high = ndi.minimum_filter(dense, window, mode="wrap"), ndi.maximum_filter(dense, window, mode="wrap")
    by_id = np.concatenate([[0], fading])  # inside an obstacle there may be no grain at all
    return ndi.gaussian_filter((by_id[low] + by_id[high]) % 1, 1.5, mode="wrap")


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
