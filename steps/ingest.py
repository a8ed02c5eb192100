"""Stage 2: read and prepare micrographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from graincast.config import Ingest
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact
from steps.stage import output_folder, stage


@stage("run_ingest")
def ingest(config: Ingest, morphologies: ImageSet, folder: str, masks: str | None, fingerprint: str) -> Annotated[ImageSet, "micrographs"]:
    """Micrographs of a folder of the user's; `fingerprint` is its content's, so that changed files are read again."""
    from graincast.stages import run_ingest

    return run_ingest(config, Path(folder), morphologies, output_folder("micrographs"), Path(masks) if masks else None)


@stage("run_ingest")
def ingest_virtual(config: Ingest, morphologies: ImageSet, session: Artifact) -> Annotated[ImageSet, "micrographs"]:
    """Micrographs of a virtual session, read as an instrument's would be."""
    from graincast.stages import run_ingest

    return run_ingest(config, session.path / "micrographs", morphologies, output_folder("micrographs"))
