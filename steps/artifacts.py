"""How ImageSets, models and reports travel between steps: bytes in DVC, a pointer in ZenML.

Importing this module registers the materializer for `ImageSet` and `Artifact`, so a step only has to name
them as its inputs and outputs.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
from skimage.util import montage
from zenml.enums import ArtifactType, VisualizationType
from zenml.materializers.base_materializer import BaseMaterializer
from zenml.metadata.metadata_types import MetadataType, StorageSize

from graincast.store import versioning
from graincast.store.imageset import ImageSet
from graincast.store.versioning import Artifact, Version

ROOT = Path(__file__).resolve().parents[1]
POINTER = "pointer.json"


class FolderMaterializer(BaseMaterializer):
    """Stores a folder in DVC and keeps its hash, size and place; loading fetches it if need be.

    ZenML's content hash is the DVC hash, so a step whose inputs were made anew with the same bytes is cached.
    """

    ASSOCIATED_TYPES = (ImageSet, Artifact)
    ASSOCIATED_ARTIFACT_TYPE = ArtifactType.DATA
    SKIP_REGISTRATION = False

    def save(self, data: ImageSet | Artifact) -> None:
        """Add the folder to DVC and write the pointer."""
        self._version = versioning.add(data.path)
        pointer = {"kind": data.kind, "path": os.path.relpath(data.path, ROOT), **asdict(self._version)}
        with self.artifact_store.open(os.path.join(self.uri, POINTER), "w") as file:
            json.dump(pointer, file, indent=1)

    def validate_load_type_compatibility(self, data_type: type[Any]) -> None:
        """By name: where the library lies in the checkout, ZenML notes its classes as ``src.graincast...`` and loads these as others."""
        if data_type.__name__ not in {known.__name__ for known in self.ASSOCIATED_TYPES}:
            super().validate_load_type_compatibility(data_type)

    def load(self, data_type: type[Any]) -> ImageSet | Artifact:
        """The folder as it was saved, from its place, the DVC cache or the DVC remote."""
        with self.artifact_store.open(os.path.join(self.uri, POINTER), "r") as file:
            pointer = json.load(file)
        kind, path = pointer.pop("kind"), ROOT / pointer.pop("path")
        versioning.fetch(Version(**pointer), path)
        return ImageSet(path) if data_type.__name__ == ImageSet.__name__ else Artifact(path, kind)

    def compute_content_hash(self, data: ImageSet | Artifact) -> str:
        """The DVC hash."""
        return self._version.md5

    def extract_metadata(self, data: ImageSet | Artifact) -> dict[str, MetadataType]:
        """What ZenML shows beside the artifact: DVC hash, kind, place, size, and the images of a set."""
        version = self._version
        metadata: dict[str, MetadataType] = {
            "dvc_md5": version.md5,
            "kind": data.kind,
            "path": os.path.relpath(data.path, ROOT),
            "files": version.files,
            "size": StorageSize(version.size),
        }
        if isinstance(data, ImageSet):
            metadata |= {"images": len(data), "refused": len(data.refused)}
        return metadata

    def save_visualizations(self, data: ImageSet | Artifact) -> dict[str, VisualizationType]:
        """A set's first images; a folder's HTML pages."""
        if isinstance(data, ImageSet):
            preview = os.path.join(self.uri, "preview.png")
            with self.artifact_store.open(preview, "wb") as file:
                file.write(imageio.imwrite("<bytes>", _contact_sheet(data), extension=".png"))
            return {preview: VisualizationType.IMAGE}
        pages = {}
        for page in sorted(data.path.glob("*.html")):
            uri = os.path.join(self.uri, page.name)
            with self.artifact_store.open(uri, "wb") as file:
                file.write(page.read_bytes())
            pages[uri] = VisualizationType.HTML
        return pages


def _contact_sheet(images: ImageSet, count: int = 6, side: int = 256) -> np.ndarray:
    """The first `count` images, top left `side` x `side` pixels of each, in a row; uint8."""
    tiles = np.zeros((min(count, len(images)), side, side), np.uint8)
    for i, tile in enumerate(tiles):
        image = images.image(i)[:side, :side]
        tile[: image.shape[0], : image.shape[1]] = image >> 8 if image.dtype == np.uint16 else image
    return montage(tiles, grid_shape=(1, len(tiles)), padding_width=4, fill=255)
