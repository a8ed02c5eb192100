"""Whether a trained segmenter's result on the micrographs themselves makes sense, asked without a label.

A translator that failed leaves a segmenter that scores well on its own synthetic images and finds nothing, or anything,
in the micrographs. Four questions tell that apart from a good one: are there several grains, do the boundaries found
lie where the image changes, are they bright where the image's lines are bright and dark where these are dark, and is
the mean grain about as large as the image alone says it is?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi
from skimage.segmentation import find_boundaries

from graincast.microscope.gaps import WIDE, gap_mask, gap_width
from graincast.microscope.mixture import has_bright_boundaries
from graincast.synthesise.fidelity import label_fidelity

LEAST_FIDELITY = 0.15
"""Median label fidelity of a segmenter's own boundaries. Three segmenters (NBT ceramic, perovskite film, virtual) got 0.35 to
0.99 on micrographs of these, of steel and of iron, and 0.01 to 0.11 on noise; chance gives 0."""
SIZE_FACTOR = 2.5
"""How many times larger or smaller than estimated the mean grain of the median micrograph may be. The estimate itself is good
to 25 % on real micrographs; on those micrographs the three segmenters came out at 0.5 to 1.1 of it."""
MOST_AGAINST_POLARITY = 0.5
"""Share of the micrographs with clear lines in which the boundaries found may be of the other polarity."""
SURROUNDINGS_PX = 6.0
"""Standard deviation of the Gaussian that says how grey a boundary's surroundings are, px: a boundary is some 4 px wide."""
MOST_WITHOUT_GRAINS = 0.5
"""Share of the micrographs that may come out as a single grain although their grains could be sized without labels."""


@dataclass(frozen=True)
class Result:
    """What a segmenter made of one micrograph.

    Attributes
    ----------
    grains : int
        Number of grains.
    fidelity : float
        `label_fidelity` of its boundaries, or where boundaries are wide gaps, the share of them that lies in gaps, above
        chance; NaN for a single grain, and for gaps between grains of unknown size.
    size_ratio : float
        Diameter of the circle of mean grain area over that estimated without labels; NaN where there is no estimate.
    right_polarity : bool or None
        Whether its boundaries are bright, or dark, as the image's thin lines are; None: those are neither clearly.
    """

    grains: int
    fidelity: float
    size_ratio: float
    right_polarity: bool | None

    @classmethod
    def of(cls, image: np.ndarray, labels: np.ndarray, expected_diameter_px: float, *, gaps: bool = False, bright: bool = False) -> Result:
        """Judge a prepared micrograph.

        Parameters
        ----------
        image, labels : ndarray
            The micrograph, uint8 (height, width), and the instance ids found in it.
        expected_diameter_px : float
            The diameter that its grains should have, px; NaN where nobody knows.
        gaps : bool
            Whether boundaries are wide gaps in micrographs of this kind (`has_gaps`).
        bright : bool
            Whether these gaps are brighter than the grains.
        """
        grains = int(np.unique(labels[labels > 0]).size)
        diameter = math.sqrt(4 * labels.size / (math.pi * max(grains, 1)))
        dark = 255 - image if bright else image
        fidelity = _share_in_gaps(dark, labels, expected_diameter_px) if gaps else label_fidelity(image, labels)
        return cls(grains, fidelity, diameter / expected_diameter_px, _right_polarity(image, labels))


def has_gaps(images: Iterable[np.ndarray], diameters_px: Sequence[float]) -> bool:
    """Whether the boundaries of most of these micrographs are wide gaps.

    Parameters
    ----------
    images : iterable of ndarray
        Prepared micrographs, uint8 (height, width), turned to their negatives where boundaries are bright.
    diameters_px : sequence of float
        About how large the grains of each are, px; NaN where nobody knows.
    """
    widths = [gap_width([image], diameter) for image, diameter in zip(images, diameters_px, strict=True) if math.isfinite(diameter)]
    return bool(widths) and float(np.median(widths)) >= WIDE


def _share_in_gaps(image: np.ndarray, labels: np.ndarray, expected_diameter_px: float) -> float:
    """How much of the boundaries found lies in the image's gaps, above chance: of gaps, the flanks alone show as change."""
    line = find_boundaries(labels, mode="thick")
    if not line.any() or not math.isfinite(expected_diameter_px):
        return math.nan
    gap = gap_mask(image, expected_diameter_px)
    return float((gap[line].mean() - gap.mean()) / (1 - gap.mean()))


def _right_polarity(image: np.ndarray, labels: np.ndarray) -> bool | None:
    bright, line = has_bright_boundaries(image), find_boundaries(labels, mode="thick")
    if bright is None or not line.any():
        return None
    grey = image.astype(np.float32)
    return bool((float((grey - ndi.gaussian_filter(grey, SURROUNDINGS_PX))[line].mean()) > 0) == bright)


def doubts(results: Sequence[Result]) -> list[str]:
    """Sentences that say why a segmenter should not be used; none where its results are plausible."""
    sized = [result for result in results if math.isfinite(result.size_ratio)] or list(results)
    single = sum(result.grains < 2 for result in sized)
    if single > MOST_WITHOUT_GRAINS * len(sized):
        return [f"it finds no boundary in {single} of {len(sized)} micrographs"]
    found = []
    fidelity = _median([result.fidelity for result in results])
    if fidelity < LEAST_FIDELITY:
        found.append(f"the boundaries it finds in the micrographs do not lie where the images change "
                     f"(label fidelity {fidelity:.2f}, by chance 0, at least {LEAST_FIDELITY:g} is needed)")
    clear = [result.right_polarity for result in results if result.right_polarity is not None]
    if clear.count(False) > MOST_AGAINST_POLARITY * len(clear):
        found.append(f"in {clear.count(False)} of {len(clear)} micrographs its lines are dark where the boundaries are bright, "
                     "or the other way round")
    ratio = _median([result.size_ratio for result in results])
    if max(ratio, 1 / ratio) > SIZE_FACTOR:
        times, size = (ratio, "larger") if ratio > 1 else (1 / ratio, "smaller")
        found.append(f"its grains are {times:.1f} times {size} than the images themselves suggest")
    return found


def _median(values: Sequence[float]) -> float:
    """Median of the finite values; NaN without one, which no comparison finds fault with."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.median(finite)) if finite else math.nan
