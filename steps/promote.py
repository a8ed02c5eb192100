"""The last step of a training and of a recalibration: is the new model better than the one in production?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from zenml import get_step_context

from graincast.config import Promotion
from graincast.evaluate.promotion import Decision
from graincast.store import registry, versioning
from graincast.store.imageset import ImageSet, whole_folder
from graincast.store.versioning import Artifact, Version
from steps.alerts import alert
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
    from graincast.segment.segmenter import Segmenter
    from graincast.stages import run_labelled_fields, run_promotion_evidence

    hashes = {name: folder.digest for name, folder in {
        "translator": translator, "translator_morphologies": translator_morphologies, "synthetic_morphologies": synthetic_morphologies,
        "validation_morphologies": validation_morphologies, "micrographs": micrographs, "synthetic_training": synthetic_training,
        "synthetic_validation": synthetic_validation}.items()}
    number = registry.ensure_registered(segmenter.path, micrographs.image(0), run_tags(**hashes))
    registry.attach(number, REFERENCE, drift_reference.path)
    champion = registry.champion()
    if champion and champion.number == number:
        already = (f"model {number} is the champion already",)
        return _decided(Decision(False, already, "state of the registry", champion.digest, champion.digest), number)
    benchmark = {f"{NEW} synthetic images": new_validation, f"{NEW} micrographs": new_micrographs} | _champions(champion)
    rival_folder = registry.fetch(champion.number, output_folder("champion")) if champion else None
    if images and masks:
        preparation = Segmenter.load(rival_folder or segmenter.path).preparation
        assert preparation is not None  # or it had not been registered
        benchmark["labelled fields"] = run_labelled_fields(preparation, Path(images), Path(masks), output_folder("fields"))
    folder = run_promotion_evidence(config, segmenter.path, rival_folder, benchmark, output_folder("evidence"),
                                    [name for name in benchmark if name.startswith(OLD)])
    decision = Decision.load(folder)
    if not _is_on_record(number, decision):
        record = registry.promote(number, decision, by=f"pipeline run {get_step_context().pipeline_run.name}")
        decision = replace(decision, promote=record.promoted, decided_by=record.decided_by, reasons=tuple(record.reasons))
    if decision.promote:
        alert("promotion", _sentence(number, decision))  # here, not in a report to come: the model is in use from now on
    return _decided(decision, number)


def _sentence(number: int, decision: Decision) -> str:
    verdict = "promoted" if decision.promote else "not promoted"
    return f"model {number}: {verdict}, decided by {decision.decided_by}: {'; '.join(decision.reasons)}"


def _decided(decision: Decision, number: int) -> Artifact:
    """The decision as it was carried out, for reports."""
    print(_sentence(number, decision))
    with whole_folder(output_folder("decision")) as folder:
        decision.save(folder)
    return Artifact(output_folder("decision"), "decision")


def _is_on_record(number: int, decision: Decision) -> bool:
    """Whether the same refusal, for the same reasons, was the last decision; a run from the cache need not repeat it."""
    last = registry.history(1)
    return bool(last) and not decision.promote and (last[0].version, last[0].action, last[0].reasons) == (number, registry.REFUSE, decision.reasons)


def _champions(champion: registry.ModelVersion | None) -> dict[str, ImageSet]:
    """The benchmark's sets of the champion's look, pinned by the hashes that it carries."""
    names = {"synthetic_validation": f"{OLD} synthetic images", "micrographs": f"{OLD} micrographs"}
    return {called: ImageSet(versioning.fetch(Version(champion.hashes[name], 0, 0), output_folder(f"champion_{name}")))
            for name, called in names.items() if champion and name in champion.hashes}
