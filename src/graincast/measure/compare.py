"""Two sets of grain sizes side by side: two sessions, or what was found against what was measured by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from graincast.errors import UserError
from graincast.store.imageset import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_COLUMNS = ("equivalent_diameter_um", "equivalent_diameter_px")
TABLES: dict[str, Callable[[Path], pd.DataFrame]] = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
LENGTH_UNIT = re.compile(r"_((?:per_)?(?:nm|um|mm|px)2?)$")
MIN_COUNT, SIGNIFICANT = 5, 0.05
"""Sizes that a side must have, and the level of the test."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of one side.

    Attributes
    ----------
    name : str
    values : (N,) float ndarray
        In `unit`.
    column : str
        What was read.
    unit : str
        ``um``, ``um2``, ``px``, ``per_um``, ... ; empty for a pure number.
    """

    name: str
    values: np.ndarray
    column: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Comparison:
    """How two sets of sizes differ; `to_dict` says what is known.

    Attributes
    ----------
    a, b : Sizes
    values : dict
    warnings : list of str
        What a reader should know, a sentence each.
    """

    a: Sizes
    b: Sizes
    values: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Figures, flat and JSON-able, the unit in every name; a sentence at the end."""
        return {**self.values, "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The result in plain words."""
        a, b, unit = self.a.name, self.b.name, self.a.unit
        percent, p = self.values["difference_of_means_percent"], self.values["ks_p"]
        low, high = (self.values[_named(f"difference_of_means_ci95_{end}", unit)] for end in ("low", "high"))
        space = f" {unit.replace('_', ' ')}" if unit else ""
        means = [f"{self.values[_named(f'{side}_mean', unit)]:.3g}{space} ({self.values[f'{side}_count']} grains)" for side in ("a", "b")]
        told = low > 0 or high < 0
        relation = f"{abs(percent):.1f} % {'larger' if percent > 0 else 'smaller'} than" if percent else "as large as"
        text = f"{b} is {relation} {a} on the mean: {means[1]} against {means[0]}, "
        text += f"difference {self.values[_named('difference_of_means', unit)]:.2g}{space} with 95 % interval {low:.2g} to {high:.2g}, "
        text += "so the means differ" if told else "which includes no difference"
        shape = "differ" if p < SIGNIFICANT else "are not told apart"
        text += f". The distributions {shape} (Kolmogorov-Smirnov D = {self.values['ks_distance']:.2f}, p = {p:.2g}); "
        return text + f"on average a grain would have to change by {self.values[_named('wasserstein', unit)]:.2g}{space} to turn one into the other."

    def figure(self) -> Figure:
        """Both distributions: histograms of the same bins, and cumulative curves."""
        from graincast.report.drawing import BLUE, INK, VERMILION, heading, legend, row_of_axes, sheet, steps, style

        drawn = sheet(9.0, 3.6)
        left, right = row_of_axes(drawn, 2)
        both = np.concatenate([self.a.values, self.b.values])
        edges = np.histogram_bin_edges(both, min(40, max(8, round(math.sqrt(min(self.a.values.size, self.b.values.size)) * 1.5))))
        for sizes, colour in ((self.a, BLUE), (self.b, VERMILION)):
            label = f"{sizes.name} ({sizes.values.size})"
            steps(left, np.histogram(sizes.values, edges)[0], edges, colour, label)
            left.axvline(sizes.values.mean(), color=colour, linewidth=1.2, linestyle="--")
            right.ecdf(sizes.values, color=colour, linewidth=1.5, label=label)
        names = dict.fromkeys(sizes.column.removesuffix(f"_{sizes.unit}").replace("_", " ") or "size" for sizes in (self.a, self.b))
        for axes, title, scale in ((left, "share of the grains; dashed: means", "grains, %"),
                                   (right, "cumulative", "share of the grains up to this size")):
            style(axes)
            heading(axes, title)
            axes.set_xlabel(" / ".join(names) + (f", {self.a.unit.replace('_', ' ')}" if self.a.unit else ""), color=INK)
            axes.set_ylabel(scale, color=INK)
        left.set_xlim(left=min(0.0, edges[0]))
        right.set_xlim(left.get_xlim())
        legend(left)
        return drawn


def compare(a: np.ndarray, b: np.ndarray, *, names: tuple[str, str] = ("A", "B"), columns: tuple[str, str] = ("", ""),
            unit: str = "um") -> Comparison:
    """Compare two sets of sizes.

    Parameters
    ----------
    a, b : (N,), (M,) float ndarrays
        Sizes in `unit`, one a grain; `a` is what is compared against.
    names, columns : tuple of str, optional
        Of both sides, for words and figure.
    unit : str, optional
        Of both; empty for pure numbers.

    Returns
    -------
    Comparison
        ``a_count``, ``a_mean_*``, ``a_std_*``, ``a_median_*``, ``a_mean_ci95_*`` (half width, Student's t), the same of b;
        ``difference_of_means_*`` (b less a) with its 95 % interval by Welch and in per cent of a;
        ``ks_distance``, ``ks_p`` (Kolmogorov-Smirnov, two-sided); ``wasserstein_*`` (first Wasserstein distance: mean
        distance between equal percentiles). All take grains for independent of one another.

    Raises
    ------
    UserError
        If a side has fewer than `MIN_COUNT` sizes, one below 0, or nothing but 0.

    Examples
    --------
    >>> found = compare(np.arange(1.0, 11.0), np.arange(2.0, 12.0)).to_dict()
    >>> found["difference_of_means_um"], found["wasserstein_um"]
    (1.0, 1.0)
    """
    sides = [np.asarray(side, float) for side in (a, b)]
    sides = [side[np.isfinite(side)] for side in sides]
    values: dict[str, Any] = {}
    for side, name, sizes in zip("ab", names, sides, strict=True):
        if sizes.size < MIN_COUNT:
            raise UserError(f"{name} has {sizes.size} sizes, too few to compare; {MIN_COUNT} or more would be right")
        if sizes.min() < 0 or not sizes.any():
            raise UserError(f"{name} has sizes from {sizes.min():g} to {sizes.max():g}; sizes from 0 up, not all of them 0, would be right")
        half = stats.t.ppf(0.975, sizes.size - 1) * stats.sem(sizes)
        values |= {f"{side}_count": sizes.size, **{_named(f"{side}_{word}", unit): float(figure) for word, figure in (
            ("mean", sizes.mean()), ("std", sizes.std(ddof=1)), ("median", np.median(sizes)), ("mean_ci95", half))}}
    difference = float(sides[1].mean() - sides[0].mean())
    low, high = _welch(sides[1], sides[0])
    test = stats.ks_2samp(sides[0], sides[1])
    values |= {
        _named("difference_of_means", unit): difference,
        _named("difference_of_means_ci95_low", unit): difference + low,
        _named("difference_of_means_ci95_high", unit): difference + high,
        "difference_of_means_percent": 100 * difference / float(sides[0].mean()),
        "ks_distance": float(test.statistic),
        "ks_p": float(test.pvalue),
        _named("wasserstein", unit): float(stats.wasserstein_distance(sides[0], sides[1])),
    }
    both = [Sizes(*side, unit) for side in zip(names, sides, columns, strict=True)]
    warnings = ["sizes are in px: they compare where both sides have the same pixel size"] if "px" in unit else []
    return Comparison(both[0], both[1], values, warnings)


def compare_files(a: Path, b: Path, columns: tuple[str | None, str | None] = (None, None)) -> Comparison:
    """Compare two sources of sizes, see `read_sizes`.

    Raises
    ------
    UserError
        If a source cannot be read or their units differ.
    """
    one, other = (read_sizes(source, column) for source, column in zip((a, b), columns, strict=True))
    if one.unit != other.unit:
        raise UserError(f"{one.column} of {a} is in {one.unit or 'no unit'} and {other.column} of {b} in {other.unit or 'no unit'}; "
                        "columns of one unit would be right (--column, once for both or once for each)")
    names = (one.name, other.name) if one.name != other.name else (str(a), str(b))
    return compare(one.values, other.values, names=names, columns=(one.column, other.column), unit=one.unit)


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write ``comparison.png`` and ``comparison.json`` into a folder, made if absent.

    Raises
    ------
    UserError
        If the folder cannot be written.
    """
    from graincast.report.drawing import to_png

    contents = {"comparison.png": to_png(comparison.figure()), "comparison.json": json.dumps(comparison.to_dict(), indent=1).encode()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with whole_file(out / name) as path:
                path.write_bytes(content)
    except OSError as error:
        raise UserError(f"the comparison cannot be written to {out}: {error}") from error
    return [out / name for name in contents]


def read_sizes(source: Path, column: str | None = None) -> Sizes:
    """Read grain sizes.

    Parameters
    ----------
    source : Path
        A table, CSV or Parquet, or a folder of those that ``graincast segment`` wrote, ``NAME_grains.csv`` or
        ``NAME_grains.parquet``.
    column : str, optional
        Which column; its ending is its unit. Default: the equivalent diameter, else the table's only column of numbers
        with a unit of length.

    Returns
    -------
    Sizes
        Without the grains that the border cuts, where a column ``touches_border`` tells them.

    Raises
    ------
    UserError
        If there is no table, no such column, or some tables are in um and others in px.
    """
    tables = {file: _read(file) for file in _tables(source)}
    columns = {file: _column(table, column, file) for file, table in tables.items()}
    if len(set(columns.values())) > 1:
        odd = {name: file for file, name in columns.items()}
        raise UserError(f"{source}: " + " but ".join(f"{file.name} has {name}" for name, file in odd.items())
                        + "; tables of one unit would be right, so give the pixel size of every micrograph (graincast segment --pixel-size)")
    name = next(iter(columns.values()))
    values = np.concatenate([_numbers(table, name, file) for file, table in tables.items()])
    unit = LENGTH_UNIT.search(name)
    return Sizes(source.stem if source.is_file() else source.resolve().name, values, name, unit.group(1) if unit else "")


def _tables(source: Path) -> list[Path]:
    if not source.exists():
        raise UserError(f"{source} does not exist; a folder that graincast segment wrote, or a table, would be right")
    if source.is_file():
        if source.suffix.lower() not in TABLES:
            raise UserError(f"{source} is no table that is read here; {' or '.join(TABLES)} would be right")
        return [source]
    found: dict[str, Path] = {}
    for suffix in TABLES:  # a micrograph with both is read once
        for file in sorted(source.glob(f"*_grains{suffix}")):
            found.setdefault(str(file.with_suffix("")), file)
    if not found:
        raise UserError(f"{source} holds no *_grains.csv or *_grains.parquet; a folder that graincast segment wrote, or a table, would be right")
    return list(found.values())


def _read(file: Path) -> pd.DataFrame:
    try:
        return TABLES[file.suffix.lower()](file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a table: {error}") from error


def _column(table: pd.DataFrame, column: str | None, file: Path) -> str:
    if column is not None:
        if column not in table:
            raise UserError(f"{file} has no column '{column}'; one of {', '.join(map(str, table.columns))} would be right")
        return column
    default = [name for name in DEFAULT_COLUMNS if name in table]
    lengths = default[:1] or [str(name) for name in table.select_dtypes("number") if LENGTH_UNIT.search(str(name))]
    if len(lengths) != 1:
        raise UserError(f"{file} has {len(lengths) or 'no'} columns of numbers with a unit of length in the name "
                        f"({', '.join(map(str, table.columns))}); --column with the one to compare would be right")
    return lengths[0]


def _numbers(table: pd.DataFrame, column: str, file: Path) -> np.ndarray:
    if not pd.api.types.is_numeric_dtype(table[column]) and len(table):
        raise UserError(f"{column} of {file} holds no numbers; a column of sizes would be right")
    kept = table[~table["touches_border"].astype(bool)] if "touches_border" in table else table
    return kept[column].dropna().to_numpy(float)


def _welch(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two means, about that difference."""
    one, other = first.var(ddof=1) / first.size, second.var(ddof=1) / second.size
    if one + other == 0:
        return 0.0, 0.0
    freedom = (one + other) ** 2 / (one**2 / (first.size - 1) + other**2 / (second.size - 1))
    half = float(stats.t.ppf(0.975, freedom) * math.sqrt(one + other))
    return -half, half


def _named(stem: str, unit: str) -> str:
    return f"{stem}_{unit}" if unit else stem
