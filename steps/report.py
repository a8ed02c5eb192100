"""The last step: one HTML page, everything in MLflow, a table in the terminal. It runs even when all else is cached."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from rich.console import Console
from zenml import get_step_context
from zenml.client import Client
from zenml.enums import ExecutionStatus, StoreType
from zenml.models import StepRunResponse

from graincast.errors import UserError
from graincast.evaluate.realism import Realism
from graincast.evaluate.result import Evaluation
from graincast.report.findings import METRICS, warnings
from graincast.report.html import write_report
from graincast.report.inputs import ReportInputs
from graincast.report.terminal import summary_table
from graincast.store import registry, tracking
from graincast.store.imageset import ImageSet, whole_folder
from graincast.store.versioning import Artifact
from steps.artifacts import ROOT
from steps.stage import output_folder, run_tags, stage


@stage(enable_cache=False)
def report(config: dict[str, Any], morphologies: ImageSet, micrographs: ImageSet, training: ImageSet, translator: Artifact, segmenter: Artifact,
           evaluation: Artifact) -> Annotated[Artifact, "report"]:
    """Report a run: HTML page, MLflow parent run, terminal table.

    A segmenter whose results on the micrographs are not plausible is reported but not registered, and the run fails.

    Raises
    ------
    UserError
        With the evaluation's doubts, unless ``evaluate.require_plausible`` is off.
    """
    steps = Client().get_pipeline_run(get_step_context().pipeline_run.id).steps
    tags = run_tags(**_hashes(steps))
    found = Evaluation.load(evaluation.path)
    shown = _without_places(config)
    rejected = bool(found.doubts) and config["evaluate"]["require_plausible"]
    mlflow_run, model = tracking.active_run_id(), "not registered" if rejected else _register(segmenter, micrographs, tags)
    inputs = ReportInputs(
        title="graincast training run",
        run={"MLflow run": mlflow_run, "model": model, **{name: tag for name, tag in tags.items() if tag}},
        config=shown,
        micrographs=micrographs,
        morphologies=morphologies,
        synthetic=training,
        translator_history=_timed(translator, steps["train_translator"]),
        segmenter_history=_timed(segmenter, steps["train_segmenter"]),
        scores=found.scores,
        realism=Realism.load(evaluation.path / "realism"),
        grains=found.grains,
        overlays=found.overlays,
        virtual=config["session"]["folder"] is None,
        doubts=found.doubts,
    )
    with whole_folder(output_folder()) as folder:
        write_report(inputs, folder)
    page = output_folder() / "report.html"
    told = {"warnings": "\n".join(warnings(inputs)) or None}
    tracking.log(params=shown, tags={**tags, **told}, metrics=_metrics(inputs), files=[page, page.parent / "figures"])
    places = {"report": os.path.relpath(page, ROOT), "MLflow run": mlflow_run, "model": model}
    console = Console()
    console.print(summary_table(inputs, places, _dashboards()))
    for name, reason in found.skipped.items():
        console.print(f"not scored, {name}: {reason}", markup=False)
    if rejected:
        raise UserError(f"the segmenter was not registered: {'; '.join(found.doubts)}; the report, {places['report']}, shows what it makes of the "
                        "micrographs; other micrographs or a longer translator training would be right "
                        "(evaluate.require_plausible: false registers it nevertheless)")
    return Artifact(page.parent, "report")


def _register(segmenter: Artifact, micrographs: ImageSet, tags: Mapping[str, str | None]) -> str:
    """The segmenter's address in the registry, where it becomes the next version unless it is known there."""
    return f"models:/{registry.MODEL}/{registry.ensure_registered(segmenter.path, micrographs.image(0), tags)}"


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the names of the user's folders in place of their paths, which are nobody else's business."""
    places = {key: Path(config["session"][key]).name for key in ("folder", "masks") if config["session"][key]}
    return {**config, "session": {**config["session"], **places}}


def _hashes(steps: Mapping[str, StepRunResponse]) -> dict[str, str]:
    """DVC hash of every dataset and model of the run, by its artifact's name."""
    outputs = [(name, artifact.run_metadata) for step in steps.values() for name, (artifact, *_) in step.outputs.items()]
    return {name: str(metadata["dvc_md5"]) for name, metadata in outputs if "dvc_md5" in metadata}


def _timed(model: Artifact, training: StepRunResponse) -> pd.DataFrame:
    """The training's history, with how long the step took where it ran now and does not come from the cache."""
    history = pd.read_csv(model.path / "history.csv")
    if training.status != ExecutionStatus.COMPLETED or not (training.start_time and training.end_time):
        return history
    return history.assign(seconds=(training.end_time - training.start_time).total_seconds())


def _metrics(inputs: ReportInputs) -> dict[str, float]:
    """Mean scores by set and method, and the realism figures, under names MLflow takes."""
    means = inputs.scores.groupby(["set", "method"]).mean(numeric_only=True).stack()
    scores = {f"{set_}/{method}/{name}".replace(",", "").replace(" ", "_"): float(value)
              for (set_, method, name), value in means.items() if name in METRICS}
    realism = inputs.realism.summary if inputs.realism else {}
    return {**scores, **{f"realism/{name}/{group}": value for name, values in realism.items() for group, value in values.items()}}


def _dashboards() -> dict[str, str]:
    """By the dashboard's name: the address where a server shows it, else the command that starts it here."""
    store, uri = Client().zen_store, os.environ["MLFLOW_TRACKING_URI"]
    mlflow_is_served = uri.startswith(("http://", "https://"))
    return {
        "MLflow dashboard": uri if mlflow_is_served else "source env.sh && mlflow ui --backend-store-uri $MLFLOW_TRACKING_URI",
        "ZenML dashboard": store.url if store.type == StoreType.REST else "source env.sh && zenml login --local",
    }
