"""Inference: the champion segments a folder of micrographs; the results of ``graincast segment`` are an artifact of the run."""

from __future__ import annotations

from typing import Any

from zenml import pipeline

from graincast.config import parse_config
from graincast.errors import UserError
from graincast.export.kinds import chosen
from pipelines.recalibration import new_micrographs
from steps.champion import champion
from steps.session import check_session, failures, segment_session


@pipeline(dynamic=True)
def inference_pipeline(config: dict[str, Any], exports: str = "all") -> None:
    """Check the micrographs of ``session.folder`` (null: a session of the virtual SEM), segment and measure those that pass.

    `exports` names kinds of `graincast.export.kinds.KINDS` with commas between them, or ``report``, or ``all``; in a run's configuration
    file it stands beside ``config``.
    """
    settings, kinds = parse_config(config), list(chosen(exports))
    folder, digest = new_micrographs(settings)
    segmenter, _, _ = champion()
    session = check_session(settings.gates, segmenter, folder, digest)
    if why := failures(session.load()):
        raise UserError(f"nothing was segmented: {'; '.join(why)}")
    segment_session(settings.gates, segmenter, session, folder, digest, kinds)
