"""Grain sizes of a session: the mean over its fields with the interval and accuracy that ASTM E112 asks for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from graincast.errors import UserError
from graincast.measure.distribution import distribution, plain
from graincast.measure.field import FieldSizes
from graincast.measure.standards import (
    ACCEPTABLE_PERCENT,
    MIN_FIELDS,
    MIN_GRAINS,
    astm_e112_intercept,
    astm_e112_planimetric,
    astm_e1382_area,
    iso_643_planimetric,
)

OVER_FIELDS = (
    "mean_equivalent_diameter_*", "edge_corrected_mean_equivalent_diameter_*", "area_weighted_mean_equivalent_diameter_*", "mean_area_*2",
    "grains_per_mm2", "astm_e1382_mean_area_*2", "mean_intercept_heyn_lines_*", "mean_intercept_hilliard_circle_*",
    "mean_intercept_abrams_circles_*", "boundary_length_per_area_per_*", "surface_per_volume_per_*", "triple_junctions_per_*2",
    "mean_feret_max_*", "mean_feret_min_*", "mean_aspect_ratio", "mean_circularity", "mean_neighbours", "anisotropy_index")
"""Values of a field whose mean, standard deviation, interval and accuracy over the fields a session states; ``*`` is the unit."""
JUDGED = {"um": {"grains_per_mm2": "number of grains per area", "mean_intercept_heyn_lines_um": "mean intercept by lines"},
          "px": {"mean_area_px2": "mean grain area", "mean_intercept_heyn_lines_px": "mean intercept by lines"}}
"""Values whose relative accuracy is held against the standard's, by unit, and what they are in words."""
UNIT = re.compile(r"(_per)?_(um|px|mm)2?$")
ROUNDING = 1e-9
"""Half widths below this, in um or as a grain size number, are those of equal fields."""

NUMBERS = {
    "astm_e112_g_planimetric": ("grains_per_mm2", astm_e112_planimetric, 1.0, 1.0),
    "iso_643_g_planimetric": ("grains_per_mm2", iso_643_planimetric, 1.0, 1.0),
    "astm_e1382_g_mean_area": ("astm_e1382_mean_area_um2", astm_e1382_area, 1e-6, 1.0),
    **{f"astm_e112_g_intercept_{procedure}": (f"mean_intercept_{procedure}_um", astm_e112_intercept, 1e-3, 2.0)
       for procedure in ("heyn_lines", "hilliard_circle", "abrams_circles")},
}
"""Grain size numbers: from which mean, by which function, of what multiple, and how many doublings of the number of grains a
doubling of the mean is."""


@dataclass(frozen=True)
class SessionSizes:
    """Grain sizes of a session.

    Attributes
    ----------
    unit : str
        ``um`` or ``px``.
    values : dict
        What `to_dict` returns, see `measure_session`.
    diameters : (N,) float ndarray
        Equivalent diameters of the whole grains of all fields.
    warnings : list of str
        What the figures lack of what the standards ask for, a sentence each.
    """

    unit: str
    values: dict[str, Any]
    diameters: np.ndarray = field(repr=False)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All figures, flat and JSON-able; None for what is undefined here."""
        return dict(self.values)

    @property
    def headline(self) -> str:
        """The mean grain size with its interval, in a few words."""
        mean = self.values[f"mean_equivalent_diameter_{self.unit}"]
        if mean is None:
            return "no whole grain"
        text = f"mean equivalent diameter {_with_interval(mean, self.values[f'mean_equivalent_diameter_ci95_{self.unit}'], '.3g')} {self.unit}"
        number = self.values["astm_e112_g_planimetric"]
        if number is not None:
            text += f", ASTM E112 G {_with_interval(number, self.values['astm_e112_g_planimetric_ci95'], '.1f')} (planimetric)"
        several = "" if self.values["fields"] == 1 else f" in {self.values['fields']} fields"
        return f"{text}; {len(self.diameters)} whole grain{'' if len(self.diameters) == 1 else 's'}{several}"


def measure_session(fields: Mapping[str, FieldSizes]) -> SessionSizes:
    """Sum up the fields of a session.

    Parameters
    ----------
    fields : mapping of str to FieldSizes
        By their names; the fields are of one specimen or material, and their sizes weigh alike, as in the standard.

    Returns
    -------
    SessionSizes
        With the following values; ``*`` stands for um or px.

        ``fields``, ``fields_measured``, ``grains``, ``grains_whole``, ``field_area_*2``
            Fields, those of them with a whole grain, and sums over the fields.
        ``NAME_*``, ``NAME_std_*``, ``NAME_ci95_*``, ``NAME_relative_accuracy_percent``
            For every name of `OVER_FIELDS`: mean over the fields, sample standard deviation s, half width of the 95 %
            confidence interval, t s / sqrt(n) with Student's t of n - 1 degrees of freedom, and that in per cent of the
            mean (ASTM E112-13, section 15). The last three need two fields.
        ``astm_e112_g_planimetric`` and the other numbers, each with ``..._ci95``
            From the mean over the fields, not the mean of the fields' numbers, as the standard has it. The interval is
            carried over to first order: d G = d x / (x ln 2), twice that for an intercept.
        ``pooled_...``
            Distribution of the whole grains of all fields together
            (`graincast.measure.distribution.distribution`).

    Raises
    ------
    UserError
        If there is no field, or some are in um and others in px.
    """
    unit = _common_unit(fields)
    rows = [each.to_dict() for each in fields.values()]
    diameters, areas = (np.concatenate([each.whole[f"{column}_{unit}{power}"].to_numpy(float) for each in fields.values()])
                        for column, power in (("equivalent_diameter", ""), ("area", "2")))
    values: dict[str, Any] = {
        "fields": len(rows), "fields_measured": sum(row["grains_whole"] > 0 for row in rows),
        **{name: sum(row[name] for row in rows) for name in ("grains", "grains_whole", f"field_area_{unit}2")}}
    for name in (template.replace("*", unit) for template in OVER_FIELDS):
        values |= over_fields(name, [row[name] for row in rows if row[name] is not None])
    for name, (source, function, multiple, doublings) in NUMBERS.items():
        mean, accuracy = (values.get(key) for key in (source, _part(source, "relative_accuracy_percent", unitless=True)))
        values[name] = function(mean * multiple) if unit == "um" and mean else None
        values[f"{name}_ci95"] = doublings * accuracy / 100 / math.log(2) if values[name] is not None and accuracy is not None else None
    values |= {f"pooled_{name}": value for name, value in distribution(diameters, areas, unit).items()}
    return SessionSizes(unit, {name: plain(value) for name, value in values.items()}, diameters, _warnings(fields, values, unit))


def over_fields(name: str, values: list[float]) -> dict[str, float | None]:
    """Mean, standard deviation, half width of the 95 % interval and relative accuracy of one quantity over fields.

    Parameters
    ----------
    name : str
        With its unit at the end, where it has one.
    values : list of float
        One a field.

    Examples
    --------
    >>> over_fields("mean_intercept_um", [2.0, 2.2, 2.4])["mean_intercept_ci95_um"].__round__(3)
    0.497
    """
    count = len(values)
    mean = float(np.mean(values)) if count else None
    spread = float(np.std(values, ddof=1)) if count > 1 else None
    half = float(stats.t.ppf(0.975, count - 1)) * spread / math.sqrt(count) if spread is not None else None
    accuracy = 100 * half / mean if half is not None and mean else None
    return {name: mean, _part(name, "std"): spread, _part(name, "ci95"): half, _part(name, "relative_accuracy_percent", unitless=True): accuracy}


def _part(name: str, part: str, unitless: bool = False) -> str:
    """The name with a word before its unit, or in its place."""
    unit = UNIT.search(name)
    stem, rest = (name[: unit.start()], unit.group()) if unit else (name, "")
    return f"{stem}_{part}" if unitless else f"{stem}_{part}{rest}"


def _common_unit(fields: Mapping[str, FieldSizes]) -> str:
    if not fields:
        raise UserError("no field was measured, so there is no session to sum up; at least one micrograph that can be read would be right")
    by_unit = {each.unit: name for name, each in fields.items()}
    if len(by_unit) > 1:
        raise UserError(f"'{by_unit['um']}' is measured in um and '{by_unit['px']}' in px, as its pixel size is unknown; "
                        "a pixel size for every field would be right (--pixel-size), or a folder for each kind")
    return next(iter(by_unit))


def _with_interval(value: float, half: float | None, form: str) -> str:
    """The half width to two digits and the value to as many decimals; without one, or with none but rounding, the value as `form` has it."""
    if half is None or half < ROUNDING:
        return f"{value:{form}}" + ("" if half is None else " ± 0")
    decimals = max(1 - math.floor(math.log10(half)), 0)
    return f"{value:.{decimals}f} ± {half:.{decimals}f}"


def _warnings(fields: Mapping[str, FieldSizes], values: Mapping[str, Any], unit: str) -> list[str]:
    few = [name for name, each in fields.items() if 0 < each.values["grains_counted"] < MIN_GRAINS]
    empty = [name for name, each in fields.items() if not each.values["grains_counted"]]
    sentences = {
        f"{_fields(len(fields))}; ASTM E112 asks for {MIN_FIELDS}": len(fields) < MIN_FIELDS,
        f"{_fields(len(few))} of {len(fields)} with fewer than {MIN_GRAINS} grains ({_some(few)}); ASTM E112 asks for them in each": bool(few),
        f"{_fields(len(empty))} of {len(fields)} without a grain that can be counted ({_some(empty)}): left out of the means": bool(empty),
        "no pixel size: lengths are in px and there is no grain size number": unit == "px",
    }
    found = [sentence for sentence, applies in sentences.items() if applies]
    for name, words in JUDGED[unit].items():
        accuracy = values[_part(name, "relative_accuracy_percent", unitless=True)]
        if accuracy is not None and accuracy > ACCEPTABLE_PERCENT:
            found.append(f"the {words} has a relative accuracy of {accuracy:.0f} %; ASTM E112 calls {ACCEPTABLE_PERCENT} % acceptable, "
                         "so more fields would be right")
    return found


def _fields(count: int) -> str:
    return f"{count} field" + ("" if count == 1 else "s")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
