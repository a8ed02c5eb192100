"""What a field of grains says about the material, by the standards' procedures.

**Grains that the border cuts.** Planimetric counts (ASTM E112, ISO 643) count them half, and where the field is a rectangle its
four corners a quarter each. Size distributions and the mean area of ASTM E1382 leave them out. Test lines and boundary
lengths need no rule: they count what lies inside the field.

**Headline.** The mean equivalent diameter of the whole grains is the length that is told first, ASTM's planimetric number the
number: the first is what distributions are drawn of, the second counts every grain rightly and needs no shape. Leaving out cut
grains favours small ones, since large grains are cut more often; ``edge_corrected_mean_equivalent_diameter_*`` says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from graincast.measure.distribution import distribution, plain
from graincast.measure.grains import check_map, measure_grains, unit_and_size
from graincast.measure.intercepts import ABRAMS, DIRECTIONS_DEG, LINES_PER_GRAIN, Count, count_circles, count_lines
from graincast.measure.scan import border_weights, filled, scan
from graincast.measure.standards import (
    MIN_GRAINS,
    astm_e112_intercept,
    astm_e112_planimetric,
    astm_e930_ala,
    astm_e1382_area,
    iso_643_planimetric,
)

MEANS = ("feret_max_*", "feret_min_*", "aspect_ratio", "circularity", "neighbours")
"""Columns of `measure_grains` whose mean over the whole grains a field states; ``*`` is the unit."""


@dataclass(frozen=True)
class FieldSizes:
    """Grain sizes of one field.

    Attributes
    ----------
    unit : str
        ``um``, or ``px`` where the pixel size is unknown.
    values : dict
        What `to_dict` returns, see `measure_field`.
    whole : pandas.DataFrame
        The grains that the border does not cut, rows of `measure_grains`.
    warnings : list of str
        What makes the figures less than the standards ask for, a sentence each.
    """

    unit: str
    values: dict[str, Any]
    whole: pd.DataFrame = field(repr=False)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All figures, flat and JSON-able; None for what is undefined here."""
        return dict(self.values)

    @property
    def headline(self) -> str:
        """The mean grain size in a few words."""
        mean, number = self.values[f"mean_equivalent_diameter_{self.unit}"], self.values["astm_e112_g_planimetric"]
        if mean is None:
            return "no whole grain"
        grade = f", ASTM E112 G {number:.1f} (planimetric)" if number is not None else ""
        return f"mean equivalent diameter {mean:.3g} {self.unit} of {len(self.whole)} whole grains{grade}"


def measure_field(labels: np.ndarray, pixel_size_um: float | None, grains: pd.DataFrame | None = None,
                  field: np.ndarray | None = None) -> FieldSizes:
    """Measure a field of grains.

    Parameters
    ----------
    labels : (H, W) integer ndarray
        0 = boundary line, 1..N = grains.
    pixel_size_um : float or None
        Pixel size in um; None or NaN: unknown, lengths stay in px and there are no grain size numbers.
    grains : pandas.DataFrame, optional
        What `measure_grains` made of the same map, if that is at hand.
    field : (H, W) bool ndarray, optional
        False where no specimen is seen, e.g. the info bar.

    Returns
    -------
    FieldSizes
        With the following values; ``*`` stands for um or px.

        ``pixel_size_um``
            None if unknown.
        ``grains``, ``grains_whole``, ``grains_at_border``
            Number of grains, of those inside, of those that the border may cut.
        ``grains_counted``
            Planimetric count N: those inside, half of those at the border; in a rectangular field the grains at its
            corners a quarter a corner (Jeffries, Saltykov).
        ``field_area_*2``, ``mean_area_*2``, ``grains_per_mm2``
            A; A / N; N_A = N / A.
        ``astm_e112_g_planimetric``, ``iso_643_g_planimetric``
            Grain size numbers from N_A.
        ``astm_e1382_mean_area_*2``, ``astm_e1382_g_mean_area``
            Mean area of the whole grains, and the number from it.
        ``astm_e930_largest_area_*2``, ``astm_e930_g_ala``
            Of the largest grain in view, a cut one included.
        ``mean_intercept_heyn_lines_*``, ``_hilliard_circle_*``, ``_abrams_circles_*``; ``astm_e112_g_intercept_...``
            Mean lineal intercept and number by straight lines in four directions, by one circle, by three
            (`graincast.measure.intercepts`); ``intersections_...`` the scored crossings behind each.
        ``mean_intercept_0_deg_*``, ``_45_``, ``_90_``, ``_135_``, ``anisotropy_index``
            The same along each direction of the lines, and 0 over 90 degrees.
        ``boundary_length_*``, ``boundary_length_per_area_per_*``, ``surface_per_volume_per_*``
            Boundaries between grains by Crofton's formula; L_A; S_V = 4 / pi L_A.
        ``triple_junctions``, ``triple_junctions_per_*2``
            Points where three grains meet; one where four meet counts twice.
        ``mean_equivalent_diameter_*`` and others
            Distribution of the whole grains, `graincast.measure.distribution.distribution`.
        ``edge_corrected_mean_equivalent_diameter_*``
            The mean with every whole grain weighted by the inverse of its chance to lie whole in the field
            (`graincast.measure.scan.border_weights`; as in ISO 13322-1); None where the field is no rectangle.
        ``mean_feret_max_*``, ``mean_feret_min_*``, ``mean_aspect_ratio``, ``mean_circularity``, ``mean_neighbours``
            Over the whole grains.

    Raises
    ------
    ValueError
        As `measure_grains`.
    """
    check_map(labels, pixel_size_um, field)
    unit, size = unit_and_size(pixel_size_um)
    grown = filled(labels, field)
    table = measure_grains(grown, pixel_size_um, field=field) if grains is None else grains
    scanned = scan(grown)
    border, boxes = scanned.at_border, scanned.boxes
    whole = table[~table["touches_border"].to_numpy(bool)]
    cells = float(scanned.area_px2.sum())
    box = [*boxes[:, :2].min(axis=0, initial=1 << 40), *boxes[:, 2:].max(axis=0, initial=0)]
    rectangle = cells > 0 and cells == (box[2] - box[0]) * (box[3] - box[1])
    count = _planimetric_count(border, grown[box[0] : box[2], box[1] : box[3]][[0, 0, -1, -1], [0, -1, 0, -1]] if rectangle else None)
    per_mm2 = count / (cells * size**2) * 1e6 if unit == "um" and count else None
    areas, diameters = whole[f"area_{unit}2"].to_numpy(float), whole[f"equivalent_diameter_{unit}"].to_numpy(float)
    mean_area = areas.mean() if areas.size else None
    largest = table[f"area_{unit}2"].max() if len(table) else None
    corrected = np.average(diameters, weights=border_weights(boxes[~border], box)) if rectangle and diameters.size else None
    density = scanned.boundary_per_area
    values: dict[str, Any] = {
        "pixel_size_um": pixel_size_um if unit == "um" else None,
        "grains": len(table),
        "grains_whole": len(whole),
        "grains_at_border": int(border.sum()),
        "grains_counted": count,
        f"field_area_{unit}2": cells * size**2,
        f"mean_area_{unit}2": cells * size**2 / count if count else None,
        "grains_per_mm2": per_mm2,
        "astm_e112_g_planimetric": astm_e112_planimetric(per_mm2) if per_mm2 else None,
        "iso_643_g_planimetric": iso_643_planimetric(per_mm2) if per_mm2 else None,
        f"astm_e1382_mean_area_{unit}2": mean_area,
        "astm_e1382_g_mean_area": astm_e1382_area(mean_area * 1e-6) if unit == "um" and mean_area else None,
        f"astm_e930_largest_area_{unit}2": largest,
        "astm_e930_g_ala": astm_e930_ala(largest * 1e-6) if unit == "um" and largest else None,
        **_intercepts(grown, box, np.sqrt(cells / count) if count else None, unit, size),
        f"boundary_length_{unit}": density * cells * size,
        f"boundary_length_per_area_per_{unit}": density / size if cells else None,
        f"surface_per_volume_per_{unit}": 4 / np.pi * density / size if cells else None,
        "triple_junctions": scanned.triple_junctions,
        f"triple_junctions_per_{unit}2": scanned.triple_junctions / (cells * size**2) if cells else None,
        **distribution(diameters, areas, unit),
        f"edge_corrected_mean_equivalent_diameter_{unit}": corrected,
        **{f"mean_{name}": whole[name].mean() for name in (template.replace("*", unit) for template in MEANS)},
    }
    return FieldSizes(unit, {name: plain(value) for name, value in values.items()}, whole, _warnings(len(table), len(whole), count, unit))


def _planimetric_count(border: np.ndarray, at_corners: np.ndarray | None) -> float:
    """Jeffries' count; with the grains at a rectangle's corners a quarter a corner. 0 where one grain is all there is."""
    if border.size < 2 and border.all():
        return 0.0
    if at_corners is None:
        return float((~border).sum() + border.sum() / 2)
    return float((~border).sum() + (border.sum() - np.unique(at_corners).size) / 2 + len(at_corners) / 4)


def _intercepts(grown: np.ndarray, box: Sequence[int], grain_px: float | None, unit: str, size: float) -> dict[str, Any]:
    """Mean intercepts by lines, one circle and three circles, the numbers from them and the lines' anisotropy."""
    by_angle, single, triple = dict.fromkeys(DIRECTIONS_DEG, Count()), Count(), Count()
    if grain_px is not None:
        by_angle = count_lines(grown, grain_px / LINES_PER_GRAIN)
        single, triple = count_circles(grown, box), count_circles(grown, box, ABRAMS)
    values: dict[str, Any] = {}
    for name, count in (("heyn_lines", sum(by_angle.values(), Count())), ("hilliard_circle", single), ("abrams_circles", triple)):
        mean = count.mean_intercept_px
        values[f"mean_intercept_{name}_{unit}"] = mean and mean * size
        values[f"astm_e112_g_intercept_{name}"] = astm_e112_intercept(mean * size * 1e-3) if unit == "um" and mean else None
        values[f"intersections_{name}"] = count.intersections
    along = {angle: count.mean_intercept_px for angle, count in by_angle.items()}
    values |= {f"mean_intercept_{angle}_deg_{unit}": mean and mean * size for angle, mean in along.items()}
    return {**values, "anisotropy_index": along[0] / along[90] if along[0] and along[90] else None}


def _warnings(grains: int, whole: int, count: float, unit: str) -> list[str]:
    """What a reader of the figures should know, a sentence each."""
    cases = {
        "no grain in the field": grains == 0,
        "one grain fills the field: no size can be told": grains == 1 and not whole,
        "every grain touches the border of the field: no whole grain can be measured": grains > 1 and not whole,
        f"{count:.0f} grains in the field, those at its border counted half; ASTM E112 asks for {MIN_GRAINS}": whole > 0 and count < MIN_GRAINS,
        "no pixel size: lengths are in px and there is no grain size number": unit == "px",
    }
    return [sentence for sentence, applies in cases.items() if applies]
