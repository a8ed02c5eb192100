"""Whether grain boundaries are brighter or darker than the grains, told from unlabelled micrographs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graincast.microscope.mixture import thin_structure


def boundaries_are_bright(images: Sequence[np.ndarray]) -> bool:
    """Compare what is thin and bright in the images with what is thin and dark.

    Parameters
    ----------
    images : sequence of ndarray
        Prepared micrographs, uint8 (height, width), grains at the simulation's scale.

    Returns
    -------
    bool
        True where the white top-hats outweigh the black ones (`graincast.microscope.mixture.thin_structure`), each
        image counting by its area.
    """
    tophats = ((*thin_structure(image), image.size) for image in images)
    return sum((white - black) * size for white, black, size in tophats) > 0
