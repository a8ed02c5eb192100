"""What is in production: the champion, and what it was made from."""

from __future__ import annotations

from typing import Annotated

from graincast.errors import UserError
from graincast.store import registry, versioning
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact, Version
from steps.stage import output_folder, stage

REFERENCE = "drift_reference"


@stage(enable_cache=False)
def champion() -> tuple[
    Annotated[Artifact, "champion_segmenter"],
    Annotated[Artifact, "champion_drift_reference"],
    Annotated[int, "champion_version"],
]:
    """The champion's segmenter and drift reference, verified, from the registry, and its version."""
    version = _champion()
    segmenter = registry.fetch(version.number, output_folder("segmenter"))
    reference = registry.fetch_attached(version.number, REFERENCE, output_folder(REFERENCE))
    return Artifact(segmenter, "segmenter"), Artifact(reference, REFERENCE), version.number


@stage(enable_cache=False)
def champion_data() -> tuple[
    Annotated[Artifact, "champion_translator"],
    Annotated[ImageSet, "champion_translator_morphologies"],
    Annotated[ImageSet, "champion_synthetic_morphologies"],
    Annotated[ImageSet, "champion_validation_morphologies"],
    Annotated[ImageSet, "champion_micrographs"],
    Annotated[ImageSet, "champion_synthetic_training"],
    Annotated[ImageSet, "champion_synthetic_validation"],
]:
    """The datasets behind the champion, from DVC, by the hashes that its registered version carries."""
    hashes = _champion().hashes
    sets = (ImageSet(versioning.fetch(_version(hashes, name), output_folder(name))) for name in (
        "translator_morphologies", "synthetic_morphologies", "validation_morphologies", "micrographs", "synthetic_training", "synthetic_validation"))
    translator = versioning.fetch(_version(hashes, "translator"), output_folder("translator"))
    return Artifact(translator, "translator"), *sets  # type: ignore[return-value]


def _champion() -> registry.ModelVersion:
    version = registry.champion()
    if version is None:
        raise UserError(f"{registry.MODEL} has no champion; `make demo` trains one and promotes it if it is good enough, "
                        "`graincast promote VERSION --reason ...` makes a registered version the champion")
    return version


def _version(hashes: dict[str, str], name: str) -> Version:
    if name not in hashes:
        raise UserError(f"the champion carries no hash of its {name}, so it cannot be recalibrated; a champion that a pipeline of this graincast "
                        "trained would be right")
    return Version(hashes[name], 0, 0)
