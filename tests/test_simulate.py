"""Labelled grain structures and libraries of them. The solver: test_grain_growth.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from graincast.config import Simulate
from graincast.errors import UserError
from graincast.labels import boundary_mask
from graincast.simulate import library, structure
from graincast.simulate.library import mean_grain_diameter, simulate_library, simulate_sequences, simulate_set
from graincast.simulate.structure import separate, simulate_structure
from graincast.store.imageset import PARTIAL

SMALL = Simulate(size=96, grains=14, steps=150, translator_structures=2, synthetic_structures=2,
                 validation_structures=2)


def vary(config: Simulate, **options: Any) -> Simulate:
    """The configuration with other settings, checked."""
    return Simulate(**{**config.model_dump(), **options})


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


@pytest.mark.slow
def test_the_processor_does_not_show(tmp_path: Path) -> None:
    """The solver compiled for any processor of the family computes the same bytes as for this one."""
    start = structure.draw_start(SMALL, 0)
    np.save(tmp_path / "start.npy", start.labels)
    script = ("import sys, numpy as np\n"
              "from graincast.simulate.phase_field import GrainGrowth\n"
              "growth = GrainGrowth(np.load(sys.argv[1]), 0.1)\n"
              "growth.advance(150)\n"
              "np.save(sys.argv[2], growth.picture())")
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", script, tmp_path / "start.npy", tmp_path / "phi.npy"], check=True, env=environment)
    growth = structure.grow(SMALL, start)
    growth.advance(150)
    assert (np.load(tmp_path / "phi.npy") == growth.picture()).all()


def test_a_failure_leaves_the_old_library_and_nothing_half_written(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "morphologies"
    before = {name: one.digest for name, one in simulate_library(SMALL, out).items()}
    grow = structure.simulate

    def fail_at_the_fourth(config: Simulate, number: int, threads: int) -> list[tuple[np.ndarray, np.ndarray]]:
        if number == 3:
            raise OSError("no space left on device")
        return grow(config, number, threads)

    monkeypatch.setattr(structure, "simulate", fail_at_the_fourth)
    with pytest.raises(OSError, match="no space"):
        simulate_library(SMALL.model_copy(update={"seed": 9}), out)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["morphologies"]
    assert not list(tmp_path.rglob(f"{PARTIAL}*"))
    assert {name: one.digest for name, one in simulate_library(SMALL, out).items()} == before


VARIETY: dict[str, dict[str, Any]] = {
    "plain": {}, "voronoi": {"area_spread": None, "regularity": 0.8}, "bimodal": {"coarse_share": 0.4, "area_spread": 0.3},
    "elongated": {"elongation": 2.0, "elongation_deg": 30}, "anisotropic": {"boundary_anisotropy": 2.0, "boundary_anisotropy_deg": 60},
    "pores": {"pores": {"fraction": 0.06, "diameter": 0.25}}, "particles": {"particles": {"fraction": 0.06, "diameter": 0.25}},
}


@pytest.mark.parametrize("options", VARIETY.values(), ids=VARIETY)
def test_every_variety_is_labelled_and_reproducible(options: dict[str, Any]) -> None:
    config = vary(SMALL, **options)
    picture, labels = simulate_structure(config, 0, threads=1)
    assert 8 < labels.max() < 40
    assert all(ndimage.label(labels == one)[1] == 1 for one in range(1, labels.max() + 1))
    for here, there in ((labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:])):
        assert not ((here != there) & (here > 0) & (there > 0)).any()
    again, labels_again = simulate_structure(config, 0, threads=2)
    assert (picture == again).all()
    assert (labels == labels_again).all()
    if options:
        assert (picture != simulate_structure(SMALL, 0)[0]).any()


@pytest.mark.parametrize(("kind", "dark"), [("pores", True), ("particles", False)])
def test_obstacles_are_no_grains_and_have_their_grey(kind: str, dark: bool) -> None:
    config = vary(SMALL, **{kind: {"fraction": 0.08, "diameter": 0.3}})
    start = structure.draw_start(config, 0)
    inside = getattr(start, kind) > 0.99
    picture, labels = simulate_structure(config, 0)
    assert inside.mean() > 0.04
    assert (labels[inside] == 0).all()
    assert (picture[inside] < 20).all() if dark else (picture[inside] > 235).all()


def test_a_volume_gives_slices_about_a_grain_apart() -> None:
    config = vary(SMALL, size=48, depth=40, grains=26, area_spread=None, steps=60)
    each = structure.slices(config)
    assert each == 2  # grains are 21 px across
    grown = structure.simulate(config, 0)
    assert len(grown) == each
    growth = structure.grow(config, structure.draw_start(config, 0))
    growth.advance(config.steps)
    for k, (picture, labels) in enumerate(grown):
        assert picture.shape == labels.shape == (48, 48)
        own = growth.labels()[40 * k // each]
        assert len(np.unique(own[labels > 0])) <= labels.max()
        assert all(len(np.unique(own[labels == one])) == 1 for one in range(1, labels.max() + 1))


def test_no_volume_serves_two_purposes(tmp_path: Path) -> None:
    config = vary(SMALL, size=32, depth=64, grains=24, area_spread=None, regularity=0.3, steps=20, translator_structures=3)
    each = structure.slices(config)
    assert each > 1
    volumes = [{index // each for index in one.rows["structure"]} for one in simulate_library(config, tmp_path / "sets").values()]
    assert sum(map(len, volumes)) == len(set.union(*volumes))


@pytest.mark.parametrize("steps", [100, 1500])
def test_a_wanted_diameter_is_reached(steps: int) -> None:
    config = vary(SMALL, size=256, pixel_size_um=0.1, grain_diameter_um=2.4, steps=steps)
    diameters = []
    for number in range(4):
        growth = structure.grow(config, structure.draw_start(config, number))
        growth.advance(steps)
        diameters.append(0.1 * np.sqrt(4 / np.pi * 256**2 / len(np.unique(growth.labels()))))
    assert np.mean(diameters) == pytest.approx(2.4, rel=0.04)


def test_pixel_size_comes_out(tmp_path: Path) -> None:
    one = simulate_set(vary(SMALL, pixel_size_um=0.2), 2, tmp_path / "set")
    assert one.rows["pixel_size_um"].tolist() == [0.2, 0.2]
    assert one.rows["mean_diameter_um"].tolist() == pytest.approx(0.2 * one.rows["mean_diameter_px"])
    assert one.image(1).tolist() == simulate_structure(SMALL, 1)[0].tolist()


def test_sequences_keep_ids_and_grow(tmp_path: Path) -> None:
    config = vary(SMALL, grains=60, pixel_size_um=0.5)
    frames = simulate_sequences(config, 2, [0, 50, 400], tmp_path / "frames")
    assert frames.kind == "sequences"
    assert frames.rows["step"].tolist() == [0, 50, 400] * 2
    assert frames.rows["time"].tolist() == pytest.approx([0, 5, 40] * 2)
    for first in (0, 3):
        ids = [set(np.unique(frames.labels(first + k))) - {0} for k in range(3)]
        assert ids[2] < ids[0]  # grains vanish, none appears
        assert ids[1] <= ids[0]
        kept = frames.labels(first + 1) == frames.labels(first)
        assert kept[frames.labels(first + 1) > 0].mean() > 0.9  # boundaries move little by little
        assert frames.rows["grains"][first + 2] < frames.rows["grains"][first] == 60
    assert (frames.image(2) == next(structure.simulate_frames(config, 0, [400])).picture).all()


def test_batches_on_a_device_give_the_same_structures() -> None:
    config = vary(SMALL, pores={"fraction": 0.06, "diameter": 0.25})
    here, there = (list(grow(config, range(2))) for grow in (library._grow_on_processors, library._grow_on_device))
    for (picture, labels), (other, other_labels) in zip(here, there, strict=True):
        assert np.abs(picture.astype(int) - other).max() <= 1
        assert (labels == other_labels).mean() > 0.999


@pytest.mark.parametrize(("options", "message"), [
    ({"time_step": 0.19}, r"simulate.time_step: 0.19 is not stable.*at most 0.1875"),
    ({"time_step": 0.17, "pores": {"fraction": 0.05, "diameter": 0.3}}, "time_step.*at most 0.1579"),
    ({"time_step": 0.17, "depth": 32, "area_spread": None}, "time_step.*at most 0.1667"),
    ({"grains": 400}, "simulate.grains: 400 grains are too many for 96 x 96 px, at most 307"),
    ({"size": 2_000_000, "grains": 100}, "simulate.size: 2000000 x 2000000 px need about 3e[+]05 GB of memory.*at most [0-9]+ would be right"),
    ({"depth": 64}, "simulate.area_spread.*volumes"),
    ({"depth": 64, "area_spread": None, "boundary_anisotropy": 1.5}, "simulate.boundary_anisotropy: not available for volumes"),
    ({"pores": {"fraction": 0.9}}, "simulate.pores.fraction: 0.9 is outside 0 to"),
    ({"particles": {"fraction": 0.1, "diameter": 0.05}}, "simulate.particles.diameter: .* px is outside 3 px"),
    ({"pixel_size_um": 1.0, "grain_diameter_um": 80.0}, "simulate.grain_diameter_um: a field of 96 um holds only 2 grains of 80 um, want at least 4"),
    ({"pixel_size_um": 1.0, "grain_diameter_um": 8.0, "steps": 3000}, "simulate.grain_diameter_um: 8 um are only 8 px, and grains outgrow them"),
    ({"pixel_size_um": 1.0, "grain_diameter_um": 5.0}, "simulate.grain_diameter_um: 5 um are only 5 px, want at least 6.2 px"),
    ({"size": 2**32}, "simulate.size: 4294967296 x 4294967296 px need about 1.38e[+]12 GB of memory"),
    ({"coarse_share": 0.01}, "simulate.coarse_share"),
    ({"pores": {"fraction": 0.0001, "diameter": 0.3}}, "simulate.pores.fraction: 0.0001 is less than one obstacle"),
    ({"device": "cuda:7"}, "device 'cuda:7' is not there"),
    ({"device": "gpu"}, "device 'gpu' is unknown"),
])
def test_what_cannot_be_simulated_is_refused_before_work_starts(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        library.check(vary(SMALL, **options))
    with pytest.raises(UserError, match=message):
        simulate_library(vary(SMALL, **options), tmp_path / "library")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [[], [5, 5], [10, 3], [-1, 4]])
def test_frames_have_to_rise(steps: list[int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"frames: .* would have to rise"):
        simulate_sequences(SMALL, 1, steps, tmp_path / "frames")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_no_half_written_set(how: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = subprocess.Popen([Path(sys.executable).with_name("graincast"), "simulate", "--out", out, "--structures", "100000"])
    try:
        deadline = time.monotonic() + 200  # a first run compiles
        while not list(tmp_path.glob(f"{PARTIAL}*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(how)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    assert not out.exists()
    if how == signal.SIGINT:  # nothing at all is left where the process could tidy up
        assert not list(tmp_path.iterdir())
    assert len(simulate_set(SMALL, 1, out)) == 1
