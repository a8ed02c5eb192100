"""Stage 6: measure the segmenter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from graincast.config import Evaluate, Session
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact
from steps.stage import output_folder, stage


@stage("run_evaluate", "masked_files")
def evaluate(config: Evaluate, session: Session, segmenter: Artifact, translator: Artifact, morphologies: ImageSet, training: ImageSet,
             validation: ImageSet, micrographs: ImageSet, fingerprint: str) -> Annotated[Artifact, "evaluation"]:
    """Scores beside the classical baseline; on the user's masks too, where the session names a folder of them."""
    from graincast.stages import masked_files

    images, masks = masked_files(session, None)
    return _evaluate(config, segmenter, translator, morphologies, training, validation, micrographs, images, masks, virtual=False)


@stage("run_evaluate", "masked_files")
def evaluate_virtual(config: Evaluate, session: Session, segmenter: Artifact, translator: Artifact, morphologies: ImageSet, training: ImageSet,
                     validation: ImageSet, micrographs: ImageSet, virtual_session: Artifact) -> Annotated[Artifact, "evaluation"]:
    """Scores beside the classical baseline, also on the virtual session's held-out micrographs."""
    from graincast.stages import masked_files

    images, masks = masked_files(session, virtual_session.path)
    return _evaluate(config, segmenter, translator, morphologies, training, validation, micrographs, images, masks, virtual=True)


def _evaluate(config: Evaluate, segmenter: Artifact, translator: Artifact, morphologies: ImageSet, training: ImageSet, validation: ImageSet,
              micrographs: ImageSet, images: Path | None, masks: Path | None, *, virtual: bool) -> Artifact:
    from graincast.stages import run_evaluate

    synthetic = {"training": training, "validation": validation}
    folder = run_evaluate(config, segmenter.path, translator.path, morphologies, synthetic, micrographs, output_folder("evaluation"),
                          images=images, masks=masks, virtual=virtual)
    return Artifact(folder, "evaluation")
