"""The physics of the grain-growth solver, against independent solvers, exact solutions and the laws of grain growth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import ks_2samp, linregress

from graincast.errors import UserError
from graincast.simulate.free_energy import ISOTROPIC, OBSTACLE, VOLUME_KERNEL, Stencil, anisotropic_stencil, time_step_bound
from graincast.simulate.phase_field import GrainGrowth
from tests.oracles import (
    REACH,
    Dense,
    History,
    amount,
    areas,
    boundary_energy_errors,
    discs,
    grain_angles,
    grow_history,
    junction_angles,
    moving_boundary_errors,
    periodic_components,
    random_cells,
    refined,
    sides,
    time_step_errors,
)

OBLIQUE = anisotropic_stencil(1.6, 30)


def assert_agree(growth: GrainGrowth, dense: Dense, steps: int) -> None:
    growth.advance(steps)
    dense.advance(steps)
    assert np.abs(growth.picture() - dense.picture()).max() <= 1e-3
    grain = dense.picture() > 0.25  # elsewhere, inside obstacles, nothing is there to be the largest
    assert (growth.labels() == dense.labels())[grain].mean() >= 0.999
    assert growth.energy() == pytest.approx(dense.energy(), rel=1e-3)


@pytest.mark.parametrize(("shape", "grains", "time_step", "steps"), [
    *(((96, 96), 12, time_step, steps) for time_step in (0.02, 0.1) for steps in (2, 4, 8, 37)),  # sharp boundaries spread
    ((96, 96), 12, 0.1, 1000),
    ((64, 112), 9, 3 / 16, 1000),
    ((40, 40), 2, 0.1, 300),  # windows as large as the field
    ((150, 36), 4, 0.1, 300),  # as wide as the field, not as high
])
def test_agrees_with_the_dense_solver(shape: tuple[int, int], grains: int, time_step: float, steps: int) -> None:
    start = random_cells(shape, grains, seed=5)
    assert_agree(GrainGrowth(start, time_step), Dense(start, time_step), steps)


@pytest.mark.parametrize("stencil", [ISOTROPIC, OBLIQUE], ids=["isotropic", "anisotropic"])
@pytest.mark.parametrize("particles", [0, 12])
def test_agrees_with_the_dense_solver_on_anisotropy_and_obstacles(stencil: Stencil, particles: int) -> None:
    start = random_cells((72, 88), 9, seed=6)
    obstacles = discs(start.shape, particles, 3.5, seed=7) if particles else None
    time_step = time_step_bound(stencil.kernel, particles > 0)
    assert_agree(GrainGrowth(start, time_step, stencil=stencil, obstacles=obstacles), Dense(start, time_step, stencil.kernel, obstacles), 1000)


@pytest.mark.parametrize("particles", [False, True])
def test_agrees_with_the_dense_solver_in_a_volume(particles: bool) -> None:
    start = random_cells((20, 24, 28), 5, seed=8)
    obstacles = np.zeros(start.shape, np.float32)
    obstacles[5:10, 8:14, 20:25] = OBSTACLE if particles else 0
    given = obstacles if particles else None
    assert_agree(GrainGrowth(start, 0.12, obstacles=given), Dense(start, 0.12, VOLUME_KERNEL, obstacles), 1000 if particles else 300)


def test_interiors_and_far_field_are_skipped_without_harm() -> None:
    """One large grain beside small ones, so that long settled stretches occur."""
    start = np.ones((160, 160), np.int32)
    start[60:100, 20:60], start[60:90, 60:90], start[100:130, 30:60] = 2, 3, 4
    assert_agree(GrainGrowth(start, 0.15), Dense(start, 0.15), 300)


def test_the_field_has_no_preferred_origin() -> None:
    start = random_cells((80, 96), 8, seed=3)
    growth, rolled = GrainGrowth(start, 0.1), GrainGrowth(np.roll(start, (31, 57), (0, 1)), 0.1)
    growth.advance(200)
    rolled.advance(200)
    np.testing.assert_allclose(np.roll(growth.picture(), (31, 57), (0, 1)), rolled.picture(), atol=1e-3)
    assert (np.roll(growth.labels(), (31, 57), (0, 1)) == rolled.labels()).mean() > 0.999


@pytest.mark.parametrize("shape", [(96, 130), (24, 40, 44)])
def test_threads_share_the_work_to_the_last_bit(shape: tuple[int, ...]) -> None:
    start = random_cells(shape, 12, seed=9)
    alone, shared = GrainGrowth(start, 0.15), GrainGrowth(start, 0.15, threads=2)
    alone.advance(101)
    shared.advance(101)
    assert (alone.picture() == shared.picture()).all()
    assert (alone.labels() == shared.labels()).all()


@pytest.mark.parametrize("time_step", [0.0, -0.1, 0.19, 0.3])
def test_an_unstable_time_step_is_refused_naming_the_bound(time_step: float) -> None:
    with pytest.raises(UserError, match=r"time_step.*0\.1875"):
        GrainGrowth(np.ones((32, 32), np.int32), time_step)


def test_a_slice_of_columns_is_a_plane() -> None:
    """Grains that are the same on every layer of a volume grow as on a field."""
    start = random_cells((48, 56), 6, seed=10)
    plane, volume = GrainGrowth(start, 0.12), GrainGrowth(np.repeat(start[None], 12, axis=0), 0.12)
    plane.advance(300)
    volume.advance(300)
    np.testing.assert_allclose(volume.picture(), np.broadcast_to(plane.picture(), volume.shape), atol=1e-4)
    assert (volume.labels() == plane.labels()).mean() >= 0.999


@pytest.mark.parametrize("radius", [25, 50])
def test_a_circle_shrinks_at_a_constant_rate(radius: int) -> None:
    """dA/dt = -2 pi L kappa, whatever the size, and the circle stays one."""
    y, x = np.mgrid[:128, :128] - 63.3
    growth = GrainGrowth(np.where(x**2 + y**2 < radius**2, 1, 2), 0.15)
    growth.advance(100)
    amounts = []
    for _ in range(6):
        amounts.append(amount(growth))
        growth.advance(200)
    rates = -np.diff(amounts) / (200 * 0.15)
    assert rates == pytest.approx(rates.mean(), rel=0.01)
    assert rates == pytest.approx(2 * np.pi, rel=0.055)  # 0.95, of which the grid spacing is the cause: see below
    inside = growth.labels() == 1
    diameters = [np.ptp(values[inside]) + 1 for values in (x, y, (x + y) / np.sqrt(2), (x - y) / np.sqrt(2))]
    assert np.ptp(diameters) <= 1.5


@pytest.mark.parametrize(("factor", "exactness"), [(1, 0.09), (2, 0.02)])
@pytest.mark.parametrize(("ratio", "direction"), [(1.6, 30), (2.0, 0), (2.0, 135)])
def test_an_ellipse_keeps_its_shape_under_anisotropy(ratio: float, direction: float, factor: int, exactness: float) -> None:
    """The affine image of the shrinking circle: axes in the ratio of the boundary energies, dA/dt = -2 pi L kappa.

    The thinner boundaries lag a little more behind on the grid than isotropic ones; on one of half the spacing they do not.
    """
    y, x = (np.mgrid[:110 * factor, :110 * factor] + 0.5) / factor - 54.8
    turn = np.radians(direction)
    along, across = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)  # rows run downwards
    start = np.where(along**2 / ratio + across**2 * ratio < 30**2, 1, 2)
    growth = GrainGrowth(start, 0.12 / factor**2, stencil=refined(factor, anisotropic_stencil(ratio, direction)))
    growth.advance(80 * factor**2)
    amounts, shapes = [], []
    for _ in range(5):
        share = growth.picture(np.array([1.0, 0.0])) / growth.picture()
        amounts.append(share.sum(dtype=float) / factor**2)
        shapes.append(np.sqrt((share * along**2).sum(dtype=float) / (share * across**2).sum(dtype=float)))
        assert abs((share * along * across).sum(dtype=float)) < 0.01 * (share * along**2).sum(dtype=float)
        growth.advance(150 * factor**2)
    assert shapes == pytest.approx(np.full(5, ratio), rel=0.01)
    rates = -np.diff(amounts) / (150 * 0.12)
    assert rates == pytest.approx(rates.mean(), rel=0.05)
    assert rates.mean() == pytest.approx(2 * np.pi, rel=exactness)


def test_a_sphere_shrinks_at_its_rate() -> None:
    """dR^2/dt = -4 L kappa."""
    z, y, x = np.mgrid[:44, :44, :44] - 21.7
    growth = GrainGrowth(np.where(x**2 + y**2 + z**2 < 17**2, 1, 2), 1 / 6)
    growth.advance(60)
    squares = []
    for _ in range(5):
        squares.append((amount(growth) * 3 / (4 * np.pi)) ** (2 / 3))
        growth.advance(60)
    rates = -np.diff(squares) / 10
    assert rates == pytest.approx(rates.mean(), rel=0.02)
    assert rates.mean() == pytest.approx(4, rel=0.06)


def test_a_small_grain_vanishes_and_the_rest_keep_their_ids() -> None:
    y, x = np.mgrid[:64, :64] - 32
    growth = GrainGrowth(np.where(x**2 + y**2 < 25, 2, np.where(x < 0, 1, 3)), 0.1)
    growth.advance(600)
    assert set(np.unique(growth.labels())) == {1, 3}
    assert growth.picture().max() <= 1 + 1e-5


@pytest.mark.parametrize("stencil", [ISOTROPIC, OBLIQUE], ids=["isotropic", "anisotropic"])
@pytest.mark.parametrize("particles", [0, 20])
@pytest.mark.parametrize("share_of_bound", [0.5, 1])
def test_energy_never_rises(stencil: Stencil, particles: int, share_of_bound: float) -> None:
    start = random_cells((96, 96), 14, seed=8)
    obstacles = discs(start.shape, particles, 3, seed=8) if particles else None
    growth = GrainGrowth(start, share_of_bound * time_step_bound(stencil.kernel, particles > 0), stencil=stencil, obstacles=obstacles)
    assert_falls(growth, 400)


def test_energy_never_rises_in_a_volume() -> None:
    assert_falls(GrainGrowth(random_cells((24, 28, 32), 12, seed=9), time_step_bound(VOLUME_KERNEL)), 100)


def assert_falls(growth: GrainGrowth, steps: int) -> None:
    """The energy, at every step."""
    energies = []
    for _ in range(steps):
        energies.append(growth.energy())
        growth.advance(1)
    assert (np.diff(energies) <= 1e-6 * energies[0]).all()
    assert energies[-1] < 0.9 * energies[0]


def test_energy_of_the_start() -> None:
    start = np.repeat([1, 2], 20)[:, None].repeat(40, axis=1)
    assert GrainGrowth(start, 0.1).energy() == pytest.approx(Dense(start, 0.1).energy()) == 80


@pytest.mark.parametrize("piece", [1, 10, 500])
@pytest.mark.parametrize("radius", [3.2, 5])
def test_a_grain_that_vanishes_inside_another_leaves_no_trace(radius: float, piece: int) -> None:
    """The order parameter around it recovers slowly and far from any boundary."""
    y, x = np.mgrid[:120, :120] - 60
    start = np.where(x**2 + y**2 <= radius**2, 3, np.where(np.maximum(abs(x), abs(y)) < 40, 1, 2))
    growth, dense = GrainGrowth(start, 0.1), Dense(start, 0.1)
    for _ in range(0, 500, piece):
        growth.advance(piece)
    dense.advance(500)
    assert 3 not in growth.labels()
    assert np.abs(growth.picture() - dense.picture()).max() <= 1e-3


def test_how_steps_are_parted_does_not_show() -> None:
    start = random_cells((96, 112), 14, seed=4)
    whole, parted = GrainGrowth(start, 0.1), GrainGrowth(start, 0.1)
    whole.advance(400)
    for steps in (1, 6, 57, 100, 236):
        parted.advance(steps)
        parted.labels()
    assert (whole.picture() == parted.picture()).all()


def orders(errors: list[float], factors: Sequence[float]) -> np.ndarray:
    """Apparent order between neighbouring resolutions."""
    return -np.diff(np.log(errors)) / np.diff(np.log(factors))


def test_second_order_in_space_boundary_energy() -> None:
    errors = boundary_energy_errors([1, 2, 3])
    assert errors[0] < 0.02
    assert orders(errors, [1, 2, 3]) == pytest.approx([2, 2], abs=0.25)


def test_second_order_in_space_moving_boundary() -> None:
    errors = moving_boundary_errors([1, 1.5, 2, 2.5])
    assert errors[0] < 0.055
    assert orders(errors, [1, 1.5, 2, 2.5]) == pytest.approx([2, 2, 2], abs=0.25)


def test_first_order_in_time() -> None:
    errors = time_step_errors([1, 2, 4, 8])
    assert errors[0] < 1e-3
    assert orders(errors, [1, 2, 4, 8]) == pytest.approx([1, 1, 1], abs=0.15)


INTERVAL = 320
"""Steps between two frames of a history."""


def grow(seed: int, frames: int) -> History:
    """1000 grains, 16 px across, of which about 650 are left at the third frame and 240 at the fourteenth."""
    return grow_history((512, 512), 1000, seed, frames, INTERVAL)


@pytest.fixture(scope="module")
def history() -> History:
    return grow(seed=1, frames=14)


def test_mean_area_grows_linearly(history: History) -> None:
    late = slice(3, None)
    mean = history.mean_areas()[late]
    line = linregress(history.times[late], mean)
    assert mean[-1] > 2 * mean[0]
    assert line.rvalue**2 >= 0.99
    assert 0.9 < line.slope < 1.3  # by L kappa


def test_sizes_are_self_similar(history: History) -> None:
    """Scaled with their mean, sizes are distributed alike at an early and a late time, in two different structures."""
    other = grow(seed=2, frames=5)
    early, late = other.scaled_sizes(-1), history.scaled_sizes(-1)
    assert len(early) > 1.8 * len(late) > 400
    assert ks_2samp(early, late).pvalue > 0.05
    start = np.sqrt(areas(random_cells((512, 512), 1000, seed=2), 1000))
    assert ks_2samp(start / start.mean(), late).pvalue < 0.05  # the test can tell


def test_von_neumann_mullins(history: History) -> None:
    """dA/dt = (pi / 3) L kappa (n - 6), for the grains that keep n sides meanwhile."""
    sizes, rates = history.side_rates(range(4, len(history.maps)))
    assert all(sides(labels, history.grains).sum() == pytest.approx(6 * np.unique(labels).size, rel=0.01) for labels in history.maps)  # Euler
    line = linregress(sizes, rates)
    assert len(sizes) > 1000
    assert line.rvalue >= 0.9
    assert line.slope == pytest.approx(np.pi / 3, rel=0.1)
    assert line.intercept == pytest.approx(0, abs=0.1)
    means = [rates[sizes == n].mean() for n in range(-2, 4)]
    assert means == pytest.approx(line.slope * np.arange(-2, 4), abs=0.2)  # linear, not only correlated


def test_three_boundaries_meet_at_120_degrees(history: History) -> None:
    """The mean of three angles is 120 whatever they are; so is asked that each be near it."""
    angles = grain_angles(history.last)
    assert len(angles) > 100
    assert np.abs(angles - 120).mean() < 6
    assert angles.std() < 6
    start = grain_angles(GrainGrowth(random_cells((256, 256), 50, seed=4), 0.1))
    assert np.abs(start - 120).mean() > 15  # the measurement can tell


@pytest.mark.parametrize("angles", [(120, 120, 120), (110, 118, 132), (100, 125, 135), (140, 120, 100)])
@pytest.mark.parametrize("turn", [0, 17, 45])
def test_the_measurement_of_angles_finds_known_ones(angles: tuple[int, int, int], turn: int) -> None:
    """Three blurred sectors between arcs, one of which bends by 1/40 px."""
    size, fine = 2 * REACH + 9, 16
    places = (np.arange(size * fine) + 0.5) / fine - 0.5 - (size // 2 + 0.5)
    y, x = np.meshgrid(places - 0.3, places + 0.2, indexing="ij")
    distance, direction = np.hypot(x, y), np.arctan2(y, x)
    starts = np.radians(turn + np.array([0, angles[0], angles[0] + angles[1]]))
    bend = np.array([1, -0.5, 0.3]) / 40
    behind = [(direction - start - curvature * distance / 2) % (2 * np.pi) for start, curvature in zip(starts, bend, strict=True)]
    sector = np.argmin(behind, axis=0)
    shares = [(sector == k).reshape(size, fine, size, fine).mean((1, 3)) for k in range(3)]
    squares = ndimage.gaussian_filter(np.stack(shares), (0, 1.5, 1.5))[:, 4:-4, 4:-4]
    found = junction_angles(squares)
    assert found is not None
    assert min(np.abs(np.roll(found, shift) - angles).max() for shift in range(3)) < 2


def test_the_count_of_sides_finds_those_of_bricks() -> None:
    """Bricks in running bond have six neighbours each; one of them split along has five in either half."""
    row, column = np.mgrid[:48, :64]
    bricks = row // 8 * 4 + (column + 8 * (row // 8 % 2)) % 64 // 16 + 1
    assert sides(bricks, 24).tolist() == [6] * 24
    bricks[(bricks == 10) & (row >= 20)] = 25
    assert (sides(bricks, 25)[9], sides(bricks, 25)[24], sides(bricks, 25).sum()) == (5, 5, 6 * 25)


def test_the_count_of_components_goes_through_the_seams() -> None:
    mask = np.zeros((9, 12), bool)
    mask[0, 2:4] = mask[-1, 3] = mask[4, :2] = mask[4, -1] = True
    assert periodic_components(mask) == 2
    mask[5, 2] = True  # touches a corner only
    assert periodic_components(mask) == 3
    assert periodic_components(np.stack([mask, np.zeros_like(mask), mask])) == 3


def test_particles_pin_boundaries() -> None:
    """Zener pinning: with particles the grains all but stop growing, without they go on."""
    start = random_cells((192, 192), 150, seed=11)
    counts = []
    for obstacles in (None, discs(start.shape, 160, 3, seed=12)):
        growth = GrainGrowth(start, 0.15, obstacles=obstacles)
        counts.append([])
        for _ in range(2):
            growth.advance(6000)
            counts[-1].append(np.unique(growth.labels()[growth.picture() > 0.5]).size)
    free, pinned = counts
    assert free[1] < 0.65 * free[0]
    assert pinned[1] > 0.9 * pinned[0]
    assert pinned[1] > 2 * free[1]


def test_every_grain_is_one_component_and_the_boundary_one_network() -> None:
    growth = GrainGrowth(random_cells((192, 192), 40, seed=13), 0.15)
    growth.advance(1000)
    labels = growth.labels()
    ids = np.unique(labels)
    assert labels.min() >= 1
    assert all(periodic_components(labels == grain) == 1 for grain in ids)
    boundary = growth.picture() < 0.9
    assert periodic_components(boundary) == 1
    interiors = [periodic_components(~boundary & (labels == grain)) for grain in ids]
    assert periodic_components(~boundary) == sum(interiors)
    large = areas(labels, growth.grains)[ids - 1] > 50  # one that is about to vanish is all boundary
    assert large.sum() > 0.9 * ids.size
    assert [count for count, one in zip(interiors, large, strict=True) if one] == [1] * large.sum()
    assert max(interiors) == 1
    crossings = [labels != np.roll(labels, shift, axis) for axis in (0, 1) for shift in (1, -1)]
    assert boundary[np.any(crossings, axis=0)].all()  # where two ids meet there is boundary
