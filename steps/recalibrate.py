"""Re-learn a look that changed, from the champion on."""

from __future__ import annotations

from typing import Annotated

from graincast.config import Recalibration, Translator
from graincast.store import tracking
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact
from steps.stage import checkpoint_folder, output_folder, run_tags, stage


@stage()
def session_images(session: Artifact) -> Annotated[ImageSet, "new_micrographs"]:
    """The checked micrographs of a session as a set of their own."""
    from graincast.stages import SESSION_IMAGES

    return ImageSet(session.path / SESSION_IMAGES)


@stage("run_recalibrate_translator", child_run=True)
def recalibrate_translator(config: Recalibration, translator_config: Translator, champion: Artifact, morphologies: ImageSet,
                           micrographs: ImageSet) -> Annotated[Artifact, "translator"]:
    """The champion's translator, trained on in the new look."""
    from graincast.checkpoint import Checkpoint
    from graincast.stages import run_recalibrate_translator

    tracking.log(params=config.model_dump(), tags=run_tags(morphologies=morphologies.digest, micrographs=micrographs.digest))
    with Checkpoint(checkpoint_folder(), "translator") as checkpoint, tracking.MetricLog() as log:
        folder = run_recalibrate_translator(config, translator_config, champion.path, morphologies, micrographs, output_folder("translator"),
                                            log, checkpoint)
    tracking.log(files=[folder / "sample.png"])
    return Artifact(folder, "translator")


@stage("run_recalibrate_segmenter", child_run=True)
def recalibrate_segmenter(config: Recalibration, champion: Artifact, training: ImageSet, training_old: ImageSet, validation: ImageSet,
                          validation_old: ImageSet, micrographs: ImageSet) -> Annotated[Artifact, "segmenter"]:
    """The champion's segmenter, trained on with images of the new look and of the old ones."""
    from graincast.checkpoint import Checkpoint
    from graincast.stages import run_recalibrate_segmenter

    tracking.log(params=config.model_dump(), tags=run_tags(synthetic_training=training.digest, micrographs=micrographs.digest))
    with Checkpoint(checkpoint_folder(), "segmenter") as checkpoint, tracking.MetricLog() as log:
        folder = run_recalibrate_segmenter(config, champion.path, training, training_old, validation, validation_old, micrographs,
                                           output_folder("segmenter"), log, checkpoint)
    return Artifact(folder, "segmenter")


@stage("run_join")
def join_looks(micrographs_old: ImageSet, micrographs: ImageSet, training_old: ImageSet, training: ImageSet, validation_old: ImageSet,
               validation: ImageSet) -> tuple[Annotated[ImageSet, "micrographs"], Annotated[ImageSet, "synthetic_training"],
                                              Annotated[ImageSet, "synthetic_validation"]]:
    """Old and new looks as one set each: what the recalibrated model knows, and the next recalibration must not forget."""
    from graincast.stages import run_join

    pairs = {"micrographs": [micrographs_old, micrographs], "training": [training_old, training], "validation": [validation_old, validation]}
    micrographs_joined, training_joined, validation_joined = (
        run_join(sets, output_folder(name), even=name == "validation") for name, sets in pairs.items())
    return micrographs_joined, training_joined, validation_joined
