"""Pores and particles, and the packing of discs that they and the grains' seeds share."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from graincast.errors import UserError
from graincast.simulate.obstacles import DIAMETER_SPREAD, scatter_obstacles
from graincast.simulate.packing import filled, largest_radius, scatter_discs


def scatter(shape: tuple[int, ...], fraction: float, diameter: float, seed: int = 0) -> np.ndarray:
    return scatter_obstacles(shape, fraction, diameter, np.random.default_rng(seed))


def overlap(centres: np.ndarray, radii: np.ndarray, shape: tuple[int, ...], stretch: np.ndarray) -> float:
    """Deepest overlap of any two discs, images among them, by trying all pairs."""
    deepest = -np.inf
    for shift in np.ndindex(*(3 for _ in shape)):
        apart = centres[:, None] - centres + (np.array(shift) - 1) * shape
        depth = radii[:, None] + radii - np.linalg.norm(apart @ stretch, axis=2)
        depth[np.eye(len(radii), dtype=bool)] = -np.inf
        deepest = max(deepest, float(depth.max()))
    return deepest


@pytest.mark.parametrize("share", [0.3, 0.73])
@pytest.mark.parametrize(("shape", "stretch"), [((80, 120), np.eye(2)), ((100, 100), np.array([[1.4, 0.5], [0.5, 0.9]])), ((30, 40, 50), np.eye(3))])
def test_discs_do_not_overlap(shape: tuple[int, ...], stretch: np.ndarray, share: float) -> None:
    share *= np.linalg.det(stretch) if len(shape) == 2 else 0.7
    sizes = np.sort(np.random.default_rng(1).uniform(0.5, 1, 60))[::-1]
    radii = sizes * (share / filled(shape, sizes)) ** (1 / len(shape))
    centres = scatter_discs(shape, radii, np.random.default_rng(2), stretch)
    assert centres is not None
    assert ((centres >= 0) & (centres < shape)).all()
    assert overlap(centres, radii, shape, stretch) <= 1e-9


def test_discs_that_cannot_be_packed_find_no_place() -> None:
    shape = (64, 64)
    radii = np.full(20, 8.0)
    assert radii[0] < largest_radius(shape)
    assert filled(shape, radii) > 0.95
    assert scatter_discs(shape, radii, np.random.default_rng(0)) is None


@pytest.mark.parametrize(("shape", "fraction", "diameter"), [
    ((256, 256), 0.05, 10), ((200, 300), 0.3, 8), ((128, 128), 0.02, 3), ((256, 256), 0.45, 20), ((48, 64, 64), 0.1, 8)])
def test_obstacles_fill_the_fraction(shape: tuple[int, ...], fraction: float, diameter: float) -> None:
    field = scatter(shape, fraction, diameter)
    assert (field.shape, field.dtype) == (shape, np.float32)
    assert (field.min(), field.max()) == (0, 1)
    assert field.mean() == pytest.approx(fraction, rel=0.005)
    assert (scatter(shape, fraction, diameter) == field).all()
    assert (scatter(shape, fraction, diameter, seed=1) != field).any()


def test_obstacles_are_separate_round_and_of_the_diameter() -> None:
    field = np.pad(scatter((600, 600), 0.2, 14), 40, mode="wrap")  # so that each is whole once at least
    parts, count = ndimage.label(field > 0)
    areas = ndimage.sum_labels(field, parts, np.arange(1, count + 1))
    boxes = ndimage.find_objects(parts)
    whole = [k for k, (rows, columns) in enumerate(boxes) if min(rows.start, columns.start) > 0 and max(rows.stop, columns.stop) < 680]
    diameters = np.sqrt(areas[whole] * 4 / np.pi)
    assert diameters.mean() == pytest.approx(14, rel=0.05)
    assert diameters.std() / diameters.mean() == pytest.approx(DIAMETER_SPREAD, rel=0.15)
    sides = np.array([[side.stop - side.start for side in boxes[k]] for k in whole])
    assert (np.abs(sides - diameters[:, None] - 1) <= 1.1).all()
    assert 0.03 < ((field > 0) & (field < 1)).mean() / field.mean() < 0.35  # edges about 1 px wide


def test_no_obstacles() -> None:
    assert not scatter((64, 64), 0, 8).any()


@pytest.mark.parametrize(("shape", "fraction", "diameter", "message"), [
    ((0, 64), 0.1, 8, r"simulate\.size"),
    ((64, 64), -0.1, 8, r"obstacles.fraction.*0 to 0\.38"),
    ((64, 64), 0.4, 8, r"obstacles.fraction.*0 to 0\.38"),
    ((64, 64), 0.001, 8, r"obstacles.fraction.*less than one"),
    ((64, 64), 0.1, 2, r"obstacles.diameter.*3 px"),
    ((64, 64), 0.1, 20, r"obstacles.diameter.*12\.8 px"),
    ((64, 64), 0.1, float("nan"), r"obstacles.diameter"),
])
def test_what_cannot_be_placed_is_refused(shape: tuple[int, ...], fraction: float, diameter: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scatter(shape, fraction, diameter)
