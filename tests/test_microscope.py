"""Reading, describing, scaling and ingesting micrographs: made files with known content, and real ones where present."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import imagecodecs
import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy import ndimage as ndi
from scipy.signal import lfilter
from scipy.spatial import cKDTree
from skimage.measure import label
from skimage.morphology import h_minima

from graincast.config import Ingest
from graincast.errors import UserError
from graincast.microscope.gaps import gap_mask, gap_width
from graincast.microscope.info_bar import find_info_bar
from graincast.microscope.ingest import ingest
from graincast.microscope.preparation import Preparation, prepare, to_grey8
from graincast.microscope.quality import describe, noise_level, without_shading
from graincast.microscope.reader import PHYSICAL_FIELDS, Micrograph, find_micrographs, read_micrograph
from graincast.microscope.scale import _count_deep_minima, estimate_grain_diameter

REAL = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real micrographs (../shared/data) are not here")


def grains(shape=(300, 300), diameter=30.0, seed=0, contrast="grooves", noise=0.02):
    """A Voronoi micrograph in [0, 1]; returns it with the diameter of the circle of mean grain area."""
    rng = np.random.default_rng(seed)
    padding = 2 * diameter
    spans = [side + 2 * padding for side in shape]
    count = int(np.prod(spans) / (np.pi * diameter**2 / 4))
    seeds = rng.uniform(-padding, np.array(spans) - padding, (count, 2))
    for _ in range(2):  # Lloyd's relaxation: grains of similar size
        points = rng.uniform(-padding, np.array(spans) - padding, (40 * count, 2))
        nearest = cKDTree(seeds).query(points)[1]
        members = np.maximum(np.bincount(nearest, minlength=count), 1)
        seeds = np.stack([np.bincount(nearest, points[:, i], count) / members for i in (0, 1)], 1)
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    distances, owners = cKDTree(seeds).query(np.stack([rows, columns], -1).reshape(-1, 2), k=2)
    line = np.exp(-(np.diff(distances)[:, 0] / (0.09 * diameter + 1)) ** 2).reshape(shape)
    gap = (np.diff(distances)[:, 0] < 0.3 * diameter).reshape(shape)
    grey = {"grooves": 0.6 - 0.3 * line, "bright": 0.3 + 0.3 * line, "gaps": 0.8 - gap * (0.6 - 0.1 * rng.standard_normal(shape)),
            "channelling": 0.5 + 0.12 * rng.standard_normal(count)[owners[:, 0]].reshape(shape)}[contrast]
    image = ndi.gaussian_filter(grey, 1) + noise * rng.standard_normal(shape)
    inside = ((seeds >= 0) & (seeds < shape)).all(1).sum()
    return np.clip(image, 0, 1).astype(np.float32), float(np.sqrt(4 * np.prod(shape) / (np.pi * inside)))


def with_bar(image, rows=40, background=0.0):
    """The image with an info bar below it: text of the other colour, a frame line, a scale bar."""
    bar = np.full((rows, image.shape[1]), background, np.float32)
    text = np.random.default_rng(1).random((rows // 4, image.shape[1] // 2)) < 0.45
    bar[rows // 3:rows // 3 + rows // 4, 10:10 + text.shape[1]][text] = 1 - background
    bar[rows - 6:rows - 3, image.shape[1] * 2 // 3:-10] = 1 - background
    return np.vstack([image, bar])


def to_bytes(image):
    return np.rint(255 * image).astype(np.uint8)


FEI = """[User]\r\nUser=Jane Doe\r\nUserText=secret sample\r\n[System]\r\nSystemType=Quanta\r\n[Beam]\r\nHV=15000\r\nSpot=3.5
[EBeam]\r\nWD=0.0106168\r\n[Detectors]\r\nNumber=1\r\nName=ETD\r\n[Scan]\r\nPixelWidth=2.9e-08\r\nPixelHeight=2.9e-08\r\nDwelltime=3e-05
[Image]\r\nResolutionX=300\r\nResolutionY=300\r\n"""


def write_fei(path, image, text=FEI):
    tifffile.imwrite(path, to_bytes(image), metadata=None, extratags=[(34682, "s", 0, text, True)])


# ------------------------------------------------------------------------------------------------------- reader


@pytest.mark.parametrize(("dtype", "full_scale"), [(np.uint8, 255), (np.uint16, 65535)])
@pytest.mark.parametrize("suffix", [".tif", ".png", ".TIFF", ".PNG"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_fractions_of_full_scale(tmp_path, dtype, full_scale, suffix, channels):
    grey = np.linspace(0, full_scale, 40 * 30).reshape(40, 30).astype(dtype)
    stored = grey if channels == 1 else np.dstack([grey] * 3 + [np.full_like(grey, full_scale // 2)] * (channels - 3))
    path = tmp_path / f"ramp{suffix}"
    if suffix.lower() == ".png":
        iio.imwrite(path, stored, extension=".png") if dtype == np.uint8 or channels == 1 else path.write_bytes(
            imagecodecs.png_encode(stored))
    else:
        tifffile.imwrite(path, stored, photometric="minisblack" if channels == 1 else "rgb")
    micrograph = read_micrograph(path)
    assert micrograph.image.dtype == np.float32
    assert micrograph.image.shape == (40, 30)
    assert micrograph.bit_depth == 8 * grey.itemsize
    assert micrograph.pixel_size_um is None
    np.testing.assert_allclose(micrograph.image, grey / full_scale, atol=1e-6)


def test_colour_becomes_luminance(tmp_path):
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[..., 1] = 255
    tifffile.imwrite(tmp_path / "green.tif", colour, photometric="rgb")
    np.testing.assert_allclose(read_micrograph(tmp_path / "green.tif").image, 0.7154, atol=1e-4)


def test_palette_planes_inverse_and_packed_bits(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    backwards = np.tile(np.arange(255, -1, -1, dtype=np.uint16) * 257, (3, 1))
    tifffile.imwrite(tmp_path / "palette.tif", ramp, photometric="palette", colormap=backwards)
    palette = read_micrograph(tmp_path / "palette.tif")
    np.testing.assert_allclose(palette.image, 1 - ramp / 255, atol=1e-6)
    assert palette.bit_depth == 8
    tifffile.imwrite(tmp_path / "white0.tif", ramp, photometric="miniswhite")
    np.testing.assert_allclose(read_micrograph(tmp_path / "white0.tif").image, 1 - ramp / 255, atol=1e-6)
    tifffile.imwrite(tmp_path / "planes.tif", np.stack([ramp] * 3), photometric="rgb", planarconfig="separate")
    np.testing.assert_allclose(read_micrograph(tmp_path / "planes.tif").image, ramp / 255, atol=1e-6)


def test_jpeg_is_close(tmp_path):
    image, _ = grains(noise=0)
    iio.imwrite(tmp_path / "a.jpg", to_bytes(image), quality=95)
    assert np.abs(read_micrograph(tmp_path / "a.jpg").image - image).mean() < 0.01


def test_float_tiff_is_kept_or_stretched(tmp_path):
    values = np.random.default_rng(0).random((20, 20)).astype(np.float32)
    tifffile.imwrite(tmp_path / "unit.tif", values)
    np.testing.assert_array_equal(read_micrograph(tmp_path / "unit.tif").image, values)
    tifffile.imwrite(tmp_path / "counts.tif", 500 * values - 20)
    stretched = read_micrograph(tmp_path / "counts.tif").image
    assert stretched.min() == 0
    assert stretched.max() == 1
    assert np.corrcoef(stretched.ravel(), values.ravel())[0, 1] > 0.9999


def test_first_page_counts(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([np.full((9, 8), v, np.uint8) for v in (51, 102, 204)]),
                     photometric="minisblack")
    micrograph = read_micrograph(tmp_path / "stack.tif")
    np.testing.assert_allclose(micrograph.image, 0.2, atol=1e-6)
    assert micrograph.instrument["pages"] == 3


def test_fei_metadata_and_nothing_personal(tmp_path):
    write_fei(tmp_path / "fei.tif", with_bar(grains()[0]))
    micrograph = read_micrograph(tmp_path / "fei.tif")
    assert micrograph.pixel_size_um == pytest.approx(0.029)
    assert micrograph.scan_rows == 300
    assert micrograph.instrument == {"model": "Quanta", "accelerating_voltage_kv": 15.0, "detector": "ETD", "spot": 3.5,
                                     "working_distance_mm": 10.6168, "dwell_time_us": 30.0}


@pytest.mark.parametrize(("unit", "per_unit", "expected"), [
    ("CENTIMETER", 1e4 / 0.05, 0.05), ("INCH", 25400 / 0.05, 0.05),  # a microscope's
    ("INCH", 72, None), ("INCH", 96, None), ("INCH", 300, None), ("INCH", 1200, None), ("CENTIMETER", 28.35, None),
    ("CENTIMETER", 118.11, None), ("NONE", 200000, None)])
def test_resolution_tags_are_believed_only_where_plausible(tmp_path, unit, per_unit, expected):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 9), np.uint8), resolution=(per_unit, per_unit), resolutionunit=unit)
    assert read_micrograph(tmp_path / "a.tif").pixel_size_um == (expected and pytest.approx(expected, rel=1e-4))


def test_imagej_and_ome_pixel_sizes(tmp_path):
    image = np.zeros((9, 9), np.uint8)
    tifffile.imwrite(tmp_path / "ij.tif", image, imagej=True, resolution=(20, 20), metadata={"unit": "um"})
    assert read_micrograph(tmp_path / "ij.tif").pixel_size_um == pytest.approx(0.05)
    tifffile.imwrite(tmp_path / "nm.tif", image, imagej=True, resolution=(0.1, 0.1), metadata={"unit": "nm"})
    assert read_micrograph(tmp_path / "nm.tif").pixel_size_um == pytest.approx(0.01)
    tifffile.imwrite(tmp_path / "dpi.tif", image, imagej=True, resolution=(72, 72), metadata={"unit": "inch"})
    assert read_micrograph(tmp_path / "dpi.tif").pixel_size_um is None
    tifffile.imwrite(tmp_path / "a.ome.tif", image, metadata={"axes": "YX", "PhysicalSizeX": 40, "PhysicalSizeXUnit": "nm"})
    assert read_micrograph(tmp_path / "a.ome.tif").pixel_size_um == pytest.approx(0.04)


def test_makers_format_through_rosettasciio(tmp_path):
    from rsciio.ripple import file_writer

    data = np.random.default_rng(0).integers(0, 65535, (12, 10)).astype(np.uint16)
    axes = [{"name": n, "size": s, "scale": 30.0, "offset": 0, "units": "nm", "index_in_array": i, "navigate": False,
             "_type": "UniformDataAxis"} for i, (n, s) in enumerate(zip("yx", data.shape, strict=True))]
    file_writer(str(tmp_path / "a.rpl"), {"data": data, "axes": axes, "metadata": {"Signal": {}, "General": {}},
                                          "original_metadata": {}, "attributes": {}})
    micrograph = read_micrograph(tmp_path / "a.rpl")
    np.testing.assert_allclose(micrograph.image, data / 65535, atol=1e-6)
    assert micrograph.pixel_size_um == pytest.approx(0.03)


def broken_files(folder):
    """A file for each way to be unreadable, with a word that its message must have."""
    def new(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    tifffile.imwrite(folder / "whole.tif", np.zeros((64, 64), np.uint8))
    whole = (folder / "whole.tif").read_bytes()
    iio.imwrite(folder / "whole.jpg", np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8))
    jpeg = (folder / "whole.jpg").read_bytes()
    iio.imwrite(folder / "whole.png", np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8))
    png = (folder / "whole.png").read_bytes()
    for name in ("whole.tif", "whole.jpg", "whole.png"):
        (folder / name).unlink()
    hole = np.full((8, 8), 0.5, np.float32)
    hole[3, 4] = np.nan
    tifffile.imwrite(folder / "nan.tif", hole)
    hole[3, 4] = np.inf
    tifffile.imwrite(folder / "inf.tif", hole)
    tifffile.imwrite(folder / "complex.tif", np.ones((8, 8), np.complex64))
    return [
        (new("text.tif", b"this is no image at all, only text\n" * 20), "cannot be read as a TIF"),
        (new("text.png", b"neither is this\n" * 20), "cannot be read as a PNG"),
        (new("text.dm3", b"nor this\n" * 20), "cannot be read as a DM3"),
        (new("cut.tif", whole[:-100]), "truncated"),
        (new("cut_early.tif", whole[:100]), "cannot be read"),
        (new("cut.jpg", jpeg[:len(jpeg) // 2]), "truncated"),
        (new("cut.png", png[:len(png) // 2]), "cannot be read"),
        (new("empty.tif", b""), "is empty"),
        (folder / "nan.tif", "NaN"), (folder / "inf.tif", "infinite"), (folder / "complex.tif", "complex"),
        (new("notes.docx", b"x"), "unsupported extension"),
        (folder / "absent.tif", "is no file"),
    ]


def test_unreadable_files_are_named(tmp_path):
    for path, word in broken_files(tmp_path):
        with pytest.raises(UserError, match=word) as caught:
            read_micrograph(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_find_micrographs(tmp_path):
    for name in ("b/2.TIF", "b/1.png", "a.jpeg", ".hidden.tif", ".git/x.tif", "notes.txt", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in find_micrographs(tmp_path)] == ["a.jpeg", "b/1.png", "b/2.TIF"]
    assert find_micrographs(tmp_path / "a.jpeg") == [tmp_path / "a.jpeg"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no micrographs"):
        find_micrographs(tmp_path / "none")
    with pytest.raises(UserError, match="does not exist"):
        find_micrographs(tmp_path / "typo")
    with pytest.raises(UserError, match="unsupported extension"):
        find_micrographs(tmp_path / "notes.txt")


# ----------------------------------------------------------------------------------------------------- info bar


@pytest.mark.parametrize("background", [0.0, 1.0])
@pytest.mark.parametrize("rows", [20, 40, 70])
@pytest.mark.parametrize("trailing", [0, 2])
@pytest.mark.parametrize("quality", [None, 80])
def test_info_bar_is_found_to_the_row(tmp_path, background, rows, trailing, quality):
    image, _ = grains((500, 400))
    barred = np.vstack([with_bar(image, rows, background), image[:trailing]])  # Zeiss leaves rows of image below its bar
    if quality:
        iio.imwrite(tmp_path / "a.jpg", to_bytes(barred), quality=quality)
        barred = read_micrograph(tmp_path / "a.jpg").image
    assert abs(find_info_bar(barred) - 500) <= (1 if quality else 0)


@pytest.mark.parametrize("contrast", ["grooves", "bright", "channelling"])
def test_no_bar_is_found_where_there_is_none(contrast):
    image, _ = grains((200, 300), contrast=contrast)
    assert find_info_bar(image) == 200
    crushed = np.clip(2.5 * image - 0.8, 0, 1)  # large parts black or white
    assert find_info_bar(crushed) == 200
    assert find_info_bar(np.zeros((200, 100), np.float32)) == 200
    assert find_info_bar(np.zeros((1, 1), np.float32)) == 1


def test_metadata_decide_only_when_consistent():
    image = with_bar(grains((500, 400))[0], 40)
    assert find_info_bar(image, 490) == 490
    assert find_info_bar(image, 540) == 500  # resaved: the scan is said to fill the file
    assert find_info_bar(image, 100) == 500  # cropped
    assert find_info_bar(image[:400], 500) == 400


# ------------------------------------------------------------------------------------------------------ quality


@pytest.mark.parametrize("sigma", [0.01, 0.03, 0.08])
def test_noise_is_measured(sigma):
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:300, :300] / 300
    smooth = 0.4 + 0.2 * rows + 0.1 * columns**2
    assert noise_level(smooth + sigma * rng.standard_normal(smooth.shape)) == pytest.approx(sigma, rel=0.03)


def test_descriptors_respond_to_what_they_name():
    image, _ = grains((400, 400), diameter=40)
    plain = describe(image)
    assert describe(ndi.gaussian_filter(image, 3))["sharpness"] < plain["sharpness"]
    assert describe(0.5 + 0.5 * (image - 0.5))["contrast"] == pytest.approx(0.5 * plain["contrast"], rel=1e-3)
    assert describe(np.where(image > 0.55, 1, image))["saturated_fraction"] == pytest.approx((image > 0.55).mean(), abs=1e-6)
    assert describe(image + np.linspace(0, 0.3, 400))["shading"] > plain["shading"] + 0.05
    assert describe(np.full((9, 9), 0.5))["entropy"] == 0
    assert all(np.isfinite(list(describe(np.full((9, 9), 0.5)).values())))


# -------------------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize(("contrast", "tolerance"), [("grooves", 0.1), ("bright", 0.1), ("channelling", 0.3)])
@pytest.mark.parametrize("diameter", [24, 45])
def test_grain_diameter_without_labels(contrast, tolerance, diameter):
    image, truth = grains((400, 400), diameter, contrast=contrast)
    assert estimate_grain_diameter(image) == pytest.approx(truth, rel=tolerance)


@pytest.mark.parametrize("diameter", [45, 70])
def test_gaps_are_no_grains(diameter):
    image, truth = grains((400, 400), diameter, contrast="gaps")
    assert estimate_grain_diameter(image) == pytest.approx(truth, rel=0.2)


@pytest.mark.parametrize(("contrast", "width"), [("gaps", 0.3), ("grooves", 0.12), ("channelling", 0)])
def test_gap_width_is_told_from_the_image(contrast, width):
    image, truth = grains((400, 400), 45, contrast=contrast)
    assert gap_width([image], truth) == pytest.approx(width, abs=0.06)
    assert gap_width([40 + 100 * image], truth) == pytest.approx(gap_width([image], truth), abs=0.01)
    assert gap_width([1 - image], truth) == 0


def test_gaps_are_masked():
    image, truth = grains((300, 300), 45, contrast="gaps", noise=0)
    dark = ndi.gaussian_filter(image, 2) < 0.5
    masked = gap_mask(image, truth)
    assert masked.shape == image.shape
    assert (masked & dark).sum() > 0.85 * dark.sum()
    assert (masked & ~dark).sum() < 0.1 * dark.sum()


def test_basins_are_those_of_scikit_image():
    for seed in range(4):
        relief = ndi.gaussian_filter(np.random.default_rng(seed).random((80, 70)), 1.5)
        relief = np.rint(1000 * (relief - relief.min()) / np.ptp(relief)).astype(np.uint16)
        order = np.argsort(relief, axis=None, kind="stable")
        for depth in (10, 100, 300):
            expected = label(h_minima(relief.astype(int), depth + 1)).max()
            assert _count_deep_minima(relief, order, depth, np.ones(relief.size, bool)) == expected


@pytest.mark.parametrize("sigma", [0, 1, 3])
def test_smoothed_noise_is_no_grain_structure(sigma):
    noise = ndi.gaussian_filter(np.random.default_rng(2).normal(0.5, 0.2, (300, 300)), sigma)
    with pytest.raises(ValueError, match="grain"):
        estimate_grain_diameter(noise)


@pytest.mark.parametrize("contrast", ["grooves", "channelling"])
def test_grain_diameter_scales_with_the_image(contrast):
    image, _ = grains((400, 400), 30, contrast=contrast)
    zoomed = ndi.zoom(image, 1.5, order=3)
    assert estimate_grain_diameter(zoomed) / estimate_grain_diameter(image) == pytest.approx(1.5, rel=0.08)


def test_grain_diameter_ignores_gain_offset_and_polarity():
    image, _ = grains((400, 400), 30)
    diameter = estimate_grain_diameter(image)
    assert estimate_grain_diameter(0.3 * image + 0.2) == pytest.approx(diameter, rel=1e-3)
    assert estimate_grain_diameter(1 - image) == pytest.approx(diameter, rel=0.03)


@pytest.mark.parametrize("image", [
    np.full((200, 200), 0.5), np.tile(np.linspace(0, 1, 200), (200, 1)), np.zeros((3, 3)),
    np.random.default_rng(0).normal(0.5, 0.05, (300, 300)), np.random.default_rng(1).normal(0.5, 0.05, (640, 500))],
    ids=["constant", "ramp", "tiny", "noise", "noise_large"])
def test_structureless_images_have_no_grain_diameter(image):
    with pytest.raises(ValueError, match="grain"):
        estimate_grain_diameter(image.astype(np.float32))


# ------------------------------------------------------------------------------------------------------- ingest


def test_prepare_keeps_polarity_and_shape():
    image, _ = grains((300, 240))
    before = image.copy()
    prepared = prepare(image, 0.5, 0.01, 60)
    assert prepared.dtype == np.uint8
    assert prepared.shape == (150, 120)
    np.testing.assert_array_equal(image, before)
    halved = image.reshape(150, 2, 120, 2).mean((1, 3))
    assert np.corrcoef(prepared.ravel(), halved.ravel())[0, 1] > 0.9
    assert prepare(image, 1, 0, 60).std() > 0


def test_resampling_does_not_alias():
    stripes = np.tile(np.tile([0.0, 1.0], 200), (400, 1)).astype(np.float32)
    image = 0.5 + 0.4 * (stripes - 0.5)
    image[:, :2], image[:, -2:] = 0, 1  # fixes the stretch
    assert prepare(image, 0.3, 0, 60)[:, 10:-10].std() < 3


def test_resampling_is_an_identity_at_scale_one():
    image, _ = grains((100, 90))
    low, high = np.percentile(image, [0.1, 99.9])
    np.testing.assert_array_equal(prepare(image, 1.0, 0, 60), np.rint(255 * np.clip((image - low) / (high - low), 0, 1)))


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A mixed folder: two magnifications with pixel sizes, PNGs without, and everything that must be refused."""
    folder = tmp_path_factory.mktemp("data")
    for sub in ("monday", "tuesday", "bad"):
        (folder / sub).mkdir()
    write_fei(folder / "monday" / "1.tif", with_bar(grains(diameter=40, seed=1)[0]))
    write_fei(folder / "monday" / "2.tif", with_bar(grains(diameter=20, seed=2)[0]), FEI.replace("2.9e-08", "5.8e-08"))
    iio.imwrite(folder / "tuesday" / "1.png", to_bytes(with_bar(grains(diameter=30, seed=3)[0])))
    iio.imwrite(folder / "tuesday" / "1.jpg", to_bytes(grains(diameter=30, seed=4)[0]))
    for path, _ in broken_files(folder / "bad"):
        assert path.parent.name == "bad"
    image = grains()[0]
    tifffile.imwrite(folder / "bad" / "black.tif", np.zeros((200, 200), np.uint8))
    tifffile.imwrite(folder / "bad" / "saturated.tif", to_bytes(np.where(image > 0.5, 1, image)))
    tifffile.imwrite(folder / "bad" / "dot.tif", np.full((1, 1), 7, np.uint8))
    tifffile.imwrite(folder / "bad" / "small.tif", to_bytes(grains((70, 300), 40)[0]))
    tifffile.imwrite(folder / "bad" / "noise.tif", to_bytes(np.random.default_rng(0).normal(0.5, 0.05, (200, 200)).clip(0, 1)))
    return folder


def test_ingest_of_a_mixed_folder(session, tmp_path):
    result = ingest(Ingest(), session, 24.0, tmp_path / "set")
    rows = result.rows.set_index("source")
    assert result.kind == "micrographs"
    assert set(rows.index) == {"monday/1.tif", "monday/2.tif", "tuesday/1.png", "tuesday/1.jpg"}
    assert rows.id.is_unique
    assert rows.session.to_dict() == {name: name.split("/")[0] for name in rows.index}
    preparation = Preparation.from_dict(result.info["preparation"])
    known = rows.loc[["monday/1.tif", "monday/2.tif"]]
    np.testing.assert_allclose(known.pixel_size_um, preparation.target_pixel_size_um)
    np.testing.assert_allclose(known.original_pixel_size_um, [0.029, 0.058])
    np.testing.assert_allclose(known.scale, known.original_pixel_size_um / preparation.target_pixel_size_um)
    unknown = rows.loc[["tuesday/1.png", "tuesday/1.jpg"]]
    assert unknown.pixel_size_um.isna().all()
    small = result.refused.set_index("source").loc[["bad/small.tif"]]  # passed the first checks, had its say in the scale
    np.testing.assert_allclose(unknown.scale, 24 / pd.concat([unknown, small]).grain_diameter_px.median())
    assert rows.bar_row.to_dict() == dict.fromkeys(rows.index, 300)
    np.testing.assert_allclose(rows.height, np.rint(300 * rows.scale))
    for i in range(len(result)):
        assert estimate_grain_diameter(result.image(i) / np.float32(255)) == pytest.approx(24, rel=0.25)
    result.verify()


def test_ingest_refuses_with_reasons(session, tmp_path):
    refused = ingest(Ingest(), session, 24.0, tmp_path / "set").refused.set_index("source").refused
    expected = {"text.tif": "cannot be read", "text.png": "cannot be read", "text.dm3": "cannot be read",
                "cut.tif": "truncated", "cut_early.tif": "cannot be read", "cut.jpg": "truncated", "cut.png": "cannot be read",
                "empty.tif": "is empty", "nan.tif": "NaN", "inf.tif": "infinite", "complex.tif": "complex",
                "black.tif": "no contrast", "saturated.tif": "saturated", "dot.tif": "too small", "small.tif": "too small",
                "noise.tif": "structureless"}
    assert set(refused.index) == {f"bad/{name}" for name in expected}
    for name, word in expected.items():
        assert word in refused[f"bad/{name}"], (name, refused[f"bad/{name}"])
    assert not refused.str.contains(str(session), regex=False).any()


def test_nothing_personal_or_absolute_is_written(session, tmp_path):
    ingest(Ingest(), session, 24.0, tmp_path / "set")
    everything = b"".join(p.read_bytes() for p in (tmp_path / "set").iterdir())
    for secret in (b"Jane", b"secret", str(session).encode()):
        assert secret not in everything


def test_same_input_same_bytes(session, tmp_path):
    first = ingest(Ingest(), session, 24.0, tmp_path / "a").digest
    assert ingest(Ingest(), session, 24.0, tmp_path / "b").digest == first


def test_pixel_size_from_the_configuration_and_required(session, tmp_path):
    told = ingest(Ingest(pixel_size_um=0.04), session, 24.0, tmp_path / "told")
    assert told.rows.pixel_size_um.nunique() == 1
    assert told.rows.set_index("source").original_pixel_size_um["tuesday/1.png"] == 0.04
    strict = ingest(Ingest(require_pixel_size=True), session, 24.0, tmp_path / "strict")
    assert set(strict.rows.source) == {"monday/1.tif", "monday/2.tif"}
    assert "no pixel size" in strict.refused.set_index("source").refused["tuesday/1.png"]


def test_a_file_that_cannot_be_sized_takes_the_scale_of_the_others(session, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_fei(folder / "grains.tif", grains(diameter=30)[0])
    few, _ = grains(diameter=400)
    write_fei(folder / "few.tif", few)
    with pytest.raises(ValueError, match="grain"):
        estimate_grain_diameter(few)
    result = ingest(Ingest(), folder, 24.0, tmp_path / "set")
    rows = result.rows.set_index("source")
    assert np.isnan(rows.grain_diameter_px["few.tif"])
    assert rows.scale["few.tif"] == rows.scale["grains.tif"]
    (folder / "grains.tif").unlink()
    with pytest.raises(UserError, match=r"few\.tif: scale unknown.*ingest\.scale"):
        ingest(Ingest(), folder, 24.0, tmp_path / "set2")
    assert len(ingest(Ingest(scale=0.5), folder, 24.0, tmp_path / "set3")) == 1


def test_excluded_folder_counts_only_within(tmp_path):
    for name in ("a.png", "masks/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        iio.imwrite(tmp_path / name, to_bytes(grains()[0]))
    assert find_micrographs(tmp_path, exclude=tmp_path / "masks") == [tmp_path / "a.png"]
    assert find_micrographs(tmp_path / "masks", exclude=tmp_path) == [tmp_path / "masks" / "a.png"]
    with pytest.raises(UserError, match="holds no micrographs outside"):
        find_micrographs(tmp_path, exclude=tmp_path)
    result = ingest(Ingest(), tmp_path, 24.0, tmp_path / "set", exclude=tmp_path / "masks")
    assert list(result.rows.source) == ["a.png"]


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_gate_judges_the_range_that_the_detector_uses(bits):
    image, _ = grains()
    stored = (np.rint(image * (2**bits - 1)) / 65535).astype(np.float32)
    assert describe(stored, 16)["contrast"] == pytest.approx(describe(image)["contrast"], rel=0.01)
    preparation = Preparation(None, 1.0, 24.0, 0.01, 96.0, True, 64, 0.5, 0.01, None)
    assert preparation.inspect(Micrograph(stored, 16)).refused is None
    flat = np.full((200, 200), 0.4 * (2**bits - 1) / 65535, np.float32)
    flat[0, 0] = 1  # a hot pixel is no contrast
    assert "no contrast" in preparation.inspect(Micrograph(flat, 16)).refused
    clipped = np.minimum(3 * stored, (2**bits - 1) / 65535)
    assert "saturated" in preparation.inspect(Micrograph(clipped, 16)).refused


def test_grey8_shows_any_range_and_leaves_the_bar_out():
    image, _ = grains()
    dim = with_bar(image / 16)
    field = np.arange(dim.shape[0])[:, None] < 300 + np.zeros(dim.shape[1])
    picture = to_grey8(dim, field)
    np.testing.assert_array_equal(picture[:300], to_grey8(image / 16))
    np.testing.assert_allclose(picture[:300].astype(int), to_grey8(image), atol=1)


def test_scale_has_bounds():
    preparation = Preparation(0.05, None, 24.0, 0.01, 96.0, True, 64, 0.5, 0.01, None)
    field = np.zeros((3000, 4000), np.float32)
    assert preparation.scale_for(0.1, field) == pytest.approx(2)
    for pixel_size, word in ((0.301, "magnification too low.*4.0 px"), (0.0005, "too small"), (0.2, "too large")):
        with pytest.raises(ValueError, match=word):
            preparation.scale_for(pixel_size, field)


def test_one_overview_does_not_stop_a_session(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_fei(folder / "grains.tif", grains(diameter=30)[0])
    write_fei(folder / "twin.tif", grains(diameter=30, seed=1)[0])
    write_fei(folder / "overview.tif", grains(diameter=30, seed=2)[0], FEI.replace("2.9e-08", "2.9e-06"))
    result = ingest(Ingest(), folder, 24.0, tmp_path / "set")
    assert set(result.rows.source) == {"grains.tif", "twin.tif"}
    assert "magnification too low" in result.refused.refused[0]


def test_unreadable_file_is_a_refused_row(tmp_path):
    for name in ("a.png", "locked.png"):
        iio.imwrite(tmp_path / name, to_bytes(grains()[0]))
    (tmp_path / "locked.png").chmod(0)
    if os.access(tmp_path / "locked.png", os.R_OK):
        pytest.skip("this user may read everything")
    result = ingest(Ingest(), tmp_path, 24.0, tmp_path / "set")
    assert "locked.png cannot be read: Permission denied" in result.refused.refused[0]


def test_scale_from_the_configuration(session, tmp_path):
    fixed = ingest(Ingest(scale=0.75), session / "tuesday", 24.0, tmp_path / "fixed")
    np.testing.assert_allclose(fixed.rows.scale, 0.75)
    assert set(fixed.rows.session) == {"tuesday"}
    one = ingest(Ingest(scale=0.5), session / "monday" / "1.tif", 24.0, tmp_path / "one")
    assert one.rows.pixel_size_um[0] == pytest.approx(0.058)
    assert one.info["preparation"]["target_pixel_size_um"] == pytest.approx(0.058)


def test_nothing_accepted_is_an_error_that_leaves_nothing(session, tmp_path):
    with pytest.raises(UserError, match=r"not one image was accepted.*black\.tif: no contrast"):
        ingest(Ingest(), session / "bad", 24.0, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_preparation_of_new_files_follows_the_set(session, tmp_path):
    made = ingest(Ingest(), session, 24.0, tmp_path / "set")
    preparation = Preparation.from_dict(json.loads(json.dumps(made.info["preparation"])))
    for i, row in made.rows.iterrows():
        again = preparation.prepare(read_micrograph(session / row.source))
        np.testing.assert_array_equal(again.image, made.image(i))
        assert (again.scale, again.bar_row) == (row.scale, row.bar_row)
    only_known = replace(preparation, target_pixel_size_um=0.05, scale=None)
    image = read_micrograph(session / "tuesday" / "1.jpg")
    assert only_known.prepare(image).scale == pytest.approx(24 / estimate_grain_diameter(image.image))
    assert only_known.prepare(image, pixel_size_um=0.025).scale == pytest.approx(0.5)


# --------------------------------------------------------------------------------------- what is wrong with a folder


def folder_of(path, **images):
    path.mkdir()
    for name, image in images.items():
        iio.imwrite(path / f"{name}.png", to_bytes(image))
    return path


def told(folder, out, config=None):
    """The warnings of a folder, and what its preparation says."""
    info = ingest(config or Ingest(), folder, 30.0, out).info
    return info["warnings"], info


def test_nothing_is_said_of_a_folder_of_one_kind(tmp_path):
    folder = folder_of(tmp_path / "data", **{f"i{seed}": grains(seed=seed)[0] for seed in range(4)})
    warnings, info = told(folder, tmp_path / "set")
    assert warnings == []
    assert info["preparation"]["bright_boundaries"] is False
    assert info["groups"] == [["i0.png", "i1.png", "i2.png", "i3.png"]]


def test_two_materials_are_named_file_by_file(tmp_path, caplog):
    ours = {f"a{seed}": grains(seed=seed)[0] for seed in range(3)}
    others = {f"b{seed}": grains(seed=seed, contrast="channelling")[0] for seed in range(2)}
    warnings, info = told(folder_of(tmp_path / "data", **ours, **others), tmp_path / "set")
    (sentence,) = (w for w in warnings if "materials" in w)
    assert "A = 3 files (a0.png, a1.png, a2.png); B = 2 files (b0.png, b1.png)" in sentence
    assert info["groups"] == [["a0.png", "a1.png", "a2.png"], ["b0.png", "b1.png"]]
    assert sentence in caplog.text


def test_two_magnifications_without_pixel_sizes_are_named(tmp_path):
    fine = {f"fine{seed}": grains((400, 400), 20, seed)[0] for seed in range(3)}
    coarse = {f"coarse{seed}": grains((400, 400), 50, seed)[0] for seed in range(3)}
    warnings, _ = told(folder_of(tmp_path / "data", **fine, **coarse), tmp_path / "set")
    (sentence,) = (w for w in warnings if "times in size" in w)
    assert "(coarse0.png, coarse1.png, coarse2.png)" in sentence
    assert "(fine0.png, fine1.png, fine2.png)" in sentence
    assert "ingest.pixel_size_um" in sentence


def test_magnifications_with_pixel_sizes_are_no_mixture(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for seed in range(2):
        write_fei(folder / f"high{seed}.tif", grains((400, 400), 50, seed)[0])
        field, _ = grains((600, 600), 50, seed + 2)  # half as large again, and seen by as many pixels
        write_fei(folder / f"low{seed}.tif", ndi.zoom(field, 2 / 3, order=1), FEI.replace("2.9e-08", "4.35e-08"))
    assert told(folder, tmp_path / "set")[0] == []


def test_an_inverted_micrograph_is_named_and_later_ones_are_refused(tmp_path):
    images = {f"i{seed}": grains(seed=seed)[0] for seed in range(3)}
    mixed, info = told(folder_of(tmp_path / "mixed", **images, inverted=grains(seed=9, contrast="bright")[0]), tmp_path / "mixed-set")
    (sentence,) = mixed
    assert "boundaries are bright in 1 file (inverted.png) and dark in 3 files" in sentence
    assert info["preparation"]["bright_boundaries"] is None
    _, info = told(folder_of(tmp_path / "dark", **images), tmp_path / "dark-set")
    preparation = Preparation.from_dict(info["preparation"])
    assert preparation.prepare(Micrograph(grains(seed=5)[0], 8)).image.size
    with pytest.raises(ValueError, match="inverted contrast: boundaries are bright here and dark in the micrographs of the training"):
        preparation.prepare(Micrograph(grains(seed=5, contrast="bright")[0], 8))
    # grains that differ in tone alone have no polarity to be wrong
    assert preparation.prepare(Micrograph(grains(seed=5, contrast="channelling")[0], 8)).image.size


def test_charging_is_named(tmp_path):
    images = {f"i{seed}": grains((400, 400), seed=seed, contrast="bright")[0] for seed in range(3)}
    keep = 0.99  # a trail of 100 px
    trail = lfilter([0, 1 - keep], [1, -keep], np.maximum(images["i1"] - images["i1"].mean(), 0), axis=1)
    images["i1"] = np.clip(images["i1"] + 8 * trail, 0, 1).astype(np.float32)
    warnings, _ = told(folder_of(tmp_path / "data", **images), tmp_path / "set")
    assert [w for w in warnings if "charging" in w and "1 file (i1.png)" in w]
    assert not [w for w in warnings if "materials" in w]


@pytest.mark.parametrize("kind", ["noise", "blank", "gradient", "noisy gradient", "vignette"])
def test_images_without_grains_are_refused(tmp_path, kind):
    rows, columns = np.mgrid[:300, :300] / 300
    noise = np.random.default_rng(0).standard_normal((300, 300))
    empty = {"noise": 0.5 + 0.1 * noise, "blank": np.full((300, 300), 0.4), "gradient": 0.2 + 0.5 * columns + 0.1 * rows,
             "noisy gradient": 0.2 + 0.5 * columns + 0.02 * noise,
             "vignette": 0.7 - 0.5 * ((columns - 0.5) ** 2 + (rows - 0.5) ** 2) + 0.01 * noise}[kind]
    folder = folder_of(tmp_path / "data", good=grains()[0], empty=np.clip(empty, 0, 1))
    result = ingest(Ingest(), folder, 30.0, tmp_path / "set")
    assert list(result.rows.source) == ["good.png"]
    assert result.refused.refused[0].startswith(("structureless: no grains", "no contrast"))


def test_too_few_grains_say_how_many_more_images(tmp_path):
    folder = folder_of(tmp_path / "data", only=grains((110, 110), 30)[0])
    with pytest.raises(UserError, match=r"data: the only micrograph shows about \d+ grains.*20 are the least; \d more like it, 50 grains in all"):
        ingest(Ingest(scale=1.0), folder, 30.0, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    more = folder_of(tmp_path / "more", **{f"i{seed}": grains((110, 110), 30, seed)[0] for seed in range(2)})
    (sentence,) = told(more, tmp_path / "set", Ingest(scale=1.0))[0]
    assert "2 micrographs together show about" in sentence
    assert "more like these, 50 grains in all" in sentence


def test_shading_is_taken_out_and_nothing_else():
    rows, columns = np.mgrid[:40, :60].astype(np.float32)
    surface = 3 + 0.2 * rows - 0.1 * columns + 0.01 * rows**2 + 0.003 * rows * columns - 0.002 * columns**2
    assert np.abs(without_shading(surface)).max() < 1e-3 * np.ptp(surface)
    waves = np.sin(rows) * np.sin(columns)
    np.testing.assert_allclose(without_shading(surface + waves), waves, atol=0.05)


# -------------------------------------------------------------------------------------------------- real images


@needs_real
def test_real_files_are_read_and_cut():
    for path in find_micrographs(REAL / "nbt-ceramic-sem" / "images"):
        micrograph = read_micrograph(path)
        assert find_info_bar(micrograph.image) == find_info_bar(micrograph.image, micrograph.scan_rows) == 884
        assert micrograph.pixel_size_um in (pytest.approx(0.0291406), pytest.approx(0.0728516))
        assert micrograph.instrument["model"] == "Quanta"
        assert set(micrograph.instrument) <= set(PHYSICAL_FIELDS)
    zeiss = find_micrographs(REAL / "tio2-nanoparticle-sem" / "images")
    for path in zeiss:
        micrograph = read_micrograph(path)
        assert find_info_bar(micrograph.image) == 712  # two rows of image lie below the bar
        assert micrograph.pixel_size_um == pytest.approx(0.007344)
        assert micrograph.instrument["magnification"] == 50000
        assert set(micrograph.instrument) <= set(PHYSICAL_FIELDS)


@needs_real
def test_real_grain_diameters():
    """Within 25 % of lengths measured by hand (NBT at 5000x, but for the specimen under debris) and of masks."""
    lengths = pd.read_csv(REAL / "nbt-ceramic-sem" / "measured_lengths.csv").groupby("sample").grain_length_um.mean()
    for name in ("1_001", "2_001", "5_001", "6_001", "6_007", "8_001"):
        micrograph = read_micrograph(REAL / "nbt-ceramic-sem" / "images" / f"{name}.tif")
        diameter = estimate_grain_diameter(micrograph.image[:884]) * micrograph.pixel_size_um
        assert diameter == pytest.approx(lengths[int(name[0])], rel=0.25), name
    for name in ("perovskite_sem", "pure_iron_optical"):
        labels = label(iio.imread(REAL / "single-fields" / "masks" / f"{name}.png") < 128)
        border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
        count = (np.bincount(labels.ravel())[1:] > 30).sum() - np.count_nonzero(border) / 2
        truth = np.sqrt(4 * labels.size / (np.pi * count))
        image = read_micrograph(REAL / "single-fields" / "images" / f"{name}.png").image
        assert estimate_grain_diameter(image) == pytest.approx(truth, rel=0.25), name


@needs_real
@pytest.mark.parametrize("folder", ["single-fields/images", "superalloy-sem/train/images", "superalloy-sem/val/images",
                                    "steel-316l-optical/images"])
def test_no_bar_is_found_on_real_images_without_one(folder):
    for path in find_micrographs(REAL / folder)[:60]:
        image = read_micrograph(path).image
        assert find_info_bar(image) == image.shape[0], path.name


@needs_real
def test_real_folders_of_one_kind_and_mixtures_of_them(tmp_path):
    """Perovskite alone must stay accepted; iron beside it, and specimen 4 of NBT beside the others, are told apart."""
    fields, ceramic = REAL / "single-fields" / "images", REAL / "nbt-ceramic-sem" / "images"
    warnings, _ = told(fields / "perovskite_sem.png", tmp_path / "alone")
    assert warnings == []
    mixed = folder_of(tmp_path / "mixed", **{n: read_micrograph(fields / f"{n}.png").image for n in ("perovskite_sem", "pure_iron_optical")})
    warnings, _ = told(mixed, tmp_path / "set")
    assert [w for w in warnings if "materials" in w and "A = 1 file (perovskite_sem.png); B = 1 file (pure_iron_optical.png)" in w]
    session = tmp_path / "session"
    session.mkdir()
    for name in ("1_003", "2_001", "6_001", "6_004"):
        (session / f"{name}.tif").symlink_to((ceramic / f"{name}.tif").resolve())
    assert told(session, tmp_path / "ceramic")[0] == []
    (session / "4_001.tif").symlink_to((ceramic / "4_001.tif").resolve())
    assert [w for w in told(session, tmp_path / "both")[0] if "materials, magnifications" in w and "(4_001.tif)" in w]
