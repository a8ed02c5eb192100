"""What became of a session: a page, a row in the drift history, an alert where somebody should look."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from graincast.monitor import history
from graincast.monitor.drift import Drift
from graincast.store.imageset import whole_folder
from graincast.store.versioning import Artifact
from steps.alerts import alert
from steps.artifacts import ROOT
from steps.stage import output_folder, run_tags, stage

CHART = "drift_history.png"
TOLD = {"images", "quarantined", "grains", "mean_equivalent_diameter_um", "columns_score", "embedding_score"}
"""Figures of a session that an alert carries; the report and MLflow have all."""


@stage(enable_cache=False)
def note_drift(name: str, digest: str, champion: int, drift: Artifact) -> Annotated[Artifact, "drift_history"]:
    """Put the verdict on record and tell of drift, before anything is made of it; the chart of all verdicts so far."""
    verdict = Drift.load(drift.path)
    with whole_folder(output_folder("history")) as folder:
        if verdict.scores:
            history.record(name, digest, verdict, champion=str(champion), tags=run_tags(drift=drift.digest), files=sorted(drift.path.glob("*.html")))
            history.draw_history(history.history(), folder / CHART)
        (folder / "verdict.txt").write_text(verdict.sentence)
    if verdict.drifted:
        alert("drift", f"session '{name}': {verdict.sentence}", {key: value for key, value in verdict.scores.items() if key in TOLD})
    return Artifact(output_folder("history"), "drift history")


@stage("run_session_report", enable_cache=False)
def report_session(name: str, digest: str, champion: int, session: Artifact, grains: Artifact | None, drift: Artifact | None,
                   noted: Artifact | None, decision: Artifact | None, failed: str | None) -> Annotated[Artifact, "session_report"]:
    """The page of a session, and alerts; `champion` is the version that processed it, `failed` says why a recalibration did."""
    from graincast.stages import run_session_report

    tags = {key: value for key, value in run_tags(session=session.digest).items() if value}
    chart = noted.path / CHART if noted and (noted.path / CHART).exists() else None
    folder = run_session_report(name, session.path, output_folder("report"), grains=grains and grains.path, drift=drift and drift.path,
                                decision=decision and decision.path, failed=failed, history=chart,
                                run={"model": f"version {champion}", "content": digest, **tags})
    told = json.loads((folder / "session.json").read_text())
    for event, sentence in told["alerts"].items():
        alert(event, f"session '{name}': {sentence}", {key: told["figures"][key] for key in told["figures"].keys() & TOLD})
    print(f"session '{name}': {told['headline']}; report: {os.path.relpath(folder / 'report.html', ROOT)}")
    return Artifact(folder, "session report")


def result_of(report: Artifact) -> dict[str, Any]:
    """What the ledger remembers of a session."""
    told = json.loads((Path(report.path) / "session.json").read_text())
    return {"headline": told["headline"], **told["figures"]}
