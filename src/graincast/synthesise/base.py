"""What any maker of micrographs from morphologies offers the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

import numpy as np


class Synthesiser(Protocol):
    """Turns the picture of a simulated morphology into a micrograph without moving its boundaries."""

    def to_sem(self, picture: np.ndarray, seed: int) -> np.ndarray:
        """Micrograph, uint8 (height, width), of a morphology's `picture`, uint8 of the same shape.

        `seed` draws the detail that the morphology leaves open.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write everything `load` needs into an existing folder."""
        ...

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        ...
