"""Stage 4: draw the labelled synthetic sets."""

from __future__ import annotations

from typing import Annotated

from graincast.config import Synthesise
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact
from steps.stage import output_folder, stage


@stage("run_synthesise")
def synthesise(
    config: Synthesise, synthetic: ImageSet, validation: ImageSet, translator: Artifact
) -> tuple[Annotated[ImageSet, "synthetic_training"], Annotated[ImageSet, "synthetic_validation"]]:
    """Unseen morphologies through the translator, with their exact labels; unfaithful images are dropped."""
    from graincast.stages import run_synthesise

    morphologies = {"synthetic": synthetic, "validation": validation}
    sets = run_synthesise(config, morphologies, translator.path, output_folder("synthetic"))
    return sets["training"], sets["validation"]
