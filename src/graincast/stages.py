"""The stages of the loop as functions from folders to folders.

The ZenML steps and the stages of ``dvc.yaml`` call these and nothing else, so both roads give the same bytes. A
folder appears under its name only when it is whole; nothing in it depends on when, where or by whom it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pandas as pd

from graincast import config as settings
from graincast.checkpoint import Checkpoint
from graincast.compute import Log
from graincast.errors import UserError
from graincast.evaluate.evaluation import evaluate, match_masks
from graincast.evaluate.realism import set_realism
from graincast.microscope.ingest import ingest
from graincast.microscope.preparation import Preparation
from graincast.microscope.virtual_sem import write_session
from graincast.segment.segmenter import Segmenter
from graincast.segment.train import train_segmenter
from graincast.simulate.library import mean_grain_diameter, simulate_library
from graincast.store.imageset import ImageSet, folder_digest, whole_folder
from graincast.synthesise.cyclegan.train import CycleGAN, train_cyclegan
from graincast.synthesise.generate import synthesise
from graincast.synthesise.polarity import boundaries_are_bright

HISTORY, REALISM = "history.csv", "realism"


def run_virtual_sem(config: settings.VirtualSession, out: Path) -> Path:
    """A session of the virtual SEM: ``micrographs/`` and ``held_out/{images,masks}/`` in `out`."""
    return write_session(config, out)


def run_simulate(config: settings.Simulate, out: Path) -> dict[str, ImageSet]:
    """Morphologies in `out`, by split: ``translator``, ``synthetic`` and ``validation``."""
    return simulate_library(config, out)


def run_ingest(config: settings.Ingest, source: Path, morphologies: ImageSet, out: Path, masks: Path | None = None) -> ImageSet:
    """Prepared micrographs of `source`, a folder or a file, brought to the grain size of `morphologies`; `masks` are left out."""
    return ingest(config, source, mean_grain_diameter(morphologies), out, exclude=masks, parents={"morphologies": morphologies.digest})


def run_train_translator(config: settings.Translator, morphologies: ImageSet, micrographs: ImageSet, out: Path,
                         log: Log | None = None, checkpoint: Checkpoint | None = None) -> Path:
    """A translator in `out`: ``translator.safetensors``, ``history.csv`` and ``sample.png`` (simulated beside translated)."""
    history = _History(log)
    images = list(micrographs)
    translator = train_cyclegan(_pairs(morphologies, range(len(morphologies))), images, config,
                                bright_boundaries=boundaries_are_bright(images), log=history, checkpoint=checkpoint)
    translator.parents = {"morphologies": morphologies.digest, "micrographs": micrographs.digest}
    with whole_folder(out) as folder:
        translator.save(folder)
        history.save(folder, "step")
        sample = morphologies.image(0)
        iio.imwrite(folder / "sample.png", np.hstack([sample, translator.to_sem(sample, morphologies.labels(0), config.seed)]))
    return out


def run_synthesise(config: settings.Synthesise, morphologies: Mapping[str, ImageSet], translator: Path, out: Path) -> dict[str, ImageSet]:
    """Labelled synthetic sets in `out`: ``training`` from the morphologies ``synthetic``, each translated and untranslated;
    ``validation`` from ``validation``, translated alone."""
    synthesiser, digest = CycleGAN.load(translator), folder_digest(translator)
    with whole_folder(out) as folder:
        for name, source in (("training", "synthetic"), ("validation", "validation")):
            synthesise(morphologies[source], synthesiser, config, folder / name, synthesiser_digest=digest, untranslated=name == "training")
    return {name: ImageSet(out / name) for name in ("training", "validation")}


def run_train_segmenter(config: settings.Segmenter, training: ImageSet, validation: ImageSet, micrographs: ImageSet, out: Path,
                        log: Log | None = None, checkpoint: Checkpoint | None = None) -> Path:
    """A segmenter in `out`: ``segmenter.safetensors`` (with the micrographs' preparation inside) and ``history.csv``."""
    history = _History(log)
    choosing, _ = halves(validation)
    segmenter = train_segmenter(_pairs(training, range(len(training))), _pairs(validation, choosing), config, log=history, checkpoint=checkpoint)
    segmenter.parents = {"training": training.digest, "validation": validation.digest, "micrographs": micrographs.digest}
    segmenter.preparation = Preparation.from_dict(micrographs.info["preparation"])
    with whole_folder(out) as folder:
        segmenter.save(folder)
        history.save(folder, "epoch")
    return out


def run_evaluate(config: settings.Evaluate, segmenter: Path, translator: Path, morphologies: ImageSet, synthetic: Mapping[str, ImageSet],
                 micrographs: ImageSet, out: Path, *, images: Path | None = None, masks: Path | None = None, virtual: bool = False) -> Path:
    """Figures in `out`: ``scores.csv``, ``skipped.json``, ``grains.parquet``, ``overlays/*.png`` and ``realism/``.

    `morphologies` are those that the synthetic training images were drawn from. `images` and `masks` are folders of
    micrograph files with masks of the same names, where there are any.
    """
    masked = match_masks(images, masks) if images and masks else []
    trained = Segmenter.load(segmenter)
    result = evaluate(trained, synthetic["validation"], halves(synthetic["validation"])[1], micrographs, config,
                      bright_boundaries=CycleGAN.load(translator).bright_boundaries, masked=masked,
                      masked_set="virtual micrographs, held out" if virtual else "real micrographs")
    likeness = set_realism(micrographs, synthetic["training"], morphologies, trained.network)
    with whole_folder(out) as folder:
        result.save(folder)
        (folder / REALISM).mkdir()
        likeness.save(folder / REALISM)
    return out


def masked_files(session: settings.Session, virtual_session: Path | None) -> tuple[Path | None, Path | None]:
    """Folders of the micrographs and masks to score on: the user's, or the virtual session's held-out ones; None: none."""
    if session.folder is None:
        assert virtual_session is not None
        held_out = virtual_session / "held_out"
        return (held_out / "images", held_out / "masks") if session.virtual.held_out else (None, None)
    return Path(session.folder), Path(session.masks) if session.masks else None


class _History:
    """Keeps what a training reports and hands it on."""

    def __init__(self, log: Log | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.log = log

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **figures})
        if self.log:
            self.log(step, figures)

    def save(self, folder: Path, unit: str) -> None:
        pd.DataFrame(self.rows).rename(columns={"step": unit}).to_csv(folder / HISTORY, index=False, float_format="%.6g")


def halves(validation: ImageSet) -> tuple[range, range]:
    """Indices of the validation images that choose the epoch, and of those that are only ever scored."""
    if len(validation) < 2:
        raise UserError(f"{len(validation)} of the validation images passed the check of label fidelity; two are needed, "
                        "so a larger simulate.validation_structures or a smaller synthesise.min_fidelity would be right")
    return range(0, len(validation), 2), range(1, len(validation), 2)


def _pairs(images: ImageSet, indices: range) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(images.image(i), images.labels(i)) for i in indices]
