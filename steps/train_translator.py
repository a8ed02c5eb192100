"""Stage 3: learn how the microscope makes grains look."""

from __future__ import annotations

from typing import Annotated

from graincast.config import Translator
from graincast.store import tracking
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact
from steps.stage import checkpoint_folder, output_folder, run_tags, stage


@stage("run_train_translator", child_run=True)
def train_translator(config: Translator, morphologies: ImageSet, micrographs: ImageSet) -> Annotated[Artifact, "translator"]:
    """A CycleGAN between morphologies and micrographs."""
    from graincast.checkpoint import Checkpoint
    from graincast.stages import run_train_translator

    tracking.log(params=config.model_dump(), tags=run_tags(morphologies=morphologies.digest, micrographs=micrographs.digest))
    with Checkpoint(checkpoint_folder(), "translator") as checkpoint, tracking.MetricLog() as log:
        folder = run_train_translator(config, morphologies, micrographs, output_folder("translator"), log, checkpoint)
    tracking.log(files=[folder / "sample.png"])
    return Artifact(folder, "translator")
