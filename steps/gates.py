"""Gates: data that do not pass never reach a training."""

from __future__ import annotations

from typing import Annotated

from graincast.config import Gates
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact
from steps.stage import output_folder, stage


@stage("run_gate_library")
def gate_library(config: Gates, translator: ImageSet, synthetic: ImageSet, validation: ImageSet) -> Annotated[Artifact, "library_gate"]:
    """Simulated pictures and their labels, of all three purposes."""
    from graincast.stages import run_gate_library

    morphologies = {"translator": translator, "synthetic": synthetic, "validation": validation}
    return Artifact(run_gate_library(config, morphologies, output_folder("gate")), "gate")


@stage("run_gate_session")
def gate_micrographs(config: Gates, micrographs: ImageSet) -> Annotated[Artifact, "micrographs_gate"]:
    """The micrographs that the translator is to learn from."""
    from graincast.stages import run_gate_session

    return Artifact(run_gate_session(config, micrographs, output_folder("gate")), "gate")


@stage("run_gate_synthetic")
def gate_synthetic(config: Gates, training: ImageSet, validation: ImageSet, micrographs: ImageSet) -> Annotated[Artifact, "synthetic_gate"]:
    """The labelled synthetic sets, against what the micrographs themselves say of their grains."""
    from graincast.stages import run_gate_synthetic

    return Artifact(run_gate_synthetic(config, {"training": training, "validation": validation}, micrographs, output_folder("gate")), "gate")
