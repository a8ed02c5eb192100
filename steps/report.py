"""The last step: one HTML page, everything in MLflow, a table in the terminal. It runs even when all else is cached."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

from rich.console import Console
from zenml import get_step_context

from graincast.report.figures import figures
from graincast.report.findings import summarise
from graincast.report.html import build_report
from graincast.report.inputs import ReportInputs
from graincast.report.terminal import summary_table
from graincast.store import tracking
from graincast.store.imageset import ImageSet, whole_folder
from graincast.store.versioning import Artifact
from steps.artifacts import ROOT
from steps.stage import output_folder, run_tags, stage

COMMANDS = {
    "MLflow dashboard": "source env.sh && mlflow ui --backend-store-uri $MLFLOW_TRACKING_URI",
    "ZenML dashboard": "source env.sh && zenml login --local",
}


@stage(enable_cache=False)
def report(config: dict[str, Any], morphologies: ImageSet, micrographs: ImageSet, training: ImageSet, validation: ImageSet, translator: Artifact,
           segmenter: Artifact, model_version: int, evaluation: Artifact) -> Annotated[Artifact, "report"]:
    """Report a run: HTML page, MLflow parent run, terminal table."""
    from graincast.stages import load_evaluation, load_history

    tags = run_tags(morphologies=morphologies.digest, micrographs=micrographs.digest, synthetic_training=training.digest,
                    synthetic_validation=validation.digest, translator=translator.digest, segmenter=segmenter.digest,
                    evaluation=evaluation.digest)
    found, likeness = load_evaluation(evaluation.path)
    mlflow_run = tracking.active_run_id()
    inputs = ReportInputs(
        title="graincast training run", run={"name": get_step_context().pipeline_run.name, "MLflow run": mlflow_run,
                                              "model": f"models:/{tracking.MODEL}/{model_version}", **{k: v for k, v in tags.items() if v}},
        config=config, micrographs=micrographs, morphologies=morphologies, synthetic=training, translator_history=load_history(translator.path),
        segmenter_history=load_history(segmenter.path), scores=found.scores, realism=likeness, grains=found.grains, overlays=found.overlays,
        virtual=config["session"]["folder"] is None)
    with whole_folder(output_folder()) as folder:
        (folder / "report.html").write_text(build_report(inputs))
        (folder / "summary.json").write_text(json.dumps(summarise(inputs), indent=1))
    page = output_folder() / "report.html"
    tracking.log(params=config, tags=tags, metrics=_metrics(inputs), figures=figures(inputs), files=[page])
    places = {"report": os.path.relpath(page, ROOT), "MLflow run": mlflow_run, "model": f"models:/{tracking.MODEL}/{model_version}"}
    Console(soft_wrap=False).print(summary_table(inputs, places, COMMANDS))
    return Artifact(page.parent, "report")


def _metrics(inputs: ReportInputs) -> dict[str, float]:
    """Mean scores by set and method, and the realism figures, under names MLflow takes."""
    means = inputs.scores.groupby(["set", "method"]).mean(numeric_only=True).stack()
    scores = {f"{set_}/{method}/{name}".replace(",", "").replace(" ", "_"): float(value) for (set_, method, name), value in means.items()}
    return {**scores, **{f"realism/{name}": value for name, value in inputs.realism.items()}}
