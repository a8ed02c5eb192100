"""Whether a challenger becomes the champion.

In this order:

1. **Floors.** It has to be good enough by itself on every set, also where there is no champion yet: AP50 where there are
   labels; a plausible and stable result where there are none.
2. **No loss.** On no set of the champion's own look may it lose more than ``promotion.old_look_loss``, on no set of unlabelled
   micrographs more than ``promotion.label_free_loss``: a challenger that is good on the synthetic images of a translator
   that failed shows there.
3. **Margin.** It has to be better. The most trusted evidence that tells the two apart decides: labelled fields, then synthetic
   images with their exact labels, then label-free evidence. Telling apart means a mean difference of at least
   ``promotion.margin`` that is also larger than chance makes it. Where nothing tells them apart, the champion stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from scipy import stats

from graincast.errors import UserError
from graincast.evaluate.evidence import FIELDS, SYNTHETIC, UNLABELLED, Evidence, SetEvidence

if TYPE_CHECKING:
    from graincast.config import Promotion

DECISION = "decision.json"
TRUST = {FIELDS: "labelled fields", SYNTHETIC: "held-out synthetic images", UNLABELLED: "label-free evidence on micrographs"}
"""Kinds of evidence, the most trusted first, and how they are called."""

SPREAD = 0.03
"""Standard deviation of an image's difference, as expected before any is seen: two trainings that differ in their seed alone differ by
so much (AP50 on an iron and a perovskite field, three trainings each: 0.026 and 0.013, for the difference times the root of two)."""
SPREAD_WEIGHT = 4
"""Images that this expectation counts for beside those that were scored."""
CONFIDENCE = 0.95
"""One-sided, of Student's t."""


@dataclass(frozen=True)
class Decision:
    """A decision and why.

    Attributes
    ----------
    promote : bool
        Whether the challenger becomes champion.
    reasons : tuple of str
        Sentences with figures.
    decided_by : str
        Which evidence decided.
    champion, challenger : str or None
        DVC hashes of the segmenters compared; no champion: None.
    figures : dict
        By set: its ``dvc`` hash, ``kind``, number of ``images``, and the figures of ``champion`` and ``challenger``.
    """

    promote: bool
    reasons: tuple[str, ...]
    decided_by: str
    champion: str | None
    challenger: str
    figures: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write ``decision.json`` into an existing folder."""
        (folder / DECISION).write_text(json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote; a UserError where there is none."""
        try:
            kept = json.loads((Path(folder) / DECISION).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no {DECISION}: {error}") from error
        return cls(**{**kept, "reasons": tuple(kept["reasons"])})


@dataclass(frozen=True)
class Difference:
    """Mean difference of two segmenters' scores, challenger less champion, and what chance makes of it at most.

    Student's t of the images' differences within their sets; or, where that is more, the same with their spread moderated by what is
    known beforehand (Smyth, Stat. Appl. Genet. Mol. Biol. 3 (2004) 3, doi:10.2202/1544-6115.1027): few images may agree by accident.
    """

    gain: float
    chance: float
    images: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[SetEvidence, SetEvidence]]) -> Difference:
        """Of sets, (champion, challenger); every set counts the same, whatever its number of images."""
        differences = [np.subtract(new.scores, old.scores) for old, new in pairs]
        gain, images = float(np.mean([d.mean() for d in differences])), sum(map(len, differences))
        squares, freedom = sum(float(((d - d.mean()) ** 2).sum()) for d in differences), images - len(differences)
        lever = math.sqrt(sum(1 / len(d) for d in differences)) / len(differences)
        estimates = [(squares + SPREAD_WEIGHT * SPREAD**2, freedom + SPREAD_WEIGHT), *([(squares, freedom)] if freedom else [])]
        return cls(gain, max(float(stats.t.ppf(CONFIDENCE, n)) * math.sqrt(s / n) for s, n in estimates) * lever, images)

    def verdict(self, margin: float) -> int:
        """1: better; -1: worse; 0: cannot be told apart."""
        if abs(self.gain) < margin or abs(self.gain) <= self.chance:
            return 0
        return 1 if self.gain > 0 else -1

    def __str__(self) -> str:
        return f"{self.gain:+.3f} over {self.images} images, where chance alone makes up to {self.chance:.3f}"


def decide(champion: Evidence | None, challenger: Evidence, config: Promotion) -> Decision:
    """Decide by the rules at the top of this module.

    Parameters
    ----------
    champion, challenger : Evidence
        Of the same images; no champion: None.
    config : graincast.config.Promotion
        Floors, margin and losses.

    Raises
    ------
    UserError
        If the two were scored on different images, or on none.
    """
    _check(champion, challenger)
    promote, reasons, decided_by = _ruling(champion, challenger, config)
    in_use = champion.segmenter if champion else None
    return Decision(promote, tuple(reasons), decided_by, in_use, challenger.segmenter, _figures(champion, challenger))


def _ruling(champion: Evidence | None, challenger: Evidence, config: Promotion) -> tuple[bool, list[str], str]:
    """Whether to promote, the reasons, and what decided."""
    if low := _below_floor(challenger, config):
        return False, low, "floors"
    if champion is None:
        return True, [f"it is above the floor on all {len(challenger.sets)} sets, and there is no champion yet"], "floors"
    if lost := _lost(champion, challenger, config):
        return False, lost, "loss of what the champion does well"
    return _by_margin(champion, challenger, config)


def _by_margin(champion: Evidence, challenger: Evidence, config: Promotion) -> tuple[bool, list[str], str]:
    reasons: list[str] = []
    for kind, called in TRUST.items():
        pairs = [(champion.sets[name], found) for name, found in challenger.sets.items() if found.kind == kind]
        if not pairs:
            continue
        difference = Difference.of(pairs)
        verdict = difference.verdict(config.margin)
        words = {1: "it is better", -1: "it is worse", 0: "it cannot be told apart from the champion"}[verdict]
        reasons.append(f"{called}: {words}, {difference}; the margin is {config.margin:g}")
        if verdict:
            return verdict > 0, reasons, called
    return False, reasons, "margin"


def _below_floor(challenger: Evidence, config: Promotion) -> list[str]:
    reasons = []
    for name, found in challenger.sets.items():
        if found.kind == UNLABELLED:
            reasons += [f"{name}: {doubt}" for doubt in found.doubts]
            steady = found.figures["stability"]
            if steady < config.min_stability:
                reasons.append(f"{name}: the grains found change when the image hardly does (stability {steady:.2f}, "
                               f"at least {config.min_stability:g} is needed)")
        elif found.score < config.min_ap50:
            reasons.append(f"{name}: AP50 {found.score:.3f} is below the floor of {config.min_ap50:g}")
    return reasons


def _lost(champion: Evidence, challenger: Evidence, config: Promotion) -> list[str]:
    reasons = []
    for name, new in challenger.sets.items():
        old = champion.sets[name]
        loss = old.score - new.score
        if new.kind == UNLABELLED:
            if loss > config.label_free_loss:
                reasons.append(f"{name}: the label-free score falls from {old.score:.3f} to {new.score:.3f}, "
                               f"by more than {config.label_free_loss:g}")
        elif old.own_look and loss > config.old_look_loss:
            reasons.append(f"{name}, the champion's own look: AP50 falls from {old.score:.3f} to {new.score:.3f}, "
                           f"by more than {config.old_look_loss:g}")
    return reasons


def _check(champion: Evidence | None, challenger: Evidence) -> None:
    if not challenger.sets:
        raise UserError("the benchmark is empty; at least one set of images to score on would be right")
    if champion is None:
        return
    if champion.sets.keys() != challenger.sets.keys():
        unlike = sorted(champion.sets.keys() ^ challenger.sets.keys())
        raise UserError(f"champion and challenger were not scored on the same sets ({', '.join(unlike)}); score both in one run")
    for name, found in challenger.sets.items():
        other = champion.sets[name]
        if (found.digest, found.images) != (other.digest, other.images):
            raise UserError(f"champion and challenger were not scored on the same images of '{name}'; score both in one run")


def _figures(champion: Evidence | None, challenger: Evidence) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, found in challenger.sets.items():
        figures[name] = {"dvc": found.digest, "kind": found.kind, "images": len(found.images), "challenger": found.figures}
        if champion:
            figures[name] |= {"champion": champion.sets[name].figures, "own_look": champion.sets[name].own_look}
    return figures
