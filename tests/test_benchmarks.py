"""The solvers that the simulator's benchmark compares with solve the same problem; the benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import FusedNumba, Peer, PlainNumpy, Pystencils, TunedNumpy
from benchmarks.simulate import KEYS, _tiled
from graincast.simulate.phase_field import GrainGrowth
from graincast.simulate.tessellation import tessellate

ROOT = Path(__file__).parents[1]
GENERATED = all(map(find_spec, ("pystencils", "cpuinfo")))
START = tessellate((64, 96), 9, np.random.default_rng(4), area_spread=0.35)


def grown(peer: type[Peer], steps: int = 60) -> np.ndarray:
    solver = peer(START, 0.1)
    solver.advance(steps)
    return solver.order_parameters()


@pytest.mark.parametrize("peer", [
    TunedNumpy, FusedNumba,
    pytest.param(Pystencils, marks=pytest.mark.skipif(not GENERATED, reason="needs pystencils and py-cpuinfo: pip install -e '.[bench]'")),
])
def test_peers_agree(peer: type[Peer]) -> None:
    np.testing.assert_allclose(grown(peer), grown(PlainNumpy), atol=2e-6)


def test_peers_solve_the_simulators_problem() -> None:
    growth = GrainGrowth(START, 0.1)
    growth.advance(60)
    order_parameters = grown(PlainNumpy)
    np.testing.assert_allclose(growth.picture(), (order_parameters**2).sum(0), atol=1e-3)
    assert (growth.labels() == order_parameters.argmax(0) + 1).mean() >= 0.999


def boundary_length(labels: np.ndarray) -> int:
    return sum(int((labels != np.roll(labels, 1, axis)).sum()) for axis in (0, 1))


def test_tiled_structures_have_more_grains_of_the_same_shapes() -> None:
    tiled = _tiled(START, 2, 3)
    assert np.array_equal((tiled - 1) % 9 + 1, np.tile(START, (2, 3)))
    assert np.array_equal(np.bincount(tiled.ravel())[1:], np.tile(np.bincount(START.ravel())[1:], 6))
    assert boundary_length(tiled) == 6 * boundary_length(START)


@pytest.mark.slow
def test_the_benchmark_ends_in_one_json_object() -> None:
    command = [sys.executable, "-m", "benchmarks.simulate", "--quick", "--without-pystencils"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert list(figures)[:len(KEYS)] == list(KEYS)
    assert figures.pop("speedup_vs_pystencils") is None
    assert all(figures[key] > 0 for key in KEYS if key in figures)


def test_what_cannot_be_measured_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.simulate", "--quick", "--record", "--without-pystencils"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == ["--record keeps figures of the full problems: leave --quick out"]


def test_the_benchmark_of_training_ends_in_one_json_object() -> None:
    command = [sys.executable, "-m", "benchmarks.training_speed", "--quick", "--device", "cpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads(ended.stdout.splitlines()[-1])
    for kind, setting in (("translator", "standard"), ("segmenter", "crop_64")):
        assert set(figures[kind][setting]) == {"float32", "auto", "auto_speedup"}
        assert all(value > 0 for value in figures[kind][setting].values())
    assert 0 < figures["data"]["segmenter_crop_64"]["share_in_turn"] < 1


def test_realism_says_which_result_is_missing(tmp_path: Path) -> None:
    for arguments, words in (([], "neither a run nor --real was given"), ([str(tmp_path)], "holds no micrographs")):
        ended = subprocess.run([sys.executable, "-m", "benchmarks.realism", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 1
        assert len(ended.stderr.splitlines()) == 1
        assert words in ended.stderr
