"""How right the measured grain sizes are: ``python -m benchmarks.measurement [--only PART ...] [--record]``.

============  ========================================================================================================
lattices      drawn grains whose sizes are known: hexagons, squares and ellipses, turned by several angles
e112          the tables of ASTM E112 (number, grains per area, mean intercept, Student's t) and drawn lattices of which
              the standard's number follows from the side of a cell
references    scikit-image on a Voronoi map, and what theory says of its boundaries and triple junctions
nbt           a ceramic whose grains somebody measured by hand: 12 micrographs of 6 specimens, segmented by the network that
              `benchmarks.real_micrographs` trains on its unlabelled images (11 to 14 minutes on one core, kept in
              ``--work``; ``--segmenter`` takes one that is trained already)
============  ========================================================================================================

The last line is one JSON object; what was not run, or has no data, is null there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from skimage import measure, segmentation

from benchmarks import machine
from benchmarks.real_micrographs import MATERIALS, NBT, NBT_5000X, NBT_SPECIMENS, PRESETS, RESULTS, ROOT, Study, our_segmenter
from graincast.config import load_config
from graincast.measure.field import FieldSizes, measure_field
from graincast.measure.grains import measure_grains
from graincast.measure.session import over_fields
from graincast.measure.standards import astm_e112_intercept, astm_e112_planimetric
from graincast.microscope.reader import read_micrograph
from graincast.segment.segmenter import Segmenter
from graincast.store import tracking

SIDE_PX = 900
CELL_PX2 = 1600.0
"""Side of a drawn field and area of its cells: some 500 cells, 45 px across."""
ANGLES_DEG = (0.0, 7.0, 15.0, 22.5, 31.0, 40.0)
FIELDS, PIXEL_UM = 16, 0.5
"""Fields of a lattice, turned and shifted at random, whose mean the standard's number is taken of, and their pixel size."""
E112_TABLE = {0: (7.75, 320.0), 1: (15.50, 226.3), 3: (62.00, 113.1), 5: (248.0, 56.6), 8: (1984.0, 20.0), 10: (7936.0, 10.0), 12: (31744.0, 5.0)}
"""ASTM E112-13, table 4: G to grains per mm^2 and mean lineal intercept in um, as the definitions give them: 7.75 * 2^G and
320 * 2^(-G/2)."""
PUBLISHED = ((25, 75, 4.81), (33, 270, 8.91))
"""Worked examples of a textbook (Callister & Rethwisch, Materials Science and Engineering, chapter 4): grains per square inch, as counted at
this magnification, and the number found."""
PER_SQUARE_INCH = 645.16
"""Square millimetres in a square inch."""
E112_STUDENT = {5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""ASTM E112-13, table of multipliers for the 95 % interval: number of fields to t."""
BY_HAND = "feret_max"
"""The measure that the hand-drawn length is held against: fixed for `benchmarks.real_micrographs` before any figure was seen."""
MEASURES = ("feret_max", "feret_min", "equivalent_diameter")
MEAN_INTERCEPT = "mean_intercept_heyn_lines"


Found = tuple[dict[str, Any], dict[str, Any]]
"""What a part has found: its share of the last line, and the details for the record."""


def hexagons(angle_deg: float, shift_px: tuple[float, float] = (3.3, 7.7)) -> np.ndarray:
    """A honeycomb, turned and shifted: the cells nearest to the points of a triangular lattice."""
    pitch = math.sqrt(2 * CELL_PX2 / math.sqrt(3))
    return _nearest(np.array([[pitch, 0.0], [pitch / 2, pitch * math.sqrt(3) / 2]]), angle_deg, shift_px)


def squares(angle_deg: float, shift_px: tuple[float, float] = (3.3, 7.7)) -> np.ndarray:
    """A chequered floor, turned and shifted."""
    return _nearest(np.eye(2) * math.sqrt(CELL_PX2), angle_deg, shift_px)


def voronoi(seed: int) -> np.ndarray:
    """Voronoi cells of random points; those beyond the field cut it off as a larger structure would."""
    margin = 4 * math.sqrt(CELL_PX2)
    extent = SIDE_PX + 2 * margin
    points = np.random.default_rng(seed).uniform(-margin, SIDE_PX + margin, (round(extent**2 / CELL_PX2), 2))
    return _cells(points)


def _nearest(basis: np.ndarray, angle_deg: float, shift_px: tuple[float, float]) -> np.ndarray:
    angle = math.radians(angle_deg)
    turned = basis @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    numbers = np.stack(np.meshgrid(*[np.arange(-60, 61)] * 2), axis=-1).reshape(-1, 2)
    points = numbers @ turned + SIDE_PX / 2 + np.array(shift_px)
    return _cells(points[np.all((points > -100) & (points < SIDE_PX + 100), axis=1)])


def _cells(points: np.ndarray) -> np.ndarray:
    pixels = np.stack(np.meshgrid(np.arange(SIDE_PX), np.arange(SIDE_PX), indexing="ij"), axis=-1).reshape(-1, 2)
    return (cKDTree(points).query(pixels)[1] + 1).reshape(SIDE_PX, SIDE_PX).astype(np.int32)


def ellipse(length: float, width: float, angle_deg: float) -> np.ndarray:
    """One ellipse, its middle off the pixels' grid."""
    side = int(length) + 9
    row, column = np.mgrid[:side, :side]
    x, y = column - (side / 2 - 0.29), (side / 2 - 0.37) - row
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    return ((x * cos + y * sin) / (length / 2)) ** 2 + ((y * cos - x * sin) / (width / 2)) ** 2 <= 1


def _percent(found: float, true: float) -> float:
    return 100 * (found / true - 1)


def lattices() -> Found:
    """Errors of every size of drawn grains, per cent."""
    side, edge = math.sqrt(CELL_PX2), math.sqrt(2 * CELL_PX2 / (3 * math.sqrt(3)))
    known = {
        "hexagons": (hexagons, {"perimeter": 6 * edge, "feret_max": 2 * edge, "feret_min": math.sqrt(3) * edge}),
        "squares": (squares, {"perimeter": 4 * side, "feret_max": math.sqrt(2) * side, "feret_min": side}),
    }
    rows = []
    for name, (draw, sizes) in known.items():
        for angle in ANGLES_DEG:
            field = measure_field(draw(angle), None)
            whole, density = field.whole, 2 / CELL_PX2 if name == "hexagons" else None
            rows.append({
                "grains": name, "angle": angle, "mean area": _percent(whole["area_px2"].mean(), CELL_PX2),
                "worst area": float((100 * (whole["area_px2"] / CELL_PX2 - 1)).abs().max()),
                "planimetric area": _percent(field.values["mean_area_px2"], CELL_PX2),
                **{size.replace("_", " "): _percent(whole[f"{size}_px"].mean(), true) for size, true in sizes.items()},
                "boundary": _percent(field.values["boundary_length_per_area_per_px"], sizes["perimeter"] / 2 / CELL_PX2),
                "triple junctions": _percent(field.values["triple_junctions_per_px2"], density) if density else None,
                "neighbours": whole["neighbours"].mean()})
    for length, width in ((90, 36), (60, 45), (24, 16)):
        for angle in ANGLES_DEG:
            shape = ellipse(length, width, angle)
            grain = measure_grains(shape.astype(np.int32), None, field=shape).iloc[0]
            half, wide = length / 2, width / 2
            around = math.pi * (3 * (half + wide) - math.sqrt((3 * half + wide) * (half + 3 * wide)))  # Ramanujan
            rows.append({
                "grains": f"ellipse {length} x {width}", "angle": angle, "mean area": _percent(grain["area_px2"], math.pi * half * wide),
                "perimeter": _percent(grain["perimeter_px"], around), "feret max": _percent(grain["feret_max_px"], length),
                "feret min": _percent(grain["feret_min_px"], width), "aspect ratio": _percent(grain["aspect_ratio"], length / width),
                "orientation, deg": (grain["orientation_deg"] - angle + 90) % 180 - 90})
    table = pd.DataFrame(rows).set_index(["grains", "angle"])
    print("\nDrawn grains, error in per cent (neighbours and orientation: as they are)\n" + table.round(2).to_string(na_rep=""))
    worst = table.drop(columns="neighbours").abs().groupby(level="grains", sort=False).max()
    return ({"lattice_max_area_error_percent": float(table["mean area"].abs().max()),
             "lattice_max_perimeter_error_percent": float(table["perimeter"].abs().max())},
            {name: {size: round(float(value), 3) for size, value in row.items() if np.isfinite(value)} for name, row in worst.T.to_dict().items()})


def e112() -> Found:
    """Errors of ASTM's number: of the formulas on the standard's table, and of whole fields with a known cell."""
    rows = []
    for number, (per_mm2, intercept_um) in E112_TABLE.items():
        rows.append({"case": f"table 4, G = {number}", "planimetric": astm_e112_planimetric(per_mm2) - number,
                     "heyn_lines": astm_e112_intercept(intercept_um * 1e-3) - number})
    for count, magnification, number in PUBLISHED:
        rows.append({"case": f"textbook, {count} per in2 at {magnification}x",
                     "planimetric": astm_e112_planimetric(count * magnification**2 / PER_SQUARE_INCH) - number})
    true = astm_e112_planimetric(1e6 / (CELL_PX2 * PIXEL_UM**2))
    edge, side = math.sqrt(2 * CELL_PX2 / (3 * math.sqrt(3))), math.sqrt(CELL_PX2)
    perimeters = {"hexagons": (hexagons, 6 * edge), "squares": (squares, 4 * side)}
    rng = np.random.default_rng(0)
    for name, (draw, perimeter) in perimeters.items():
        intercept = astm_e112_intercept(math.pi * CELL_PX2 / perimeter * PIXEL_UM * 1e-3)  # over all directions (Cauchy)
        rows.append({"case": f"{name} along the pixels", **_number_errors([measure_field(draw(0.0), PIXEL_UM)], true, intercept)})
        fields = [measure_field(draw(rng.uniform(0, 90), tuple(rng.uniform(0, 100, 2))), PIXEL_UM) for _ in range(FIELDS)]
        rows.append({"case": f"{name}, turned: mean", **_number_errors(fields, true, intercept)})
        rows.append({"case": f"{name}, turned: spread", **_spread(fields, true, intercept)})
    fields = [measure_field(voronoi(seed), PIXEL_UM) for seed in range(FIELDS)]
    intercept = astm_e112_intercept(math.pi / 4 * math.sqrt(CELL_PX2) * PIXEL_UM * 1e-3)  # L_A = 2 sqrt(N_A): Meijering 1953
    rows.append({"case": "Voronoi cells: mean", **_number_errors(fields, true, intercept)})
    rows.append({"case": "Voronoi cells: spread", **_spread(fields, true, intercept)})
    table = pd.DataFrame(rows).set_index("case")
    print(f"\nASTM E112, error of G; mean and standard deviation over {FIELDS} fields\n" + table.round(3).to_string(na_rep=""))
    print(f"Student's t against the standard's table: largest difference {max(abs(_multiplier(n) - t) for n, t in E112_STUDENT.items()):.4f}")
    judged = table[table.index.str.contains("table|textbook|mean")]  # one circle in one lattice meets it by chance
    return ({"e112_max_error_g": float(judged.abs().max().max())}, {"cases": json.loads(table.round(4).to_json(orient="index"))})


def _multiplier(fields: int) -> float:
    """Half width of the interval in standard errors, as the session's statistics have it."""
    found = over_fields("x", list(np.linspace(0, 1, fields)))
    return (found["x_ci95"] or math.nan) * math.sqrt(fields) / (found["x_std"] or math.nan)


def _number_errors(fields: list[FieldSizes], planimetric: float, intercept: float) -> dict[str, float]:
    """Errors of G from the means over the fields."""
    mean = {name: float(np.mean([field.values[name] for field in fields])) for name in (
        "grains_per_mm2", *(f"mean_intercept_{procedure}_um" for procedure in ("heyn_lines", "hilliard_circle", "abrams_circles")))}
    errors = {"planimetric": astm_e112_planimetric(mean.pop("grains_per_mm2")) - planimetric}
    return errors | {name.removeprefix("mean_intercept_").removesuffix("_um"): astm_e112_intercept(value * 1e-3) - intercept
                     for name, value in mean.items()}


def _spread(fields: list[FieldSizes], planimetric: float, intercept: float) -> dict[str, float]:
    return pd.DataFrame([_number_errors([field], planimetric, intercept) for field in fields]).std().to_dict()


def references() -> Found:
    """Scikit-image, region by region, and the theory of Voronoi cells."""
    labels = voronoi(0)
    grains = measure_grains(labels, None)
    lines = np.where(segmentation.find_boundaries(labels, mode="inner"), 0, labels)
    speeds = {"measure_grains_mpx_per_s": _speed(lambda: measure_grains(labels, None), labels.size),
              "measure_grains_with_lines_mpx_per_s": _speed(lambda: measure_grains(lines, None), labels.size),
              "measure_field_mpx_per_s": _speed(lambda: measure_field(labels, None, grains), labels.size)}
    regions = measure.regionprops(labels)
    theirs = {"area_px2": [region.area for region in regions], "equivalent_diameter_px": [region.equivalent_diameter_area for region in regions],
              "perimeter_px": [region.perimeter_crofton for region in regions], "feret_max_px": [region.feret_diameter_max for region in regions],
              "centroid_x_px": [region.centroid[1] for region in regions]}
    keep = ~grains["touches_border"].to_numpy()
    different = {name: float(np.abs(grains[name].to_numpy()[keep] / np.array(values)[keep] - 1).max() * 100) for name, values in theirs.items()}
    found = pd.DataFrame([measure_field(voronoi(seed), None).values for seed in range(FIELDS)])
    theory = {"boundary_length_per_area_per_px": 2 / math.sqrt(CELL_PX2), "triple_junctions_per_px2": 2 / CELL_PX2, "mean_area_px2": CELL_PX2}
    errors = {name: _percent(float(found[name].astype(float).mean()), true) for name, true in theory.items()}
    print("\nScikit-image, largest difference over the whole grains, per cent:", {name: round(value, 4) for name, value in different.items()})
    print(f"Voronoi cells, {FIELDS} fields, difference to theory (2 sqrt(N_A), 2 N_A, 1 / N_A) in per cent:",
          {name: round(value, 2) for name, value in errors.items()})
    print("Mpx a second of processor time:", {name: round(value) for name, value in speeds.items()})
    return speeds, {"scikit_image_percent": different, "voronoi_percent": errors}


def _speed(work: Callable[[], object], pixels: int) -> float:
    """Best of five, Mpx/s on one core."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return pixels / 1e6 / min(seconds)


def nbt(data: Path, work: Path, segmenter: Path | None) -> Found:
    """Means of the specimens against the hand's, by every measure; the measure that is answered for was fixed before."""
    trained = Segmenter.load(segmenter) if segmenter else our_segmenter(
        Study("nbt_ceramic_sem", MATERIALS["nbt_ceramic_sem"], data, work, load_config(ROOT / "configs" / f"{PRESETS['cpu']}.yaml"), 0))
    fields: dict[str, list[FieldSizes]] = {specimen: [] for specimen in NBT_SPECIMENS}
    for name in NBT_5000X:
        micrograph = read_micrograph(data / NBT / "images" / f"{name}.tif")
        labels = trained.segment_micrograph(micrograph)
        fields[name[0]].append(measure_field(labels, micrograph.pixel_size_um, field=labels > 0))
    return against_hand(fields, pd.read_csv(data / NBT / "measured_lengths.csv", dtype={"sample": str}))


def against_hand(fields: Mapping[str, list[FieldSizes]], hand: pd.DataFrame) -> Found:
    """Figures of every measure against the lengths measured by hand.

    Parameters
    ----------
    fields : mapping of str to list of FieldSizes
        Fields of each specimen, in um.
    hand : DataFrame
        ``sample``, ``grain_length_um``.
    """
    by_hand = hand.groupby("sample")["grain_length_um"].mean()
    means = pd.DataFrame({specimen: {
        **{name: pd.concat([field.whole for field in own])[f"{name}_um"].mean() for name in MEASURES},
        MEAN_INTERCEPT: np.mean([field.values[f"{MEAN_INTERCEPT}_um"] for field in own])} for specimen, own in fields.items()}).T
    hand_means = by_hand[means.index]
    table = pd.DataFrame({name: {
        "mean error, %": 100 * float((values / hand_means - 1).mean()),
        "mean absolute error, %": 100 * float((values / hand_means - 1).abs().mean()),
        "Pearson r": float(np.corrcoef(values, hand_means)[0, 1])} for name, values in means.items()})
    print("\nNBT ceramic, mean of the whole grains by specimen, um\n" + means.assign(by_hand=hand_means).T.round(3).to_string())
    print(table.round(3).to_string())
    print(f"The hand drew lengths, so {BY_HAND}, the largest extent, corresponds; it was fixed before any figure was seen.\n"
          f"Closest in the mean: {table.loc['mean error, %'].abs().idxmin()}; follows the hand best: {table.loc['Pearson r'].idxmax()}.")
    figures = {name: {figure: round(float(value), 4) for figure, value in column.items()} for name, column in table.items()}
    return ({"nbt_mean_error_percent": table.loc["mean absolute error, %", BY_HAND], "nbt_pearson": table.loc["Pearson r", BY_HAND]},
            {"measures": figures, "means_um": json.loads(means.assign(by_hand=hand_means).round(3).to_json(orient="index"))})


KEYS = ("e112_max_error_g", "nbt_mean_error_percent", "nbt_pearson", "lattice_max_area_error_percent", "lattice_max_perimeter_error_percent",
        "measure_grains_mpx_per_s", "measure_grains_with_lines_mpx_per_s", "measure_field_mpx_per_s")


def record(summary: Mapping[str, Any], details: Mapping[str, Any], segmenter: str) -> Path:
    """Keep the figures under ``benchmarks/results/``, those of parts that this run left out as they were; `segmenter` made the maps of ``nbt``."""
    path = RESULTS / "measurement.json"
    kept = json.loads(path.read_text()) if path.exists() else {"details": {}, "made": {}}
    kept["details"] |= details
    kept["made"] |= {part: {"commit": tracking.git_commit(ROOT), **({"segmenter": segmenter} if part == "nbt" else {})} for part in details}
    kept["summary"] = {**kept.get("summary", {}), **{key: value for key, value in summary.items() if value is not None}}
    path.write_text(json.dumps({**kept, "command": "python -m benchmarks.measurement --record", "machine": machine.describe()}, indent=1) + "\n")
    return path


def main() -> None:
    """Run the parts and print what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parts = ("lattices", "e112", "references", "nbt")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the micrographs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study", help="where trainings are kept")
    parser.add_argument("--segmenter", type=Path, help="folder of a segmenter of the NBT ceramic, in place of the study's")
    parser.add_argument("--record", action="store_true", help="keep the figures under benchmarks/results")
    options = parser.parse_args()
    runs: dict[str, Callable[[], Found]] = {
        "lattices": lattices, "e112": e112, "references": references,
        "nbt": lambda: nbt(options.data.resolve(), options.work.resolve(), options.segmenter)}
    summary: dict[str, Any] = dict.fromkeys(KEYS)
    details = {}
    for part in options.only:
        if part == "nbt" and not (options.data / NBT).is_dir():
            print(f"\nNBT ceramic: no {options.data / NBT}; left out")
            continue
        figures, details[part] = runs[part]()
        summary |= figures
    summary = {key: None if value is None else round(float(value), 4) for key, value in summary.items()}
    if options.record:
        print(record(summary, details, "given with --segmenter" if options.segmenter else "trained by the study").relative_to(ROOT))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
