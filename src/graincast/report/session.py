"""The report of one monitored session: what was checked, found, compared and decided."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imageio.v3 as iio
import pandas as pd

from graincast.report.page import MANY, Picture, Table, embedded, number, render

if TYPE_CHECKING:
    from graincast.evaluate.promotion import Decision
    from graincast.monitor.drift import Drift

OVERLAYS = 6
"""Overlays on the page; the folder of the segmentation has all."""


@dataclass(frozen=True)
class SessionReport:
    """What a page about a session shows.

    Attributes
    ----------
    name : str
        Of the session's folder.
    images : int
        Files that passed the checks.
    quarantined : Mapping of str to str
        File to why it was set aside.
    failures : sequence of str
        Why the session as a whole failed; none: it did not.
    warnings : sequence of str
        What does not stop the session and should be known.
    docs, grain_docs : str, optional
        Addresses of the Data Docs of files and grains, relative to the page.
    segmentation : Path, optional
        What `graincast.inference.segment_files` wrote.
    verdict : str, optional
        The drift test's sentence; None: not tested.
    moved : sequence of (str, str, str)
        What moved: descriptor, by how much, in words.
    charts : Mapping of str to Path
        Caption to PNG file: the drift test's figure, the drift history.
    evidently : str, optional
        Address of Evidently's page, relative to this one.
    decision : sequence of str
        What was decided about a recalibrated model, and why.
    evidence : pandas.DataFrame, optional
        Scores of champion and challenger side by side.
    run : Mapping of str to str
        Model version, hashes and the like.
    """

    name: str
    images: int
    quarantined: Mapping[str, str] = field(default_factory=dict)
    failures: Sequence[str] = ()
    warnings: Sequence[str] = ()
    docs: str | None = None
    grain_docs: str | None = None
    segmentation: Path | None = None
    verdict: str | None = None
    moved: Sequence[tuple[str, str, str]] = ()
    charts: Mapping[str, Path] = field(default_factory=dict)
    evidently: str | None = None
    decision: Sequence[str] = ()
    evidence: pd.DataFrame | None = None
    run: Mapping[str, str] = field(default_factory=dict)


def build_session_report(report: SessionReport) -> str:
    """Render a session as one HTML document; pictures are inside it."""
    found = _summaries(report.segmentation)
    return render(
        "session.html",
        title=report.name,
        headline=headline(report),
        tiles=_tiles(report, found),
        failures=report.failures,
        quarantined=_quarantined(report.quarantined),
        warnings=report.warnings,
        docs=report.docs,
        grain_docs=report.grain_docs,
        grains=_grains(found),
        overlays=_overlays(report.segmentation),
        drift=report.verdict,
        moved=Table("What moved, the most first", ["Descriptor", "By", "Meaning"], report.moved) if report.moved else None,
        charts=[embedded(iio.imread(path), caption, caption, chart=True) for caption, path in report.charts.items()],
        evidently=report.evidently,
        decision=report.decision,
        evidence=_evidence(report.evidence),
        run=report.run,
    )


def _summaries(segmentation: Path | None) -> list[dict[str, Any]]:
    return json.loads((segmentation / "summary.json").read_text())["images"] if segmentation else []


def _measured(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [image for image in found if "refused" not in image]


def headline(report: SessionReport) -> str:
    """The session in a sentence or two."""
    found = _summaries(report.segmentation)
    if report.failures:
        return f"The session was not used: {'; '.join(report.failures)}"
    grains = sum(image["grains"] for image in _measured(found))
    return f"{grains} grains in {len(_measured(found))} images. {report.verdict or ''}".strip()


def _tiles(report: SessionReport, found: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    tiles = [(str(report.images), "images used", f"{len(report.quarantined)} set aside")]
    for unit in ("um", "px"):
        means = [image[f"mean_equivalent_diameter_{unit}"] for image in _measured(found) if image.get(f"mean_equivalent_diameter_{unit}")]
        if means:
            tiles.append((f"{number(sum(means) / len(means), '.3g')} {'µm' if unit == 'um' else unit}", "mean grain diameter",
                          f"mean of {len(means)} images"))
    return tiles


def _quarantined(quarantined: Mapping[str, str]) -> Table | None:
    rows = [[name, reason] for name, reason in quarantined.items()]
    return Table("Files that were set aside", ["File", "Reason"], rows, folded=len(rows) > MANY) if rows else None


def _grains(found: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = []
    for image in found:
        if "refused" in image:
            rows.append([image["file"], "", "", image["refused"]])
            continue
        rows.append([image["file"], str(image["grains"]), _diameter(image), number(image.get("astm_grain_size_number"), ".2f")])
    head = ["File", "Grains", "Mean diameter", "ASTM G"]
    return Table("Grains of every image", head, rows, frozenset({1, 2, 3}), folded=len(rows) > MANY) if rows else None


def _diameter(image: Mapping[str, Any]) -> str:
    key, unit = ("mean_equivalent_diameter_um", "µm") if image["pixel_size_um"] else ("mean_equivalent_diameter_px", "px")
    return f"{number(image[key], '.3g')} {unit}"


def _overlays(segmentation: Path | None) -> list[Picture]:
    files = sorted(segmentation.glob("*_overlay.png"))[:OVERLAYS] if segmentation else []
    return [embedded(iio.imread(file), f"Segmentation overlay: {name}", name) for file in files for name in [file.stem.removesuffix("_overlay")]]


def figures(report: SessionReport, drift: Drift | None) -> dict[str, float]:
    """The session in numbers, for the ledger, MLflow and alerts."""
    found = _measured(_summaries(report.segmentation))
    counted: dict[str, float] = {"images": report.images, "quarantined": len(report.quarantined), "grains": sum(image["grains"] for image in found)}
    for key in ("mean_equivalent_diameter_um", "mean_equivalent_diameter_px", "astm_grain_size_number"):
        values = [image[key] for image in found if image.get(key) is not None]
        if values:
            counted[key] = sum(values) / len(values)
    scores = {name: value for name, value in drift.scores.items() if math.isfinite(value)} if drift else {}
    return counted | scores


def alerts(report: SessionReport) -> dict[str, str]:
    """What somebody should hear of, event to sentence, besides drift and promotions, which are told when they happen."""
    told = {}
    if report.failures:
        told["session failed its checks"] = "; ".join(report.failures)
    elif report.quarantined:
        told["files set aside"] = "; ".join(f"{name}: {reason}" for name, reason in report.quarantined.items())
    if report.decision:
        told["recalibration"] = " ".join(report.decision)
    return told


def moved_rows(drift: Drift) -> list[tuple[str, str, str]]:
    """Rows of the table of what moved."""
    return [(entry["descriptor"].replace("_", " "), f"{number(entry['sigmas'], '+.1f')} standard errors", entry["words"]) for entry in drift.moved]


def decision_sentences(decision: Decision | None) -> list[str]:
    """What was decided about a recalibrated model, and why; nothing where there was none."""
    if decision is None:
        return []
    verdict = "The recalibrated model was promoted" if decision.promote else "The recalibrated model was not promoted"
    return [f"{verdict}; {decision.decided_by} decided.", *decision.reasons]


def evidence_table(decision: Decision | None) -> pd.DataFrame | None:
    """Scores of both by set: AP50 where there are labels, the label-free score where there are none."""
    if decision is None:
        return None
    rows = [{"Set": name, "Kind": facts["kind"], "Images": str(facts["images"]), "Champion": _score(facts.get("champion")),
             "Challenger": _score(facts.get("challenger"))} for name, facts in decision.figures.items()]
    return pd.DataFrame(rows)


def _score(scores: Mapping[str, float] | None) -> float:
    return scores["score"] if scores else math.nan


def _evidence(evidence: pd.DataFrame | None) -> Table | None:
    if evidence is None or evidence.empty:
        return None
    rows = [[str(value) if isinstance(value, str) else number(value) for value in row] for row in evidence.itertuples(index=False)]
    return Table("Champion and challenger on the same images", [str(name) for name in evidence.columns], rows)
