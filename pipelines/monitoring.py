"""Monitoring: sessions that arrived in the inbox are checked, segmented and compared with what the champion learned from.

Where the look has changed in a way that re-learning can mend, the run branches into the recalibration. A session counts
as processed when its report is written, not before: after a crash the next run takes it up again, and ZenML's cache gives
what was finished.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zenml import pipeline
from zenml.exceptions import RunInterruptedException, RunStoppedException

from graincast import preflight
from graincast.config import Config, parse_config
from graincast.errors import Unavailable, UserError, is_down
from graincast.monitor.drift import Drift
from graincast.monitor.inbox import Ledger, Session, look_into
from pipelines.recalibration import recalibrate
from steps.alerts import STATE, alert
from steps.champion import champion
from steps.session import check_session, failures, segment_session, test_drift
from steps.session_report import note_drift, report_session, result_of


@pipeline(dynamic=True)
def monitoring_pipeline(config: dict[str, Any]) -> None:
    """Process every session of ``monitoring.inbox`` that is whole and new."""
    settings = parse_config(config)
    preflight.check(settings)
    if settings.monitoring.inbox is None:
        raise UserError("monitoring.inbox is not set; the folder that holds a folder for each session would be right")
    ledger = Ledger.open(STATE, settings.monitoring)
    look = look_into(Path(settings.monitoring.inbox), ledger, settings.monitoring.settle_seconds)
    for name, sentence in look.news.items():
        alert("session refused", f"session '{name}': {sentence}")
    look.told(ledger)
    for name, sentence in look.waiting.items():
        print(f"session '{name}' waits: {sentence}")
    if not look.ready:
        print(f"nothing to do: no session in {settings.monitoring.inbox} is whole and new")
    defects = []
    for session in look.ready:
        model = champion()  # anew: the session before may have led to another one
        if ledger.claim(session):
            defects += _account(ledger, session, settings, model)
    if defects:
        raise defects[0]  # after the others had their turn


def _account(ledger: Ledger, session: Session, settings: Config, model: Sequence[Any]) -> list[Exception]:
    """Process one session and note in the ledger what became of it; returns the defect that showed, if one did.

    A session fails by its own fault or a defect. What is nobody's ends the run, and the session waits for the next one.
    """
    try:
        ledger.done(session, _process(session, settings, model))
    except (RunInterruptedException, RunStoppedException):
        ledger.release(session, "the run was stopped")
        raise
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else traceback.format_exception_only(error)[-1].strip()
        if is_down(error):
            ledger.release(session, sentence)
            raise
        again = "failed too often and is set aside" if ledger.failed(session, sentence) else "failed and is tried again"
        alert("session failed", f"session '{session.name}' {again}: {sentence}")
        return [] if isinstance(error, UserError) else [error]
    return []


def _process(session: Session, settings: Config, model: Sequence[Any]) -> dict[str, Any]:
    segmenter, reference, version = model
    about, folder = (session.name, session.digest, version), str(session.folder)
    checked = check_session(settings.gates, segmenter, folder, session.digest)
    if failures(checked.load()):
        return result_of(report_session(*about, checked, None, None, None, None, None).load())
    grains = segment_session(settings.gates, segmenter, checked, folder, session.digest)
    drift = test_drift(settings.drift, reference, segmenter, checked)
    noted = note_drift(*about, drift)
    decision = failed = None
    verdict = Drift.load(drift.load().path)
    if verdict.drifted and verdict.mendable and settings.monitoring.recalibrate:
        decision, failed = _recalibrated(settings, segmenter, checked)
    return result_of(report_session(*about, checked, grains, drift, noted, decision, failed).load())


def _recalibrated(settings: Config, segmenter: Any, session: Any) -> tuple[Any, str | None]:
    """The decision on a recalibrated model, or why there is none: that recalibration failed does not undo what was found in the session."""
    try:
        return recalibrate(settings, segmenter, session), None
    except Unavailable:
        raise
    except UserError as error:
        return None, f"The recalibration failed: {error}"
