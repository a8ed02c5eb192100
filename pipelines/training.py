"""The labour-free loop: a folder of unlabelled micrographs to a trained, registered segmenter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zenml import pipeline
from zenml.enums import ExecutionMode

from graincast import preflight
from graincast.config import parse_config
from graincast.store.imageset import content_digest
from pipelines.recalibration import labelled_fields
from steps.drift_reference import drift_reference
from steps.evaluate import evaluate, evaluate_virtual
from steps.gates import gate_library, gate_micrographs, gate_synthetic
from steps.ingest import ingest, ingest_virtual
from steps.promote import promote
from steps.report import report
from steps.simulate import simulate
from steps.synthesise import synthesise
from steps.train_segmenter import train_segmenter
from steps.train_translator import train_translator
from steps.virtual_session import virtual_session


@pipeline(execution_mode=ExecutionMode.FAIL_FAST)
def training_pipeline(config: dict[str, Any]) -> None:
    """Simulate, ingest, learn the look, synthesise, train, evaluate, report, promote; gates between."""
    settings = parse_config(config)
    preflight.check(settings)
    session = settings.session
    for_translator, for_synthetic, for_validation = simulate(settings.simulate)
    if session.folder is None:
        virtual = virtual_session(session.virtual)
        micrographs = ingest_virtual(settings.ingest, for_translator, virtual)
    else:
        content = content_digest(Path(session.folder), "session.folder")
        micrographs = ingest(settings.ingest, for_translator, session.folder, session.masks, content)
    gates = [gate_library(settings.gates, for_translator, for_synthetic, for_validation), gate_micrographs(settings.gates, micrographs)]
    translator = train_translator(settings.translator, for_translator, micrographs, after=gates)
    training, validation = synthesise(settings.synthesise, for_synthetic, for_validation, translator)
    gate = gate_synthetic(settings.gates, training, validation, micrographs)
    segmenter = train_segmenter(settings.segmenter, training, validation, micrographs, after=[gate])
    if session.folder is None:
        evaluation = evaluate_virtual(settings.evaluate, session, segmenter, translator, for_synthetic, training, validation, micrographs, virtual)
    else:
        masks = content_digest(Path(session.masks), "session.masks") if session.masks else ""
        evaluation = evaluate(settings.evaluate, session, segmenter, translator, for_synthetic, training, validation, micrographs, masks)
    reported = report(settings.model_dump(), for_synthetic, micrographs, training, translator, segmenter, evaluation)
    reference = drift_reference(settings.drift, segmenter, micrographs, training)
    promote(settings.promotion, segmenter, reference, translator, for_translator, for_synthetic, for_validation, micrographs, training, validation,
            micrographs, validation, *labelled_fields(settings), after=[reported])
