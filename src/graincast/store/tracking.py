"""Runs, loss curves and the registered segmenter in MLflow.

Where MLflow keeps them is said by its own variable, ``MLFLOW_TRACKING_URI`` (``env.sh`` sets it).
"""

from __future__ import annotations

import importlib.metadata
import math
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from graincast.errors import UserError
from graincast.store.imageset import folder_digest

if TYPE_CHECKING:
    from graincast.segment.segmenter import Segmenter

EXPERIMENT = "graincast"
MODEL = "graincast-segmenter"
CHAMPION = "champion"
DIGEST_TAG = "dvc.segmenter"

REQUIREMENTS = (
    "numba", "numpy", "pillow", "safetensors", "scikit-image", "scipy", "segmentation-models-pytorch", "torch", "torchvision",
)
"""Distributions that a served segmenter imports."""

MAX_METRICS, MAX_PARAMS = 1000, 100
"""What an MLflow server takes in one call."""

T = TypeVar("T")


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


def ensure_registered(folder: Path, example: np.ndarray, tags: Mapping[str, str | None] | None = None) -> int:
    """Have a segmenter registered as a version of ``graincast-segmenter``.

    The version whose tag ``dvc.segmenter`` is the folder's hash is kept where the registry has one; else the segmenter
    is logged in the active run and becomes the next version.

    Parameters
    ----------
    folder : Path
        What `Segmenter.save` wrote.
    example : ndarray
        A prepared image, uint8 (height, width); a 64 x 64 corner of it is kept as the input example.
    tags : Mapping of str to str, optional
        Further tags of a new version: git commit, hashes of the data and the like; None is left out.

    Returns
    -------
    int
        The version.

    Notes
    -----
    The model is data and this package's code, no pickle; it serves where graincast is not installed.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    import graincast

    active_run_id()
    client, digest = mlflow.MlflowClient(), folder_digest(folder)
    known = client.search_model_versions(f"name = '{MODEL}' and tags.`{DIGEST_TAG}` = '{digest}'", max_results=1)
    if known:
        return int(known[0].version)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1))]),
        outputs=Schema([TensorSpec(np.dtype(np.int32), (-1, -1, -1))]),
    )
    logged = mlflow.pyfunc.log_model(
        name="segmenter",
        loader_module="graincast.store.pyfunc",
        data_path=str(folder),
        code_paths=[str(Path(graincast.__file__).parent)],
        signature=signature,
        input_example=example[None, :64, :64],
        pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS],
    )
    version = mlflow.register_model(logged.model_uri, MODEL)
    for name, value in {**(tags or {}), DIGEST_TAG: digest}.items():
        if value is not None:
            client.set_model_version_tag(MODEL, version.version, name, value)
    return int(version.version)


def load_segmenter(reference: str | None = None, device: str = "auto") -> Segmenter:
    """Load a segmenter.

    Parameters
    ----------
    reference : str, optional
        A version (``3``) or alias (``challenger``) of ``graincast-segmenter``, any ``models:/`` or
        ``runs:/`` URI, or the folder of a saved segmenter. None: the alias ``champion``, or the newest
        version while there is none.
    device : str
        See `graincast.compute.pick_device`.

    Raises
    ------
    UserError
        If there is no such model.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    from graincast.segment.segmenter import Segmenter

    if reference and Path(reference).is_dir():
        return Segmenter.load(Path(reference), device)
    try:
        folder = Path(download_artifacts(_model_uri(reference)))
    except (MlflowException, OSError) as error:
        raise UserError(f"model '{reference}' cannot be loaded: {error}") from error
    return Segmenter.load(folder / Model.load(str(folder)).flavors["python_function"]["data"], device)


def _model_uri(reference: str | None) -> str:
    from mlflow import MlflowClient

    if reference is None:
        client = MlflowClient()
        newest_first = ["version_number DESC"]
        versions = client.search_model_versions(f"name = '{MODEL}'", max_results=1, order_by=newest_first)
        if not versions:
            raise UserError(
                f"no model '{MODEL}' is registered in {client.tracking_uri}; "
                "train one (make demo) or set MLFLOW_TRACKING_URI (source env.sh)"
            )
        aliases = client.get_registered_model(MODEL).aliases
        reference = str(aliases.get(CHAMPION, versions[0].version))
    if ":/" in reference:
        return reference
    return f"models:/{MODEL}/{reference}" if reference.isdecimal() else f"models:/{MODEL}@{reference}"


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
