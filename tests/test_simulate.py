"""The grain simulator, against independent solvers and laws of grain growth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from graincast.config import Simulate
from graincast.errors import UserError
from graincast.labels import boundary_mask
from graincast.simulate import library
from graincast.simulate.library import (
    mean_grain_diameter,
    separate,
    simulate_library,
    simulate_structure,
)
from graincast.simulate.free_energy import ISOTROPIC, time_step_bound
from graincast.simulate.phase_field import GrainGrowth, evolve
from graincast.simulate.tessellation import regularised_voronoi
from graincast.store.imageset import PARTIAL

TIME_STEP_BOUND = time_step_bound(ISOTROPIC.kernel)

SMALL = Simulate(size=96, grains=14, steps=150, translator_structures=2, synthetic_structures=2,
                 validation_structures=2)


def periodic_parts(mask: np.ndarray) -> int:
    """Number of 4-connected parts of a mask on the periodic field."""
    parts, count = ndimage.label(mask)
    joined = list(range(count + 1))

    def root(part: int) -> int:
        while joined[part] != part:
            part = joined[part]
        return part

    for one, other in ((parts[0], parts[-1]), (parts[:, 0], parts[:, -1])):
        for a, b in zip(one, other, strict=True):
            if a and b:
                joined[root(a)] = root(b)
    return len({root(part) for part in range(1, count + 1)})


class Dense:
    """Every order parameter on every cell, NumPy float64: the same equations with none of the tricks."""

    def __init__(self, labels: np.ndarray, time_step: float) -> None:
        self.eta = (labels == np.arange(1, labels.max() + 1)[:, None, None]).astype(float)
        self.time_step = time_step

    def laplacian(self) -> np.ndarray:
        stencil = np.array([[1, 4, 1], [4, -20, 4], [1, 4, 1]]) / 6
        return ndimage.convolve(self.eta, stencil[None], mode="wrap")

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            phi = (self.eta**2).sum(0)
            self.eta += self.time_step * (self.eta * (1 + self.eta**2 - 2 * phi) + self.laplacian())

    def energy(self) -> float:
        square = self.eta**2
        pairs = (square.sum(0) ** 2 - (square**2).sum(0)) / 2
        bulk = (-square / 2 + square**2 / 4).sum(0) + pairs + 0.25
        return float(bulk.sum() - (self.eta * self.laplacian()).sum() / 2)


@pytest.mark.parametrize(("shape", "grains", "time_step", "steps"), [
    ((96, 96), 12, 0.1, 37),
    ((96, 96), 12, 0.1, 1000),
    ((64, 112), 9, TIME_STEP_BOUND, 400),
    ((40, 40), 2, 0.1, 300),  # windows as large as the field
    ((150, 36), 4, 0.1, 300),  # as wide as the field, not as high
])
def test_agrees_with_the_dense_solver(shape: tuple[int, int], grains: int, time_step: float,
                                      steps: int) -> None:
    start = regularised_voronoi(shape, grains, 0.35, np.random.default_rng(5))
    dense = Dense(start, time_step)
    dense.advance(steps)
    growth = GrainGrowth(start, time_step)
    growth.advance(steps)
    assert np.abs(growth.picture() - (dense.eta**2).sum(0)).max() <= 1e-3
    assert (growth.labels() == dense.eta.argmax(0) + 1).mean() >= 0.999
    assert growth.energy() == pytest.approx(dense.energy(), rel=1e-3)


def test_interiors_and_far_field_are_skipped_without_harm() -> None:
    """One large grain beside small ones, so that long settled stretches occur."""
    start = np.ones((160, 160), np.int32)
    start[60:100, 20:60], start[60:90, 60:90], start[100:130, 30:60] = 2, 3, 4
    dense = Dense(start, 0.15)
    dense.advance(300)
    phi, labels = evolve(start, 300, 0.15)
    assert np.abs(phi - (dense.eta**2).sum(0)).max() <= 1e-3
    assert (labels == dense.eta.argmax(0) + 1).mean() >= 0.999


def test_the_field_has_no_preferred_origin() -> None:
    start = regularised_voronoi((80, 96), 8, 0.35, np.random.default_rng(3))
    phi, labels = evolve(start, 200, 0.1)
    rolled_phi, rolled_labels = evolve(np.roll(start, (31, 57), (0, 1)), 200, 0.1)
    np.testing.assert_allclose(np.roll(phi, (31, 57), (0, 1)), rolled_phi, atol=1e-3)
    assert (np.roll(labels, (31, 57), (0, 1)) == rolled_labels).mean() > 0.999


@pytest.mark.parametrize("radius", [25, 50])
def test_a_circle_shrinks_at_a_constant_rate(radius: int) -> None:
    y, x = np.mgrid[:128, :128] - 63.3
    growth = GrainGrowth(np.where(x**2 + y**2 < radius**2, 1, 2), 0.15)
    growth.advance(100)
    areas = []
    for _ in range(6):
        areas.append((growth.picture(np.array([1.0, 0.0])) / growth.picture()).sum())
        growth.advance(200)
    rates = -np.diff(areas) / (200 * 0.15)
    assert rates == pytest.approx(rates.mean(), rel=0.01)
    assert rates.mean() == pytest.approx(2 * np.pi, rel=0.06)
    inside = growth.labels() == 1
    diameters = [np.ptp(values[inside]) + 1 for values in (x, y, (x + y) / np.sqrt(2), (x - y) / np.sqrt(2))]
    assert np.ptp(diameters) <= 1.5


def test_a_small_grain_vanishes_and_the_rest_keep_their_ids() -> None:
    y, x = np.mgrid[:64, :64] - 32
    start = np.where(x**2 + y**2 < 25, 2, np.where(x < 0, 1, 3))
    phi, labels = evolve(start, 600, 0.1)
    assert set(np.unique(labels)) == {1, 3}
    assert phi.max() <= 1 + 1e-5


@pytest.mark.parametrize("time_step", [0.1, TIME_STEP_BOUND])
def test_energy_never_rises(time_step: float) -> None:
    growth = GrainGrowth(regularised_voronoi((96, 96), 14, 0.4, np.random.default_rng(8)), time_step)
    energies = []
    for _ in range(120):
        energies.append(growth.energy())
        growth.advance(4)
    assert (np.diff(energies) <= 1e-6 * energies[0]).all()
    assert energies[-1] < 0.9 * energies[0]


@pytest.mark.parametrize("time_step", [0.0, -0.1, 0.19, 0.3])
def test_an_unstable_time_step_is_refused_naming_the_bound(time_step: float) -> None:
    with pytest.raises(UserError, match=r"time_step.*0\.1875"):
        evolve(np.ones((32, 32), np.int32), 1, time_step)


@pytest.mark.parametrize("index", range(3))
def test_labels_are_closed_and_connected(index: int) -> None:
    picture, labels = simulate_structure(SMALL, index)
    assert (picture.dtype, labels.dtype) == (np.uint8, np.int32)
    assert picture.shape == labels.shape == (96, 96)
    ids = np.unique(labels)
    assert ids.tolist() == list(range(labels.max() + 1))
    assert all(ndimage.label(labels == one)[1] == 1 for one in ids[1:])
    for here, there in ((labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:])):
        assert not ((here != there) & (here > 0) & (there > 0)).any()
    boundary = boundary_mask(labels)
    assert 0.05 < boundary.mean() < 0.5
    assert picture[boundary].mean() < picture[~boundary].mean() - 20
    assert 0.65 < picture[~boundary].mean() / 255 < 0.85


def test_dense_grains_stay_in_one_piece() -> None:
    start = regularised_voronoi((128, 128), 20, 0.35, np.random.default_rng(4))
    labels = evolve(start, 1000, 0.1).labels
    assert all(periodic_parts(labels == grain) == 1 for grain in np.unique(labels))


def test_separate_splits_parts_parts_touching_grains_and_drops_crumbs() -> None:
    labels = np.zeros((12, 20), int)
    labels[1:11, 1:8] = 1
    labels[1:11, 8:14] = 2  # touches 1
    labels[1:11, 15:19] = 1  # a second part of 1
    labels[0, 0] = 3  # a crumb
    untouched = labels.copy()
    result = separate(labels)
    assert (labels == untouched).all()
    assert np.unique(result).tolist() == [0, 1, 2, 3]
    assert result[5, 3] != result[5, 17]
    assert (result[1:11, 7] == 0).all()
    assert result[0, 0] == 0


def test_same_seed_same_bytes_and_other_index_other_structure() -> None:
    picture, labels = simulate_structure(SMALL, 0)
    again, labels_again = simulate_structure(SMALL, 0)
    assert (picture == again).all()
    assert (labels == labels_again).all()
    assert (simulate_structure(SMALL, 1)[0] != picture).any()
    assert (simulate_structure(SMALL.model_copy(update={"seed": 1}), 0)[0] != picture).any()


def test_library(tmp_path: Path) -> None:
    sets = simulate_library(SMALL, tmp_path / "morphologies")
    sizes = {name: len(one) for name, one in sets.items()}
    assert sizes == {"translator": 2, "synthetic": 2, "validation": 2}
    structures = [index for one in sets.values() for index in one.rows["structure"]]
    assert structures == list(range(6))
    assert len({row for one in sets.values() for row in one.rows["checksum"]}) == 6
    for one in sets.values():
        one.verify()
        assert (one.kind, one.info["config"]["grains"]) == ("morphologies", 14)
        for k, row in one.rows.iterrows():
            assert row["grains"] == one.labels(k).max()
            assert (one.image(k) == simulate_structure(SMALL, row["structure"])[0]).all()
        assert 0.6 < mean_grain_diameter(one) / np.sqrt(4 / np.pi * 96**2 / 14) < 1.1


def test_the_number_of_threads_does_not_show(tmp_path: Path) -> None:
    script = ("import os, sys; os.cpu_count = lambda: int(sys.argv[2])\n"
              "from graincast.config import Simulate\n"
              "from graincast.simulate.library import simulate_library\n"
              f"config = Simulate(**{SMALL.model_dump()!r})\n"
              "print(*(one.digest for one in simulate_library(config, sys.argv[1]).values()))")
    digests = [subprocess.run([sys.executable, "-c", script, str(tmp_path / threads), threads], check=True,
                              text=True, capture_output=True).stdout for threads in ("1", "2")]
    assert len(digests[0].split()) == 3
    assert digests[0] == digests[1]


def test_a_failure_leaves_the_old_library_and_nothing_half_written(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "morphologies"
    before = {name: one.digest for name, one in simulate_library(SMALL, out).items()}
    grow = library.simulate_structure

    def fail_at_the_fourth(config: Simulate, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == 3:
            raise OSError("no space left on device")
        return grow(config, index)

    monkeypatch.setattr(library, "simulate_structure", fail_at_the_fourth)
    with pytest.raises(OSError, match="no space"):
        simulate_library(SMALL.model_copy(update={"seed": 9}), out)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["morphologies"]
    assert not list(tmp_path.rglob(f"{PARTIAL}*"))
    assert {name: one.digest for name, one in simulate_library(SMALL, out).items()} == before
