"""The page of a segmented folder: grain sizes with their intervals, every field, pictures to check them by, what was refused."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imageio.v3 as iio
import numpy as np
from PIL import Image
from scipy import stats

from graincast.microscope.reader import printable
from graincast.report.drawing import BLUE, INK, VERMILION, chart, legend, steps, to_png
from graincast.report.page import MANY, UNKNOWN, Picture, Table, embedded, number, render

if TYPE_CHECKING:
    from graincast.inference import Outcome
    from graincast.measure.session import SessionSizes

PICTURES, PICTURE_PX = 24, 1000
"""Overlays on the page, at most, and the longer side that they are reduced to."""
JPEG_QUALITY = 85

SIZES = {
    "mean_equivalent_diameter_*": "Mean equivalent diameter, whole grains",
    "edge_corrected_mean_equivalent_diameter_*": "Mean equivalent diameter, corrected for cut grains",
    "area_weighted_mean_equivalent_diameter_*": "Area-weighted mean equivalent diameter",
    "mean_area_*2": "Mean area, planimetric count",
    "mean_intercept_heyn_lines_*": "Mean intercept, lines (Heyn)",
    "mean_intercept_abrams_circles_*": "Mean intercept, three circles (Abrams)",
    "mean_aspect_ratio": "Mean aspect ratio",
}
"""Figures of a session on the page; ``*`` is the unit."""
NUMBERS = {
    "astm_e112_g_planimetric": "ASTM E112, planimetric (Jeffries)",
    "astm_e112_g_intercept_heyn_lines": "ASTM E112, intercept by lines (Heyn)",
    "astm_e112_g_intercept_abrams_circles": "ASTM E112, intercept by three circles (Abrams)",
    "astm_e1382_g_mean_area": "ASTM E1382, mean area of whole grains",
    "iso_643_g_planimetric": "ISO 643, planimetric",
}


def write_folder_report(path: Path, sources: Sequence[Path], outcomes: Sequence[Outcome], session: SessionSizes | None, doubts: Sequence[str],
                        provenance: Mapping[str, Any]) -> None:
    """Write a folder's page as one HTML file.

    Parameters
    ----------
    path : Path
        The file.
    sources : sequence of Path
        What was segmented; the folders' names are the title.
    outcomes : sequence of Outcome
        One a micrograph.
    session : SessionSizes or None
        None: there are no sizes of the session, and `doubts` says why.
    doubts : sequence of str
        What the session's figures lack.
    provenance : mapping
        Model and settings.
    """
    done = [outcome for outcome in outcomes if outcome.sizes is not None]
    pictured = [outcome for outcome in done if outcome.overlay is not None]
    page = render(
        "folder.html",
        title=", ".join(dict.fromkeys(printable((source if source.is_dir() else source.parent).resolve().name) for source in sources)),
        headline=headline(outcomes, session),
        tiles=_tiles(outcomes, session),
        warnings=doubts,
        sizes=_sizes(session),
        numbers=_numbers(session),
        figure=_figure(session),
        fields=_fields(done),
        doubts=_doubts(done),
        pictures=[_picture(outcome) for outcome in pictured[:PICTURES]],
        unshown=max(len(pictured) - PICTURES, 0),
        refused=_refused(outcomes),
        run={name.replace("_", " "): UNKNOWN if value is None else str(value) for name, value in provenance.items()},
    )
    path.write_text(page, encoding="utf-8")


def headline(outcomes: Sequence[Outcome], session: SessionSizes | None) -> str:
    """The folder in a sentence or two."""
    refused = sum(outcome.refused is not None for outcome in outcomes)
    files = f"{len(outcomes) - refused} of {len(outcomes)} micrographs were measured"
    found = session.headline if session else "no grain size of the session"
    return f"{_micro(found[0].upper() + found[1:])}. {files}."


def _micro(text: str) -> str:
    return text.replace(" um", " µm")


def _unit(session: SessionSizes) -> str:
    return "µm" if session.unit == "um" else "px"


def _with_interval(value: float | None, half: float | None, form: str) -> str:
    if value is None:
        return UNKNOWN
    return number(value, form) + (f" ± {number(half, '.2g')}" if half is not None else "")


def _tiles(outcomes: Sequence[Outcome], session: SessionSizes | None) -> list[tuple[str, str, str]]:
    refused = sum(outcome.refused is not None for outcome in outcomes)
    tiles = [(str(len(outcomes) - refused), "micrographs measured", f"{refused} refused")]
    if session is None:
        return tiles
    values, unit = session.values, session.unit
    interval = "± half the 95 % interval over fields" if values["fields_measured"] > 1 else "one field, so no interval"
    tiles.append((str(values["grains"]), "grains", f"{values['grains_whole']} of them whole"))
    mean = _with_interval(values[f"mean_equivalent_diameter_{unit}"], values[f"mean_equivalent_diameter_ci95_{unit}"], ".3g")
    tiles.append((f"{mean} {_unit(session)}", "mean equivalent diameter", interval))
    if values["astm_e112_g_planimetric"] is not None:
        grade = _with_interval(values["astm_e112_g_planimetric"], values["astm_e112_g_planimetric_ci95"], ".2f")
        tiles.append((grade, "ASTM E112 G, planimetric", interval))
    return tiles


def _sizes(session: SessionSizes | None) -> Table | None:
    if session is None:
        return None
    rows = []
    for template, words in SIZES.items():
        name = template.replace("*", session.unit)
        stem, _, power = template.partition("_*")
        end = f"_{session.unit}{power}" if "*" in template else ""
        unit = f" {_unit(session)}{'²' if power else ''}" if end else ""
        values = session.values
        accuracy = values.get(f"{stem}_relative_accuracy_percent")
        rows.append([words, _with_interval(values.get(name), values.get(f"{stem}_ci95{end}"), ".4g") + unit,
                     f"{number(accuracy, '.2g')} %" if accuracy is not None else UNKNOWN])
    return Table("Mean over the fields, ± half the 95 % interval (ASTM E112)", ["Quantity", "Mean", "Relative accuracy"], rows, frozenset({1, 2}))


def _numbers(session: SessionSizes | None) -> Table | None:
    if session is None or session.unit != "um":
        return None
    values = session.values
    rows = [[words, _with_interval(values[name], values[f"{name}_ci95"], ".2f")] for name, words in NUMBERS.items()]
    return Table("Grain size numbers, ± half the 95 % interval", ["Standard and procedure", "G"], rows, frozenset({1}))


def _figure(session: SessionSizes | None) -> Picture | None:
    """Histogram of the diameters by number and by area, with the log-normal law of the former."""
    if session is None or session.diameters.size < 2:
        return None
    diameters, unit = session.diameters, _unit(session)
    edges = np.histogram_bin_edges(diameters, bins=min(max(round(2 * diameters.size ** (1 / 3)), 6), 40))
    figure, axes = chart(6.2, 4.2)
    steps(axes, np.histogram(diameters, edges)[0], edges, BLUE, "by number")
    steps(axes, np.histogram(diameters, edges, weights=diameters**2)[0], edges, VERMILION, "by area")
    median, sigma = session.values[f"pooled_lognormal_median_{session.unit}"], session.values["pooled_lognormal_sigma"]
    if median and sigma:
        grid = np.linspace(edges[0], edges[-1], 200)
        law = 100 * (edges[1] - edges[0]) * stats.lognorm.pdf(grid, sigma, scale=median)
        axes.plot(grid, law, color=INK, linewidth=1, linestyle="--", label=f"log-normal, median {median:.3g} {unit}, sigma {sigma:.2f}")
    axes.set(xlabel=f"equivalent diameter, {unit}", ylabel="share of the whole grains, %")
    axes.set_xlim(left=0)
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    legend(axes)
    caption = f"{diameters.size} whole grains of all fields; by area each counts by the area that it covers."
    return embedded(iio.imread(to_png(figure))[..., :3], "Distribution of grain sizes", caption, chart=True)


def _fields(done: Sequence[Outcome]) -> Table | None:
    rows = []
    for outcome in done:
        assert outcome.sizes is not None
        values, unit = outcome.sizes.values, outcome.sizes.unit
        words = "µm" if unit == "um" else "px"
        mean = values[f"mean_equivalent_diameter_{unit}"]
        intercept = values[f"mean_intercept_heyn_lines_{unit}"]
        rows.append([outcome.file, str(values["grains"]), str(values["grains_whole"]),
                     f"{number(mean, '.3g')} {words}" if mean is not None else UNKNOWN,
                     f"{number(intercept, '.3g')} {words}" if intercept is not None else UNKNOWN,
                     number(_or_nan(values["astm_e112_g_planimetric"]), ".2f"),
                     f"{number(values['pixel_size_um'], '.4g')} µm" if values["pixel_size_um"] else "unknown"])
    head = ["File", "Grains", "Whole", "Mean diameter", "Mean intercept", "ASTM E112 G", "Pixel"]
    return Table("Every field", head, rows, frozenset(range(1, 7)), folded=len(rows) > 2 * MANY) if rows else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _doubts(done: Sequence[Outcome]) -> Table | None:
    rows = [[outcome.file, "; ".join(outcome.warnings)] for outcome in done if outcome.warnings]
    return Table("What to know of single fields", ["File", "Warnings"], rows, folded=len(rows) > MANY) if rows else None


def _refused(outcomes: Sequence[Outcome]) -> Table | None:
    rows = [[outcome.file, outcome.refused] for outcome in outcomes if outcome.refused]
    return Table("Files without a result", ["File", "Reason"], rows) if rows else None


def _picture(outcome: Outcome) -> Picture:
    """The overlay, reduced, as JPEG: a page of many PNGs would be too large to send."""
    assert outcome.overlay is not None
    with Image.open(outcome.overlay) as picture:
        picture.thumbnail((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        words = outcome.sizes.headline if outcome.sizes else ""
        return Picture(source, *picture.size, f"Boundaries found in {outcome.file}", f"{outcome.file}: {_micro(words)}")
