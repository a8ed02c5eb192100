"""Periodic Voronoi cells of a chosen regularity: the start of every grain structure."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.spatial import Voronoi, cKDTree

from graincast.errors import UserError

SMALLEST_MEAN_AREA = 30.0
"""Mean grain area, px, below which the diffuse boundaries of the phase field would fill the grains."""

MOST_SWEEPS = 60
"""Regularisation sweeps after which the cells count as being as equal as Lloyd's iteration makes them."""


def regularised_voronoi(shape: tuple[int, int], grains: int, area_spread: float,
                        rng: np.random.Generator) -> np.ndarray:
    """Fill a periodic field with Voronoi cells whose areas scatter as asked.

    Seeds start at random (Poisson-Voronoi, coefficient of variation about 0.53). Lloyd's iteration [1]_ moves
    each seed towards the centroid of its cell, which evens the areas out; a move away from the centroid makes
    them more unequal. The last move is cut short where the coefficient of variation meets `area_spread`.

    Parameters
    ----------
    shape : tuple of int
        Height and width of the field, px.
    grains : int
        Number of cells, at least 2.
    area_spread : float
        Coefficient of variation of the cell areas, 0 to 1. Lloyd's iteration levels out near 0.05 to 0.1; a
        smaller value gives the most equal cells it finds.
    rng : numpy.random.Generator
        Source of the seeds.

    Returns
    -------
    numpy.ndarray
        Cell ids 1..grains, `shape`, int32; periodic in both directions. Far above a spread of 0.6 a cell can
        be too small to own a pixel.

    Raises
    ------
    UserError
        If the cells would be too small for the phase field to resolve.

    References
    ----------
    .. [1] S. P. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982) 129,
       doi:10.1109/TIT.1982.1056489.
    .. [2] H. X. Zhu, S. M. Thorpe, A. H. Windle, "The geometrical properties of irregular two-dimensional
       Voronoi
       tessellations", Phil. Mag. A 81 (2001) 2765, doi:10.1080/01418610010032364.

    Examples
    --------
    >>> cells = regularised_voronoi((64, 96), 20, 0.2, np.random.default_rng(0))
    >>> areas = np.bincount(cells.ravel())[1:]
    >>> len(areas), round(float(areas.std() / areas.mean()), 1)
    (20, 0.2)
    """
    height, width = shape
    if height * width < SMALLEST_MEAN_AREA * grains:
        most = int(height * width / SMALLEST_MEAN_AREA)
        raise UserError(f"simulate.grains: {grains} grains are too many for {height} x {width} px, "
                        f"at most {most} can be resolved ({SMALLEST_MEAN_AREA:g} px each)")
    box = np.array([height, width], dtype=float)
    seeds = _steer(rng.random((grains, 2)) * box, box, area_spread)
    # A tree over the periodic box gives each pixel centre its nearest seed.
    centres = np.stack(np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij"), axis=-1)
    nearest = cKDTree(seeds, boxsize=box).query(centres.reshape(-1, 2))[1]
    return (nearest + 1).astype(np.int32).reshape(shape)


def _steer(seeds: np.ndarray, box: np.ndarray, area_spread: float) -> np.ndarray:
    """Move the seeds until their cells' areas scatter by `area_spread`."""
    areas, centroids = _cells(seeds, box)
    towards = 1.0 if _variation(areas) > area_spread else -0.25
    for _ in range(MOST_SWEEPS):
        move = towards * (centroids - seeds)
        areas, centroids = _cells((seeds + move) % box, box)
        if (_variation(areas) - area_spread) * towards <= 0:
            return (seeds + _fraction(seeds, move, box, area_spread) * move) % box
        seeds = (seeds + move) % box
    return seeds


def _fraction(seeds: np.ndarray, move: np.ndarray, box: np.ndarray, area_spread: float) -> float:
    """Fraction of the move after which the areas scatter by `area_spread`, which they cross on its way."""

    def excess(fraction: float) -> float:
        return _variation(_cells((seeds + fraction * move) % box, box)[0]) - area_spread

    return float(brentq(excess, 0.0, 1.0, xtol=1e-3))


def _variation(areas: np.ndarray) -> float:
    return float(areas.std() / areas.mean())


def _cells(seeds: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas (n,) and centroids (n, 2) of the periodic Voronoi cells of the seeds (n, 2)."""
    shifts = np.array([(i, j) for i in (0, 1, -1) for j in (0, 1, -1)])  # the box first, then its images
    diagram = Voronoi((seeds + shifts[:, None] * box).reshape(-1, 2))
    # Every ridge spans one triangle with the seed on either side; a cell is the sum of its triangles.
    owner = diagram.ridge_points.ravel()
    ridges = np.repeat(np.array(diagram.ridge_vertices), 2, axis=0)
    inside = owner < len(seeds)
    owner, ridges = owner[inside], ridges[inside]
    first, second = (diagram.vertices[ridges[:, k]] - seeds[owner] for k in (0, 1))
    triangles = 0.5 * np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0])
    areas = np.bincount(owner, triangles, len(seeds))
    moments = [np.bincount(owner, triangles * (first + second)[:, k] / 3, len(seeds)) for k in (0, 1)]
    return areas, seeds + np.stack(moments, axis=1) / areas[:, None]
