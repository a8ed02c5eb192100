"""Grain sizes by the standards: drawn lattices, the standards' tables, definitions, and what holds for any map."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from scipy.spatial import cKDTree
from typer.testing import CliRunner

from benchmarks import measurement
from graincast.cli import app
from graincast.errors import UserError
from graincast.measure.compare import compare, compare_files, read_sizes
from graincast.measure.distribution import distribution
from graincast.measure.field import FieldSizes, measure_field
from graincast.measure.grains import measure_grains
from graincast.measure.intercepts import ABRAMS, Count, _circle, _count, count_circles, count_lines
from graincast.measure.session import measure_session, over_fields
from graincast.measure.standards import astm_e112_intercept, astm_e112_planimetric, astm_e1382_area, iso_643_planimetric

SIDE = 20


def tiles(rows: int, columns: int, side: int = SIDE, cut: int = 0) -> np.ndarray:
    """Square grains, `cut` px cut off all round."""
    labels = np.kron(np.arange(1, rows * columns + 1, dtype=np.int32).reshape(rows, columns), np.ones((side, side), np.int32))
    return labels[cut : labels.shape[0] - cut, cut : labels.shape[1] - cut]


def voronoi(seed: int, side: int = 300, grains: int = 120) -> np.ndarray:
    points = np.random.default_rng(seed).uniform(0, side, (grains, 2))
    pixels = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1).reshape(-1, 2)
    return (cKDTree(points).query(pixels)[1] + 1).reshape(side, side).astype(np.int32)


def along(*grains: int) -> Count:
    """The count of a line over these pixels, in a map of which every row is the same."""
    labels = np.repeat([grains], 5, axis=0)
    return _count(labels, (np.full(len(grains), 2), np.arange(len(grains))))


@pytest.mark.parametrize(("number", "row"), measurement.E112_TABLE.items())
def test_numbers_are_those_of_the_tables_of_the_standard(number: int, row: tuple[float, float]) -> None:
    grains_per_mm2, intercept_um = row
    assert astm_e112_planimetric(grains_per_mm2) == pytest.approx(number, abs=0.005)
    assert astm_e112_intercept(intercept_um * 1e-3) == pytest.approx(number, abs=0.005)
    assert astm_e1382_area(1 / grains_per_mm2) == pytest.approx(number, abs=0.01)
    assert iso_643_planimetric(8 * 2**number) == number


@pytest.mark.parametrize(("fields", "multiplier"), measurement.E112_STUDENT.items())
def test_interval_has_the_multipliers_of_the_standard(fields: int, multiplier: float) -> None:
    values = list(np.random.default_rng(fields).normal(10, 1, fields))
    found = over_fields("mean_intercept_um", values)
    half = multiplier * np.std(values, ddof=1) / math.sqrt(fields)
    assert found["mean_intercept_ci95_um"] == pytest.approx(half, rel=3e-4)
    assert found["mean_intercept_relative_accuracy_percent"] == pytest.approx(100 * half / np.mean(values), rel=3e-4)


@pytest.mark.parametrize(("pixels", "intersections"), [
    ((1, 1, 1, 2, 2, 2), 1), ((1, 1, 2, 1, 1), 1), ((1, 1, 3, 2, 2), 1.5), ((1, 1, 2, 2, 1, 1), 2), ((1, 2, 3, 4, 5), 4), ((1, 1, 1), 0)])
def test_intersections_are_scored_as_in_the_standard(pixels: tuple[int, ...], intersections: float) -> None:
    # plain, tangent, a corner of a third grain, a grain that is passed through, grains of a pixel each, nothing
    assert along(*pixels) == Count(intersections, len(pixels) - 1)


def test_a_line_through_triple_and_fourfold_junctions() -> None:
    labels = np.ones((9, 9), np.int32)
    labels[:5, 4:], labels[5:, 4:] = 2, 3
    path = np.full(9, 4), np.arange(9)  # crosses just above the junction
    assert _count(labels, path) == Count(1.5, 8)
    labels[5:, :4] = 4
    assert _count(labels, path) == Count(2, 8)


def test_what_lies_outside_the_field_ends_a_line() -> None:
    assert along(1, 1, 0, 0, 2, 2, 3) == Count(1, 3)


def test_test_lines_and_circles_are_chains_of_pixels() -> None:
    for radius in (1.0, 3.5, 10.0, 99.5):
        rows, columns = _circle((100.0, 99.5), radius)
        steps = np.maximum(np.abs(np.diff(rows)), np.abs(np.diff(columns)))
        assert steps.max() <= 2
        assert (steps == 1).mean() > 0.9
        assert (rows[0], columns[0]) == (rows[-1], columns[-1])
        assert np.abs(np.hypot(rows - 100, columns - 99.5) - radius).max() <= 0.75
    counts = count_lines(np.ones((40, 60), int), 10.0)
    assert list(counts) == [0, 45, 90, 135]
    assert counts[0].length_px == 4 * 59
    assert counts[90].length_px == 6 * 39
    assert counts[45].length_px == pytest.approx(40 * 60 / 10, rel=0.15)


def test_squares_by_every_procedure() -> None:
    # 10 um squares; the field is cut through the outer ring: 8 x 8 whole grains, 32 at the sides, 4 in the corners
    sizes = measure_field(tiles(10, 10, cut=SIDE // 2), 0.5).to_dict()
    assert (sizes["grains"], sizes["grains_whole"], sizes["grains_at_border"], sizes["grains_counted"]) == (100, 64, 36, 64 + 16 + 1)
    assert sizes["mean_area_um2"] == pytest.approx(100)
    assert sizes["astm_e1382_mean_area_um2"] == pytest.approx(100)
    assert sizes["astm_e112_g_planimetric"] == pytest.approx(3.321928 * 4 - 2.954)
    assert sizes["iso_643_g_planimetric"] == pytest.approx(math.log2(1e4 / 8))
    assert sizes["astm_e1382_g_mean_area"] == pytest.approx(-3.3223 * -4 - 2.955)
    assert sizes["astm_e930_g_ala"] == pytest.approx(sizes["astm_e112_g_planimetric"])
    # a line along the rows crosses a side every 10 um; lines within a pixel of a fourfold corner count it double
    assert sizes["mean_intercept_0_deg_um"] == pytest.approx(10, rel=0.12)
    assert sizes["mean_intercept_45_deg_um"] == pytest.approx(10 / math.sqrt(2), rel=0.12)
    assert sizes["mean_intercept_0_deg_um"] / sizes["mean_intercept_90_deg_um"] == sizes["anisotropy_index"]
    # 9 lines each way, 90 um long, less the half of a pixel at the ends
    assert sizes["boundary_length_um"] == pytest.approx(18 * 90, rel=0.09)
    assert sizes["surface_per_volume_per_um"] == pytest.approx(4 / math.pi * sizes["boundary_length_per_area_per_um"])
    assert sizes["triple_junctions"] == 2 * 81
    assert sizes["mean_neighbours"] == 4
    assert sizes["edge_corrected_mean_equivalent_diameter_um"] == pytest.approx(20 / math.sqrt(math.pi))
    assert sizes["lognormal_sigma"] == pytest.approx(0, abs=1e-9)


def test_honeycomb_has_six_neighbours_and_two_junctions_a_cell() -> None:
    sizes = measure_field(measurement.hexagons(13.0), 1.0).to_dict()
    area, edge = measurement.CELL_PX2, math.sqrt(2 * measurement.CELL_PX2 / (3 * math.sqrt(3)))
    assert sizes["astm_e1382_mean_area_um2"] == pytest.approx(area, rel=1e-3)
    assert sizes["mean_area_um2"] == pytest.approx(area, rel=5e-3)
    assert sizes["mean_neighbours"] == pytest.approx(6, abs=0.01)
    assert sizes["triple_junctions_per_um2"] == pytest.approx(2 / area, rel=0.02)
    assert sizes["boundary_length_per_area_per_um"] == pytest.approx(3 * edge / area, rel=0.02)
    assert sizes["mean_intercept_heyn_lines_um"] == pytest.approx(math.pi * area / (6 * edge), rel=0.03)
    assert sizes["mean_feret_max_um"] == pytest.approx(2 * edge, rel=0.02)


def test_circles_agree_with_lines_on_the_mean() -> None:
    maps = [voronoi(seed) for seed in range(12)]
    lines = sum((sum(count_lines(labels, 10.0).values(), Count()) for labels in maps), Count())
    circles = sum((count_circles(labels, (0, 0, 300, 300), ABRAMS) for labels in maps), Count())
    assert circles.mean_intercept_px == pytest.approx(lines.mean_intercept_px, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 16), st.integers(1, 16)), elements=st.integers(0, 5)), st.sampled_from([None, 0.25]))
def test_any_map_gives_plain_figures_that_fit_together(labels: np.ndarray, size: float | None) -> None:
    field = measure_field(labels, size)
    values = json.loads(json.dumps(field.to_dict(), allow_nan=False))
    unit = field.unit
    assert values["grains"] == values["grains_whole"] + values["grains_at_border"] == len(np.unique(labels[labels > 0]))
    assert bool(field.warnings) >= (values["grains"] < 50)
    assert values["astm_e112_g_planimetric"] is None or unit == "um"
    if values["grains_whole"]:
        low, middle, high = (values[f"{name}_equivalent_diameter_{unit}"] for name in ("d10", "median", "d90"))
        assert low <= middle <= high
        assert values[f"area_weighted_mean_equivalent_diameter_{unit}"] >= values[f"mean_equivalent_diameter_{unit}"] - 1e-9
    turned = measure_field(np.ascontiguousarray(np.rot90(labels)), size).to_dict()
    if not (labels == 0).any():  # a line halfway between two grains goes to the one or the other
        for name in ("grains_counted", f"boundary_length_{unit}", "triple_junctions", f"mean_equivalent_diameter_{unit}"):
            assert turned[name] == pytest.approx(values[name])


@pytest.mark.parametrize("factor", [0.01, 7.0])
def test_lengths_go_with_the_pixel_size_and_numbers_with_its_logarithm(factor: float) -> None:
    labels = voronoi(3, side=150, grains=40)
    one, other = measure_field(labels, 1.0).to_dict(), measure_field(labels, factor).to_dict()
    powers = {"_per_um2": -2, "_per_mm2": -2, "_per_um": -1, "_um2": 2, "_um": 1}
    for name, value in one.items():
        power = next((power for ending, power in powers.items() if name.endswith(ending)), 0)
        if "_g_" in name:
            assert other[name] == pytest.approx(value - 2 * math.log2(factor), abs=2e-3), name
        elif value is not None:
            assert other[name] == pytest.approx(value * factor**power), name


@pytest.mark.parametrize(("labels", "words"), [
    (np.zeros((9, 9), int), "no grain"), (np.ones((9, 9), int), "one grain fills"), (tiles(2, 2), "every grain touches"),
    (tiles(4, 4), "asks for 50")])
def test_fields_that_say_little_say_so(labels: np.ndarray, words: str) -> None:
    field = measure_field(labels, 0.1)
    assert any(words in warning for warning in field.warnings)
    if "asks" not in words:
        assert field.headline == "no whole grain"
        assert field.to_dict()["mean_equivalent_diameter_um"] is None
    assert any("no pixel size" in warning for warning in measure_field(labels, None).warnings)


def test_the_info_bar_is_no_field() -> None:
    labels = np.pad(tiles(10, 10, cut=SIDE // 2), ((0, 30), (0, 0)))
    plain, barred = measure_field(labels[:-30], 0.5).to_dict(), measure_field(labels, 0.5, field=labels > 0).to_dict()
    same = [name for name in plain if "intercept" not in name and "intersections" not in name and name != "anisotropy_index"]
    assert {name: barred[name] for name in same} == {name: plain[name] for name in same}
    assert barred["mean_intercept_abrams_circles_um"] == plain["mean_intercept_abrams_circles_um"]
    assert barred["mean_intercept_heyn_lines_um"] == pytest.approx(plain["mean_intercept_heyn_lines_um"], rel=0.1)


def test_a_round_field_has_no_corners() -> None:
    labels = tiles(12, 12)
    row, column = np.mgrid[:240, :240]
    disc = np.hypot(row - 119.5, column - 119.5) < 110
    sizes = measure_field(labels, None, field=disc).to_dict()
    assert sizes["grains_counted"] == sizes["grains_whole"] + sizes["grains_at_border"] / 2
    assert sizes["edge_corrected_mean_equivalent_diameter_px"] is None


def test_a_table_at_hand_gives_the_same() -> None:
    labels = voronoi(1, side=120, grains=30)
    assert measure_field(labels, 0.3, measure_grains(labels, 0.3)).to_dict() == measure_field(labels, 0.3).to_dict()


def test_cut_grains_bias_the_plain_mean_and_not_the_corrected_one() -> None:
    # large squares are cut more often than small ones; the true mean is that of the periodic pattern
    pattern = np.zeros((60, 60), int)
    pattern[:40, :40] = 1
    pattern[:40, 40:], pattern[40:, :20], pattern[40:, 20:40], pattern[40:, 40:] = [[2]] * 20 + [[3]] * 20, 4, 5, 6
    count = 12
    numbers = np.arange(count**2).reshape(count, count) * 6
    labels = np.tile(pattern, (count, count)) + np.kron(numbers, np.ones((60, 60), int))
    true = 2 / math.sqrt(math.pi) * (40 + 5 * 20) / 6
    rng, plain, corrected = np.random.default_rng(0), [], []
    for _ in range(60):
        row, column = rng.integers(0, labels.shape[0] - 150, 2)
        values = measure_field(labels[row : row + 150, column : column + 150], None).to_dict()
        plain.append(values["mean_equivalent_diameter_px"])
        corrected.append(values["edge_corrected_mean_equivalent_diameter_px"])
    assert np.mean(plain) < 0.97 * true
    assert np.mean(corrected) == pytest.approx(true, rel=0.015)


def test_distribution_of_a_lognormal_sample() -> None:
    diameters = stats.lognorm(0.4, scale=3.0).rvs(4000, random_state=0)
    found = distribution(diameters, diameters**2, "um")
    assert found["lognormal_median_um"] == pytest.approx(3, rel=0.02)
    assert found["lognormal_sigma"] == pytest.approx(0.4, rel=0.03)
    assert found["lognormal_ks"] < found["lognormal_ks_critical_5_percent"]
    # weighted by D^2, a log-normal law is one again, its median exp(2 sigma^2) times larger
    assert found["area_weighted_median_equivalent_diameter_um"] == pytest.approx(3 * math.exp(2 * 0.4**2), rel=0.05)
    uniform = distribution(np.linspace(1, 3, 4000), np.linspace(1, 3, 4000) ** 2, "um")
    assert uniform["lognormal_ks"] > uniform["lognormal_ks_critical_5_percent"]


def fields(count: int, size: float | None = 0.2) -> dict[str, FieldSizes]:
    return {f"f{seed}": measure_field(voronoi(seed, side=160, grains=90), size) for seed in range(count)}


def test_session_states_mean_interval_and_accuracy() -> None:
    measured = fields(6)
    session = measure_session(measured)
    values = session.to_dict()
    json.dumps(values, allow_nan=False)
    densities = [each.to_dict()["grains_per_mm2"] for each in measured.values()]
    half = stats.t.interval(0.95, 5, scale=stats.sem(densities))[1]
    assert values["grains_per_mm2"] == pytest.approx(np.mean(densities))
    assert values["grains_ci95_per_mm2"] == pytest.approx(half)
    assert values["astm_e112_g_planimetric"] == astm_e112_planimetric(np.mean(densities))
    exact = (astm_e112_planimetric(np.mean(densities) + half) - astm_e112_planimetric(np.mean(densities) - half)) / 2
    assert values["astm_e112_g_planimetric_ci95"] == pytest.approx(exact, rel=0.01)
    lengths = values["mean_intercept_heyn_lines_um"], values["mean_intercept_heyn_lines_ci95_um"]
    exact = (astm_e112_intercept(1e-3 * (lengths[0] - lengths[1])) - astm_e112_intercept(1e-3 * (lengths[0] + lengths[1]))) / 2
    assert values["astm_e112_g_intercept_heyn_lines_ci95"] == pytest.approx(exact, rel=0.01)
    assert values["grains_whole"] == len(session.diameters) == sum(len(each.whole) for each in measured.values())
    assert values["pooled_mean_equivalent_diameter_um"] == pytest.approx(session.diameters.mean())
    told = r"mean equivalent diameter \d\.\d\d ± 0\.\d\d um, ASTM E112 G \d+\.\d{3} ± 0\.0\d\d \(planimetric\); \d+ whole grains in 6 fields"
    assert re.fullmatch(told, session.headline), session.headline
    assert measure_session(fields(1)).headline.count("±") == 0
    assert not [warning for warning in session.warnings if "asks" in warning]


def test_session_warns_of_what_the_standard_misses() -> None:
    poor = {"few": measure_field(tiles(4, 4), 0.1), "empty": measure_field(np.zeros((9, 9), int), 0.1)}
    session = measure_session(poor)
    text = " ".join(session.warnings)
    for words in ("2 fields; ASTM E112 asks for 5", "1 field of 2 with fewer than 50 grains (few)", "without a grain that can be counted (empty)"):
        assert words in text
    assert session.to_dict()["fields_measured"] == 1
    assert session.to_dict()["mean_equivalent_diameter_ci95_um"] is None
    uneven = measure_session({str(side): measure_field(tiles(10, 10, side), 0.1) for side in (10, 14, 20, 26, 30)})
    assert re.search(r"the number of grains per area has a relative accuracy of \d+ %; .* so more fields would be right", " ".join(uneven.warnings))


def test_session_refuses_what_cannot_be_summed_up() -> None:
    with pytest.raises(UserError, match=r"'b' in px.*a pixel size for every field would be right"):
        measure_session({"a": measure_field(tiles(4, 4), 0.1), "b": measure_field(tiles(4, 4), None)})
    with pytest.raises(UserError, match="no field"):
        measure_session({})


def test_comparison_of_known_distributions() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0, 0.3, 800), rng.lognormal(0.2, 0.3, 600)
    found = compare(a, b, names=("before", "after"))
    values = json.loads(json.dumps(found.to_dict()))
    assert values["ks_distance"] == stats.ks_2samp(a, b).statistic
    assert values["wasserstein_um"] == pytest.approx(b.mean() - a.mean(), rel=0.05)  # one lies right of the other everywhere
    welch = stats.ttest_ind(b, a, equal_var=False).confidence_interval()
    assert values["difference_of_means_ci95_low_um"] == pytest.approx(welch.low)
    assert values["difference_of_means_ci95_high_um"] == pytest.approx(welch.high)
    assert "after is" in found.sentence
    assert "larger than before" in found.sentence
    assert "so the means differ" in found.sentence
    same = compare(a, a.copy())
    assert same.to_dict()["wasserstein_um"] == 0
    assert "B is as large as A" in same.sentence
    assert "not told apart" in same.sentence
    with pytest.raises(UserError, match="too few to compare"):
        compare(a, b[:3])
    with pytest.raises(UserError, match="A has sizes from 0 to 0"):
        compare(0 * a, b)


@pytest.fixture
def session_folder(tmp_path: Path) -> Path:
    """Two micrographs as ``graincast segment`` leaves them, one of them as CSV and as Parquet."""
    folder = tmp_path / "session"
    folder.mkdir()
    for seed in (0, 1):
        measure_grains(voronoi(seed, side=120, grains=40), 0.1).to_csv(folder / f"m{seed}_grains.csv", index=False)
    measure_grains(voronoi(1, side=120, grains=40), 0.1).to_parquet(folder / "m1_grains.parquet")
    return folder


def test_command_compares_a_session_with_lengths_by_hand(session_folder: Path, tmp_path: Path) -> None:
    hand = tmp_path / "by_hand.csv"
    pd.DataFrame({"sample": range(30), "grain_length_um": np.linspace(1, 3, 30)}).to_csv(hand, index=False)
    columns = ["--column", "feret_max_um", "--column", "grain_length_um"]
    result = CliRunner().invoke(app, ["compare", str(session_folder), str(hand), *columns, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    whole = pd.concat(pd.read_csv(file) for file in session_folder.glob("*.csv")).query("not touches_border")
    values = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert values["a_count"] == len(whole)
    assert values["a_mean_um"] == pytest.approx(whole["feret_max_um"].mean())
    assert values["b_mean_um"] == pytest.approx(2)
    assert values["sentence"].split(":")[0] in result.output.replace("\n", " ")
    assert iio.imread(tmp_path / "out" / "comparison.png").std() > 5


def test_sizes_that_do_not_compare_are_refused(session_folder: Path, tmp_path: Path) -> None:
    assert read_sizes(session_folder).column == "equivalent_diameter_um"
    in_px = tmp_path / "px.csv"
    measure_grains(voronoi(2, side=120, grains=40), None).to_csv(in_px, index=False)
    with pytest.raises(UserError, match=r"in um and equivalent_diameter_px .* in px"):
        compare_files(session_folder, in_px)
    with pytest.raises(UserError, match="no column 'length_um'; one of label"):
        read_sizes(in_px, "length_um")
    with pytest.raises(UserError, match="--column"):
        read_sizes(_csv(tmp_path / "two.csv", {"a_um": [1.0], "b_um": [2.0]}))
    assert read_sizes(_csv(tmp_path / "density.csv", {"length_per_um": [1.0, 2.0]}), "length_per_um").unit == "per_um"
    with pytest.raises(UserError, match="holds no numbers"):
        read_sizes(_csv(tmp_path / "words.csv", {"a_um": ["x", "y"]}), "a_um")
    (session_folder / "m2_grains.csv").write_text(in_px.read_text())
    with pytest.raises(UserError, match=r"m2_grains\.csv has equivalent_diameter_px.*--pixel-size"):
        read_sizes(session_folder)
    with pytest.raises(UserError, match=r"holds no \*_grains.csv"):
        read_sizes(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_sizes(tmp_path / "nothing")
    (tmp_path / "broken.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read"):
        read_sizes(tmp_path / "broken.parquet")


def _csv(path: Path, columns: dict[str, list[float] | list[str]]) -> Path:
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def test_benchmark_answers_for_the_measure_fixed_before() -> None:
    # specimens whose grains' largest extents the hand has measured exactly
    sizes = {"1": 0.1, "2": 0.2, "3": 0.15}
    measured = {specimen: [measure_field(voronoi(0, side=120, grains=40), size)] for specimen, size in sizes.items()}
    hand = pd.DataFrame([(specimen, length) for specimen, own in measured.items() for length in own[0].whole["feret_max_um"]],
                        columns=["sample", "grain_length_um"])
    summary, details = measurement.against_hand(measured, hand)
    assert summary["nbt_mean_error_percent"] == pytest.approx(0, abs=1e-9)
    assert summary["nbt_pearson"] == pytest.approx(1)
    assert details["measures"]["equivalent_diameter"]["mean absolute error, %"] > 10
