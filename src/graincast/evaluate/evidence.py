"""Evidence for or against a segmenter: its scores on frozen sets, with labels where there are some and without.

============== ====================================================================================================
*fields*       micrographs with an expert's labels: AP50 and the other figures of `graincast.evaluate.metrics`
*synthetic*    held-out synthetic images with their exact labels: the same figures
*unlabelled*   micrographs alone. ``agreement``: of the mean grain found with the size that the raw image itself suggests
               (`graincast.microscope.scale`). ``contrast``: whether the boundaries found lie where the image changes
               (`graincast.synthesise.fidelity.label_fidelity`, or the share in gaps where boundaries are wide). ``stability``:
               AP50 of the grains found in a slightly changed image against those found before. Their geometric mean
               is the ``score``: a segmenter that fails one of them cannot make up for it with the others
============== ====================================================================================================

Label-free evidence tells a segmenter that fails from one that works, no finer than that. Measured: the demo's segmenter with noise added to
its weights, until AP50 fell by 0.06 on virtual fields and 0.11 on synthetic images; the label-free score fell by 0.006, and
rose by 0.005 where AP50 had fallen by 0.02 and 0.04 (three images each). So labels come first where there are any, and the synthetic ones
always are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from scipy import ndimage as ndi
from tqdm.auto import tqdm

from graincast.errors import UserError
from graincast.evaluate.metrics import score_instances, score_labels
from graincast.evaluate.plausibility import Result, doubts, has_gaps

if TYPE_CHECKING:
    from graincast.config import Promotion
    from graincast.segment.segmenter import Segmenter
    from graincast.store.imageset import ImageSet

FIELDS, SYNTHETIC, UNLABELLED = "fields", "synthetic", "unlabelled"
LABELLED_FIGURES = ("ap50", "bf1_4px", "pq", "miou", "d_astm_g")

SIZE_TOLERANCE = 1.25
"""Ratio of sizes that is full agreement: the estimate from the raw image is no better than 25 % (`graincast.microscope.scale`)."""

GAIN, OFFSET = 1.1, 8.0
"""A slightly other contrast and brightness, as an operator sets them from day to day; grey levels of 255."""
NOISE = 5.0
"""Standard deviation of the noise added, grey levels: 2 % of full scale, a third of what training adds at most."""
SHIFT_PX = 0.5
"""Shift along both axes, px: another sampling of the same grains."""

PERTURBATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "gain": lambda grey, rng: (grey - 127.5) * GAIN + 127.5 + OFFSET,
    "noise": lambda grey, rng: grey + rng.normal(0, NOISE, grey.shape),
    "shift": lambda grey, rng: ndi.shift(grey, SHIFT_PX, order=3, mode="reflect"),
}


@dataclass(frozen=True)
class SetEvidence:
    """What a segmenter makes of one set.

    Attributes
    ----------
    kind : str
        ``fields``, ``synthetic`` or ``unlabelled``.
    digest : str
        The set's DVC hash.
    own_look : bool
        Whether the segmenter was trained for the look of this set.
    images : tuple of str
        Ids of the images scored.
    scores : tuple of float
        The figure that decides, for each of them: AP50, or of unlabelled ones the label-free score; 0 to 1.
    figures : dict of str to float
        Means over the images; a figure that no image has is left out.
    doubts : tuple of str
        Sentences of `graincast.evaluate.plausibility.doubts`, for unlabelled sets.
    """

    kind: str
    digest: str
    own_look: bool
    images: tuple[str, ...]
    scores: tuple[float, ...]
    figures: dict[str, float]
    doubts: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """Mean of the scores."""
        return float(np.mean(self.scores))


@dataclass(frozen=True)
class Evidence:
    """What a segmenter makes of the sets of a benchmark.

    Attributes
    ----------
    segmenter : str
        DVC hash of its folder.
    sets : dict of str to SetEvidence
        By the set's name.
    """

    segmenter: str
    sets: dict[str, SetEvidence]

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        sets = {name: SetEvidence(**{**found, **{key: tuple(found[key]) for key in ("images", "scores", "doubts")}})
                for name, found in fields["sets"].items()}
        return cls(fields["segmenter"], sets)


def gather(segmenter: Segmenter, digest: str, benchmark: Mapping[str, ImageSet], indices: Mapping[str, Sequence[int]], config: Promotion,
           own: Collection[str] = ()) -> Evidence:
    """Score a segmenter on every set of a benchmark.

    Parameters
    ----------
    segmenter : Segmenter
        To be scored.
    digest : str
        DVC hash of its folder, for the record.
    benchmark : Mapping of str to ImageSet
        Prepared images, uint8, by name of set; labelled ones are scored against their labels.
    indices : Mapping of str to sequence of int
        The images of each set to score: see `scored_images`.
    config : graincast.config.Promotion
        Its `seed`, of the noise added.
    own : collection of str
        Names of sets of the segmenter's own look, besides those that it was trained with.

    Returns
    -------
    Evidence
        The same for the same segmenter and sets, byte for byte.
    """
    parents = set(segmenter.parents.values())
    found = {}
    for name, images in benchmark.items():
        measure = _labelled if images.labelled else _label_free
        rows, told = measure(segmenter, images, indices[name], config, name)
        figures = {key: value for key in rows[0] if math.isfinite(value := _mean([row[key] for row in rows]))}
        found[name] = SetEvidence(kind_of(images), images.digest, name in own or images.digest in parents,
                                  tuple(str(images.rows["id"][i]) for i in indices[name]), tuple(row["score"] for row in rows), figures,
                                  tuple(told))
    return Evidence(digest, found)


def kind_of(images: ImageSet) -> str:
    """``fields``, ``synthetic`` or ``unlabelled``."""
    if not images.labelled:
        return UNLABELLED
    return SYNTHETIC if images.kind == SYNTHETIC else FIELDS


def scored_images(name: str, images: ImageSet, segmenters: Sequence[Segmenter], largest: int) -> list[int]:
    """Which images of a set tell about all these segmenters alike.

    Of a set that chose the epoch of any of them (its ``validation``), the other half: every second image from the second on, as
    in `graincast.stages.halves`. Of more than `largest` images, as many, evenly spread.

    Raises
    ------
    UserError
        If one of them was trained on the set, or no image is left.
    """
    roles = {role for segmenter in segmenters for role, digest in segmenter.parents.items() if digest == images.digest}
    if any(role.startswith("training") for role in roles):
        raise UserError(f"the benchmark's set '{name}' ({images.path.name}) trained one of the segmenters; a held-out set would be right")
    usable = range(1, len(images), 2) if any(role.startswith("validation") for role in roles) else range(len(images))
    if not usable:
        raise UserError(f"the benchmark's set '{name}' ({images.path.name}) has no image that both segmenters can be scored on")
    return sorted({int(usable[i]) for i in np.linspace(0, len(usable) - 1, min(len(usable), largest)).round().astype(int)})


Measured = tuple[list[dict[str, float]], list[str]]
"""Figures of every image, ``score`` among them, and doubts."""


def _labelled(segmenter: Segmenter, images: ImageSet, indices: Sequence[int], config: Promotion, name: str) -> Measured:
    rows = []
    for i in tqdm(indices, desc=f"score: {name}", unit="image", disable=None):
        scores = score_labels(segmenter.segment(images.image(i)), images.labels(i))
        rows.append({"score": scores["ap50"], **{key: scores[key] for key in LABELLED_FIGURES}})
    return rows, []


def _label_free(segmenter: Segmenter, images: ImageSet, indices: Sequence[int], config: Promotion, name: str) -> Measured:
    bright = bool(images.info.get("preparation", {}).get("bright_boundaries"))
    rows = images.rows.to_dict("records")
    diameters = [rows[i].get("grain_diameter_px", math.nan) * rows[i].get("scale", math.nan) for i in indices]
    gaps = has_gaps((255 - images.image(i) if bright else images.image(i) for i in indices), diameters)
    found, results = [], []
    for i, diameter in zip(tqdm(indices, desc=f"score: {name}", unit="image", disable=None), diameters, strict=True):
        image = images.image(i)
        labels = segmenter.segment(image)
        result = Result.of(image, labels, diameter, gaps=gaps, bright=bright)
        figures = {"agreement": size_agreement(result.size_ratio), "contrast": float(np.clip(result.fidelity, 0, 1)),
                   "stability": stability(segmenter, image, labels, np.random.default_rng([config.seed, i]))}
        found.append({"score": _geometric_mean(list(figures.values())), **figures, "size_ratio": result.size_ratio})
        results.append(result)
    return found, doubts(results)


def size_agreement(ratio: float) -> float:
    """1 where the ratio of two sizes is within `SIZE_TOLERANCE`, either way; beyond, it falls as the ratio does. NaN stays NaN."""
    if not math.isfinite(ratio):
        return math.nan
    return min(1.0, SIZE_TOLERANCE * min(ratio, 1 / ratio)) if ratio > 0 else 0.0


def stability(segmenter: Segmenter, image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> float:
    """How little the grains found change when the image does.

    Parameters
    ----------
    segmenter : Segmenter
        That found them.
    image, labels : ndarray
        Prepared image, uint8 (height, width), and the instance ids found in it.
    rng : numpy.random.Generator
        Of the noise.

    Returns
    -------
    float
        Mean AP50, 0 to 1, of the grains found after each of `PERTURBATIONS` against `labels`.
    """
    grey = image.astype(np.float32)
    changed = [np.clip(np.rint(change(grey, rng)), 0, 255).astype(np.uint8) for change in PERTURBATIONS.values()]
    return float(np.mean([score_instances(segmenter.segment(other), labels)["ap50"] for other in changed]))


def _geometric_mean(values: Sequence[float]) -> float:
    """Of the finite values; an image whose size nobody can tell is judged by the rest. 0 where nothing can be judged."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.prod(finite) ** (1 / len(finite))) if finite else 0.0


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def save(folder: Path, champion: Evidence | None, challenger: Evidence, name: str = "evidence.json") -> None:
    """Write the evidence of both into an existing folder."""
    kept = {"champion": champion.to_dict() if champion else None, "challenger": challenger.to_dict()}
    (folder / name).write_text(json.dumps(kept, indent=1, sort_keys=True, allow_nan=False))


def load(folder: Path, name: str = "evidence.json") -> tuple[Evidence | None, Evidence]:
    """The evidence of champion (None: there was none) and challenger that `save` wrote."""
    kept = json.loads((folder / name).read_text())
    return Evidence.from_dict(kept["champion"]) if kept["champion"] else None, Evidence.from_dict(kept["challenger"])
