"""Stage 5: train the segmenter and register it."""

from __future__ import annotations

from typing import Annotated

from graincast.config import Segmenter
from graincast.store import tracking
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact
from steps.stage import output_folder, run_tags, stage


@stage("run_train_segmenter", child_run=True)
def train_segmenter(config: Segmenter, training: ImageSet, validation: ImageSet, micrographs: ImageSet) -> Annotated[Artifact, "segmenter"]:
    """A U-Net trained on the synthetic set; the next version of the registered model."""
    from graincast.stages import run_train_segmenter

    tags = run_tags(synthetic_training=training.digest, synthetic_validation=validation.digest, micrographs=micrographs.digest)
    tracking.log(params=config.model_dump(), tags=tags)
    with tracking.MetricLog() as log:
        folder = run_train_segmenter(config, training, validation, micrographs, output_folder("segmenter"), log)
    tracking.ensure_registered(folder, micrographs.image(0), tags)
    return Artifact(folder, "segmenter")
