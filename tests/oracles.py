"""Independent references for the grain-growth solver, and what is measured in its grain maps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage, sparse
from scipy.integrate import solve_bvp, solve_ivp
from scipy.interpolate import CubicSpline
from scipy.optimize import least_squares, root
from scipy.spatial import cKDTree

from graincast.simulate.free_energy import ISOTROPIC, OBSTACLE, Stencil
from graincast.simulate.phase_field import GrainGrowth


class Dense:
    """Every order parameter on every cell, NumPy float64: the same equations with none of the tricks.

    Parameters
    ----------
    labels : numpy.ndarray
        Dense grain ids 1..N, (H, W) or (D, H, W), integer, periodic.
    time_step : float
        In units of 1/L.
    kernel : numpy.ndarray, optional
        Weights of div(K grad eta), of as many dimensions as `labels`.
    obstacles : numpy.ndarray, optional
        Psi, shape of `labels`.
    """

    def __init__(self, labels: np.ndarray, time_step: float, kernel: np.ndarray = ISOTROPIC.kernel, obstacles: np.ndarray | None = None) -> None:
        ids = np.arange(1, labels.max() + 1).reshape(-1, *[1] * labels.ndim)
        self.time_step = time_step
        self.kernel = kernel
        self.obstacles = np.zeros(labels.shape) if obstacles is None else obstacles.astype(float)
        self.eta = (labels == ids) * np.sqrt(np.maximum(1 - 2 * self.obstacles, 0))  # no grain is in an obstacle

    def diffusion(self) -> np.ndarray:
        """div(K grad eta) of all grains."""
        return ndimage.convolve(self.eta, self.kernel[None], mode="wrap")

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            reaction = 1 + self.eta**2 - 2 * self.picture() - 2 * self.obstacles
            self.eta += self.time_step * (self.eta * reaction + self.diffusion())

    def picture(self) -> np.ndarray:
        return (self.eta**2).sum(0)

    def labels(self) -> np.ndarray:
        return self.eta.argmax(0) + 1

    def energy(self) -> float:
        square = self.eta**2
        pairs = (square.sum(0) ** 2 - (square**2).sum(0)) / 2
        bulk = 0.25 + (-square / 2 + square**2 / 4).sum(0) + pairs + self.obstacles * square.sum(0)
        return float(bulk.sum() - (self.eta * self.diffusion()).sum() / 2)


def random_cells(shape: tuple[int, ...], grains: int, seed: int) -> np.ndarray:
    """Voronoi cells of random points in a periodic field or volume, ids 1..N without gaps, int32.

    N is below `grains` where a cell is too small for a cell of the grid.
    """
    points = np.random.default_rng(seed).random((grains, len(shape))) * shape
    centres = np.stack(np.meshgrid(*(np.arange(size) + 0.5 for size in shape), indexing="ij"), axis=-1)
    nearest = cKDTree(points, boxsize=shape).query(centres)[1]
    return (np.unique(nearest, return_inverse=True)[1].reshape(shape) + 1).astype(np.int32)


def discs(shape: tuple[int, int], count: int, radius: float, seed: int) -> np.ndarray:
    """Psi of round particles anywhere in a periodic field."""
    distance = np.full(shape, np.inf)
    for centre in np.random.default_rng(seed).random((count, 2)) * shape:
        away = [(np.arange(size) - at + size / 2) % size - size / 2 for size, at in zip(shape, centre, strict=True)]
        distance = np.minimum(distance, np.hypot(away[0][:, None], away[1]))
    return np.where(distance < radius, OBSTACLE, 0).astype(np.float32)


def boundary_energy(thickness: float) -> float:
    """Energy of a unit of boundary between two grains that fill space as alternating slabs, in equilibrium.

    SciPy's collocation solution, fourth order with controlled error, of eta'' + eta (1 + eta^2 - 2 phi) = 0 between the
    boundary, where the two are equal by symmetry, and a slab's middle, where both are level.
    """
    def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        one, d_one, two, d_two, _ = y
        phi = one**2 + two**2
        density = 0.25 - phi / 2 + (one**4 + two**4) / 4 + one**2 * two**2 + (d_one**2 + d_two**2) / 2
        return np.array([d_one, -one * (1 + one**2 - 2 * phi), d_two, -two * (1 + two**2 - 2 * phi), density])

    def ends(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        return np.array([start[0] - start[2], start[1] + start[3], start[4], end[1], end[3]])

    x = np.linspace(0, thickness / 2, 200)
    tanh, slope = np.tanh(x), 0.5 / np.cosh(x) ** 2
    solution = solve_bvp(slopes, ends, x, np.array([(1 + tanh) / 2, slope, (1 - tanh) / 2, -slope, x]), tol=1e-9, max_nodes=20000)
    assert solution.success
    return float(2 * solution.y[4, -1])


def shrinking_ball(radius: float, times: np.ndarray, dimensions: int, spacing: float = 0.125) -> np.ndarray:
    """Radius squared of a circular or spherical grain inside another one.

    The equations in the radial coordinate alone, on a fine grid, by SciPy's implicit integrator.

    Parameters
    ----------
    radius : float
        At time 0, when the boundary is sharp.
    times : numpy.ndarray
        Increasing.
    dimensions : int
        2 or 3.
    spacing : float, optional
        Of the radial grid; the error is of second order in it.

    Returns
    -------
    numpy.ndarray
        Radius squared, by the volume, which is the integral of eta^2 / phi.
    """
    cells = round(1.6 * radius / spacing)
    faces = np.arange(cells + 1) * spacing
    volumes = np.diff(faces**dimensions) / dimensions
    through = faces[1:-1] ** (dimensions - 1) / spacing
    middles = (faces[1:] + faces[:-1]) / 2

    def slope(_: float, state: np.ndarray) -> np.ndarray:
        eta = state.reshape(-1, 2)  # neighbours in memory, so that the Jacobian is banded
        flux = np.zeros((cells + 1, 2))
        flux[1:-1] = through[:, None] * np.diff(eta, axis=0)
        phi = (eta**2).sum(1, keepdims=True)
        return (eta * (1 + eta**2 - 2 * phi) + np.diff(flux, axis=0) / volumes[:, None]).ravel()

    inside = (middles < radius).astype(float)
    solution = solve_ivp(slope, (0, times[-1]), np.stack([inside, 1 - inside], 1).ravel(), "LSODA", t_eval=times,
                         rtol=1e-7, atol=1e-9, lband=2, uband=2)
    eta = solution.y.reshape(cells, 2, -1)
    share = eta[:, 0] ** 2 / (eta**2).sum(1)
    return (dimensions * (share * volumes[:, None]).sum(0)) ** (2 / dimensions)


def periodic_components(mask: np.ndarray) -> int:
    """Number of components of a mask, connected through cell faces and through the seams of the periodic field."""
    parts, count = ndimage.label(mask)
    seams = [np.stack([np.take(parts, 0, axis).ravel(), np.take(parts, -1, axis).ravel()]) for axis in range(mask.ndim)]
    pairs = np.concatenate(seams, axis=1)
    pairs = pairs[:, (pairs > 0).all(0)] - 1
    graph = sparse.coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(count, count))
    return int(sparse.csgraph.connected_components(graph, directed=False)[0])


def areas(labels: np.ndarray, grains: int) -> np.ndarray:
    """Number of cells of the grains 1..`grains`, 0 for a missing one, (grains,)."""
    return np.bincount(labels.ravel(), minlength=grains + 1)[1:]


def _corners(labels: np.ndarray) -> np.ndarray:
    """Sorted ids of the four cells around the lower right corner of every cell, (H, W, 4), periodic."""
    around = [np.roll(labels, shift, (0, 1)) for shift in ((0, 0), (-1, 0), (0, -1), (-1, -1))]
    return np.sort(np.stack(around, axis=-1), axis=-1)


def sides(labels: np.ndarray, grains: int) -> np.ndarray:
    """Number of sides of the grains 1..`grains` of a periodic map: the corners of cells where they meet two others.

    Each triple junction is one corner, so by Euler's relation the mean over a field of such grains is exactly 6; a
    corner where four grains meet is an edge too short to count. Returns (grains,).
    """
    around = _corners(labels).reshape(-1, 4)
    new = np.diff(around, axis=1, prepend=0) > 0
    at_junction = new & (new.sum(1, keepdims=True) >= 3)
    return np.bincount(around[at_junction], minlength=grains + 1)[1:]


REACH = 12
"""Radius around a triple junction, px, within which there must be no fourth grain."""

RADII = np.arange(4.0, 10.5, 0.5)
"""Radii at which the boundaries' directions are taken, px: outside the junction's diffuse core."""


def triple_junctions(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Triple junctions of a periodic map that have no fourth grain within `REACH`: position (2,) and the ids (3,)."""
    around = _corners(labels)
    distinct = 1 + (np.diff(around, axis=-1) > 0).sum(-1)
    offsets = np.arange(-REACH, REACH + 1)
    disc = (offsets[:, None] ** 2 + offsets**2) <= REACH**2
    found = []
    for row, column in np.argwhere(distinct == 3):
        ids = np.unique(around[row, column])
        if np.isin(_window(labels, row, column)[disc], ids).all():
            found.append((np.array([row, column]), ids))
    return found


def _window(field: np.ndarray, row: int, column: int, reach: int = REACH) -> np.ndarray:
    """The cells around one cell of a periodic field, (2 reach + 1, 2 reach + 1)."""
    offsets = np.arange(-reach, reach + 1)
    return field[np.ix_((row + offsets) % field.shape[0], (column + offsets) % field.shape[1])]


def junction_angles(squares: np.ndarray) -> np.ndarray | None:
    """Angles between the boundaries that meet at a triple junction.

    The boundaries are the lines of equal order parameter, traced by cubic splines at `RADII` from the point where all
    three are equal. Three arcs that leave one common point are fitted to them; that point is free, since the diffuse
    core of a junction that is out of balance lies beside it. The angles are those between the arcs' tangents in it.

    Parameters
    ----------
    squares : numpy.ndarray
        eta^2 of the three grains, (3, 2k + 1, 2k + 1), with the junction within 2 px of the middle.

    Returns
    -------
    numpy.ndarray or None
        The angles, degrees, (3,), in the order of the boundaries around the junction; None where one of the circles
        is cut by other than three boundaries.
    """
    splines = [ndimage.spline_filter(field.astype(float)) for field in squares]

    def at(place: np.ndarray) -> np.ndarray:
        return np.array([ndimage.map_coordinates(spline, place, prefilter=False) for spline in splines])

    core = root(lambda place: np.diff(at(place[:, None])[:, 0]), np.array(squares.shape[1:]) // 2 + 0.5).x
    turns = np.linspace(0, 2 * np.pi, 361)
    cut_at = []
    for radius in RADII:
        values = at(core[:, None] + radius * np.stack([np.sin(turns), np.cos(turns)]))
        largest = values.argmax(0)
        cuts = np.flatnonzero(np.diff(largest))
        if len(cuts) != 3 or len(set(largest[cuts])) != 3:
            return None
        cuts = cuts[largest[cuts].argsort()]
        here, there = (values[largest[cuts], cuts + k] - values[largest[cuts + 1], cuts + k] for k in (0, 1))
        cut_at.append(turns[cuts] + here / (here - there) * turns[1])
    boundaries = RADII[:, None, None] * np.stack([np.sin(cut_at), np.cos(cut_at)], axis=-1)

    def misfit(arcs: np.ndarray) -> np.ndarray:
        """Distances of the points from the arcs: common start (2), directions (3), halves of the curvatures (3)."""
        away = boundaries - arcs[:2]
        distance = np.hypot(away[..., 0], away[..., 1])
        turn = np.arctan2(away[..., 0], away[..., 1]) - arcs[2:5] - arcs[5:] * distance
        return (distance * np.sin(turn)).ravel()

    directions = least_squares(misfit, np.concatenate([np.zeros(2), cut_at[0], np.zeros(3)])).x[2:5]
    directions = np.sort(directions % (2 * np.pi))
    return np.degrees(np.diff(directions, append=directions[0] + 2 * np.pi))


def grain_angles(growth: GrainGrowth) -> np.ndarray:
    """Angles at all triple junctions of a structure that have no fourth grain within `REACH`, degrees, (n, 3).

    The squares of the three order parameters follow from a few pictures in which every grain has another weight, since no
    other grain is there.
    """
    weights = np.random.default_rng(0).normal(size=(6, growth.grains))
    pictures = [growth.picture(own) for own in weights]
    found = []
    for place, ids in triple_junctions(growth.labels()):
        windows = np.stack([_window(picture, *place) for picture in pictures])
        angles = junction_angles(np.tensordot(np.linalg.pinv(weights[:, ids - 1]), windows, 1))
        if angles is not None:
            found.append(angles)
    return np.array(found)


def refined(factor: float, stencil: Stencil = ISOTROPIC) -> Stencil:
    """The stencil for a grid of `factor` px a unit of length."""
    return Stencil(*(factor**2 * weight for weight in stencil))


def amount(growth: GrainGrowth) -> float:
    """Area (volume) of the first grain, sharper than a count of cells."""
    first = np.arange(growth.grains) == 0
    return float((growth.picture(first) / growth.picture()).sum(dtype=float))


def boundary_energy_errors(factors: list[int]) -> list[float]:
    """Relative errors of a flat boundary's energy on grids that are so many times finer, against `boundary_energy`."""
    thickness, height = 12, 12
    errors = []
    for factor in factors:
        slabs = np.repeat([1, 2], thickness * factor)[None].repeat(height * factor, axis=0)
        growth = GrainGrowth(slabs, 0.025, stencil=refined(factor))
        growth.advance(1200)
        errors.append(abs(growth.energy() / factor**2 / (2 * height) / boundary_energy(thickness) - 1))
    return errors


def moving_boundary_errors(factors: list[float]) -> list[float]:
    """Relative errors, on grids that are so many times finer, of the time in which a circle shrinks from radius 10 to 7.

    Against the radial problem on a fine grid, `shrinking_ball`. The time step is the same on all grids.
    """
    times = np.arange(0, 52, 2.0)

    def passage(squares: np.ndarray) -> float:
        reached = CubicSpline(-squares, times)
        return float(reached(-(7.0**2)) - reached(-(10.0**2)))

    exact = passage(shrinking_ball(12, times, dimensions=2, spacing=1 / 16))
    errors = []
    for factor in factors:
        side = round(32 * factor)
        y, x = (np.mgrid[:side, :side] + 0.5) / factor - 16.2
        growth = GrainGrowth(np.where(x**2 + y**2 < 12**2, 1, 2), 0.025, stencil=refined(factor))
        squares = []
        for _ in times:
            squares.append(amount(growth) / factor**2 / np.pi)
            growth.advance(80)
        errors.append(abs(passage(np.array(squares)) / exact - 1))
    return errors


def time_step_errors(divisors: list[int]) -> list[float]:
    """Differences of phi, root mean square, between time steps of 0.15 by `divisors` and a very small one.

    Far below them lies what the solver leaves out by skipping cells, 1e-5.
    """
    start = random_cells((64, 80), 8, seed=5)

    def picture(divisor: int) -> np.ndarray:
        growth = GrainGrowth(start, 0.15 / divisor)
        growth.advance(32 * divisor)
        return growth.picture().astype(float)

    exact = picture(256)
    return [float(np.sqrt(((picture(divisor) - exact) ** 2).mean())) for divisor in divisors]


class History(NamedTuple):
    """A field of many grains at equally spaced times."""

    grains: int
    times: np.ndarray
    maps: list[np.ndarray]
    last: GrainGrowth

    def mean_areas(self) -> np.ndarray:
        return np.array([labels.size / np.unique(labels).size for labels in self.maps])

    def scaled_sizes(self, at: int) -> np.ndarray:
        """Diameters of the grains by their mean."""
        sizes = np.sqrt(areas(self.maps[at], self.grains))
        return sizes[sizes > 0] / sizes[sizes > 0].mean()

    def side_rates(self, frames: range) -> tuple[np.ndarray, np.ndarray]:
        """n - 6 and dA/dt of the grains that have the same number n of sides in two of the frames that follow each other.

        No frame serves twice.
        """
        excess, rates = [], []
        for first in list(frames)[:-1:2]:
            before, after = self.maps[first], self.maps[first + 1]
            n = sides(before, self.grains)
            kept = (n == sides(after, self.grains)) & (n > 0)
            change = areas(after, self.grains) - areas(before, self.grains)
            excess.append(n[kept] - 6)
            rates.append(change[kept] / (self.times[first + 1] - self.times[first]))
        return np.concatenate(excess), np.concatenate(rates)


def grow_history(shape: tuple[int, int], grains: int, seed: int, frames: int, interval: int) -> History:
    """Grow random cells, with a frame every `interval` steps."""
    growth = GrainGrowth(random_cells(shape, grains, seed), 3 / 16)
    maps = []
    for _ in range(frames):
        growth.advance(interval)
        maps.append(growth.labels())
    return History(growth.grains, (1 + np.arange(frames)) * interval * growth.time_step, maps, growth)
