"""Drawing the labelled synthetic set: unseen morphologies through the translator, checked for label fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from graincast.store.imageset import ImageSet, ImageSetWriter
from graincast.synthesise.base import Synthesiser
from graincast.synthesise.fidelity import label_fidelity

if TYPE_CHECKING:
    from graincast.config import Synthesise


TRANSLATED, UNTRANSLATED = "translated", "untranslated"
"""Looks of a synthetic image."""


def synthesise(morphologies: ImageSet, synthesiser: Synthesiser, config: Synthesise, out: Path, *, synthesiser_digest: str,
               untranslated: bool = False) -> ImageSet:
    """Translate every morphology and keep the images whose boundaries stayed where the labels are.

    Parameters
    ----------
    morphologies : ImageSet
        Pictures with instance ids that the translator has not seen.
    synthesiser : Synthesiser
        The trained translator.
    config : graincast.config.Synthesise
        Copies, threshold and seed.
    out : Path
        Folder of the new set.
    synthesiser_digest : str
        Content hash of the translator, for the record.
    untranslated : bool
        Add each morphology's picture as it is, in the micrographs' tones. A segmenter that also learns from these does
        not rely on what the translator draws.

    Returns
    -------
    ImageSet
        Kind ``synthetic``; each row has the ``morphology``'s id, its ``look`` (`TRANSLATED` or `UNTRANSLATED`) and, of the
        translated, the ``copy`` and the label ``fidelity`` (`graincast.synthesise.fidelity.label_fidelity`); those below
        ``min_fidelity`` are among the refused.

    Raises
    ------
    UserError
        If not one image is faithful enough.
    """
    writer = ImageSetWriter(out, "synthetic", config=config.model_dump(),
                            parents={"morphologies": morphologies.digest, "translator": synthesiser_digest})
    with writer:
        for index in tqdm(range(len(morphologies)), desc="synthesise", unit="image", disable=None):
            row, labels, picture = morphologies.rows.iloc[index], morphologies.labels(index), morphologies.image(index)
            for copy in range(config.copies):
                seed = int(np.random.SeedSequence([config.seed, index, copy]).generate_state(1)[0])
                image = synthesiser.to_sem(picture, labels, seed)
                fidelity = label_fidelity(image, labels, synthesiser.as_lines)
                known = {"id": f"{row['id']}-{copy}", "morphology": row["id"], "look": TRANSLATED, "copy": copy, "fidelity": fidelity}
                if fidelity >= config.min_fidelity:
                    writer.add(image, labels=labels, seed=seed, **known)
                else:
                    writer.refuse(f"label fidelity {fidelity:.2f} is below synthesise.min_fidelity {config.min_fidelity:g}", **known)
            if untranslated:
                image = synthesiser.in_tones(picture, labels)
                writer.add(image, labels=labels, id=f"{row['id']}-untranslated", morphology=row["id"], look=UNTRANSLATED)
    return writer.result
