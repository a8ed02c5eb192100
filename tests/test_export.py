"""Every kind of export, opened again by the library that its users open it with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import roifile
import shapely
import shapely.geometry
import tifffile
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from graincast.errors import UserError
from graincast.evaluate.overlay import DOUBTFUL, PREDICTED, bar_length, with_scale_bar
from graincast.export import kinds
from graincast.export.kinds import KINDS, Piece, Segmented, chosen
from graincast.export.outlines import outlines
from graincast.measure.grains import measure_grains
from graincast.microscope.reader import read_micrograph

SIZE_UM = 0.05


def grain_map() -> np.ndarray:
    """Six grains over an info bar: one with a hole, within which another lies, one in two parts that touch at a corner, one at two borders."""
    labels = np.zeros((60, 80), np.int32)
    labels[:50] = 1
    labels[10:30, 10:30] = 2
    labels[15:20, 15:20] = labels[20:25, 20:25] = 3
    labels[:50, 60:] = 4
    labels[40:45, 40:45] = 5
    labels[40:45, 50] = 7  # a number is left out
    return labels


def segmented(labels: np.ndarray, size: float | None = SIZE_UM) -> Segmented:
    image = np.random.default_rng(0).random(labels.shape).astype(np.float32)
    return Segmented("field.tif", image, labels, measure_grains(labels, size, field=labels > 0), size)


@pytest.fixture
def found() -> Segmented:
    return segmented(grain_map())


def written(found: Segmented, kind: str, folder: Path) -> Path:
    path = folder / f"field{KINDS[kind].suffix}"
    KINDS[kind].write(found, path)
    return path


@pytest.mark.parametrize("seed", range(40))
def test_outlines_enclose_just_the_grains(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (12, 15)) if seed % 2 else (rng.random((20, 20)) < 0.6).astype(np.uint16)
    seen = {}
    for label, polygons in outlines(labels):
        shapes = [shapely.Polygon(shell, holes) for shell, *holes in polygons]
        assert shapely.MultiPolygon(shapes).is_valid
        assert all(shapely.LinearRing(shell).is_ccw for shell, *_ in polygons)
        assert not any(shapely.LinearRing(hole).is_ccw for _, *holes in polygons for hole in holes)
        row, column = np.nonzero(labels == label)
        assert shapely.contains_xy(shapely.MultiPolygon(shapes), column + 0.5, row + 0.5).all()
        seen[label] = sum(shape.area for shape in shapes)
    assert seen == {label: (labels == label).sum() for label in np.unique(labels) if label}


def test_label_tiff_has_the_calibration_of_imagej(found: Segmented, tmp_path: Path) -> None:
    path = written(found, "labels", tmp_path)
    with tifffile.TiffFile(path) as tif:
        assert tif.is_imagej
        assert tif.imagej_metadata is not None
        assert tif.imagej_metadata["unit"] == "um"
        for tag in ("XResolution", "YResolution"):
            numerator, denominator = tif.pages[0].tags[tag].value
            assert denominator / numerator == pytest.approx(SIZE_UM)  # um a pixel
        assert tif.pages[0].tags["ResolutionUnit"].value == 1  # or ImageJ would take the resolution for one in inches
        assert tif.asarray().dtype == np.uint16
        assert (tif.asarray() == found.labels).all()
    assert read_micrograph(path).pixel_size_um == pytest.approx(SIZE_UM)


def test_label_tiff_of_many_grains_and_without_pixel_size(tmp_path: Path) -> None:
    labels = np.arange(1, 70_001, dtype=np.int32).reshape(250, 280)
    found = replace(segmented(np.ones((2, 2), np.int32), None), labels=labels)
    with tifffile.TiffFile(written(found, "labels", tmp_path)) as tif:
        assert tif.imagej_metadata is not None
        assert tif.imagej_metadata["unit"] == "pixel"
        assert tif.asarray().dtype == np.uint32
        assert (tif.asarray() == labels).all()


def area_of(rings: list[np.ndarray]) -> float:
    """Even-odd, as ImageJ fills a composite ROI."""
    shape = shapely.Polygon()
    for ring in rings:
        shape = shape.symmetric_difference(shapely.Polygon(ring))
    return float(shape.area)


def test_rois_are_the_grains(found: Segmented, tmp_path: Path) -> None:
    rois = roifile.roiread(written(found, "roi", tmp_path))
    assert [roi.name for roi in rois] == ["1", "2", "3", "4", "5", "7"]
    for roi in rois:
        rings = roi.coordinates(multi=True)
        grain = found.labels == int(roi.name)
        assert area_of(rings) == grain.sum()
        rows, columns = np.nonzero(grain)
        assert (roi.left, roi.top, roi.right, roi.bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert {roi.name for roi in rois if roi.composite} == {"1", "2", "3"}
    assert {roi.roitype for roi in rois if not roi.composite} == {roifile.ROI_TYPE.TRACED}


def test_geojson_polygons_are_exact_and_tell_their_unit(found: Segmented, tmp_path: Path) -> None:
    document = json.loads(written(found, "geojson", tmp_path).read_text())
    assert document["type"] == "FeatureCollection"
    assert document["graincast"]["coordinates"].startswith("px")
    assert document["graincast"]["pixel_size_um"] == SIZE_UM
    kinds_of = {}
    for feature in document["features"]:
        shape = shapely.geometry.shape(feature["geometry"])
        kinds_of[feature["id"]] = shape.geom_type
        assert shape.is_valid
        assert shape.area == (found.labels == feature["id"]).sum()
        assert feature["properties"]["measurements"]["area_um2"] == pytest.approx(shape.area * SIZE_UM**2)
        for ring in shapely.get_parts(shapely.get_rings(shape)):
            assert ring.coords[0] == ring.coords[-1]
    assert kinds_of == {1: "Polygon", 2: "Polygon", 3: "MultiPolygon", 4: "Polygon", 5: "Polygon", 7: "Polygon"}


def test_coco_masks_are_the_grains(found: Segmented, tmp_path: Path) -> None:
    coco = COCO(written(found, "coco", tmp_path))
    assert coco.loadCats(coco.getCatIds())[0]["name"] == "grain"
    image, = coco.loadImgs(coco.getImgIds())
    assert (image["file_name"], image["width"], image["height"]) == ("field.tif", 80, 60)
    annotations = coco.loadAnns(coco.getAnnIds(iscrowd=False))
    assert [a["id"] for a in annotations] == [1, 2, 3, 4, 5, 7]
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        assert (mask == (found.labels == annotation["id"])).all()
        encoded = coco.annToRLE(annotation)
        assert annotation["area"] == coco_mask.area(encoded)
        assert annotation["bbox"] == coco_mask.toBbox(encoded).tolist()


def test_coco_of_a_single_grain_is_one_run(tmp_path: Path) -> None:
    coco = COCO(written(segmented(np.ones((30, 40), np.int32)), "coco", tmp_path))
    annotation, = coco.loadAnns(coco.getAnnIds())
    assert annotation["segmentation"]["counts"] == [0, 1200]
    assert coco.annToMask(annotation).all()


@pytest.mark.parametrize("kind", ["roi", "geojson", "coco"])
def test_windows_give_what_the_whole_map_gives(kind: str, tmp_path: Path) -> None:
    """Large maps are exported window by window; here each grain has a window of its own, two pixels wider than it."""
    labels = grain_map()

    def windows() -> Iterator[Piece]:
        for label in np.unique(labels[labels > 0]):
            rows, columns = np.nonzero(labels == label)
            top, left = max(rows.min() - 2, 0), max(columns.min() - 2, 0)
            yield Piece(labels[top : rows.max() + 3, left : columns.max() + 3], int(top), int(left), np.array([label]))

    found = segmented(labels)
    whole = written(found, kind, tmp_path).read_bytes()
    assert written(replace(found, windows=windows), kind, tmp_path).read_bytes() == whole


def test_csv_and_parquet_hold_the_same_table(found: Segmented, tmp_path: Path) -> None:
    csv, parquet = pd.read_csv(written(found, "csv", tmp_path)), pd.read_parquet(written(found, "parquet", tmp_path))
    assert list(csv) == list(parquet)
    assert {"area_um2", "equivalent_diameter_um", "orientation_deg", "touches_border"} <= set(csv)
    pd.testing.assert_frame_equal(parquet, found.grains)
    pd.testing.assert_frame_equal(csv, parquet, rtol=1e-5, check_dtype=False)


def test_no_column_is_in_um_without_a_pixel_size(tmp_path: Path) -> None:
    table = pd.read_csv(written(segmented(grain_map(), None), "csv", tmp_path))
    assert "area_px2" in table
    assert not [column for column in table if "_um" in column]


@pytest.mark.parametrize(("size", "words"), [(0.05, "2 µm"), (0.02914, "1 µm"), (None, "50 px"), (0.0001, "0.005 µm")])
def test_scale_bar_is_as_long_as_it_says(size: float | None, words: str, tmp_path: Path) -> None:
    labels = np.ones((300, 300), np.int32)
    labels[260:] = 0  # the info bar
    found = replace(segmented(labels, size), image=np.zeros((300, 300), np.float32))
    picture = iio.imread(written(found, "overlay", tmp_path))
    assert picture.shape == (300, 300, 3)
    length, told = bar_length(300, size)
    assert told == words
    rows, columns = np.nonzero((picture == 255).all(axis=2))
    bar = columns[rows == rows.max()]
    assert np.ptp(bar) + 1 == len(bar) == round(length / (size or 1))
    assert rows.max() < 260


def test_scale_bar_needs_room() -> None:
    picture = np.zeros((30, 30, 3), np.uint8)
    assert (with_scale_bar(picture, 0.1) == picture).all()


def test_doubtful_lines_have_a_colour_of_their_own_and_a_legend(tmp_path: Path) -> None:
    labels = np.ones((400, 400), np.int32)
    labels[:, 200:] = 2
    labels[200:, 200:] = 3
    sure = np.full(labels.shape, np.nan, np.float32)
    sure[:, 198:202], sure[198:202, 202:] = 0.95, 0.3
    plain, told = (iio.imread(written(replace(segmented(labels), line_confidence=given), "overlay", tmp_path)) for given in (None, sure))
    assert not (plain == DOUBTFUL).all(axis=2).any()
    assert (told[:190, 195:205] == PREDICTED).all(axis=2).any()
    assert not (told[:190, 195:205] == DOUBTFUL).all(axis=2).any()
    assert (told[195:205, 210:] == DOUBTFUL).all(axis=2).any()
    assert (told[300:, :180] == DOUBTFUL).all(axis=2).any()  # the legend


def test_pictures_of_large_micrographs_are_reduced_and_their_scale_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "LARGEST_PICTURE_PX", 250_000)
    labels = np.ones((1200, 900), np.int32)
    every = kinds.reduction(labels.shape)
    assert every == 3
    found = replace(segmented(labels), image=np.zeros((400, 300), np.float32), every=every)
    picture = iio.imread(written(found, "overlay", tmp_path))
    assert picture.shape == (400, 300, 3)
    rows, _ = np.nonzero((picture == 255).all(axis=2))
    assert (rows == rows.max()).sum() == round(bar_length(300, 3 * SIZE_UM)[0] / (3 * SIZE_UM))


def test_the_same_grains_give_the_same_bytes(found: Segmented, tmp_path: Path) -> None:
    for kind in KINDS:
        first = written(found, kind, tmp_path).read_bytes()
        assert written(found, kind, tmp_path).read_bytes() == first, kind


def test_kinds_are_chosen_by_name() -> None:
    assert chosen("all") == (*KINDS, "report")
    assert chosen("csv,roi, csv") == ("csv", "roi")
    with pytest.raises(UserError, match=r"no export 'pdf'; labels, .*report or all would be right"):
        chosen("csv,pdf")


def test_bar_lengths_are_round() -> None:
    for size in (None, *np.geomspace(1e-4, 10, 60)):
        length, _ = bar_length(1024, size)
        assert 0.05 < length / (1024 * (size or 1)) <= 0.2 + 1e-9
        assert round(length / 10 ** math.floor(math.log10(length) + 1e-9), 6) in (1, 2, 5)
