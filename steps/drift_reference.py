"""What later sessions are compared with; it travels with the registered model."""

from __future__ import annotations

from typing import Annotated

from graincast.config import Drift
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact
from steps.stage import output_folder, stage


@stage("run_reference")
def drift_reference(config: Drift, segmenter: Artifact, micrographs: ImageSet, training: ImageSet) -> Annotated[Artifact, "drift_reference"]:
    """Descriptors of the micrographs and of the synthetic images, and how far in-control sessions stray."""
    from graincast.stages import run_reference

    return Artifact(run_reference(config, segmenter.path, micrographs, training, output_folder("drift_reference")), "drift reference")
