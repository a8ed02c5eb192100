"""Runs, figures and the registered segmenter in MLflow."""

from __future__ import annotations

from pathlib import Path

EXPERIMENT = "graincast"


def ensure_experiment(name: str = EXPERIMENT) -> str:
    """The experiment's id; it is made where it is missing.

    A local database's artifacts lie in ``mlartifacts`` beside it; MLflow would take the working directory.
    """
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(name)
    if experiment:
        return experiment.experiment_id
    scheme, _, database = client.tracking_uri.partition(":///")
    beside = (Path(database).absolute().parent / "mlartifacts").as_uri() if scheme == "sqlite" else None
    return client.create_experiment(name, artifact_location=beside)
