"""The batched solver, against the dense one, on the CPU and, where there is a GPU, on it too."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial import cKDTree

from graincast.errors import UserError
from graincast.simulate import batched
from graincast.simulate.batched import INTERVAL, MARGIN, SEPARATION, SETTLED, BatchedGrowth, structures_at_once
from graincast.simulate.free_energy import ISOTROPIC, OBSTACLE, VOLUME_KERNEL, anisotropic_stencil, time_step_bound
from tests.oracles import Dense, periodic_components

BOUND = time_step_bound(ISOTROPIC.kernel)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def cells(shape: tuple[int, ...], grains: int, seed: int) -> np.ndarray:
    """Voronoi cells of points that keep some distance, periodic."""
    rng = np.random.default_rng(seed)
    seeds = rng.random((1, len(shape))) * shape
    while len(seeds) < grains:  # of ten places the one furthest from all points so far
        places = rng.random((10, len(shape))) * shape
        furthest = cKDTree(seeds, boxsize=shape).query(places)[0].argmax()
        seeds = np.concatenate([seeds, places[[furthest]]])
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return cKDTree(seeds, boxsize=shape).query(grid)[1].astype(np.int32) + 1


def assert_agree(growth: BatchedGrowth, references: list[Dense], where: np.ndarray | bool = True) -> None:
    """The picture, the labels `where` they matter, and the energy are those of the dense solver."""
    for picture, labels, energy, dense in zip(growth.picture(), growth.labels(), growth.energy(), references, strict=True):
        assert np.abs(picture - dense.picture()).max() <= 1e-3
        assert (labels == dense.labels())[np.broadcast_to(where, labels.shape)].mean() >= 0.999
        assert energy == pytest.approx(dense.energy(), rel=1e-3)


@pytest.mark.parametrize(("shape", "grains", "time_step", "steps"), [
    ((96, 96), (12, 20), 0.1, 37),
    ((96, 96), (12, 7), 0.1, 1000),
    ((64, 112), (9, 14), BOUND, 400),
    ((40, 40), (2, 5), 0.1, 300),  # footprints as large as the field
    ((150, 36), (4, 10), 0.1, 300),  # as wide as the field, not as high
])
def test_agrees_with_the_dense_solver(shape: tuple[int, int], grains: tuple[int, int], time_step: float, steps: int, device: str) -> None:
    starts = np.stack([cells(shape, count, 5) for count in grains])
    references = [Dense(start, time_step) for start in starts]
    for dense in references:
        dense.advance(steps)
    growth = BatchedGrowth(starts, time_step, device=device)
    growth.advance(steps)
    assert (growth.shape, growth.grains, growth.time_step) == (shape, grains, time_step)
    assert_agree(growth, references)


def test_volumes_agree_with_the_dense_solver(device: str) -> None:
    starts = np.stack([cells((20, 24, 22), count, 3) for count in (4, 6)])
    references = [Dense(start, 0.1, VOLUME_KERNEL) for start in starts]
    for dense in references:
        dense.advance(100)
    growth = BatchedGrowth(starts, 0.1, device=device)
    growth.advance(100)
    assert_agree(growth, references)


def test_a_volume_one_cell_deep_is_a_plane() -> None:
    start = cells((48, 40), 6, 1)[None]
    plane, volume = BatchedGrowth(start, 0.1, device="cpu"), BatchedGrowth(start[:, None], 0.1, device="cpu")
    plane.advance(100)
    volume.advance(100)
    np.testing.assert_allclose(volume.picture()[:, 0], plane.picture(), atol=1e-5)


def test_anisotropic_boundaries_and_obstacles(device: str) -> None:
    starts = np.stack([cells((80, 80), count, 7) for count in (8, 12)])
    y, x = np.mgrid[:80, :80]
    pores = [np.hypot(y - 30, x - 40) < 7, np.hypot(y - 50, x - 20) < 10]
    obstacles = (OBSTACLE * np.stack(pores)).astype(np.float32)
    stencil = anisotropic_stencil(1.7, 30)
    time_step = time_step_bound(stencil.kernel, obstacles=True)
    references = [Dense(start, time_step, stencil.kernel, pore) for start, pore in zip(starts, obstacles, strict=True)]
    for dense in references:
        dense.advance(300)
    growth = BatchedGrowth(starts, time_step, stencil=stencil, obstacles=obstacles, device=device)
    growth.advance(300)
    assert_agree(growth, references, where=~np.logical_or(*pores))
    for picture, pore in zip(growth.picture(), pores, strict=True):
        assert (picture[ndimage.binary_erosion(pore, iterations=4)] < 0.01).all()


def test_no_grain_deep_inside_an_obstacle(device: str) -> None:
    y, x = np.mgrid[:72, :72] - 36
    obstacle = (OBSTACLE * (np.hypot(x, y) < 16)).astype(np.float32)
    growth = BatchedGrowth(cells((72, 72), 6, 1)[None], 0.1, obstacles=obstacle[None], device=device)
    for _ in range(3):
        labels = growth.labels()[0]
        assert (labels[obstacle == 0] > 0).all()
        assert labels[36, 36] == 0
        growth.advance(100)


def test_a_long_run_in_which_grains_vanish_and_meet(device: str) -> None:
    """Rearranged layers keep ids, share no order parameter and let no two grains coalesce."""
    start = cells((72, 72), 24, 2)
    dense = Dense(start, BOUND)
    growth = BatchedGrowth(start[None], BOUND, device=device)
    first = growth._layer.clone()
    for _ in range(8):
        dense.advance(400)
        growth.advance(400)
        assert_agree(growth, [dense])
    left = np.unique(growth.labels())
    assert 2 <= len(left) <= 12
    moved = (growth._layer != first)[0].nonzero().flatten().tolist()
    assert set(moved) & set(left)  # or this test tests nothing
    assert all(periodic_components(growth.labels()[0] == grain) == 1 for grain in left)


def test_two_grains_of_one_layer_that_meet_stay_two(device: str) -> None:
    """Where the grain between them vanishes; with one shared order parameter they would become one."""
    y, x = np.mgrid[:64, :96]
    start = np.where((x >= 16) & (x < 80), np.where(np.hypot(y - 32, x - 48) < 12, 3, np.where(x < 48, 1, 2)), 4)
    start = np.where((np.abs(x - 48) < 14) & (np.hypot(y - 32, x - 48) >= 12), 3, start)
    growth = BatchedGrowth(start[None], 0.15, device=device)
    assert growth._layer[0, 1] == growth._layer[0, 2]
    squeezed = np.where(start == 3, np.where(x < 48, 1, 2), start)  # 1 and 2 brought together by force
    inside = growth._inside(growth._owner)
    shared = int(growth._layer[0, 1])
    inside[0] = torch.where(inside[0] == 3, 0, inside[0])
    inside[0, shared] = torch.from_numpy(np.where(squeezed < 3, squeezed, 0)).to(inside)
    growth._inside(growth._eta)[0] = (inside[0] > 0).float()
    dense = Dense(np.where(squeezed == 4, 3, squeezed), 0.15)
    growth.advance(300)
    dense.advance(300)
    assert growth._layer[0, 1] != growth._layer[0, 2]
    assert np.abs(growth.picture()[0] - dense.picture()).max() <= 1e-3
    assert (np.where(growth.labels()[0] == 4, 3, growth.labels()[0]) == dense.labels()).mean() >= 0.999


def test_cores_in_a_layer_keep_apart_at_all_times(device: str) -> None:
    growth = BatchedGrowth(np.stack([cells((96, 96), 30, seed) for seed in (1, 2, 3)]), BOUND, device=device)
    for _ in range(12):
        growth.advance(INTERVAL)
        growth.advance(1)  # footprints are new
        owners, etas = growth._inside(growth._owner).cpu().numpy(), growth._inside(growth._eta).cpu().numpy()
        assert (etas[owners == 0] == 0).all()
        for owner, eta, layer in zip(owners, etas, growth._layer.cpu().numpy(), strict=True):
            for own, values, index in zip(owner, eta, range(len(owner)), strict=True):
                assert set(layer[np.unique(own[own > 0])]) <= {index}
                for grain in np.unique(own[own > 0]):
                    near = ndimage.maximum_filter(own == grain, 3, mode="wrap")
                    assert np.isin(own[near], (0, grain)).all()
                    core = (own == grain) & (values > 2 * SETTLED)
                    assert (own == grain)[ndimage.maximum_filter(core, 2 * MARGIN - 1, mode="wrap")].all()


@pytest.mark.parametrize("radius", [1, 2, 5, 11, 40])
@pytest.mark.parametrize("shape", [(30, 17), (9, 12, 11)])
def test_dilation(radius: int, shape: tuple[int, ...]) -> None:
    field = np.random.default_rng(0).integers(0, 1000, shape).astype(np.int16)
    expected = ndimage.maximum_filter(field, 2 * radius + 1, mode="wrap")
    assert (batched._dilated(torch.from_numpy(field)[None, None], radius)[0, 0].numpy() == expected).all()


def test_first_fit_is_a_greedy_colouring() -> None:
    """Against the same rule on the explicit graph of grains that are near each other."""
    labels = cells((160, 160), 40, 4)
    near = [set(np.unique(labels[ndimage.maximum_filter(labels == grain, 2 * SEPARATION + 1, mode="wrap")])) for grain in range(1, 41)]
    expected: dict[int, int] = {}
    for grain in range(40, 0, -1):
        taken = {expected[other] for other in near[grain - 1] - {grain} if other in expected}
        expected[grain] = min(set(range(41)) - taken)
    ids = torch.from_numpy(labels)[None, None]
    nowhere = torch.full((1, 41), -1)
    layer = batched._first_fit(ids, nowhere, batched._grains(ids > 0, ids, 41), SEPARATION)
    assert layer[0].tolist() == [-1, *(expected[grain] for grain in range(1, 41))]


def test_a_structure_grows_alone_as_in_a_batch() -> None:
    starts = np.stack([cells((80, 80), count, count) for count in (6, 25, 12)])
    together = BatchedGrowth(starts, 0.1, device="cpu")
    together.advance(200)
    for index, start in enumerate(starts):
        alone = BatchedGrowth(start[None], 0.1, device="cpu")
        alone.advance(200)
        assert alone.picture().tobytes() == together.picture()[index].tobytes()
        assert alone.labels().tobytes() == together.labels()[index].tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_agrees_with_the_cpu() -> None:
    starts = np.stack([cells((128, 128), count, count) for count in (10, 25, 12)])
    on_cpu, on_gpu = (BatchedGrowth(starts, 0.1, device=name) for name in ("cpu", "cuda"))
    on_cpu.advance(300)
    on_gpu.advance(300)
    np.testing.assert_allclose(on_gpu.picture(), on_cpu.picture(), atol=1e-4)
    assert (on_gpu.labels() == on_cpu.labels()).mean() >= 0.9999


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for processors with g++")
def test_the_compiled_step_is_the_step() -> None:
    """As on a GPU: all structures at once, in one graph."""
    starts = np.stack([cells((64, 64), count, count) for count in (5, 12)])
    plain, compiled = BatchedGrowth(starts, 0.1, device="cpu"), BatchedGrowth(starts, 0.1, device="cpu")
    compiled._fused = True
    plain.advance(100)
    compiled.advance(100)
    np.testing.assert_allclose(compiled.picture(), plain.picture(), atol=1e-5)


def test_same_start_same_bytes() -> None:
    starts = np.stack([cells((80, 80), count, count) for count in (6, 25)])
    runs = [BatchedGrowth(starts, 0.1, device="cpu") for _ in range(2)]
    for growth in runs:
        growth.advance(150)
    assert runs[0].picture().tobytes() == runs[1].picture().tobytes()
    assert runs[0].energy().tobytes() == runs[1].energy().tobytes()


@pytest.mark.parametrize("time_step", [0.1, BOUND])
def test_energy_never_rises(time_step: float, device: str) -> None:
    growth = BatchedGrowth(np.stack([cells((96, 96), 14, 8), cells((96, 96), 25, 9)]), time_step, device=device)
    energies = []
    for _ in range(60):
        energies.append(growth.energy())
        growth.advance(8)
    assert (np.diff(energies, axis=0) <= 1e-6 * energies[0]).all()
    assert (energies[-1] < 0.9 * energies[0]).all()


def test_weights_of_each_structure(device: str) -> None:
    starts = np.stack([cells((64, 64), count, count) for count in (5, 9)])
    weights = [np.random.default_rng(count).random(count) for count in (5, 9)]
    growth = BatchedGrowth(starts, 0.1, device=device)
    growth.advance(50)
    for start, weight, picture in zip(starts, weights, growth.picture(weights), strict=True):
        dense = Dense(start, 0.1)
        dense.advance(50)
        assert picture.dtype == np.float32
        np.testing.assert_allclose(picture, np.tensordot(weight, dense.eta**2, 1), atol=1e-3)


@pytest.mark.parametrize("time_step", [0.0, -0.1, 0.19, 0.3])
def test_an_unstable_time_step_is_refused_naming_the_bound(time_step: float) -> None:
    with pytest.raises(UserError, match=r"time_step.*0\.1875"):
        BatchedGrowth(np.ones((1, 32, 32), np.int32), time_step, device="cpu")


def test_a_batch_beyond_the_memory_is_refused_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = cells((64, 64), 5, 0)[None].repeat(6, 0)
    monkeypatch.setattr(batched, "free_memory", lambda _: 1_000_000_000)
    fitting = structures_at_once((256, 256), "cpu")
    assert 1 <= fitting < structures_at_once((128, 128), "cpu")
    with pytest.raises(UserError, match=r"simulate\.device: 1 structures of 4096 x 4096 cells .* cpu has 1\.0 GB"):
        structures_at_once((4096, 4096), "cpu")
    BatchedGrowth(starts, 0.1, device="cpu")
    monkeypatch.setattr(batched, "free_memory", lambda _: 1_000_000)
    with pytest.raises(UserError, match=r"simulate\.device: 6 structures of 64 x 64 .* need .* GB, cpu has 0\.0 GB"):
        BatchedGrowth(starts, 0.1, device="cpu")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="device 'cuda:99' is not there"):
        BatchedGrowth(np.ones((1, 32, 32), np.int32), 0.1, device="cuda:99")


def test_arrays_that_do_not_fit_are_refused() -> None:
    start = np.ones((2, 32, 32), np.int32)
    with pytest.raises(ValueError, match="grain ids"):
        BatchedGrowth(start[0], 0.1, device="cpu")
    with pytest.raises(ValueError, match="grain ids"):
        BatchedGrowth(start - 1, 0.1, device="cpu")
    with pytest.raises(ValueError, match="obstacles have the shape"):
        BatchedGrowth(start, 0.1, obstacles=np.zeros((32, 32), np.float32), device="cpu")
    with pytest.raises(ValueError, match="take no stencil"):
        BatchedGrowth(start[:, None], 0.1, stencil=anisotropic_stencil(2, 0), device="cpu")
