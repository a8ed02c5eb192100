"""The virtual SEM: every effect alone does what its physics says, and a session is what it claims to be."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from scipy import ndimage as ndi
from scipy.spatial import cKDTree
from skimage import measure

from graincast.config import VirtualSem, VirtualSession
from graincast.errors import UserError
from graincast.microscope.virtual_sem import boundary_lines, mullins_profile, render, write_session

rng = np.random.default_rng
PIXEL_UM = 0.05
Written = tuple[VirtualSession, Path]
NOTHING = {
    "groove_depth_um": 0, "groove_depth_spread": 0, "facet_tilt_deg": 0, "roughness_um": 0, "shading": 0,
    "channelling": 0, "contamination": 0, "probe_um": 0, "drift_px": 0, "line_jitter_px": 0, "line_gain": 0,
    "charging": 0, "electrons": 1e12, "detector_noise": 0, "gain": 1,
    "offset": 0.002,  # a flat specimen gives 128.0, clear of the rounding edge
}


def only(**effects: float) -> VirtualSem:
    """A perfect instrument on a flat specimen, but for the effects given."""
    return VirtualSem(**{**NOTHING, **effects})


def shoot(labels: np.ndarray, seed: int = 0, pixel_um: float = PIXEL_UM, **effects: float) -> np.ndarray:
    """An image, as float, in which only the given effects act."""
    return render(labels, pixel_um, only(**effects), rng(seed)).astype(float)


@pytest.fixture(scope="module")
def grains() -> np.ndarray:
    """Forty Voronoi cells in 192 x 256 px, dense."""
    shape = (192, 256)
    points = rng(5).uniform(0, shape, (40, 2))
    nearest = cKDTree(points).query(np.indices(shape).reshape(2, -1).T)[1]
    return (nearest.reshape(shape) + 1).astype(np.int32)


@pytest.fixture(scope="module")
def one_grain() -> np.ndarray:
    return np.ones((128, 200), np.int32)


@pytest.fixture(scope="module")
def halves() -> np.ndarray:
    """Two grains; the boundary runs down between columns 99 and 100."""
    return np.repeat(np.repeat([[1, 2]], 100, axis=1), 128, axis=0).astype(np.int32)


def levels(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the image in every grain."""
    inside = [image[labels == grain] for grain in np.unique(labels[labels > 0])]
    return np.array([np.mean(i) for i in inside]), np.array([np.std(i) for i in inside])


def edge_position(image: np.ndarray) -> np.ndarray:
    """Column of the darkest point of each line, to a fraction of a pixel (centroid of the dark)."""
    dark = np.maximum(np.median(image) - image, 0)
    return (dark * np.arange(image.shape[1])).sum(1) / dark.sum(1)


# ---------------------------------------------------------------------------------------------- render


def test_same_generator_state_same_image_another_seed_another_image(grains: np.ndarray) -> None:
    first, again, other = (render(grains, PIXEL_UM, VirtualSem(), rng(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_image_is_8_bit_of_the_maps_shape_and_the_map_stays_untouched(grains: np.ndarray) -> None:
    before = grains.copy()
    image = render(grains, PIXEL_UM, VirtualSem(), rng(0))
    assert image.dtype == np.uint8
    assert image.shape == grains.shape
    np.testing.assert_array_equal(grains, before)


def test_boundary_pixels_of_a_map_are_given_to_the_nearest_grain(grains: np.ndarray) -> None:
    lined = np.where(boundary_lines(grains), 0, grains)
    image = shoot(lined, channelling=0.1)
    assert levels(image, lined)[1].max() == 0
    assert set(np.unique(image[lined == 0])) <= set(np.unique(image[lined > 0]))


def test_no_effects_no_contrast(grains: np.ndarray) -> None:
    np.testing.assert_array_equal(shoot(grains), np.full(grains.shape, 128))


@pytest.mark.parametrize("labels", [np.zeros((8, 8), int), np.ones((8, 8)), np.ones((2, 8, 8), int)])
def test_what_is_no_grain_map_is_refused(labels: np.ndarray) -> None:
    with pytest.raises(UserError, match="grain map"):
        render(labels, PIXEL_UM, VirtualSem(), rng(0))


def test_pixel_size_must_be_positive(one_grain: np.ndarray) -> None:
    with pytest.raises(UserError, match="pixel_size_um"):
        render(one_grain, 0.0, VirtualSem(), rng(0))


# ---------------------------------------------------------------------------------------- the specimen


def test_groove_profile_obeys_mullins_equation_and_figures() -> None:
    # Mullins 1957: depth below the shoulders 0.973 m s and width between them 4.6 s, with s = (B t)^(1/4) and
    # the slope m at the root; here m = s = 1
    shoulder = 4.6 / 2
    u = np.linspace(0, 4, 401)
    z = 0.973 * mullins_profile(u / shoulder)
    assert z[0] == pytest.approx(-0.780, abs=0.002)
    assert (z[1] - z[0]) / (u[1] - u[0]) == pytest.approx(1, rel=0.02)
    assert u[z.argmax()] == pytest.approx(shoulder, abs=0.05)
    far = np.linspace(0, 9 / shoulder, 2001)  # surface diffusion moves matter and loses none
    moved = mullins_profile(far)
    assert np.trapezoid(moved, far) == pytest.approx(0, abs=0.01 * np.trapezoid(abs(moved), far))


def test_grooves_are_dark_with_bright_shoulders(halves: np.ndarray) -> None:
    line = shoot(halves, groove_depth_um=0.19).mean(0)
    root, shoulder, interior = line[99:101].mean(), line[104:110].max(), line[30:60].mean()
    assert root < interior - 20
    assert shoulder > interior + 2
    assert interior == pytest.approx(128, abs=1)


def test_deeper_grooves_are_darker_and_wider_grooves_wider(halves: np.ndarray) -> None:
    def root(depth: float) -> float:
        return shoot(halves, groove_depth_um=depth)[:, 99:101].mean()

    def dark_width(width: float) -> int:
        grooves = {"groove_depth_um": 0.25 * width, "groove_width_um": width, "topography": 0}
        line = shoot(halves, 0, 0.01, **grooves).mean(0)
        return int((line < 118).sum())

    assert root(0.05) > root(0.1) > root(0.2)
    assert dark_width(0.6) == pytest.approx(2 * dark_width(0.3), rel=0.2)


def test_grooves_keep_their_physical_width_when_the_pixel_size_changes() -> None:
    def dark_width_um(pixel_um: float) -> float:
        halves = np.repeat([[1, 2]], round(5 / pixel_um), axis=1).repeat(16, axis=0)
        line = shoot(halves, 0, pixel_um, groove_depth_um=0.2, groove_width_um=1.0, topography=0).mean(0)
        return float((line < 118).sum()) * pixel_um

    assert dark_width_um(0.01) == pytest.approx(dark_width_um(0.03), rel=0.15)


def test_groove_depth_differs_from_boundary_to_boundary(grains: np.ndarray) -> None:
    def spread(value: float) -> float:
        image = shoot(grains, groove_depth_um=0.15, groove_depth_spread=value, detector_asymmetry=0)
        return float(image[boundary_lines(grains)].std())

    assert spread(0.6) > 1.3 * spread(0)


def test_topography_alone_brightens_slopes(halves: np.ndarray) -> None:
    image = shoot(halves, groove_depth_um=0.19, shadowing=0, edge_brightening_um=0, topography=1)
    assert image.min() >= 127
    flank = slice(100, 104)
    assert image[:, flank].max() > 135
    half = shoot(halves, groove_depth_um=0.19, shadowing=0, edge_brightening_um=0, topography=0.5)
    assert half[:, flank].max() - 128 == pytest.approx((image[:, flank].max() - 128) / 2, abs=1)


def test_edges_brighten_where_the_surface_is_convex_only(halves: np.ndarray) -> None:
    line = shoot(halves, groove_depth_um=0.19, shadowing=0, topography=0, edge_brightening_um=0.1).mean(0)
    assert line[104:112].max() > 131
    assert line[99:101].mean() == pytest.approx(128, abs=1)  # the root is concave


@pytest.mark.parametrize("upwards", [False, True])
def test_slopes_that_face_the_detector_are_brighter(halves: np.ndarray, upwards: bool) -> None:
    def profile(azimuth: float) -> np.ndarray:
        """Across the groove, left to right, or from the bottom up."""
        labels = halves.T if upwards else halves
        image = shoot(labels, groove_depth_um=0.19, topography=0, edge_brightening_um=0,
                      detector_asymmetry=1, detector_azimuth_deg=azimuth + 90 * upwards)
        return (image.T[:, ::-1] if upwards else image).mean(0)

    towards = profile(0)
    # before the root the surface falls in the detector's direction and so faces it
    assert towards[96:99].mean() > towards[101:104].mean() + 5
    np.testing.assert_allclose(profile(180), towards[::-1], atol=1)


def test_facets_tilt_each_grain_alone(grains: np.ndarray) -> None:
    image = shoot(grains, facet_tilt_deg=8, detector_asymmetry=1, groove_width_um=0.2)
    means, spreads = levels(image, grains * ndi.binary_erosion(~boundary_lines(grains), iterations=6))
    assert np.std(means) > 2 * np.mean(spreads)
    # detector law: slope s towards the detector changes the signal by shadowing * asymmetry / 2 * sin(atan s)
    expected = 128 * 0.8 * 0.5 * np.sin(np.radians(8))
    assert np.std(means) == pytest.approx(expected, rel=0.4)


def test_channelling_gives_each_grain_a_level_of_its_own(grains: np.ndarray) -> None:
    image = shoot(grains, channelling=0.1)
    means, spreads = levels(image, grains)
    assert spreads.max() == 0
    assert np.std(means) / 128 == pytest.approx(0.1, rel=0.3)
    close = np.abs(np.subtract.outer(means, means))[np.triu_indices(means.size, 1)]
    assert (close < 3).any()  # chance leaves some grains alike


def test_roughness_gives_contrast_inside_a_grain(one_grain: np.ndarray) -> None:
    assert shoot(one_grain, roughness_um=0.02).std() > 2 * shoot(one_grain, roughness_um=0.005).std() > 0


def test_contamination_spots_are_dark_and_their_number_follows_the_density() -> None:
    field = np.ones((400, 400), np.int32)  # 400 um2
    image = shoot(field, contamination=50, contamination_darkening=0.4, contamination_radius_um=0.2)
    assert image.max() == 128
    assert image.min() == pytest.approx(128 * 0.6, abs=4)
    spots = measure.label(image < 110).max()
    assert 10 <= spots <= 30  # 20 expected


# ----------------------------------------------------------------------------- instrument and detector


@pytest.mark.parametrize(("azimuth", "axis", "sign"), [(0, 1, 1), (180, 1, -1), (90, 0, -1), (270, 0, 1)])
def test_shading_rises_towards_the_detector(one_grain: np.ndarray, azimuth: float, axis: int,
                                            sign: int) -> None:
    image = shoot(one_grain, shading=0.2, detector_azimuth_deg=azimuth)
    along = image.mean(1 - axis)
    assert sign * (along[-1] - along[0]) == pytest.approx(0.2 * 128, abs=2)
    across = image.mean(axis)
    assert np.ptp(across) < 1


def test_a_larger_probe_lowers_the_gradients(grains: np.ndarray) -> None:
    def energy(probe_um: float) -> float:
        image = shoot(grains, channelling=0.1, probe_um=probe_um)
        return float((ndi.gaussian_gradient_magnitude(image, 1) ** 2).sum())

    assert energy(0) > energy(0.05) > energy(0.1) > energy(0.2)


def test_the_probe_is_a_gaussian_of_the_stated_width(halves: np.ndarray) -> None:
    for seed in range(50):  # the first pair of grains with enough contrast to measure
        line = shoot(halves, seed, channelling=0.3, probe_um=0.2).mean(0)
        if abs(line[-1] - line[0]) > 60:
            break
    rise = (line - line[0]) / (line[-1] - line[0])
    low, high = np.interp([0.1587, 0.8413], rise, np.arange(rise.size))  # at -1 and +1 standard deviation
    assert (high - low) / 2 * PIXEL_UM == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("electrons", [25, 100, 400])
def test_shot_noise_variance_is_one_over_the_electrons(one_grain: np.ndarray, electrons: float) -> None:
    image = shoot(one_grain, electrons=electrons, gain=0.8)
    assert (image.std() / image.mean()) ** 2 == pytest.approx(1 / electrons, rel=0.06)


def test_detector_noise_is_a_fraction_of_full_scale(one_grain: np.ndarray) -> None:
    assert shoot(one_grain, detector_noise=0.03).std() == pytest.approx(0.03 * 255, rel=0.03)


def test_gain_and_offset_are_affine(grains: np.ndarray) -> None:
    plain = shoot(grains, channelling=0.1)
    changed = shoot(grains, channelling=0.1, gain=0.7, offset=0.1)
    np.testing.assert_allclose(changed, 0.7 * plain + 25.5, atol=1)


def test_levels_out_of_range_are_clipped(one_grain: np.ndarray) -> None:
    assert (shoot(one_grain, offset=0.7) == 255).all()
    assert (shoot(one_grain, offset=-0.7) == 0).all()


def test_line_gain_changes_whole_lines(one_grain: np.ndarray) -> None:
    image = shoot(one_grain, line_gain=0.05)
    assert np.ptp(image, axis=1).max() == 0
    assert image[:, 0].std() / 128 == pytest.approx(0.05, rel=0.2)


def test_jitter_shifts_the_lines_by_the_stated_pixels(halves: np.ndarray) -> None:
    grooves = {"groove_depth_um": 0.19, "detector_asymmetry": 0, "probe_um": 0.05}
    rest = edge_position(shoot(halves, **grooves))
    shifts = edge_position(shoot(halves, line_jitter_px=2, **grooves)) - rest
    assert shifts.std() == pytest.approx(2, rel=0.2)
    assert abs(np.corrcoef(shifts[1:], shifts[:-1])[0, 1]) < 0.3  # each line for itself


def test_drift_carries_the_boundaries_along_steadily() -> None:
    upright = np.repeat([[1, 2]], 100, axis=1).repeat(200, axis=0)
    grooves = {"groove_depth_um": 0.19, "detector_asymmetry": 0, "probe_um": 0.05}
    rest = edge_position(shoot(upright, **grooves))
    ways = []
    for seed in range(12):
        shift = edge_position(shoot(upright, seed, drift_px=8, **grooves)) - rest
        slope, middle = np.polyfit(np.linspace(-0.5, 0.5, 200), shift, 1)
        assert np.abs(shift - slope * np.linspace(-0.5, 0.5, 200) - middle).max() < 0.4
        assert middle == pytest.approx(0, abs=0.1)  # the frame's middle line stays
        ways.append(slope)
    # the direction is random, so the x component's mean square is half that of the whole way
    assert np.abs(ways).max() <= 8.1
    assert np.sqrt(2 * np.mean(np.square(ways))) == pytest.approx(8, rel=0.3)


def test_charging_trails_follow_bright_features_along_the_scan_only() -> None:
    labels = np.ones((60, 200), np.int32)
    labels[25:35, 60:80] = 2
    for seed in range(50):  # the first draw in which the patch is clearly brighter
        plain = shoot(labels, seed, channelling=0.2)
        if plain[30, 70] > plain[0, 0] + 40:
            break
    for charging, sign in ((0.5, 1), (-0.5, -1)):
        change = sign * (shoot(labels, seed, channelling=0.2, charging=charging) - plain)
        assert (change[25:35, :60] <= 1).all()
        assert (change[:25] <= 1).all()
        assert change[25:35, 81].min() > 3
        decay = change[25:35, 81:].mean(0)
        assert decay[20] / decay[0] == pytest.approx(np.exp(-1), abs=0.1)  # charging_length_um = 1 um = 20 px


# ----------------------------------------------------------------------------------------- the session


def test_boundary_lines_are_closed_and_thin(grains: np.ndarray) -> None:
    line = boundary_lines(grains)
    pieces = measure.label(~line, connectivity=1)
    for piece in range(1, pieces.max() + 1):
        assert np.unique(grains[pieces == piece]).size == 1
    assert np.median(2 * ndi.distance_transform_edt(line)[line]) <= 4
    upright = boundary_lines(np.repeat([[1, 2]], 20, axis=1).repeat(9, axis=0))
    assert (upright.sum(1) == 3).all()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Written:
    config = VirtualSession(micrographs=2, held_out=1, size=192, grain_diameter_um=1.6)
    return config, write_session(config, tmp_path_factory.mktemp("sem") / "session")


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_session_holds_what_it_says(session: Written) -> None:
    config, folder = session
    assert list(files(folder)) == [
        "held_out/images/vsem_h000.tif", "held_out/masks/vsem_h000.png",
        "micrographs/vsem_000.tif", "micrographs/vsem_001.tif", "session.json"]
    about = json.loads((folder / "session.json").read_text())
    assert about["virtual"] is True
    assert VirtualSession.model_validate(about["config"]) == config


def test_same_config_same_bytes_and_no_two_fields_alike(session: Written, tmp_path: Path) -> None:
    config, folder = session
    again = files(write_session(config, tmp_path / "again"))
    assert again == files(folder)
    images = [data for name, data in again.items() if name.endswith(".tif")]
    assert len(set(images)) == len(images)


def test_more_micrographs_leave_all_others_as_they_are(session: Written, tmp_path: Path) -> None:
    config, folder = session
    larger = config.model_copy(update={"micrographs": 3})
    more = files(write_session(larger, tmp_path / "more"))
    for name in ("micrographs/vsem_001.tif", "held_out/masks/vsem_h000.png", "held_out/images/vsem_h000.tif"):
        assert more[name] == files(folder)[name]


def test_the_pixel_size_stands_where_fei_instruments_put_it(session: Written) -> None:
    config, folder = session
    with tifffile.TiffFile(folder / "micrographs" / "vsem_000.tif") as tif:
        about = tif.fei_metadata
        assert tif.pages[0].shape == (config.size + 2 * (config.size // 32), config.size)
        assert tif.pages[0].dtype == np.uint8
    assert about is not None
    assert about["Scan"]["PixelWidth"] == pytest.approx(config.pixel_size_um * 1e-6)
    assert about["Image"]["ResolutionY"] == config.size
    assert about["System"]["Type"] == "Virtual SEM"


def test_the_projects_reader_takes_the_session(session: Written) -> None:
    from graincast.microscope.info_bar import find_info_bar
    from graincast.microscope.reader import read_micrograph

    config, folder = session
    for path in folder.rglob("*.tif"):
        micrograph = read_micrograph(path)
        assert micrograph.pixel_size_um == pytest.approx(config.pixel_size_um)
        assert find_info_bar(micrograph.image, micrograph.scan_rows) == config.size


def test_info_bar_scale_is_true(session: Written) -> None:
    config, folder = session
    bar = tifffile.imread(folder / "micrographs" / "vsem_000.tif")[config.size:]
    assert (bar[0] == 0).mean() > 0.9
    runs = [measure.regionprops(measure.label(row[None] > 0)) for row in bar]
    longest = max(region.area for row in runs for region in row)
    assert longest * config.pixel_size_um == pytest.approx(2.0, abs=2 * config.pixel_size_um)


def test_masks_fit_their_images_and_lie_on_the_dark_grooves(session: Written) -> None:
    _, folder = session
    for path in (folder / "held_out" / "images").glob("*.tif"):
        image = tifffile.imread(path).astype(float)
        mask = iio.imread(folder / "held_out" / "masks" / f"{path.stem}.png")
        assert mask.dtype == np.uint8
        assert mask.shape == image.shape
        assert set(np.unique(mask)) == {0, 255}

        def darkness(dy: int, dx: int, image: np.ndarray = image, line: np.ndarray = mask > 0) -> float:
            return float(image.mean() - image[np.roll(line, (dy, dx), (0, 1))].mean())

        assert darkness(0, 0) > 5
        assert darkness(0, 0) > max(darkness(*shift) for shift in ((3, 0), (-3, 0), (0, 3), (0, -3)))
        pieces = measure.label(mask == 0, connectivity=1)  # of 46 grains, some cut by the field's edge
        assert 40 <= (np.bincount(pieces[pieces > 0]) >= 30).sum() <= 75


def test_masks_follow_the_drift(tmp_path: Path) -> None:
    config = VirtualSession(micrographs=1, held_out=1, size=192, grain_diameter_um=2.4, sem=only(
        groove_depth_um=0.2, detector_asymmetry=0, drift_px=24))
    folder = write_session(config, tmp_path / "session") / "held_out"
    image = tifffile.imread(folder / "images" / "vsem_h000.tif").astype(float)
    line = iio.imread(folder / "masks" / "vsem_h000.png") > 0
    for rows in (slice(10, 50), slice(-50, -10)):
        assert image[rows][line[rows]].mean() < image[rows][~line[rows]].mean() - 10


def test_a_field_without_room_for_grains_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grain_diameter_um"):
        write_session(VirtualSession(size=64, grain_diameter_um=4), tmp_path / "session")
    assert list(tmp_path.iterdir()) == []
