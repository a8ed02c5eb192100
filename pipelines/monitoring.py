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

from graincast import preflight
from graincast.config import Config, parse_config
from graincast.errors import Unavailable, UserError, is_down
from graincast.monitor.drift import Drift
from graincast.monitor.inbox import Ledger, Session, look_into
from pipelines.recalibration import recalibrate
from steps.champion import champion
from steps.session import check_session, failures, segment_session, test_drift
from steps.session_report import STATE, alert, report_session, result_of


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
    for session in look.ready:
        model = champion()  # anew: the session before may have led to another one
        if ledger.claim(session):
            _account(ledger, session, settings, model)


def _account(ledger: Ledger, session: Session, settings: Config, model: Sequence[Any]) -> None:
    """Process one session and note in the ledger what became of it; what is no fault of the session's ends the run."""
    try:
        result = _process(session, settings, model)
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else traceback.format_exception_only(error)[-1].strip()
        if is_down(error):
            ledger.release(session, sentence)
            raise
        again = "failed too often and is set aside" if ledger.failed(session, sentence) else "failed and is tried again"
        alert("session failed", f"session '{session.name}' {again}: {sentence}")
        if not isinstance(error, UserError):
            raise
    else:
        ledger.done(session, result)


def _process(session: Session, settings: Config, model: Sequence[Any]) -> dict[str, Any]:
    folder = str(session.folder)
    segmenter, reference, version = model
    checked = check_session(settings.gates, segmenter, folder, session.digest)
    if failures(checked.load()):
        return result_of(report_session(session.name, session.digest, version, checked, None, None, None).load())
    grains = segment_session(settings.gates, segmenter, checked, folder, session.digest)
    drift = test_drift(settings.drift, reference, segmenter, checked)
    verdict = Drift.load(drift.load().path)
    wanted = verdict.drifted and verdict.mendable and settings.monitoring.recalibrate
    decision = _recalibrated(session.name, settings, segmenter, checked) if wanted else None
    return result_of(report_session(session.name, session.digest, version, checked, grains, drift, decision).load())


def _recalibrated(name: str, settings: Config, segmenter: Any, session: Any) -> Any:
    """The decision on a recalibrated model; None where recalibration failed, which does not undo what was found in the session."""
    try:
        return recalibrate(settings, segmenter, session)
    except Unavailable:
        raise
    except UserError as error:
        alert("recalibration failed", f"session '{name}': {error}")
        return None
