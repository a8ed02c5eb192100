"""The starting structures, against brute force, known statistics and their own definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graincast.errors import UserError
from graincast.simulate.packing import scatter_discs
from graincast.simulate.tessellation import MOST_REGULAR, SMALLEST_MEAN_AREA, VORONOI_SPREADS, power_cells, tessellate


def make(shape: tuple[int, ...], grains: int, seed: int = 0, **options: Any) -> np.ndarray:
    return tessellate(shape, grains, np.random.default_rng(seed), **options)


def areas_of(labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels.ravel())[1:]


def variation(areas: np.ndarray) -> float:
    return float(areas.std() / areas.mean())


def periodic_parts(labels: np.ndarray) -> int:
    """Number of parts of all ids, connected through edges (faces) on the periodic field."""
    cells = np.arange(labels.size).reshape(labels.shape)
    links = [(cells[same], np.roll(cells, -1, axis)[same])
             for axis in range(labels.ndim) for same in [labels == np.roll(labels, -1, axis)]]
    one, other = np.concatenate(links, axis=1)
    return int(connected_components(coo_array((np.ones(one.size), (one, other)), (labels.size,) * 2), directed=False)[0])


def mean_tensor(labels: np.ndarray) -> np.ndarray:
    """(2, 2), mean over all cells of the second moments of (x, y), y upwards, each by the cell's area."""
    total = np.zeros((2, 2))
    for grain in range(1, labels.max() + 1):
        places = np.argwhere(labels == grain).astype(float)
        places -= places[0]
        places -= labels.shape * np.rint(places / labels.shape)
        total += np.cov(np.stack([places[:, 1], -places[:, 0]]), bias=True) / len(places)
    return total / labels.max()


@pytest.mark.parametrize("options", [
    {}, {"regularity": 0.5}, {"regularity": MOST_REGULAR}, {"area_spread": 0.0}, {"area_spread": 1.0, "regularity": 0.5},
    {"area_spread": 0.5, "elongation": 5.0, "elongation_deg": 70.0},
    {"area_spread": 0.3, "coarse_share": 0.4, "coarse_ratio": 12.0, "elongation": 2.0}])
@pytest.mark.parametrize(("shape", "grains"), [((160, 160), 40), ((96, 240), 90), ((90, 70), 60)])
def test_every_cell_is_there_in_one_piece(shape: tuple[int, int], grains: int, options: dict[str, float]) -> None:
    labels = make(shape, grains, **options)
    assert (labels.shape, labels.dtype) == (shape, np.int32)
    assert np.unique(labels).tolist() == list(range(1, grains + 1))
    assert periodic_parts(labels) == grains
    assert not (labels[0] == labels[shape[0] // 2]).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_cells_allowed_all_own_pixels(seed: int) -> None:
    grains = int(128 * 128 / SMALLEST_MEAN_AREA)
    assert periodic_parts(make((128, 128), grains, seed, area_spread=0.5)) == grains


@pytest.mark.parametrize("options", [{}, {"area_spread": 0.5}, {"area_spread": 0.5, "elongation": 3.0, "elongation_deg": 20.0}])
@pytest.mark.parametrize(("shape", "grains"), [((40, 40), 2), ((150, 36), 4), ((64, 32), 3)])
def test_cells_that_border_on_their_own_images(shape: tuple[int, int], grains: int, options: dict[str, float]) -> None:
    labels = make(shape, grains, 3, **options)
    assert periodic_parts(labels) == grains
    if options:
        assert variation(areas_of(labels)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("regularity", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5, 1.0])
def test_areas_scatter_as_asked(spread: float, regularity: float) -> None:
    areas = areas_of(make((400, 300), 60, area_spread=spread, regularity=regularity))
    assert variation(areas) == pytest.approx(spread, abs=0.005)


def test_areas_are_lognormal() -> None:
    logarithms = np.log(areas_of(make((1500, 1500), 1000, area_spread=0.5, regularity=0.5)))
    standard = (logarithms - logarithms.mean()) / logarithms.std()
    assert logarithms.std() == pytest.approx(np.sqrt(np.log(1.25)), rel=0.08)
    assert abs((standard**3).mean()) < 0.3
    assert (standard**4).mean() == pytest.approx(3, abs=0.6)


def test_equal_cells_are_equal_to_the_pixel() -> None:
    areas = areas_of(make((256, 256), 30, area_spread=0.0))
    assert np.abs(areas / areas.mean() - 1).max() < 0.01


# The table in the documentation of `tessellate`.
@pytest.mark.parametrize(("regularity", "spread"), VORONOI_SPREADS.items())
def test_areas_scatter_less_the_more_regular_the_seeds(regularity: float, spread: float) -> None:
    assert variation(areas_of(make((1000, 1000), 1000, 5, regularity=regularity))) == pytest.approx(spread, abs=0.03)


def test_poisson_voronoi_cells_have_the_known_statistics() -> None:
    """Exact by integration: variance of areas 0.2802, of the numbers of sides 1.7808 (Brakke 1986)."""
    seeds = scatter_discs((1000, 1000), np.zeros(20000), np.random.default_rng(1))
    assert seeds is not None
    cells = power_cells(seeds, np.zeros(20000), 1000 * np.eye(2))
    assert variation(cells.areas) == pytest.approx(np.sqrt(0.2802), rel=0.02)
    sides = np.bincount(cells.owner[cells.lengths > 1e-6])
    assert (sides.mean(), sides.var()) == pytest.approx((6, 1.7808), rel=0.04)


@pytest.mark.parametrize("periods", [np.diag([1.0, 1.0]), np.array([[1.2, 0.5], [-0.4, 0.9]])])
def test_power_cells_agree_with_brute_force(periods: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    seeds, weights = rng.random((15, 2)) @ periods, rng.uniform(0, 0.03, 15)
    fractions = (np.stack(np.meshgrid(np.arange(300), np.arange(300), indexing="ij"), axis=-1).reshape(-1, 2) + 0.5) / 300
    best, owner, away = np.full(90000, np.inf), np.zeros(90000, int), np.zeros((90000, 2))
    for shift in np.ndindex(5, 5):
        for cell, seed in enumerate(seeds + (np.array(shift) - 2) @ periods):
            apart = fractions @ periods - seed
            power = (apart**2).sum(axis=1) - weights[cell]
            nearer = power < best
            best[nearer], owner[nearer], away[nearer] = power[nearer], cell, apart[nearer]
    cells = power_cells(seeds, weights, periods)
    counts = np.bincount(owner, minlength=15)
    np.testing.assert_allclose(cells.areas, counts / 90000 * np.linalg.det(periods), atol=5e-4)
    for cell in np.flatnonzero(counts):
        np.testing.assert_allclose(cells.centroids[cell] - seeds[cell], away[owner == cell].mean(axis=0), atol=3e-3)
    assert (counts == 0).sum() == (cells.areas < 1e-4).sum()


@pytest.mark.parametrize("direction", [0.0, 90.0, 30.0, -45.0])
@pytest.mark.parametrize("options", [{"elongation": 2.0, "regularity": 0.5}, {"elongation": 3.0, "area_spread": 0.5}])
def test_cells_are_long_as_asked(options: dict[str, float], direction: float) -> None:
    values, vectors = np.linalg.eigh(mean_tensor(make((400, 400), 200, elongation_deg=direction, **options)))
    assert np.sqrt(values[1] / values[0]) == pytest.approx(options["elongation"], rel=0.12)
    turned = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])) - direction
    assert abs((turned + 90) % 180 - 90) < 5


def test_cells_are_equiaxed_otherwise() -> None:
    values = np.linalg.eigvalsh(mean_tensor(make((400, 400), 200, area_spread=0.5)))
    assert np.sqrt(values[1] / values[0]) < 1.08


def test_coarse_and_fine_grains() -> None:
    areas = areas_of(make((512, 512), 112, area_spread=0.3, coarse_share=0.4, coarse_ratio=10.0, regularity=0.5))
    coarse = 7  # 0.4 / (0.4 + 0.6 * 10) of 112 grains
    assert areas[:coarse].sum() / areas.sum() == pytest.approx(0.4, abs=0.002)
    assert areas[:coarse].mean() / areas[coarse:].mean() == pytest.approx(10, rel=0.07)
    assert [variation(areas[:coarse]), variation(areas[coarse:])] == pytest.approx([0.3, 0.3], abs=0.01)


@pytest.mark.parametrize(("regularity", "spread"), [(0.0, 0.42), (0.5, 0.29), (0.8, 0.15)])
def test_volumes(regularity: float, spread: float) -> None:
    labels = make((48, 56, 64), 300, regularity=regularity)
    assert (labels.shape, labels.dtype) == ((48, 56, 64), np.int32)
    assert periodic_parts(labels) == 300
    assert variation(areas_of(labels)) == pytest.approx(spread, abs=0.05)


def test_the_seed_decides() -> None:
    options = {"area_spread": 0.5, "regularity": 0.8}
    assert (make((96, 96), 20, 1, **options) == make((96, 96), 20, 1, **options)).all()
    assert (make((96, 96), 20, 1, **options) != make((96, 96), 20, 2, **options)).any()


@pytest.mark.parametrize(("shape", "grains", "options", "message"), [
    ((0, 64), 8, {}, r"simulate\.size.*positive"),
    ((64,), 8, {}, r"simulate\.size.*positive"),
    ((64, 64), 1, {}, r"simulate\.grains.*at least 2"),
    ((32, 32), 35, {}, r"simulate\.grains.*at most 34"),
    ((16, 16, 16), 25, {}, r"simulate\.grains.*at most 24"),
    ((64, 64), 8, {"regularity": 0.95}, r"simulate\.regularity.*0\.9"),
    ((64, 64), 8, {"regularity": float("nan")}, r"simulate\.regularity"),
    ((64, 64), 2, {"regularity": 0.8}, r"simulate\.regularity.*at most 0\.65 fits"),
    ((64, 64), 8, {"area_spread": -0.1}, r"simulate\.area_spread.*0 to 1"),
    ((64, 64), 8, {"area_spread": 1.1}, r"simulate\.area_spread.*0 to 1"),
    ((64, 64), 2, {"area_spread": 1.0}, r"simulate\.area_spread.*2 grains"),
    ((64, 64), 8, {"coarse_share": 1.0, "area_spread": 0.5}, r"simulate\.coarse_share"),
    ((64, 64), 8, {"coarse_share": 0.5}, r"simulate\.coarse_share.*area_spread"),
    ((64, 64), 8, {"coarse_share": 0.01, "area_spread": 0.5}, r"simulate\.coarse_share.*at least one"),
    ((64, 64), 120, {"coarse_share": 0.6, "area_spread": 0.5}, r"simulate\.coarse_share.*at least 30 px"),
    ((64, 64), 8, {"coarse_ratio": 1.0}, r"simulate\.coarse_ratio"),
    ((64, 64), 8, {"elongation": 0.5}, r"simulate\.elongation"),
    ((64, 64), 8, {"elongation": 6.0}, r"simulate\.elongation.*5"),
    ((64, 64), 8, {"elongation_deg": float("inf")}, r"simulate\.elongation_deg"),
    ((32, 32, 32), 8, {"area_spread": 0.5}, r"simulate\.area_spread.*volumes"),
    ((32, 32, 32), 8, {"elongation": 2.0}, r"simulate\.elongation.*volumes"),
])
def test_what_cannot_be_made_is_refused(shape: tuple[int, ...], grains: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(shape, grains, **options)
