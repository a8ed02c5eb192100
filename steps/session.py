"""A session of new micrographs: checked, segmented, compared with what the champion learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from graincast.config import Drift, Gates
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact
from steps.stage import output_folder, stage


@stage("run_check_session", enable_cache=False)  # a drive that was away must not be remembered as a bad session
def check_session(config: Gates, segmenter: Artifact, folder: str, fingerprint: str) -> Annotated[Artifact, "session"]:
    """The session's files, prepared as the champion's own, each checked; `fingerprint` is their content's."""
    from graincast.stages import run_check_session

    return Artifact(run_check_session(config, segmenter.path, Path(folder), output_folder("session")), "session")


@stage("run_segment_session")
def segment_session(config: Gates, segmenter: Artifact, session: Artifact, folder: str, fingerprint: str,
                    exports: list[str] | None = None) -> Annotated[Artifact, "grains"]:
    """Grain maps, overlays and tables of the files that passed, or other kinds of `graincast.export.kinds.KINDS`."""
    from graincast.stages import SESSION_IMAGES, USUAL, run_segment_session

    images = ImageSet(session.path / SESSION_IMAGES)
    out = run_segment_session(config, segmenter.path, images, Path(folder), output_folder("grains"), exports or USUAL)
    return Artifact(out, "grains")


@stage("run_drift")
def test_drift(config: Drift, reference: Artifact, segmenter: Artifact, session: Artifact) -> Annotated[Artifact, "drift"]:
    """Whether the session has left what the champion learned from, and in what."""
    from graincast.stages import SESSION_IMAGES, run_drift

    return Artifact(run_drift(config, reference.path, segmenter.path, ImageSet(session.path / SESSION_IMAGES), output_folder("drift")), "drift")


def failures(session: Artifact) -> list[str]:
    """Why a session cannot be used; nothing: it can."""
    from graincast.stages import SESSION_GATE
    from graincast.store.gates import Gate

    return Gate.load(session.path / SESSION_GATE).failures
