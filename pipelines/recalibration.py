"""Recalibration: a look that changed is learned from the champion on; the result is promoted, or refused.

Alone it takes the micrographs of ``session.folder`` (null: a session of the virtual SEM); the monitoring pipeline
branches into it with a session that has drifted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zenml import pipeline

from graincast import preflight
from graincast.config import Config, parse_config
from graincast.errors import UserError
from graincast.monitor.inbox import session_digest
from graincast.store.imageset import content_digest
from graincast.store.versioning import Artifact
from steps.champion import champion, champion_data
from steps.drift_reference import drift_reference
from steps.gates import gate_synthetic
from steps.promote import promote
from steps.recalibrate import join_looks, recalibrate_segmenter, recalibrate_translator, session_images
from steps.session import check_session, failures
from steps.synthesise import synthesise
from steps.virtual_session import virtual_session


@pipeline(dynamic=True)
def recalibration_pipeline(config: dict[str, Any]) -> None:
    """Check new micrographs, learn their look, synthesise, fine-tune, compare with the champion, promote or refuse."""
    settings = parse_config(config)
    preflight.check(settings)
    segmenter, _, _ = champion()
    session = check_session(settings.gates, segmenter, *new_micrographs(settings))
    if why := failures(session.load()):
        raise UserError(f"the new micrographs cannot be learned from: {'; '.join(why)}")
    recalibrate(settings, segmenter, session)


def recalibrate(settings: Config, segmenter: Any, session: Any) -> Any:
    """Wire the recalibration of a checked session into the running pipeline; returns the decision's artifact."""
    micrographs = session_images(session)
    old_translator, for_translator, for_synthetic, for_validation, micrographs_old, training_old, validation_old = champion_data()
    translator = recalibrate_translator(settings.recalibration, settings.translator, old_translator, for_translator, micrographs)
    training, validation = synthesise(settings.synthesise, for_synthetic, for_validation, translator)
    gate_synthetic(settings.gates, training, validation, micrographs)  # raises before anything is trained on what does not pass
    challenger = recalibrate_segmenter(settings.recalibration, segmenter, training, training_old, validation, validation_old, micrographs)
    all_micrographs, all_training, all_validation = join_looks(micrographs_old, micrographs, training_old, training, validation_old, validation)
    reference = drift_reference(settings.drift, challenger, all_micrographs, all_training)
    return promote(settings.promotion, challenger, reference, translator, for_translator, for_synthetic, for_validation, all_micrographs,
                   all_training, all_validation, micrographs, validation, *labelled_fields(settings))


def labelled_fields(settings: Config) -> tuple[str | None, str | None]:
    """Folders of images and masks that every promotion is measured on; where none are named for that, those of the session."""
    if settings.promotion.fields:
        return str(Path(settings.promotion.fields) / "images"), str(Path(settings.promotion.fields) / "masks")
    return (settings.session.folder, settings.session.masks) if settings.session.masks else (None, None)


def new_micrographs(settings: Config) -> tuple[str, str]:
    """Folder and digest of the new micrographs."""
    if settings.session.folder is None:
        virtual: Artifact = virtual_session(settings.session.virtual).load()
        folder = virtual.path / "micrographs"
        return str(folder), session_digest(folder)
    folder = Path(settings.session.folder)
    return str(folder), content_digest(folder, "session.folder")
