"""Stage 0, where no folder of micrographs is given: a session of the virtual SEM."""

from __future__ import annotations

from typing import Annotated

from graincast.config import VirtualSession
from graincast.store.versioning import Artifact
from steps.stage import output_folder, stage


@stage("run_virtual_sem")
def virtual_session(config: VirtualSession) -> Annotated[Artifact, "virtual_session"]:
    """Micrographs with exact truth, made by the virtual SEM."""
    from graincast.stages import run_virtual_sem

    return Artifact(run_virtual_sem(config, output_folder("session")), "virtual session")
