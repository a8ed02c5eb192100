"""Data gates: what micrographs, simulated libraries, synthetic sets and tables of grains must fulfil before they are used.

The expectations are Great Expectations' [1]_, one suite for each kind of data, their bounds `graincast.config.Gates`. What
fails is told in sentences and, value by value, on a page of its Data Docs: ``index.html`` in the folder of a gate, which needs
neither network nor scripts. A session loses the images that fail and goes on; everything else passes as a whole or not at all.

References
----------
.. [1] Great Expectations 1.24, https://docs.greatexpectations.io/docs/core
"""

from __future__ import annotations

import html
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from skimage.measure import label as connected

from graincast.config import Gates
from graincast.errors import UserError
from graincast.microscope.quality import focus, noise_level
from graincast.store.imageset import ImageSet, checksum

PAGE, VERDICT, RESULTS = "index.html", "gate.json", "validation.json"
NAMED = 5
"""Images named in a sentence; the page names all."""
SIZE_TOLERANCE = 0.01
"""Relative difference at which a recorded mean grain diameter is not that of the labels any more."""
SESSION_COLUMNS = ("original_height", "original_width", "bar_row", "bit_depth", "original_pixel_size_um", "mean", "contrast",
                   "saturated_fraction", "noise", "signal_to_noise", "grain_diameter_px", "source_sha256")
"""What a session's manifest says of each file, see `graincast.microscope.ingest`."""
GRAIN_COLUMNS = ("label", "centroid_x_px", "centroid_y_px", "area", "equivalent_diameter", "perimeter", "aspect_ratio", "circularity",
                 "orientation_deg")
"""Columns of `graincast.measure.grains.measure_grains`, lengths without their unit."""


@dataclass(frozen=True)
class Gate:
    """What a gate found.

    Attributes
    ----------
    suite : str
        Kind of data.
    passed : bool
        Whether the data may be used.
    failures : list of str
        Why not, a sentence each.
    warnings : list of str
        What does not stop the data and should be known.
    quarantined : dict of str to str
        Images of a session that must not be used, with the reason.
    figures : dict of str to float
        Numbers of images or grains, for the record.
    results : dict
        The validation results of Great Expectations, as JSON; without times, so that the same data give the same bytes.
    """

    suite: str
    passed: bool
    failures: list[str]
    warnings: list[str]
    quarantined: dict[str, str]
    figures: dict[str, float]
    results: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def refused(cls, suite: str, why: str) -> Gate:
        """The gate of data that could not even be read as a set."""
        nothing = {"success": False, "results": [], "suite_name": suite, "meta": {}, "statistics": {
            "evaluated_expectations": 0, "successful_expectations": 0, "unsuccessful_expectations": 0, "success_percent": None}}
        return cls(suite, False, [why], [], {}, {"images": 0}, nothing)

    def save(self, folder: Path) -> None:
        """Write ``gate.json``, ``validation.json`` and the page ``index.html`` into an existing folder."""
        verdict = {key: value for key, value in asdict(self).items() if key != "results"}
        (folder / VERDICT).write_text(json.dumps(verdict, indent=1))
        (folder / RESULTS).write_text(json.dumps(self.results, indent=1))
        (folder / PAGE).write_text(_page(self), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Gate:
        """The inverse of `save`.

        Raises
        ------
        UserError
            If there is no whole gate in the folder.
        """
        try:
            return cls(**json.loads((folder / VERDICT).read_text()), results=json.loads((folder / RESULTS).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder} holds no result of a data gate ({VERDICT} and {RESULTS} expected): {error}") from error

    def require(self, page: Path | None = None) -> Gate:
        """Itself, if passed.

        Raises
        ------
        UserError
            With every failure, naming the `page` that has the details.
        """
        if not self.passed:
            details = f"; details: {page}" if page else ""
            raise UserError(f"the {self.suite} did not pass its data gate: {'; '.join(self.failures)}{details}")
        return self


# ------------------------------------------------------------------------------------------------------------ sessions


def judge_session(table: pd.DataFrame, config: Gates) -> dict[str, str]:
    """Images of a session that must not be used.

    Parameters
    ----------
    table : DataFrame
        A row a file: ``id``, ``refused`` (or None), ``focus`` and `SESSION_COLUMNS`; NaN where a file could not be read.
    config : Gates

    Returns
    -------
    dict of str to str
        Reason by ``id``, of those not refused already.
    """
    findings, _ = _validate("microscope session", _session_table(table), _session_checks(config, whole=False))
    flaws, usable = _flaws(findings), table[table["refused"].isna()]
    return {row["id"]: flaws[row["source"]] for _, row in usable.iterrows() if row["source"] in flaws}


def check_session(images: ImageSet, config: Gates) -> Gate:
    """Check a session's micrographs, file by file and as a whole.

    Parameters
    ----------
    images : ImageSet
        Kind ``micrographs``, of `graincast.microscope.ingest`.
    config : Gates

    Returns
    -------
    Gate
        ``quarantined`` holds the set's refused files and those among its images that fail. It passes when enough are left and every
        image's bytes are those that were written.
    """
    table = _files_of(images)
    findings, _ = _validate("microscope session", _session_table(table), _session_checks(config, whole=False))
    flaws = _flaws(findings)
    refused = {row["source"]: row["refused"] for _, row in table[table["refused"].notna()].iterrows()}
    quarantined = flaws | refused
    table["good"] = (~table["source"].isin(quarantined)).astype(float)
    findings, results = _validate("microscope session", _session_table(table), _session_checks(config, whole=True))
    used = sorted(set(flaws) - set(refused))
    failures = [finding.sentence() for finding in findings if finding.check.fatal]
    if failures:
        failures += [f"{source}: {why}" for source, why in quarantined.items()]
    warnings = [finding.sentence() for finding in findings if finding.check.warns]
    if used:
        warnings.append(f"{_names(used)} should not be used and {'is' if len(used) == 1 else 'are'} in the set all the same; "
                        "a folder without them would be right")
    return Gate("microscope session", not failures, failures, warnings, quarantined,
                {"images": len(table), "good": int(table["good"].sum()), "quarantined": len(quarantined)}, results)


def _files_of(images: ImageSet) -> pd.DataFrame:
    """A row a file of a set of micrographs, refused ones included."""
    missing = [column for column in SESSION_COLUMNS if column not in images.rows]
    if missing:
        raise UserError(f"{images.path} is no set of micrographs, its manifest lacks '{missing[0]}'; a folder that ingest made would be right")
    rows = images.rows.copy()
    pixels = [_pixels(images, index) for index in range(len(images))]
    rows["intact"] = [page is not None and checksum(*page) == row["checksum"] for page, (_, row) in zip(pixels, rows.iterrows(), strict=True)]
    if "focus" not in rows:
        diameter = images.info["preparation"]["grain_diameter_px"]
        rows["focus"] = [focus(page[0], diameter) if page else math.nan for page in pixels]
    rows["refused"] = None
    refused = [{**row.to_dict(), "intact": True} for _, row in images.refused.iterrows()]
    return pd.DataFrame([*rows.to_dict("records"), *refused])


def _session_table(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that a session's suite looks at."""
    table = table.copy()
    numbers = [column for column in (*SESSION_COLUMNS[:-1], "focus") if column in table]
    table[numbers] = table[numbers].astype(float)
    for column in (*SESSION_COLUMNS[:-1], "focus"):
        if column not in table:
            table[column] = math.nan  # not one file could be read
    read = table["original_width"].notna() & table["refused"].isna()
    table["name"] = table["source"]
    table["smaller_side_px"] = np.minimum(table["original_width"], table["bar_row"])
    table["pixel_size_known"] = table["original_pixel_size_um"].notna().astype(float).where(read)
    table["grains_in_field"] = table["original_width"] * table["bar_row"] / (np.pi / 4 * table["grain_diameter_px"] ** 2)
    hashes = table["source_sha256"] if "source_sha256" in table else pd.Series(None, table.index, dtype=object)
    first = table[read].drop_duplicates("source_sha256").set_index("source_sha256")["source"].to_dict() if read.any() else {}
    table["copy_of"] = [first[sha] if ok and first.get(sha, source) != source else None
                        for sha, source, ok in zip(hashes, table["source"], read, strict=True)]
    return table


def _session_checks(config: Gates, whole: bool) -> list[_Check]:
    image = [
        _between("smaller_side_px", config.min_side_px, None, "too small: {} px on its smaller side", "gates.min_side_px"),
        _between("bit_depth", config.min_bit_depth, None, "too few grey levels: {} bit", "gates.min_bit_depth"),
        _between("original_pixel_size_um", config.min_pixel_size_um, config.max_pixel_size_um, "a pixel size of {} um",
                 "gates.min_pixel_size_um and gates.max_pixel_size_um"),
        _between("contrast", config.min_contrast, None, "no contrast: grey values span {} of full scale", "gates.min_contrast"),
        _between("saturated_fraction", None, config.max_saturated, "saturated: {} of the pixels are black or white", "gates.max_saturated"),
        _between("noise", None, config.max_noise, "too noisy: noise of {} of full scale", "gates.max_noise"),
        _between("signal_to_noise", config.min_signal_to_noise, None, "lost in noise: grey varies only {} times as much as noise",
                 "gates.min_signal_to_noise"),
        _between("focus", config.min_focus, None, "blurred: a sharpness of {} at the scale of its grains", "gates.min_focus"),
        _Check("ColumnValuesToBeNull", {"column": "copy_of"}, "the same file as {}"),
        _Check("ColumnValuesToBeInSet", {"column": "pixel_size_known", "value_set": [1.0]},
               "no known pixel size" if config.require_pixel_size else "without a known pixel size, so their lengths stay in pixels",
               "gates.require_pixel_size", warns=not config.require_pixel_size, valued=False),
        _between("grains_in_field", config.few_grains, None, "few grains in the field, about {}: its grain size is uncertain", "gates.few_grains",
                 warns=True),
    ]
    if not whole:
        return image
    return [
        _Check("ColumnSumToBeBetween", {"column": "good", "min_value": config.least_good_images},
               f"too few good images: {{}}, at least {config.least_good_images} are needed (gates.least_good_images)", fatal=True),
        _Check("ColumnMeanToBeBetween", {"column": "good", "min_value": config.least_good_share},
               f"too large a part is unusable: only {{}} of the files are good, at least {config.least_good_share:g} must be "
               "(gates.least_good_share)", fatal=True),
        _Check("ColumnValuesToBeInSet", {"column": "intact", "value_set": [True]}, "the image's bytes are not those that were written; "
               "the set made again would be right", fatal=True, valued=False),
        _Check("ColumnValuesToBeNull", {"column": "refused"}, "{}", listed=False),
        *image,
    ]


# ------------------------------------------------------------------------------------------------------- labelled sets


def check_library(morphologies: ImageSet | Mapping[str, ImageSet], config: Gates) -> Gate:
    """Check simulated pictures and their labels.

    Parameters
    ----------
    morphologies : ImageSet or mapping of str to ImageSet
        Of `graincast.simulate.library`; several are checked together, for no structure may serve two purposes.
    config : Gates
    """
    table = _labelled_table(_named(morphologies))
    return _all_or_nothing("simulated library", table, [*_label_checks(config), *_picture_checks(config)[:1]])


def check_synthetic(synthetic: ImageSet | Mapping[str, ImageSet], micrographs: ImageSet | None, config: Gates) -> Gate:
    """Check synthetic images and their labels, also against what the micrographs themselves suggest of their grains.

    Parameters
    ----------
    synthetic : ImageSet or mapping of str to ImageSet
        Of `graincast.synthesise.generate`.
    micrographs : ImageSet, optional
        Those whose look it has; the median of the grain diameters estimated in them without labels, in prepared pixels, is what the
        labels' mean diameter is compared with. None, or none that could be sized: not compared, which is told.
    config : Gates
    """
    sets = _named(synthetic)
    table = _labelled_table(sets)
    least = max((images.info["config"].get("min_fidelity", -1.0) for images in sets.values()), default=-1.0)
    checks = [*_label_checks(config), *_picture_checks(config),
              _between("fidelity", least, None, "boundaries are not where the labels say: a label fidelity of {}", "synthesise.min_fidelity"),
              _Check("ColumnMeanToBeBetween", {"column": "dropped_share", "max_value": config.max_dropped_share},
                     f"the translator moves boundaries: {{}} of its images were dropped, at most {config.max_dropped_share:g} may be "
                     "(gates.max_dropped_share)")]
    estimate = math.nan if micrographs is None else float((micrographs.rows["grain_diameter_px"] * micrographs.rows["scale"]).median())
    if math.isfinite(estimate):
        low, high = estimate / config.max_size_ratio, estimate * config.max_size_ratio
        checks.append(_Check(
            "ColumnMedianToBeBetween", {"column": "diameter_px", "min_value": low, "max_value": high},
            f"grains are {{}} px wide, and the micrographs suggest {estimate:.3g} px; between {low:.3g} and {high:.3g} px would be right "
            "(gates.max_size_ratio)"))
    gate = _all_or_nothing("synthetic set", table, checks)
    if not math.isfinite(estimate):
        gate.warnings.append("the micrographs tell no grain size, so that of the labels was compared with none")
    return gate


def _named(sets: ImageSet | Mapping[str, ImageSet]) -> Mapping[str, ImageSet]:
    return {sets.path.name: sets} if isinstance(sets, ImageSet) else sets


def _label_checks(config: Gates) -> list[_Check]:
    def true(column: str, flaw: str) -> _Check:
        return _Check("ColumnValuesToBeInSet", {"column": column, "value_set": [1.0]}, flaw, valued=False)

    return [
        true("readable", "cannot be read, or its set holds other pages than rows"),
        true("intact", "is corrupt, its checksum differs"),
        true("labelled", "has no labels, or none but background"),
        true("ids_dense", "has gaps in its ids, which should be 1 to N"),
        _between("grains", config.min_grains, None, "shows {} grains", "gates.min_grains"),
        true("grains_as_recorded", "shows other grains than its row says"),
        _between("torn_ids", None, 0, "has {} grains in several pieces, one id should be one grain"),
        _between("boundary_share", config.min_boundary_share, config.max_boundary_share, "a share of {} of its pixels is boundary",
                 "gates.min_boundary_share and gates.max_boundary_share"),
        _between("size_error", None, SIZE_TOLERANCE, "a mean grain diameter that is not the recorded one, relative difference {}"),
        _Check("ColumnValuesToBeNull", {"column": "copy_of"}, "the same image and labels as {}"),
    ]


def _picture_checks(config: Gates) -> list[_Check]:
    return [
        _between("contrast", config.min_contrast, None, "no contrast: grey values span {} of full scale", "gates.min_contrast"),
        _between("saturated_fraction", None, config.max_saturated, "saturated: {} of the pixels are black or white", "gates.max_saturated"),
        _between("noise", None, config.max_noise, "too noisy: noise of {} of full scale", "gates.max_noise"),
        _between("focus", config.min_focus, None, "blurred: a sharpness of {} at the scale of its grains", "gates.min_focus"),
    ]


def _labelled_table(sets: Mapping[str, ImageSet]) -> pd.DataFrame:
    """A row an image of all sets: what its pixels, its labels and its row say."""
    rows = []
    for name, images in sets.items():
        whole = _pages(images.path / "images.tif") == len(images) == (_pages(images.path / "labels.tif") if images.labelled else len(images))
        translated = int(images.rows["fidelity"].notna().sum()) if "fidelity" in images.rows else 0
        dropped = len(images.refused) / max(len(images.refused) + translated, 1)
        for index, row in images.rows.iterrows():
            page = _pixels(images, int(index)) if whole else None  # type: ignore[call-overload]
            rows.append({"name": f"{name}/{row['id']}", "readable": float(page is not None), "dropped_share": dropped,
                         "fidelity": row.get("fidelity", math.nan), **(_labelled_row(*page, row) if page else {})})
    table = pd.DataFrame(rows)
    for column in LABELLED_COLUMNS:
        if column not in table:
            table[column] = math.nan
    first = table[table["sha256"].notna()].drop_duplicates("sha256").set_index("sha256")["name"].to_dict()
    table["copy_of"] = [None if pd.isna(sha) or first[sha] == name else first[sha] for sha, name in zip(table["sha256"], table["name"], strict=True)]
    return table


LABELLED_COLUMNS = ("intact", "labelled", "sha256", "grains", "ids_dense", "grains_as_recorded", "torn_ids", "boundary_share", "diameter_px",
                    "size_error", "contrast", "saturated_fraction", "noise", "focus")
"""What the labelled suites look at beside `readable`; missing where nothing could be read."""


def _labelled_row(image: np.ndarray, labels: np.ndarray | None, row: pd.Series) -> dict[str, Any]:
    sha = checksum(image, labels)
    known: dict[str, Any] = {"sha256": sha, "intact": float(sha == row["checksum"]), "labelled": float(labels is not None and (labels > 0).any())}
    grey = image / np.float32(np.iinfo(image.dtype).max)
    low, high = np.percentile(grey, [1, 99])
    known |= {"contrast": float(high - low), "saturated_fraction": float(((grey <= 0) | (grey >= 1)).mean()), "noise": noise_level(grey)}
    if labels is None or not known["labelled"]:
        return known
    ids = np.unique(labels[labels > 0])
    pieces = connected(labels, connectivity=2, background=0)
    ids_of_pieces = np.unique(np.stack([pieces[labels > 0], labels[labels > 0]]), axis=1)[1]
    diameter = _mean_diameter(labels, ids)
    recorded = row.get("mean_diameter_px", math.nan)
    return {**known, "grains": float(ids.size), "ids_dense": float(ids[-1] == ids.size and labels.min() >= 0),
            "grains_as_recorded": float(pd.isna(row.get("grains")) or int(row["grains"]) == ids.size),
            "torn_ids": float((np.unique(ids_of_pieces, return_counts=True)[1] > 1).sum()),
            "boundary_share": float((labels == 0).mean()), "diameter_px": diameter,
            "size_error": math.nan if pd.isna(recorded) else abs(diameter / recorded - 1), "focus": focus(image, diameter)}


def _mean_diameter(labels: np.ndarray, ids: np.ndarray) -> float:
    """Diameter of the circle of mean grain area, px, the grains at the border counting half (ASTM E112, planimetric)."""
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return float(2 * math.sqrt(labels.size / (ids.size - np.unique(border[border > 0]).size / 2) / math.pi))


def _pages(stack: Path) -> int:
    """Pages of a stack; 0 where it cannot be opened."""
    try:
        with tifffile.TiffFile(stack) as tif:
            shape = tif.series[0].shape
            return shape[0] if len(shape) == 3 else 1
    except (OSError, ValueError, IndexError, tifffile.TiffFileError):
        return 0


def _pixels(images: ImageSet, index: int) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Image and labels; None where the stack does not hold them."""
    try:
        page = images.image(index), images.labels(index) if images.labelled else None
    except (OSError, ValueError, IndexError, tifffile.TiffFileError):
        return None
    shape = tuple(images.rows[["height", "width"]].iloc[index])
    return page if page[0].shape == shape and (page[1] is None or page[1].shape == shape) else None


# ---------------------------------------------------------------------------------------------------------------- grains


def check_grains(table: pd.DataFrame, config: Gates, expected_diameter: Mapping[str, float] | None = None) -> Gate:
    """Check a table of measured grains.

    Parameters
    ----------
    table : DataFrame
        Rows of `graincast.measure.grains.measure_grains` with ``image_id``; lengths in um, px, or both (see `read_grains`).
    config : Gates
    expected_diameter : mapping of str to float, optional
        Mean grain diameter that a micrograph itself suggests, by image id and in the table's unit; a ratio beyond
        `Gates.max_size_ratio` is told as a warning, for neither of the two is the truth.

    Returns
    -------
    Gate
    """
    table = _without_units(table)
    missing = [column for column in ("image_id", *GRAIN_COLUMNS) if column not in table]
    if missing:
        raise UserError(f"the table of grains lacks the column '{missing[0]}'; one that graincast segment made would be right")
    table["name"] = [f"{image}: grain {label}" for image, label in zip(table["image_id"], table["label"], strict=True)]
    table[list(GRAIN_COLUMNS)] = table[list(GRAIN_COLUMNS)].astype(float)
    table["repeated"] = table.duplicated(["image_id", "label"]).astype(float)
    table["diameter_error"] = (table["equivalent_diameter"] / (2 * np.sqrt(table["area"].clip(lower=0) / np.pi)) - 1).abs()
    border = table["touches_border"].astype(float) if "touches_border" in table else pd.Series(0.0, table.index)
    counts = 1 - border.groupby(table["image_id"]).transform("mean") / 2  # grains at the border count half
    mean = np.sqrt(4 / np.pi * table.groupby("image_id")["area"].transform("mean") / counts)
    table["size_ratio"] = mean / table["image_id"].map(dict(expected_diameter or {})).astype(float)
    # one value an image; of all its grains the first carries it
    table["size_ratio"] = table["size_ratio"].where(~table.duplicated("image_id"))
    table["grains"] = table.groupby("image_id")["label"].transform("size").astype(float).where(~table.duplicated("image_id"))
    present = [_Check("ColumnValuesToNotBeNull", {"column": column}, f"no {column}", valued=False) for column in GRAIN_COLUMNS]
    return _all_or_nothing("table of grains", table, [
        _Check("TableRowCountToBeBetween", {"min_value": 1}, "it holds no grains"),
        *present,
        _between("label", 1, None, "an id of {}"),
        _between("repeated", None, 0, "listed twice", valued=False),
        _between("area", 0, None, "an area of {}", open_below=True),
        _between("perimeter", 0, None, "a perimeter of {}", open_below=True),
        _between("diameter_error", None, 1e-3, "a diameter that does not fit its area, relative difference {}"),
        _between("aspect_ratio", 1 - 1e-6, None, "an aspect ratio of {}"),
        _between("circularity", 0, 1, "a circularity of {}", open_below=True),
        _between("orientation_deg", 0, 180, "an orientation of {} degrees"),
        _between("grains", config.few_grains, None, "in a field of {} grains: its grain size is uncertain", "gates.few_grains", warns=True),
        _between("size_ratio", 1 / config.max_size_ratio, config.max_size_ratio,
                 "in a field whose mean grain is {} times as wide as the micrograph itself suggests", "gates.max_size_ratio", warns=True),
    ])


def read_grains(folder: Path) -> pd.DataFrame:
    """All tables of grains in a folder: ``grains.parquet`` of an evaluation, or the ``*_grains.csv`` of a segmentation, the file's stem
    being the ``image_id``.

    Raises
    ------
    UserError
        If there is none, or one cannot be read.
    """
    try:
        if (folder / "grains.parquet").exists():
            return _without_units(pd.read_parquet(folder / "grains.parquet"))
        tables = [_without_units(pd.read_csv(file)).assign(image_id=file.name.removesuffix("_grains.csv"))
                  for file in sorted(folder.glob("*_grains.csv"))]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds a table of grains that cannot be read: {error}") from error
    if not tables:
        raise UserError(f"{folder} holds no table of grains; the results of graincast segment would be right")
    return pd.concat(tables, ignore_index=True)


def _without_units(table: pd.DataFrame) -> pd.DataFrame:
    """Lengths and areas in columns without unit: um where there are, else px."""
    table = table.copy()
    for name, power in (("area", "2"), ("equivalent_diameter", ""), ("perimeter", "")):
        units = [column for unit in ("um", "px") if (column := f"{name}_{unit}{power}") in table]
        if units:
            table[name] = table[units].bfill(axis=1).iloc[:, 0]
    return table


# ---------------------------------------------------------------------------------------------------- great expectations


@dataclass(frozen=True)
class _Check:
    """An expectation and what is to be said where it fails.

    `flaw` has braces where the value stands; `warns`: told, and nothing else; `fatal`: of a session, not a matter of one image;
    `valued`: whether the value says anything; `listed`: whether the images are named in a sentence.
    """

    expectation: str
    arguments: dict[str, Any]
    flaw: str
    key: str = ""
    warns: bool = False
    fatal: bool = False
    valued: bool = True
    listed: bool = True

    @property
    def bounds(self) -> str:
        low, high = (self.arguments.get(name) for name in ("min_value", "max_value"))
        if self.expectation != "ColumnValuesToBeBetween" or (low is None and high is None) or not self.valued:
            return ""
        words = f"{low:g} to {high:g} would be right" if None not in (low, high) else (
            f"at least {low:g} is needed" if high is None else f"at most {high:g} may be")
        return f", {words}" + (f" ({self.key})" if self.key else "")

    def says(self, value: Any) -> str:
        """The flaw of one image (or of the table)."""
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        return self.flaw.replace("{}", shown) + self.bounds


def _between(column: str, low: float | None, high: float | None, flaw: str, key: str = "", warns: bool = False, valued: bool = True,
             open_below: bool = False) -> _Check:
    arguments: dict[str, Any] = {"column": column, "min_value": low, "max_value": high}
    return _Check("ColumnValuesToBeBetween", arguments | ({"strict_min": True} if open_below else {}), flaw, key, warns, valued=valued)


@dataclass(frozen=True)
class _Finding:
    """A check that failed: with the names and values of the rows, or the value of the table."""

    check: _Check
    values: Mapping[str, Any]
    observed: Any = None

    def sentence(self) -> str:
        if not self.values:
            return self.check.says(self.observed)
        values = sorted(set(self.values.values()), key=str)
        numbers = [value for value in values if isinstance(value, float)]
        shown = f"{min(numbers):.3g} to {max(numbers):.3g}" if len(numbers) > 1 else numbers[0] if numbers else _names(map(str, values))
        return f"{_names(self.values)}: {self.check.says(shown)}"


def _names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _flaws(findings: Sequence[_Finding]) -> dict[str, str]:
    """Reasons by name, all flaws of an image in one sentence."""
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        if not finding.check.warns:
            for name, value in finding.values.items():
                reasons.setdefault(name, []).append(finding.check.says(value))
    return {name: "; ".join(flaws) for name, flaws in reasons.items()}


def _all_or_nothing(suite: str, table: pd.DataFrame, checks: Sequence[_Check]) -> Gate:
    findings, results = _validate(suite, table, checks)
    failures = [finding.sentence() for finding in findings if not finding.check.warns]
    warnings = [finding.sentence() for finding in findings if finding.check.warns]
    bad = {name for finding in findings if not finding.check.warns for name in finding.values}
    return Gate(suite, not failures, failures, warnings, {}, {"rows": len(table), "bad": len(bad)}, results)


def _validate(suite: str, table: pd.DataFrame, checks: Sequence[_Check]) -> tuple[list[_Finding], dict[str, Any]]:
    """Run a suite over a table; what failed, and the results as JSON without anything that changes from run to run."""
    gx = _great_expectations()
    base = gx.data_context.types.base
    context = gx.get_context(mode="ephemeral", project_config=base.DataContextConfig(
        analytics_enabled=False, progress_bars=base.ProgressBarsConfig(globally=False),
        store_backend_defaults=base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False)))  # or it leaves a folder in /tmp each time
    batch = context.data_sources.add_pandas("graincast").add_dataframe_asset(suite).add_batch_definition_whole_dataframe("all").get_batch(
        {"dataframe": table})
    expectations = [getattr(gx.expectations, f"Expect{check.expectation}")(
        **check.arguments, meta={"number": number}, notes=f"Bounds: {check.key}" if check.key else None,
        severity="warning" if check.warns else "critical") for number, check in enumerate(checks)]
    result = batch.validate(gx.ExpectationSuite(name=suite, expectations=expectations), result_format={
        "result_format": "COMPLETE", "unexpected_index_column_names": ["name"], "return_unexpected_index_query": False})
    findings = []
    for each in sorted(result.results, key=lambda each: each.expectation_config.meta["number"]):
        check = checks[each.expectation_config.meta["number"]]
        if each.exception_info.get("raised_exception", True):
            raise RuntimeError(f"{suite}: {check.expectation} of {check.arguments} failed to run: {each.exception_info}")
        if not each.success:
            unexpected = each.result.get("unexpected_index_list") or []
            findings.append(_Finding(check, {row["name"]: row[check.arguments["column"]] for row in unexpected}, each.result.get("observed_value")))
    return findings, _timeless(result.to_json_dict())


def _great_expectations() -> Any:
    """The library, without telemetry and without its progress messages; it takes seconds to import."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations as gx
    import great_expectations.expectations  # an attribute of gx from here on

    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)  # which sets its own level
    return gx


def _timeless(results: dict[str, Any]) -> dict[str, Any]:
    """In the order of the checks, without times, and plain JSON: Great Expectations' pages cannot show NumPy's numbers."""
    results = json.loads(json.dumps(results))
    meta = {key: value for key, value in results["meta"].items() if key in ("great_expectations_version", "active_batch_definition")}
    ordered = sorted(results["results"], key=lambda each: each["expectation_config"]["meta"]["number"])
    return {**results, "results": ordered, "meta": meta, "id": None}


# --------------------------------------------------------------------------------------------------------------- the page


FOREIGN = re.compile(r"<script\b.*?</script>|<footer\b.*?</footer>|<(?:link|img)\b[^>]*>| onclick=\"[^\"]*\"", re.DOTALL | re.IGNORECASE)
DEAD_LINK = re.compile(r"<a\b[^>]*href=\"(?:\.\./|https?:)[^>]*>(.*?)</a>", re.DOTALL | re.IGNORECASE)
"""What of Great Expectations' page needs a network or scripts, and links that need the rest of its site."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the page may load: nothing. File names are a stranger's, and Great Expectations writes them into its pages as they are."""


def _page(gate: Gate) -> str:
    """The verdict, and below it Great Expectations' Data Docs of the results; one file, no scripts, nothing from elsewhere."""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f"<title>{html.escape(gate.suite)}: data gate</title><style>{STYLE}</style></head><body>{_verdict(gate)}"
            f"{_data_docs(gate.results) if gate.results else ''}</body></html>\n")


def _data_docs(validation: Mapping[str, Any]) -> str:
    """What stands in the body of Great Expectations' page of validation results."""
    _great_expectations()
    from great_expectations.core.expectation_validation_result import ExpectationSuiteValidationResult, ExpectationValidationResult
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    safe = _escaped(validation)
    each = [ExpectationValidationResult(success=one["success"], result=one["result"], meta=one["meta"], exception_info=one["exception_info"],
                                        expectation_config=ExpectationConfiguration(**one["expectation_config"])) for one in safe["results"]]
    results = ExpectationSuiteValidationResult(success=safe["success"], results=each, suite_name=safe["suite_name"], meta=safe["meta"],
                                               statistics=safe["statistics"], suite_parameters={})
    document = DefaultJinjaPageView().render(ValidationResultsPageRenderer(run_info_at_end=True).render(results))
    body = DEAD_LINK.sub(r"\1", FOREIGN.sub("", document[document.index("<body"):]))
    return body[body.index(">") + 1:body.rindex("</body>")]


def _verdict(gate: Gate) -> str:
    def listed(title: str, sentences: Iterable[str]) -> str:
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""

    word = "passed" if gate.passed else "failed"
    figures = ", ".join(f"{value:g} {name}" for name, value in gate.figures.items())
    below = f"{figures}. Below, each expectation for all of them, with the values that do not meet it." if gate.results else ""
    if gate.quarantined:
        below += " An image that misses one is quarantined, and the others go on."
    title = html.escape(gate.suite[:1].upper() + gate.suite[1:])
    return (f'<header class="{word}"><h1>{title}: {word}</h1><p>{below}</p>'
            f'{listed("Failures", gate.failures)}{listed("Warnings", gate.warnings)}'
            f'{listed("Quarantined", (f"{name}: {why}" for name, why in gate.quarantined.items()))}</header>')


def _escaped(value: Any) -> Any:
    """A JSON value whose texts stand for themselves in HTML and in Python's templates."""
    if isinstance(value, str):
        return html.escape(value).replace("$", "&#36;")
    if isinstance(value, Mapping):
        return {key: _escaped(each) for key, each in value.items()}
    return [_escaped(each) for each in value] if isinstance(value, list) else value


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1.5rem; color: #222; background: #fff; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: .9rem 0 .2rem; } ul { margin: 0; padding-left: 1.3rem; }
header { border-left: .4rem solid; padding: .2rem 0 .2rem 1rem; margin-bottom: 1rem; overflow-wrap: anywhere; }
header.passed { border-color: #2a7f3f; } header.failed { border-color: #b3261e; } header p { color: #666; margin: .2rem 0; }
nav, .col-lg-2 { display: none; }
.ge-section { border-top: 1px solid #ddd; padding: .5rem 0; } h5, h6 { font-size: 1rem; margin: .2rem 0; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: .15rem 1.2rem .15rem 0; font-weight: normal; }
th { color: #666; } td table { margin-bottom: .5rem; } td td { color: #444; overflow-wrap: anywhere; }
.fas::before { font-style: normal; font-weight: bold; content: "\\2022"; }
.fa-check-circle::before { content: "\\2713"; color: #2a7f3f; } .fa-times::before { content: "\\2717"; color: #b3261e; }
.fa-exclamation-triangle::before { content: "!"; color: #9a6700; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #1b1b1b; } header p, th { color: #aaa; } td td { color: #ccc; } }
"""
