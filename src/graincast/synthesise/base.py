"""What any maker of micrographs from morphologies offers the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

import numpy as np


class Synthesiser(Protocol):
    """Turns the picture of a simulated morphology into a micrograph without moving its boundaries."""

    def to_sem(self, picture: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
        """Micrograph, uint8 (height, width), of a morphology: `picture`, uint8, and instance ids `labels`, int32, of that shape.

        `seed` draws the detail that the morphology leaves open.
        """
        ...

    def in_tones(self, picture: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The morphology's picture itself, untranslated, in the micrographs' brightness and contrast; uint8 of its shape."""
        ...

    def as_lines(self, values: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """A map (height, width) of what was drawn, with boundaries that are drawn as wide gaps closed to lines, so that their
        place can be compared with that of the labels."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything `load` needs into an existing folder."""
        ...

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        ...
