"""Periodic cells of chosen sizes and shapes: the start of every grain structure.

**Seeds** keep a chosen least distance (`regularity`): from none, Poisson-Voronoi cells, to nearly that of the hexagonal
lattice [1]_. Where cells differ in size, so do the distances of their seeds.

**Cells** are those of a power diagram (Laguerre tessellation): of all seeds s with weights w, a point p belongs to that
of smallest power distance :math:`|p - s|^2 - w`. With equal weights they are the seeds' Voronoi cells. For any seeds
there is one such diagram of given areas; Newton's method finds its weights, damped so that no cell ever vanishes [2]_,
[3]_. On the way seeds move to the centroids of their cells, which makes the cells equiaxed.

**Elongated** cells are equiaxed cells in a stretched metric: until cells are painted, all happens in coordinates in
which they are equiaxed and the periods of the field are oblique.

References
----------
.. [1] H. X. Zhu, S. M. Thorpe, A. H. Windle, "The geometrical properties of irregular two-dimensional Voronoi
   tessellations", Phil. Mag. A 81 (2001) 2765, doi:10.1080/01418610010032364.
.. [2] D. P. Bourne, P. J. J. Kok, S. M. Roper, W. D. T. Spanjer, "Laguerre tessellations and polycrystalline
   microstructures: a fast algorithm for generating grains of given volumes", Phil. Mag. 100 (2020) 2677,
   doi:10.1080/14786435.2020.1790053.
.. [3] J. Kitagawa, Q. Mérigot, B. Thibert, "Convergence of a Newton algorithm for semi-discrete optimal transport",
   J. Eur. Math. Soc. 21 (2019) 2603, doi:10.4171/JEMS/889.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from scipy.optimize import brentq
from scipy.sparse import csc_array
from scipy.sparse.linalg import splu
from scipy.spatial import ConvexHull, cKDTree

from graincast.errors import UserError
from graincast.simulate.packing import largest_radius, scatter_discs

SMALLEST_MEAN_AREA = 30.0
"""Mean grain area, px, below which the diffuse boundaries of the phase field would fill the grains."""

SMALLEST_MEAN_VOLUME = SMALLEST_MEAN_AREA**1.5
"""The same for volumes, in voxels."""

SMALLEST_AREA = 4.0
"""Area below which no cell is aimed at, px; it might contain no pixel's centre."""

MOST_REGULAR = 0.9
"""Highest regularity on offer. Seeds pushed apart jam not far above, since random packings of discs are no lattice."""

MOST_ELONGATED = 5.0
"""Highest elongation on offer."""

VORONOI_SPREADS = {0.0: 0.53, 0.2: 0.49, 0.4: 0.38, 0.5: 0.31, 0.6: 0.23, 0.7: 0.19, 0.8: 0.17, 0.85: 0.14, 0.9: 0.10}
"""Coefficient of variation of the areas of plane Voronoi cells by the regularity of their seeds: means of ten structures of
1000 cells."""

LLOYD_SWEEPS = 3
"""Moves of seeds to centroids; cells are equiaxed after a few, many would make them hexagons."""

AREA_TOLERANCE = 0.1
"""Largest error of a cell's area, px, before it is painted."""


def tessellate(shape: tuple[int, ...], grains: int, rng: np.random.Generator, *, regularity: float = 0.0,
               area_spread: float | None = None, coarse_share: float = 0.0, coarse_ratio: float = 10.0,
               elongation: float = 1.0, elongation_deg: float = 0.0) -> np.ndarray:
    """Fill a periodic field with cells.

    Parameters
    ----------
    shape : tuple of int
        (height, width) of the field, px, or (depth, height, width) of a volume, voxels.
    grains : int
        Number of cells, at least 2.
    rng : numpy.random.Generator
        Source of all that is random.
    regularity : float, optional
        Least distance of two seeds over that in the densest lattice of as many seeds (hexagonal; in volumes
        face-centred cubic), 0 (Poisson) to `MOST_REGULAR`. Areas of Voronoi cells then scatter as in the notes.
        Together with `area_spread` it is that of seeds before they move, and the higher the rounder are the cells.
    area_spread : float, optional
        Coefficient of variation of the areas, 0 (equal) to 1, met up to the rounding to pixels; areas are lognormal.
        None: Voronoi cells. Fields only.
    coarse_share : float, optional
        Share of the area that coarse grains take, 0 (no such grains) to below 1. Coarse and fine grains each scatter
        by `area_spread`, which must be given.
    coarse_ratio : float, optional
        Mean area of coarse grains by that of fine ones, above 1. Met as nearly as whole numbers of grains allow.
    elongation : float, optional
        How many times longer cells are along one direction than across, 1 to `MOST_ELONGATED`. Fields only.
    elongation_deg : float, optional
        That direction, degrees from +x (right) towards the image's top.

    Returns
    -------
    numpy.ndarray
        Cell ids 1..grains, `shape`, int32, periodic in all directions; larger areas come first, coarse grains before
        fine ones. Each cell is one part, connected through edges of pixels (faces of voxels).

    Raises
    ------
    UserError
        If an argument is out of range, or the field does not hold the cells asked for.

    Notes
    -----
    Areas of Voronoi cells scatter as in `VORONOI_SPREADS`, the volumes of volumes' cells somewhat less: 0.43, 0.41, 0.34,
    0.28, 0.22, 0.18, 0.15, 0.12 and 0.08 in its order.

    Examples
    --------
    >>> cells = tessellate((64, 96), 20, np.random.default_rng(0), area_spread=0.2)
    >>> areas = np.bincount(cells.ravel())[1:]
    >>> len(areas), round(float(areas.std() / areas.mean()), 2)
    (20, 0.2)
    """
    _check(shape, grains, regularity, area_spread, coarse_share, coarse_ratio, elongation, elongation_deg)
    if area_spread is None:
        areas = np.full(grains, math.prod(shape) / grains)
    else:
        areas = _draw_areas(shape, grains, area_spread, coarse_share, coarse_ratio, rng)
    stretch = _stretch(elongation, elongation_deg) if len(shape) == 2 else np.eye(3)
    radii = _disc_radii(shape, areas, regularity, stretch)
    seeds = scatter_discs(shape, radii, rng, stretch)
    if seeds is None:
        raise UserError(f"simulate.regularity: {regularity:g} is too much for {grains} cells in {_by(shape)} px, want a lower one or more grains")
    if len(shape) == 3:
        labels = _paint_volume(seeds, shape)
    else:
        periods = np.diag(shape) @ stretch
        cells = power_cells(seeds @ stretch, radii**2, periods)
        labels = _paint(cells if area_spread is None else _fit(cells, areas, periods), stretch, shape)
    sizes = _connect(labels.reshape((1,) * (3 - labels.ndim) + labels.shape), grains)
    if sizes.min() == 0:
        raise UserError(f"simulate.grains: of {grains} cells in {_by(shape)} px some are too small for a pixel of their own, "
                        "want fewer grains, more regularity or a smaller area_spread")
    return labels


def _check(shape: tuple[int, ...], grains: int, regularity: float, area_spread: float | None, coarse_share: float,
                coarse_ratio: float, elongation: float, elongation_deg: float) -> None:
    """Refuse what cannot be made, naming the limit."""
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise UserError(f"simulate.size: {_by(shape)} is no field, want two or three positive numbers of px")
    if grains < 2:
        raise UserError(f"simulate.grains: {grains} is too few, want at least 2")
    smallest = SMALLEST_MEAN_AREA if len(shape) == 2 else SMALLEST_MEAN_VOLUME
    if math.prod(shape) < smallest * grains:
        most = int(math.prod(shape) / smallest)
        raise UserError(f"simulate.grains: {grains} grains are too many for {_by(shape)} px, at most {most} can be "
                        f"resolved ({smallest:.0f} px each)")
    if not 0 <= regularity <= MOST_REGULAR:
        raise UserError(f"simulate.regularity: {regularity:g} is outside 0 (Poisson) to {MOST_REGULAR:g} (nearly hexagonal)")
    if area_spread is not None and not 0 <= area_spread <= 1:
        raise UserError(f"simulate.area_spread: {area_spread:g} is outside 0 to 1")
    if not 0 <= coarse_share < 1:
        raise UserError(f"simulate.coarse_share: {coarse_share:g} is outside 0 to below 1")
    if not 1 < coarse_ratio < math.inf:
        raise UserError(f"simulate.coarse_ratio: {coarse_ratio:g} is not above 1")
    if not 1 <= elongation <= MOST_ELONGATED:
        raise UserError(f"simulate.elongation: {elongation:g} is outside 1 to {MOST_ELONGATED:g}")
    if not math.isfinite(elongation_deg):
        raise UserError(f"simulate.elongation_deg: {elongation_deg:g} is no direction, want degrees")
    if coarse_share > 0 and area_spread is None:
        raise UserError("simulate.coarse_share: coarse grains need an area_spread, 0 to 1")
    if len(shape) == 3:
        for key, given in (("area_spread", area_spread is not None), ("coarse_share", coarse_share > 0), ("elongation", elongation > 1)):
            if given:
                raise UserError(f"simulate.{key}: not available for volumes, whose cells are Voronoi cells of a chosen regularity")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape)


def _stretch(elongation: float, direction_deg: float) -> np.ndarray:
    """(2, 2): positions (row, column) times this are those where cells are equiaxed; symmetric, determinant 1."""
    angle = math.radians(direction_deg)
    long = np.array([-math.sin(angle), math.cos(angle)])  # rows run downwards
    along = np.outer(long, long)
    return along / math.sqrt(elongation) + (np.eye(2) - along) * math.sqrt(elongation)


def _disc_radii(shape: tuple[int, ...], areas: np.ndarray, regularity: float, stretch: np.ndarray) -> np.ndarray:
    """Half the least distances of seeds of cells of the given areas, (n,), px: discs of these radii must not overlap."""
    largest = largest_radius(shape, stretch)
    mean = regularity / 2 * _densest_distance(areas.mean(), len(shape))
    if mean > largest:
        raise UserError(f"simulate.regularity: {regularity:g} is too much for {len(areas)} such cells in {_by(shape)} px, "
                        f"at most {math.floor(100 * regularity * largest / mean) / 100:g} fits")
    return np.minimum(regularity / 2 * _densest_distance(areas, len(shape)), largest)


def _densest_distance(areas: Any, dimensions: int) -> Any:
    """Distance of neighbours in the densest lattice with cells of these areas, px."""
    return np.sqrt(2 / math.sqrt(3) * areas) if dimensions == 2 else np.cbrt(math.sqrt(2) * areas)


def _draw_areas(shape: tuple[int, ...], grains: int, spread: float, coarse_share: float, coarse_ratio: float,
                rng: np.random.Generator) -> np.ndarray:
    """Areas that fill the field, (grains,), px, coarse grains first."""
    field = math.prod(shape)
    if coarse_share == 0:
        return _lognormal(grains, field, spread, rng)
    coarse = round(grains * coarse_share / (coarse_share + (1 - coarse_share) * coarse_ratio))
    if not 1 <= coarse < grains:
        raise UserError(f"simulate.coarse_share: {coarse_share:g} of the area is {coarse} of {grains} grains at a coarse_ratio of "
                        f"{coarse_ratio:g}, want at least one coarse and one fine grain")
    fine = (1 - coarse_share) * field / (grains - coarse)
    if fine < SMALLEST_MEAN_AREA:
        raise UserError(f"simulate.coarse_share: fine grains of {fine:.1f} px in the mean are too small, at least "
                        f"{SMALLEST_MEAN_AREA:g} px can be resolved; want fewer grains or a smaller share")
    return np.concatenate([_lognormal(coarse, coarse_share * field, spread if coarse > 1 else 0, rng),
                           _lognormal(grains - coarse, (1 - coarse_share) * field, spread, rng)])


def _lognormal(count: int, total: float, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Lognormal areas above `SMALLEST_AREA` of exactly the given sum and coefficient of variation."""
    above = total / count - SMALLEST_AREA
    wanted = spread * (above + SMALLEST_AREA) / above
    if wanted > 0.99 * math.sqrt(count - 1):  # that of one large area among areas of nothing
        raise UserError(f"simulate.area_spread: {spread:g} is too much for {count} grains, want less or more grains")
    normal = rng.standard_normal(count)
    normal = np.sort(normal - normal.max())[::-1]
    widest = 1.0
    while _variation(np.exp(widest * normal)) < wanted:
        widest *= 2
    sizes = np.exp(normal * brentq(lambda width: _variation(np.exp(width * normal)) - wanted, 0, widest) if wanted else 0 * normal)
    return SMALLEST_AREA + above * sizes / sizes.mean()


def _variation(areas: np.ndarray) -> float:
    return float(areas.std() / areas.mean())


def _fit(cells: Cells, areas: np.ndarray, periods: np.ndarray) -> Cells:
    """Cells of the given areas, with seeds near their centroids."""
    sweep = 0
    while sweep < LLOYD_SWEEPS or np.abs(areas - cells.areas).max() > AREA_TOLERANCE:
        move = cells.centroids - cells.seeds if sweep < LLOYD_SWEEPS else np.zeros_like(cells.seeds)
        cells = _step(cells, areas, move, periods)
        sweep += 1
    return cells


def _step(cells: Cells, targets: np.ndarray, move: np.ndarray, periods: np.ndarray) -> Cells:
    """A Newton step of the weights and a move of the seeds, together so short that no cell comes near to vanishing."""
    missing = targets - cells.areas
    change = _newton(cells, missing)
    smallest = min(cells.areas.min(), targets.min()) / 2
    step = 1.0
    while True:
        trial = power_cells(cells.seeds + step * move, cells.weights + step * change, periods)
        nearer = np.linalg.norm(targets - trial.areas) <= (1 - step / 2) * np.linalg.norm(missing)
        if trial.areas.min() > smallest and (nearer or move.any()):  # moved seeds start anew, on better terms
            return trial
        step /= 2


def _newton(cells: Cells, missing: np.ndarray) -> np.ndarray:
    """Change of the weights that adds the missing areas to first order; the last weight, which is free, stays."""
    one, other, count = cells.owner, cells.neighbour, len(missing)
    rates = cells.lengths / (2 * cells.distances)  # of the area that passes between two cells, by their weights' difference
    matrix = csc_array((np.concatenate([rates, -rates]), (np.concatenate([one, one]), np.concatenate([one, other]))), (count, count))
    return np.append(splu(matrix[:-1, :-1], permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve(missing[:-1]), 0.0)


class Cells(NamedTuple):
    """The power cells of seeds in a periodic plane. Every cell has its own copy of each of its edges.

    Attributes
    ----------
    seeds : numpy.ndarray
        Positions of the seeds, (n, 2), float64.
    weights : numpy.ndarray
        Their weights, (n,), float64, squared lengths.
    areas : numpy.ndarray
        Of the cells, (n,), float64; 0 where a seed has none.
    centroids : numpy.ndarray
        Of the cells, (n, 2), float64, each beside its seed, be it beyond the border of the period.
    owner, neighbour : numpy.ndarray
        Index of the cell that an edge belongs to and of the cell beyond it, (m,), int.
    ends : numpy.ndarray
        Both ends of each edge, (m, 2, 2), float64.
    lengths : numpy.ndarray
        Of the edges, (m,), float64.
    distances : numpy.ndarray
        Between the two seeds on either side, (m,), float64.
    """

    seeds: np.ndarray
    weights: np.ndarray
    areas: np.ndarray
    centroids: np.ndarray
    owner: np.ndarray
    neighbour: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    distances: np.ndarray


def power_cells(seeds: np.ndarray, weights: np.ndarray, periods: np.ndarray) -> Cells:
    """Power diagram of weighted seeds in a periodic plane.

    Parameters
    ----------
    seeds : numpy.ndarray
        (n, 2), float.
    weights : numpy.ndarray
        (n,), float, squared lengths.
    periods : numpy.ndarray
        (2, 2), float: the two vectors, in rows, along which the plane repeats itself.

    Returns
    -------
    Cells
        The areas add up to that of a period.

    Raises
    ------
    ArithmeticError
        If the geometry is degenerate.

    Notes
    -----
    Lifted to :math:`z = |s|^2 - w`, the seeds' convex hull seen from below is the dual of the diagram [1]_.

    References
    ----------
    .. [1] F. Aurenhammer, "Power diagrams: properties, algorithms and applications", SIAM J. Comput. 16 (1987) 78,
       doi:10.1137/0216006.

    Examples
    --------
    >>> cells = power_cells(np.array([[2.0, 4], [6, 4]]), np.array([4.0, 0]), np.diag([8.0, 8]))
    >>> cells.areas.round(9).tolist()
    [40.0, 24.0]
    """
    period = abs(np.linalg.det(periods))
    margin = 3 * math.sqrt(period / len(seeds))
    for _ in range(8):
        cells = _cells_within(seeds, weights, periods, margin)
        if cells is not None and abs(cells.areas.sum() - period) < 1e-9 * period:  # more, if images are missing
            return cells
        margin *= 1.5
    raise ArithmeticError("the power diagram does not close: do seeds coincide?")


def _cells_within(seeds: np.ndarray, weights: np.ndarray, periods: np.ndarray, margin: float) -> Cells | None:
    """Power cells among the seeds and their images no further from the period than `margin`; None if some are open."""
    count = len(seeds)
    sites, origin = _with_images(seeds, periods, margin)
    weight = weights[origin]
    hull = ConvexHull(np.column_stack([sites, (sites**2).sum(axis=1) - weight]))
    below = hull.equations[:, 2] < -1e-12
    if hull.simplices[~below].min() < count:
        return None
    corners = -0.5 * hull.equations[:, :2] / np.where(below, hull.equations[:, 2], 1)[:, None]
    # A facet of the hull is a corner of cells. Two facets that share a side are the ends of an edge between two cells.
    facet, side = np.nonzero(below[:, None] & below[hull.neighbors] & (hull.neighbors > np.arange(len(below))[:, None]))
    ends = np.stack([corners[facet], corners[hull.neighbors[facet, side]]], axis=1)
    one, other = hull.simplices[facet, side - 2], hull.simplices[facet, side - 1]
    one, other, ends = np.append(one, other), np.append(other, one), np.concatenate([ends, ends])
    inside = one < count
    one, other, ends = one[inside], other[inside], ends[inside]
    lengths = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)
    distances = np.linalg.norm(sites[other] - sites[one], axis=1)
    # A cell is the sum of the triangles of its edges with its seed, which are negative where the seed is beyond the edge.
    triangles = lengths * (distances + (weight[one] - weight[other]) / distances) / 4
    areas = np.bincount(one, triangles, count)
    middles = (ends.sum(axis=1) - 2 * seeds[one]) / 3
    moments = np.stack([np.bincount(one, triangles * middle, count) for middle in middles.T], axis=1)
    centroids = seeds + moments / np.where(areas > 0, areas, 1)[:, None]
    return Cells(seeds, weights, areas, centroids, one, origin[other], ends, lengths, distances)


def _with_images(seeds: np.ndarray, periods: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """The seeds and after them their periodic images within the margin, (m, 2); the index of the seed of each, (m,)."""
    to_fractions = np.linalg.inv(periods)
    reach = margin * np.linalg.norm(to_fractions, axis=0)
    down, right = (np.arange(-math.ceil(most), math.ceil(most) + 1) for most in reach)
    shifts = np.array([(i, j) for i in down for j in right if i or j])
    images = (seeds @ to_fractions) + shifts[:, None]
    shift, origin = np.nonzero(((images > -reach) & (images < 1 + reach)).all(axis=2))
    return np.concatenate([seeds, images[shift, origin] @ periods]), np.append(np.arange(len(seeds)), origin)


def _paint(cells: Cells, stretch: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Ids 1..n of the cells that the pixels' centres lie in, `shape`, int32."""
    to_pixels = np.linalg.inv(stretch)
    ends = cells.ends @ to_pixels
    low, high = np.full_like(cells.seeds, np.inf), np.full_like(cells.seeds, -np.inf)
    np.minimum.at(low, cells.owner, ends.min(axis=1))
    np.maximum.at(high, cells.owner, ends.max(axis=1))
    labels = np.zeros(shape, np.int32)
    first, last = np.floor(low - 0.5).astype(np.int64), np.ceil(high - 0.5).astype(np.int64)
    nearest = np.full(shape, np.inf, np.float32)
    counts = _paint_boxes(cells.seeds @ to_pixels, cells.weights, stretch, first, last, labels, nearest)
    pixelless = np.flatnonzero(counts == 0)
    rows, columns = (np.floor(cells.centroids[pixelless] @ to_pixels).astype(np.int64) % shape).T
    labels[rows, columns] = pixelless + 1
    return labels


@numba.njit(cache=True, nogil=True)
def _paint_boxes(seeds: np.ndarray, weights: np.ndarray, stretch: np.ndarray, first: np.ndarray, last: np.ndarray,
                 labels: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Give each pixel of every cell's bounding box to the cell if it is nearer than those before; returns pixels per cell."""
    height, width = labels.shape
    counts = np.zeros(len(seeds) + 1, np.int64)
    for cell in range(len(seeds)):
        for row in range(first[cell, 0], last[cell, 0] + 1):
            r = row % height
            c = first[cell, 1] % width
            y = row + 0.5 - seeds[cell, 0]
            for column in range(first[cell, 1], last[cell, 1] + 1):
                x = column + 0.5 - seeds[cell, 1]
                down, right = y * stretch[0, 0] + x * stretch[1, 0], y * stretch[0, 1] + x * stretch[1, 1]
                distance = np.float32(down * down + right * right - weights[cell])
                if distance < nearest[r, c]:
                    nearest[r, c] = distance
                    counts[labels[r, c]] -= 1
                    counts[cell + 1] += 1
                    labels[r, c] = cell + 1
                c = c + 1 if c + 1 < width else 0
    return counts[1:]


def _paint_volume(seeds: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Ids 1..n of the seeds nearest to the voxels' centres, `shape`, int32."""
    tree = cKDTree(seeds, boxsize=np.array(shape))
    layer = np.stack(np.meshgrid([0.5], *(np.arange(side) + 0.5 for side in shape[1:]), indexing="ij"), axis=-1)
    labels = np.empty(shape, np.int32)
    for depth in range(shape[0]):  # one at a time, to save memory
        labels[depth] = tree.query(layer[0] + (depth, 0, 0))[1] + 1
    return labels


@numba.njit(cache=True, nogil=True)
def _connect(labels: np.ndarray, grains: int) -> np.ndarray:
    """Leave each id its largest part, in place, (depth, height, width), periodic; crumbs go to cells beside them.

    A convex cell can come apart where it ends in a corner narrower than a pixel. Returns the sizes of the largest parts.
    """
    depth, height, width = labels.shape
    ids = labels.ravel()
    part = np.zeros(ids.size, np.int32)
    largest, largest_size = np.zeros(grains + 1, np.int32), np.zeros(grains + 1, np.int64)
    stack = np.empty(ids.size, np.int64)
    parts = 0
    for start in range(ids.size):
        if part[start]:
            continue
        parts += 1
        part[start] = parts
        stack[0], count, size = start, 1, 0
        while count:
            count -= 1
            size += 1
            for other in _neighbours(stack[count], depth, height, width):
                if not part[other] and ids[other] == ids[start]:
                    part[other] = parts
                    stack[count] = other
                    count += 1
        if size > largest_size[ids[start]]:
            largest[ids[start]], largest_size[ids[start]] = parts, size
    _absorb(ids, part, largest, depth, height, width)
    return largest_size[1:]


@numba.njit(cache=True, nogil=True)
def _absorb(ids: np.ndarray, part: np.ndarray, largest: np.ndarray, depth: int, height: int, width: int) -> None:
    """Give cells that are not of the largest part of their id to a neighbour that is."""
    crumbs = [pixel for pixel in range(ids.size) if part[pixel] != largest[ids[pixel]]]
    while len(crumbs):
        left = [crumbs[0] for _ in range(0)]
        for pixel in crumbs:
            for other in _neighbours(pixel, depth, height, width):
                if part[other] == largest[ids[other]]:
                    ids[pixel], part[pixel] = ids[other], part[other]
                    break
            else:
                left.append(pixel)
        crumbs = left


@numba.njit(cache=True, nogil=True)
def _neighbours(cell: int, depth: int, height: int, width: int) -> tuple[int, int, int, int, int, int]:
    """Flat indices of the six cells around one in the periodic volume; a layer one cell deep is its own neighbour."""
    row, column = divmod(cell, width)
    layer, row = divmod(row, height)
    here = layer * height
    return ((here + row) * width + (column + 1 if column + 1 < width else 0),
            (here + row) * width + (column - 1 if column else width - 1),
            (here + (row + 1 if row + 1 < height else 0)) * width + column,
            (here + (row - 1 if row else height - 1)) * width + column,
            ((layer + 1 if layer + 1 < depth else 0) * height + row) * width + column,
            ((layer - 1 if layer else depth - 1) * height + row) * width + column)
