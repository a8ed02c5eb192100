"""Grain measurement against drawn shapes, lattices with known answers and scikit-image."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist
from skimage import measure, segmentation

from graincast.labels import fill_lines
from graincast.measure.grains import measure_grains, summarise
from graincast.measure.scan import filled, scan
from graincast.measure.standards import astm_e112_planimetric


def ellipse(length: float, width: float, degrees: float = 0.0) -> np.ndarray:
    """A filled ellipse of the given full axes; the angle runs counter-clockwise from the rows, as seen."""
    side = int(max(length, width)) + 9
    row, column = np.mgrid[:side, :side]
    x, y = column - (side / 2 - 0.29), (side / 2 - 0.37) - row  # centred off the pixel grid, y upwards
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return ((x * cos + y * sin) / (length / 2)) ** 2 + ((y * cos - x * sin) / (width / 2)) ** 2 <= 1


def measure_shape(shape: np.ndarray, pixel_size_um: float | None = None) -> pd.Series:
    """The one row of a shape that is surrounded by no field at all."""
    table = measure_grains(shape.astype(np.int32), pixel_size_um, field=shape)
    assert len(table) == 1
    return table.iloc[0]


def squares(count: int, side: int, line: int = 0, cut: int = 0) -> np.ndarray:
    """A square lattice of grains, its lines `line` px wide, `cut` px cut off all round."""
    numbers = np.arange(1, count**2 + 1, dtype=np.int32).reshape(count, count)
    labels = np.kron(numbers, np.ones((side, side), np.int32))
    for k in range(1, count):
        low, high = k * side - line // 2, k * side + (line + 1) // 2
        labels[low:high] = labels[:, low:high] = 0
    return labels[cut : labels.shape[0] - cut, cut : labels.shape[1] - cut]


@pytest.mark.parametrize("diameter", [11, 20, 40, 101])
def test_disc(diameter: int) -> None:
    grain = measure_shape(ellipse(diameter, diameter))
    assert grain["equivalent_diameter_px"] == pytest.approx(diameter, rel=0.02)
    assert grain["perimeter_px"] == pytest.approx(math.pi * diameter, rel=0.02)
    assert 0.96 < grain["circularity"] <= 1
    assert grain["aspect_ratio"] == pytest.approx(1, abs=0.6 / diameter)


@pytest.mark.parametrize("degrees", [0, 15, 45, 70, 90, 120, 179])
def test_ellipse_at_every_angle(degrees: float) -> None:
    grain = measure_shape(ellipse(90, 36, degrees))
    assert grain["area_px2"] == pytest.approx(math.pi * 45 * 18, rel=0.01)
    assert grain["aspect_ratio"] == pytest.approx(2.5, rel=0.01)
    difference = (grain["orientation_deg"] - degrees + 90) % 180 - 90
    assert abs(difference) < 0.5
    assert 0 <= grain["orientation_deg"] < 180
    ramanujan = math.pi * (3 * (45 + 18) - math.sqrt((3 * 45 + 18) * (45 + 3 * 18)))
    assert grain["perimeter_px"] == pytest.approx(ramanujan, rel=0.03)
    assert grain["circularity"] == pytest.approx(4 * math.pi * (math.pi * 45 * 18) / ramanujan**2, rel=0.05)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (12, 3), (20, 40)])
def test_rectangle_counts_its_pixels_whole(height: int, width: int) -> None:
    grain = measure_shape(np.ones((height, width), bool))
    assert grain["area_px2"] == height * width
    assert grain["aspect_ratio"] == pytest.approx(max(height, width) / min(height, width))
    assert (grain["centroid_x_px"], grain["centroid_y_px"]) == ((width - 1) / 2, (height - 1) / 2)
    if height != width:
        assert grain["orientation_deg"] == pytest.approx(0 if width > height else 90)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int32, st.tuples(st.integers(2, 14), st.integers(2, 14)), elements=st.integers(1, 4)))
def test_agrees_with_scikit_image_on_any_map(labels: np.ndarray) -> None:
    table = measure_grains(labels, None).set_index("label")
    for region in measure.regionprops(labels):
        grain = table.loc[region.label]
        assert grain["area_px2"] == region.area
        assert (grain["centroid_y_px"], grain["centroid_x_px"]) == pytest.approx(region.centroid)
        assert grain["perimeter_px"] == pytest.approx(measure.perimeter_crofton(labels == region.label, 4))
        # scikit-image takes pixels for points, here they are unit squares: 1/12 more on the axes' variances
        axes = region.axis_major_length, region.axis_minor_length
        length, width = (math.sqrt(axis**2 / 16 + 1 / 12) for axis in axes)
        assert grain["aspect_ratio"] == pytest.approx(length / width, rel=1e-5)
        if length / width > 1.1:
            difference = grain["orientation_deg"] - (math.degrees(region.orientation) + 90)
            assert math.sin(math.radians(difference)) == pytest.approx(0, abs=1e-6)


def brute_force_ferets(pixels: np.ndarray) -> tuple[float, float]:
    """Largest and smallest width of the corners of some pixels, over the pairs of corners and the sides of their hull."""
    corners = np.unique(np.concatenate([pixels + shift for shift in ((0, 0), (0, 1), (1, 0), (1, 1))]), axis=0)
    hull = corners[ConvexHull(corners).vertices]
    sides = hull - np.roll(hull, 1, axis=0)
    normals = np.stack([-sides[:, 1], sides[:, 0]]) / np.hypot(*sides.T)
    return float(pdist(hull).max()), float(np.ptp(hull @ normals, axis=0).min())


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.integers(0, 3)))
def test_ferets_neighbours_and_junctions_of_any_map(labels: np.ndarray) -> None:
    # against qhull, and against loops over the pixels; labels may lie in pieces
    grown = fill_lines(labels)
    table = measure_grains(labels, None).set_index("label")
    touching = set()
    for one, other in ((grown[:, :-1], grown[:, 1:]), (grown[:-1], grown[1:])):
        touching |= {(min(pair), max(pair)) for pair in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True) if pair[0] != pair[1]}
    for label, grain in table.iterrows():
        assert (grain["feret_max_px"], grain["feret_min_px"]) == pytest.approx(brute_force_ferets(np.argwhere(grown == label)))
        assert 0 <= grain["feret_max_deg"] < 180
        assert grain["neighbours"] == sum(label in pair for pair in touching)
    corners = [len(set(grown[r : r + 2, c : c + 2].ravel())) - 2 for r in range(grown.shape[0] - 1) for c in range(grown.shape[1] - 1)]
    assert scan(grown).triple_junctions == (sum(max(corner, 0) for corner in corners) if grown.any() else 0)


@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 135, 170])
def test_feret_direction_of_a_needle(degrees: float) -> None:
    grain = measure_shape(ellipse(120, 12, degrees))
    assert grain["feret_max_px"] == pytest.approx(120, rel=0.015)
    assert grain["feret_min_px"] == pytest.approx(12, abs=1.5)  # the corners of the pixels lie outside a slanted outline
    assert abs((grain["feret_max_deg"] - degrees + 90) % 180 - 90) < 1.5


def test_a_map_in_bands_is_the_map_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).integers(1, 9, (37, 23)).astype(np.uint16)
    whole = scan(labels)
    monkeypatch.setattr("graincast.measure.scan.BAND_PX", 60)
    banded = scan(labels)
    for name in ("ids", "runs", "crossings", "boundary_crossings", "steps", "at_border", "neighbours", "triple_junctions"):
        assert np.array_equal(getattr(whole, name), getattr(banded, name)), name


def test_a_complete_map_is_not_copied() -> None:
    labels = squares(4, 10)
    assert filled(labels) is labels
    barred = np.pad(labels, ((0, 5), (0, 0)))
    assert filled(barred, barred > 0) is barred
    assert filled(barred).all()
    assert filled(barred, np.ones(barred.shape, bool)).all()
    assert not filled(labels, np.zeros(labels.shape, bool)).any()


def test_huge_labels_cost_no_more_than_small_ones() -> None:
    labels = squares(3, 12)
    pd.testing.assert_frame_equal(measure_grains(labels.astype(np.int64) * 10**12, 0.2).drop(columns="label"),
                                  measure_grains(labels, 0.2).drop(columns="label"))


def test_lines_are_shared_and_areas_tile_the_field() -> None:
    labels = squares(5, 20, line=3)
    before = labels.copy()
    table = measure_grains(labels, None)
    assert (labels == before).all()
    assert table["area_px2"].sum() == labels.size
    assert table["area_px2"].to_numpy() == pytest.approx(400, rel=0.11)
    grown = fill_lines(labels)
    assert (grown[labels > 0] == labels[labels > 0]).all()
    assert (grown == segmentation.expand_labels(labels, 1000)).all()


def test_pixels_outside_the_field_belong_to_no_grain() -> None:
    labels = np.pad(squares(4, 15, line=1), ((0, 12), (0, 0)))
    labels[-6:, :9] = 99  # somebody's labels in the info bar
    field = np.zeros(labels.shape, bool)
    field[:60] = True
    table = measure_grains(labels, None, field=field)
    assert list(table["label"]) == list(range(1, 17))
    assert table["area_px2"].sum() == field.sum()
    inner = table["label"].isin([6, 7, 10, 11])
    assert (table["touches_border"] == ~inner).all()


@pytest.mark.parametrize("size", [0.01, 0.5, 3.0])
def test_units_scale_and_stand_in_the_names(size: float) -> None:
    labels = squares(4, 18, line=2, cut=5)
    px, um = measure_grains(labels, None), measure_grains(labels, size)
    assert um["area_um2"].to_numpy() == pytest.approx(px["area_px2"].to_numpy() * size**2)
    for name in ("equivalent_diameter", "perimeter", "feret_max", "feret_min"):
        assert um[f"{name}_um"].to_numpy() == pytest.approx(px[f"{name}_px"].to_numpy() * size)
    same = ["label", "centroid_x_px", "aspect_ratio", "circularity", "orientation_deg", "touches_border", "feret_max_deg",
            "neighbours"]
    pd.testing.assert_frame_equal(um[same], px[same])
    assert not [name for name in px if name.endswith(("_um", "_um2"))]
    assert list(measure_grains(labels, math.nan).columns) == list(px.columns)


def test_grid_of_squares_gives_the_astm_number_by_hand() -> None:
    # 20 um squares, the field cut through the outer ring: 8 x 8 whole grains, 36 cut ones, of 9 x 9 squares'
    # area
    labels = squares(10, 40, cut=20)
    summary = summarise(measure_grains(labels, 0.5))
    assert (summary["grains"], summary["grains_at_border"]) == (100, 36)
    assert summary["field_area_um2"] == pytest.approx(180**2)
    density = (64 + 36 / 2) / 0.180**2
    assert summary["grains_per_mm2"] == pytest.approx(density)
    assert summary["mean_area_um2"] == pytest.approx(180**2 / 82)
    assert summary["astm_grain_size_number"] == pytest.approx(3.321928 * math.log10(density) - 2.954)
    ideal = astm_e112_planimetric(1e6 / 20**2)  # one grain too many from the corners
    assert summary["astm_grain_size_number"] - ideal == pytest.approx(math.log2(82 / 81), abs=1e-4)
    diameter = 2 * 20 / math.sqrt(math.pi)
    for name in ("mean_equivalent", "median_equivalent", "area_weighted_mean_equivalent"):
        assert summary[f"{name}_diameter_um"] == pytest.approx(diameter)
    assert summary["std_equivalent_diameter_um"] == pytest.approx(0, abs=1e-9)


def test_summary_leaves_cut_grains_out_of_the_diameters() -> None:
    labels = np.full((60, 60), 9, np.int32)
    labels[10:20, 10:20] = 1
    labels[30:50, 30:50] = 2
    summary = summarise(measure_grains(labels, None))
    small, large = (2 * side / math.sqrt(math.pi) for side in (10, 20))
    assert summary["mean_equivalent_diameter_px"] == pytest.approx((small + large) / 2)
    assert summary["std_equivalent_diameter_px"] == pytest.approx((large - small) / math.sqrt(2))
    weighted = (small * 100 + large * 400) / 500
    assert summary["area_weighted_mean_equivalent_diameter_px"] == pytest.approx(weighted)
    assert summary["grains_at_border"] == 1
    assert summary["grains_per_mm2"] is None
    assert summary["astm_grain_size_number"] is None


def test_summary_is_json_for_every_number_of_grains() -> None:
    for labels in (np.zeros((30, 30), np.int32), np.ones((30, 30), np.int32), squares(3, 10, line=1)):
        for size in (None, 0.1):
            text = json.dumps(summarise(measure_grains(labels, size)), allow_nan=False)
            assert json.loads(text)["grains"] == len(np.unique(labels[labels > 0]))


def test_no_grain_gives_an_empty_table_with_all_columns() -> None:
    empty = measure_grains(np.zeros((20, 30), np.int32), 0.1, "a")
    assert len(empty) == 0
    assert list(empty.columns) == list(measure_grains(squares(2, 10), 0.1, "a").columns)


def test_gaps_in_the_numbering_and_several_fields() -> None:
    labels = squares(3, 12, line=1)
    sparse = np.where(labels > 0, labels * 1000, 0)
    first, second = measure_grains(labels, 0.2, "a"), measure_grains(sparse, 0.2, "b")
    assert list(second["label"]) == [1000 * k for k in range(1, 10)]
    names = ["label", "image_id"]
    pd.testing.assert_frame_equal(first.drop(columns=names), second.drop(columns=names))
    both = summarise(pd.concat([first, second]))
    assert both["grains"] == 18
    assert both["field_area_um2"] == pytest.approx(2 * first["area_um2"].sum())
    assert both["astm_grain_size_number"] == pytest.approx(summarise(first)["astm_grain_size_number"])


def test_bad_input_is_refused() -> None:
    labels = squares(2, 10)
    with pytest.raises(ValueError, match="2-D integer"):
        measure_grains(labels.astype(float), None)
    with pytest.raises(ValueError, match="start at 0"):
        measure_grains(-labels, None)
    with pytest.raises(ValueError, match="does not fit"):
        measure_grains(labels, None, field=np.ones((3, 3), bool))
    for size in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="must be positive and finite"):
            measure_grains(labels, size)
    with pytest.raises(ValueError, match="not both"):
        summarise(pd.concat([measure_grains(labels, None), measure_grains(labels, 0.1)]))
