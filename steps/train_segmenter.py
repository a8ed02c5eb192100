"""Stage 5: train the segmenter; the report registers it, once its results are known to be plausible."""

from __future__ import annotations

from typing import Annotated

from graincast.config import Segmenter
from graincast.store import tracking
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact
from steps.stage import checkpoint_folder, output_folder, run_tags, stage


@stage("run_train_segmenter", child_run=True)
def train_segmenter(config: Segmenter, training: ImageSet, validation: ImageSet, micrographs: ImageSet) -> Annotated[Artifact, "segmenter"]:
    """A U-Net trained on the synthetic set."""
    from graincast.checkpoint import Checkpoint
    from graincast.stages import run_train_segmenter

    tags = run_tags(synthetic_training=training.digest, synthetic_validation=validation.digest, micrographs=micrographs.digest)
    tracking.log(params=config.model_dump(), tags=tags)
    with Checkpoint(checkpoint_folder(), "segmenter") as checkpoint, tracking.MetricLog() as log:
        folder = run_train_segmenter(config, training, validation, micrographs, output_folder("segmenter"), log, checkpoint)
    return Artifact(folder, "segmenter")
