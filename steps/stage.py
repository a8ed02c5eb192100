"""What every step shares: its cache, its MLflow run, its folder.

A stage's step reads like this::

    @stage("run_simulate")
    def simulate(config: Simulate) -> Annotated[ImageSet, "morphologies"]:
        from graincast.stages import run_simulate

        return run_simulate(config, output_folder("morphologies"))

The library is imported inside the step: torch and its like take seconds that a cached step need not spend.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from zenml import get_step_context, step
from zenml.config.cache_policy import CachePolicy

from graincast.store import tracking
from steps.artifacts import ROOT
from steps.sources import source_files


def stage(*functions: str, child_run: bool = False, enable_cache: bool | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `zenml.step` with an MLflow run and a cache that follows content and code.

    Parameters
    ----------
    *functions : str
        The functions of `graincast.stages` that the step calls; a change in the library's code that they run, by
        `steps.sources.source_files`, runs the stage again.
    child_run : bool
        Log to a child run of the pipeline run's MLflow run, not to the latter itself.
    enable_cache : bool, optional
        False: run every time, whatever is known.

    Notes
    -----
    The cache key holds the parameters, the DVC hashes of the inputs, the step's code and that of the library.
    """
    return step(
        enable_cache=enable_cache,
        experiment_tracker=True,
        settings={"experiment_tracker": {"experiment_name": tracking.EXPERIMENT, "nested": child_run}},
        cache_policy=CachePolicy(include_artifact_ids=False, file_dependencies=source_files(*functions)),
    )


def output_folder(name: str = "") -> Path:
    """Where the running step writes: ``runs/<run>/<step>`` of the checkout, or `name` in it; not made yet."""
    context = get_step_context()
    return ROOT / "runs" / context.pipeline_run.name / context.step_run.name / name


def checkpoint_folder() -> Path:
    """Where trainings keep their checkpoints: outside ``runs/<run>``, so that the next run finds those of a killed one."""
    return ROOT / ".graincast" / "checkpoints"


def run_tags(**digests: str) -> dict[str, str | None]:
    """What ties an MLflow run to the rest: the ZenML run, the git commit and the datasets' DVC hashes (name to hash)."""
    run = get_step_context().pipeline_run
    commit = tracking.git_commit(ROOT)
    hashes = {f"dvc.{name}": digest for name, digest in digests.items()}
    return {"zenml_run": run.name, "zenml_run_id": str(run.id), "git_commit": commit, **hashes}
