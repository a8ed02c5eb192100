"""Labelled grain structures and libraries of them. The solver: test_grain_growth.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from graincast.config import Simulate
from graincast.labels import boundary_mask
from graincast.simulate import library
from graincast.simulate.library import (
    mean_grain_diameter,
    separate,
    simulate_library,
    simulate_structure,
)
from graincast.store.imageset import PARTIAL

SMALL = Simulate(size=96, grains=14, steps=150, translator_structures=2, synthetic_structures=2,
                 validation_structures=2)


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
