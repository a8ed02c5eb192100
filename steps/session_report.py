"""What became of a session: a page, a row in the drift history, an alert where somebody should look."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from zenml.client import Client

from graincast.monitor import alerts, history
from graincast.monitor.drift import Drift
from graincast.store.versioning import Artifact
from steps.artifacts import ROOT
from steps.stage import output_folder, run_tags, stage

STATE = ROOT / ".graincast" / "monitoring"


TOLD = {"images", "quarantined", "grains", "mean_equivalent_diameter_um", "columns_score", "embedding_score"}
"""Figures of a session that an alert carries; the report and MLflow have all."""


def alert(event: str, sentence: str, figures: Mapping[str, Any] | None = None) -> None:
    """Tell a person: the file and the log always, the stack's alerter where it has one."""
    alerts.alert(event, sentence, figures, STATE)
    alerter = Client().active_stack.alerter
    if alerter is None:
        return
    try:
        alerter.post(f"graincast, {event}: {sentence}")
    except Exception as error:  # whatever a chat service's library raises: the monitor goes on, and the file says so
        alerts.alert("alerter failed", f"the stack's alerter '{alerter.name}' did not take the alert: {error}", folder=STATE)


@stage("run_session_report", enable_cache=False)
def report_session(name: str, digest: str, champion: int, session: Artifact, grains: Artifact | None, drift: Artifact | None,
                   decision: Artifact | None) -> Annotated[Artifact, "session_report"]:
    """The page of a session, its verdict in the drift history, and alerts; `champion` is the version that processed it."""
    from graincast.stages import run_session_report

    tags = {key: value for key, value in run_tags(session=session.digest).items() if value}
    chart = _history(name, digest, drift, champion, tags) if drift and Drift.load(drift.path).scores else None
    folder = run_session_report(name, session.path, output_folder("report"), grains=grains and grains.path, drift=drift and drift.path,
                                decision=decision and decision.path, history=chart, run={"model": f"version {champion}", "content": digest, **tags})
    told = json.loads((folder / "session.json").read_text())
    for event, sentence in told["alerts"].items():
        alert(event, f"session '{name}': {sentence}", {key: told["figures"][key] for key in told["figures"].keys() & TOLD})
    print(f"session '{name}': {told['headline']}; report: {os.path.relpath(folder / 'report.html', ROOT)}")
    return Artifact(folder, "session report")


def _history(name: str, digest: str, drift: Artifact, champion: int, tags: Mapping[str, str | None]) -> Path:
    """Note the verdict beside those of the sessions before, and draw them all."""
    history.record(name, digest, Drift.load(drift.path), champion=str(champion), tags=tags, files=sorted(drift.path.glob("*.html")))
    chart = output_folder("history") / "drift_history.png"
    chart.parent.mkdir(parents=True)
    return history.draw_history(history.history(), chart)


def result_of(report: Artifact) -> dict[str, Any]:
    """What the ledger remembers of a session."""
    told = json.loads((Path(report.path) / "session.json").read_text())
    return {"headline": told["headline"], **told["figures"]}
