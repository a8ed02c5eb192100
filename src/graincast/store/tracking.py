"""Runs, metrics and loss curves in MLflow.

Where MLflow keeps them is said by its own variable, ``MLFLOW_TRACKING_URI`` (``env.sh`` sets it).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from graincast.errors import Unavailable, UserError, without_login

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "graincast"

MAX_METRICS, MAX_PARAMS = 1000, 100
"""What an MLflow server takes in one call."""

MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",          # the default of 7 makes a server that is down take minutes to say so
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""MLflow's own variables, where the user has not set them."""

T = TypeVar("T")


@contextlib.contextmanager
def reach(what: str) -> Iterator[MlflowClient]:
    """MLflow's client; what a store that is down, locked or full says becomes one sentence, without a login in it.

    Parameters
    ----------
    what : str
        What is looked for there, as the sentence's subject: "the model registry".

    Raises
    ------
    UserError
        If there can be no store where ``MLFLOW_TRACKING_URI`` says.
    Unavailable
        If MLflow, its database or its files fail in the ``with`` block.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = str(mlflow.get_tracking_uri())
    _check_place(what, uri)
    chatter = logging.getLogger("mlflow.store.db.utils")  # logs the traceback of what is raised here, too
    level, unset = chatter.level, MLFLOW_SETTINGS.keys() - os.environ.keys()
    chatter.setLevel(logging.CRITICAL)
    os.environ.update({name: MLFLOW_SETTINGS[name] for name in unset})
    try:
        yield mlflow.MlflowClient()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise Unavailable(f"{what} {without_login(uri)} {_complaint(error)}") from error
    finally:
        chatter.setLevel(level)
        for name in unset:
            os.environ.pop(name, None)


def _check_place(what: str, uri: str) -> None:
    """Of a SQLite file that cannot be, MLflow tries for a minute."""
    scheme, _, database = uri.partition(":///")
    if scheme == "sqlite" and (not Path(database).parent.is_dir() or Path(database).is_dir()):
        raise UserError(f"{what} {uri} cannot be: there is no folder for it; another MLFLOW_TRACKING_URI (source env.sh) would be right")


def _complaint(error: Exception) -> str:
    said = first_line(error)
    if "locked" in said:
        return f"is locked by another process ({said}); try again when that is through, what had begun is completed then"
    if "Max retries exceeded" in said:
        return "does not answer; it may be down, or MLFLOW_TRACKING_URI wrong; try again later, what had begun is completed then"
    return f"cannot be used: {said}"


def first_line(error: Exception) -> str:
    """What an exception says, in a line and without a login."""
    return (without_login(str(error)).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


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


def log(
    *,
    params: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str | None] | None = None,
    files: Iterable[Path] = (),
) -> None:
    """Add to the active run.

    Parameters
    ----------
    params : Mapping, optional
        Parameters, nested as in the configuration (``config.model_dump()``); they get dotted names.
    metrics : Mapping of str to float, optional
        Final figures; those that are NaN or infinite are left out.
    tags : Mapping of str to str, optional
        Digests, commits and the like; None is left out.
    files : Iterable of Path, optional
        Files and folders to keep as artifacts under their own names.
    """
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    now = _now()
    entries = [Param(name, str(value)) for name, value in _flat(params or {})]
    labels = [RunTag(name, value) for name, value in (tags or {}).items() if value is not None]
    values = [Metric(k, float(v), now, 0) for k, v in (metrics or {}).items() if math.isfinite(v)]
    client, run_id = mlflow.MlflowClient(), active_run_id()
    for chunk in _chunks(entries, MAX_PARAMS):
        client.log_batch(run_id, params=chunk)
    client.log_batch(run_id, metrics=values, tags=labels)
    for file in files:
        if file.is_dir():
            client.log_artifacts(run_id, str(file), file.name)
        else:
            client.log_artifact(run_id, str(file))


class MetricLog:
    """Loss curves of a training: the ``log`` callback that trainings take, sent to the active run in batches.

    Examples
    --------
    ``with MetricLog() as log: train_segmenter(training, validation, config, log=log)``
    """

    SECONDS = 5.0
    """Longest time that curves lag behind."""

    def __init__(self) -> None:
        self._run_id = active_run_id()
        self._pending: list[Any] = []
        self._sent = time.monotonic()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receive losses and metrics of one step."""
        from mlflow.entities import Metric

        now = _now()
        self._pending += [Metric(k, float(v), now, step) for k, v in metrics.items() if math.isfinite(v)]
        if len(self._pending) >= MAX_METRICS or time.monotonic() - self._sent > self.SECONDS:
            self._send()

    def _send(self) -> None:
        from mlflow import MlflowClient

        for chunk in _chunks(self._pending, MAX_METRICS):
            MlflowClient().log_batch(self._run_id, metrics=chunk)
        self._pending, self._sent = [], time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._send()


def git_commit(folder: Path) -> str | None:
    """The commit checked out in `folder`, with ``-dirty`` where tracked files differ; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def active_run_id() -> str:
    """Id of the active run; a RuntimeError where there is none."""
    import mlflow

    run = mlflow.active_run()
    if run is None:
        raise RuntimeError("no MLflow run is active")  # MLflow would start a stray one
    return str(run.info.run_id)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _now() -> int:
    return int(time.time() * 1000)
