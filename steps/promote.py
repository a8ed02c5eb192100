"""The last step of a training and of a recalibration: is the new model better than the one in production?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from zenml import get_step_context

from graincast.config import Promotion
from graincast.evaluate.promotion import Decision
from graincast.store import registry, versioning
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact, Version
from steps.champion import REFERENCE
from steps.stage import output_folder, run_tags, stage

OLD, NEW = "the champion's", "the challenger's"


@stage("run_promotion_evidence", "run_labelled_fields", enable_cache=False)
def promote(config: Promotion, segmenter: Artifact, drift_reference: Artifact, translator: Artifact, translator_morphologies: ImageSet,
            synthetic_morphologies: ImageSet, validation_morphologies: ImageSet, micrographs: ImageSet, synthetic_training: ImageSet,
            synthetic_validation: ImageSet, new_micrographs: ImageSet, new_validation: ImageSet, images: str | None,
            masks: str | None) -> Annotated[Artifact, "decision"]:
    """Register the segmenter with all that belongs to it, compare it with the champion on the same images, promote it or refuse.

    `new_micrographs` and `new_validation` are of the look that is new to the challenger; `images` and `masks` are folders of
    labelled fields of the lab's.
    """
    from graincast.microscope.preparation import Preparation
    from graincast.stages import run_labelled_fields, run_promotion_evidence

    hashes = {name: folder.digest for name, folder in {
        "translator": translator, "translator_morphologies": translator_morphologies, "synthetic_morphologies": synthetic_morphologies,
        "validation_morphologies": validation_morphologies, "micrographs": micrographs, "synthetic_training": synthetic_training,
        "synthetic_validation": synthetic_validation}.items()}
    number = registry.ensure_registered(segmenter.path, micrographs.image(0), run_tags(**hashes))
    registry.attach(number, REFERENCE, drift_reference.path)
    champion = registry.champion()
    rival = champion if champion and champion.number != number else None
    benchmark = {f"{NEW} synthetic images": new_validation, f"{NEW} micrographs": new_micrographs} | _champions(rival)
    if images and masks:
        preparation = Preparation.from_dict(micrographs.info["preparation"])
        benchmark["labelled fields"] = run_labelled_fields(preparation, Path(images), Path(masks), output_folder("fields"))
    folder = run_promotion_evidence(config, segmenter.path, registry.fetch(rival.number, output_folder("champion")) if rival else None,
                                    benchmark, output_folder("decision"), [name for name in benchmark if name.startswith(OLD)])
    decision = Decision.load(folder)
    if champion and not rival:
        print(f"model {number} is the champion already")
        return Artifact(folder, "decision")
    registry.challenge(number)
    record = registry.promote(number, decision, by=f"pipeline run {get_step_context().pipeline_run.name}")
    print(f"model {number}: {'promoted' if record.promoted else 'not promoted'}, decided by {record.decided_by}: {'; '.join(record.reasons)}")
    return Artifact(folder, "decision")


def _champions(rival: registry.ModelVersion | None) -> dict[str, ImageSet]:
    """The benchmark's sets of the champion's look, pinned by the hashes that it carries."""
    names = {"synthetic_validation": f"{OLD} synthetic images", "micrographs": f"{OLD} micrographs"}
    return {called: ImageSet(versioning.fetch(Version(rival.hashes[name], 0, 0), output_folder(f"champion_{name}")))
            for name, called in names.items() if rival and name in rival.hashes}
