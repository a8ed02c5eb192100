"""Stage 1: grow grains."""

from __future__ import annotations

from typing import Annotated

from graincast.config import Simulate
from graincast.store.imageset import ImageSet
from steps.stage import output_folder, stage


@stage("run_simulate")
def simulate(
    config: Simulate,
) -> tuple[
    Annotated[ImageSet, "translator_morphologies"],
    Annotated[ImageSet, "synthetic_morphologies"],
    Annotated[ImageSet, "validation_morphologies"],
]:
    """Grain pictures with instance ids, from the phase-field simulator; the three sets share no structure."""
    from graincast.stages import run_simulate

    sets = run_simulate(config, output_folder("morphologies"))
    return sets["translator"], sets["synthetic"], sets["validation"]
