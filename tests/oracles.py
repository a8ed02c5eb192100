"""Independent references for the grain-growth solver, and what is measured in its grain maps."""

from __future__ import annotations

import numpy as np
from scipy import ndimage, sparse
from scipy.integrate import solve_bvp, solve_ivp
from scipy.optimize import least_squares, root
from scipy.spatial import cKDTree

from graincast.simulate.free_energy import ISOTROPIC
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
