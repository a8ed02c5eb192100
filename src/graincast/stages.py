"""The stages of the loop as functions from folders to folders.

The ZenML steps and the stages of ``dvc.yaml`` call these and nothing else, so both roads give the same bytes. A
folder appears under its name only when it is whole; nothing in it depends on when, where or by whom it was made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pandas as pd

from graincast import config as settings
from graincast.checkpoint import Checkpoint
from graincast.compute import Log
from graincast.errors import UserError
from graincast.evaluate import evidence
from graincast.evaluate.evaluation import evaluate, match_masks
from graincast.evaluate.fields import labelled_fields
from graincast.evaluate.promotion import Decision, decide
from graincast.evaluate.realism import set_realism
from graincast.export.kinds import USUAL
from graincast.inference import segment_files
from graincast.microscope.ingest import BadSession, ingest, ingest_session
from graincast.microscope.preparation import Preparation
from graincast.microscope.virtual_sem import write_session
from graincast.monitor.drift import FEWEST_IMAGES, Drift, Reference, column_bounds, describe_session, judge, make_reference, place
from graincast.report import session as session_report
from graincast.segment.segmenter import Segmenter
from graincast.segment.train import calibrated, train_segmenter
from graincast.simulate.library import mean_grain_diameter, simulate_library
from graincast.store.gates import PAGE, Gate, check_grains, check_library, check_session, check_synthetic, judge_session, read_grains
from graincast.store.imageset import ImageSet, ImageSetWriter, folder_digest, whole_folder
from graincast.synthesise.cyclegan.train import CycleGAN, train_cyclegan
from graincast.synthesise.generate import synthesise
from graincast.synthesise.polarity import boundaries_are_bright

HISTORY, REALISM = "history.csv", "realism"
SESSION_IMAGES, SESSION_GATE, UNTESTED, EVIDENTLY = "images", "gate", "untested.json", "evidently.html"
WRITTEN = ("height", "width", "checksum", "refused")
"""Columns of a manifest that `ImageSetWriter.add` fills in by itself."""


def run_virtual_sem(config: settings.VirtualSession, out: Path) -> Path:
    """A session of the virtual SEM: ``micrographs/`` and ``held_out/{images,masks}/`` in `out`."""
    return write_session(config, out)


def run_simulate(config: settings.Simulate, out: Path) -> dict[str, ImageSet]:
    """Morphologies in `out`, by split: ``translator``, ``synthetic`` and ``validation``."""
    return simulate_library(config, out)


def run_ingest(config: settings.Ingest, source: Path, morphologies: ImageSet, out: Path, masks: Path | None = None) -> ImageSet:
    """Prepared micrographs of `source`, a folder or a file, brought to the grain size of `morphologies`; `masks` are left out."""
    return ingest(config, source, mean_grain_diameter(morphologies), out, exclude=masks, parents={"morphologies": morphologies.digest})


def run_ingest_session(preparation: Preparation, folder: Path, out: Path, config: settings.Gates) -> ImageSet:
    """A session's micrographs, prepared as `preparation` says; files that cannot be read or do not pass the gate are refused rows."""
    return ingest_session(preparation, folder, out, partial(judge_session, config=config), require_pixel_size=config.require_pixel_size,
                          most_files=config.most_images, config=config.model_dump())


def run_gate_session(config: settings.Gates, micrographs: ImageSet, out: Path) -> Path:
    """The gate of a session in `out`: ``gate.json``, ``validation.json``, ``index.html``; UserError, naming each bad file, if it fails."""
    return _save_gate(check_session(micrographs, config), out)


def run_gate_library(config: settings.Gates, morphologies: ImageSet | Mapping[str, ImageSet], out: Path) -> Path:
    """The gate of simulated structures in `out`, files as of `run_gate_session`; UserError if it fails."""
    return _save_gate(check_library(morphologies, config), out)


def run_gate_synthetic(config: settings.Gates, synthetic: ImageSet | Mapping[str, ImageSet], micrographs: ImageSet | None, out: Path) -> Path:
    """The gate of a synthetic set in `out`, files as of `run_gate_session`; UserError if it fails."""
    return _save_gate(check_synthetic(synthetic, micrographs, config), out)


def _save_gate(gate: Gate, out: Path) -> Path:
    """Write a gate, whatever it found, then fail where it failed: its page stands either way."""
    with whole_folder(out) as folder:
        gate.save(folder)
    gate.require(out / PAGE)
    return out


def run_train_translator(config: settings.Translator, morphologies: ImageSet, micrographs: ImageSet, out: Path,
                         log: Log | None = None, checkpoint: Checkpoint | None = None) -> Path:
    """A translator in `out`: ``translator.safetensors``, ``history.csv`` and ``sample.png`` (simulated beside translated)."""
    return _train_translator(config, morphologies, micrographs, out, boundaries_are_bright(list(micrographs)), log, checkpoint)


def run_recalibrate_translator(config: settings.Recalibration, translator: settings.Translator, champion: Path, morphologies: ImageSet,
                               micrographs: ImageSet, out: Path, log: Log | None = None, checkpoint: Checkpoint | None = None) -> Path:
    """A translator of the look of new `micrographs`, which starts from the folder `champion`; its files are those of `run_train_translator`.

    Networks and polarity are the champion's (new micrographs of the other polarity its preparation refuses); everything else
    that `config` does not say is as in `translator`. The result knows the new look alone; the old one lives on in the
    champion's training set (`run_recalibrate_segmenter`).
    """
    start = CycleGAN.load(champion)
    sizes = {key: start.config[key] for key in ("filters", "residual_blocks")}
    changed = translator.model_copy(update={**sizes, "steps": config.translator_steps, "learning_rate": config.translator_learning_rate,
                                            "seed": config.seed})
    return _train_translator(changed, morphologies, micrographs, out, start.bright_boundaries, log, checkpoint, start,
                             {"champion": folder_digest(champion)})


def _train_translator(config: settings.Translator, morphologies: ImageSet, micrographs: ImageSet, out: Path, bright_boundaries: bool,
                      log: Log | None, checkpoint: Checkpoint | None, start: CycleGAN | None = None,
                      parents: Mapping[str, str] | None = None) -> Path:
    history = _History(log)
    translator = train_cyclegan(_pairs(morphologies, range(len(morphologies))), list(micrographs), config,
                                bright_boundaries=bright_boundaries, log=history, checkpoint=checkpoint, start=start)
    translator.parents = {"morphologies": morphologies.digest, "micrographs": micrographs.digest, **(parents or {})}
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
    """A segmenter in `out`: ``segmenter.safetensors`` (the micrographs' preparation and a calibration inside) and ``history.csv``."""
    history = _History(log)
    choosing, held_out = halves(validation)
    segmenter = train_segmenter(_pairs(training, range(len(training))), _pairs(validation, choosing), config, log=history, checkpoint=checkpoint)
    _calibrate(segmenter, _pairs(validation, held_out), config.seed, log)
    segmenter.parents = {"training": training.digest, "validation": validation.digest, "micrographs": micrographs.digest}
    segmenter.preparation = Preparation.from_dict(micrographs.info["preparation"])
    return _save_segmenter(segmenter, history, out)


def run_recalibrate_segmenter(config: settings.Recalibration, champion: Path, training_new: ImageSet, training_old: ImageSet,
                              validation_new: ImageSet, validation_old: ImageSet, micrographs: ImageSet, out: Path,
                              log: Log | None = None, checkpoint: Checkpoint | None = None) -> Path:
    """A segmenter for the old looks and the new one, which starts from the folder `champion`; its files are those of `run_train_segmenter`.

    It is fine-tuned on the synthetic images of the new look and, lest it forget, on `config.replay` times as many of the old
    ones, drawn at random; images of both choose the epoch. Network, augmentation and the rest are as the champion was
    trained, and so is its preparation, which `micrographs`, those of the new look, have to be prepared with.
    """
    start = Segmenter.load(champion)
    preparation = _champions_preparation(start, champion, micrographs)
    changed = settings.Segmenter.model_validate(start.config).model_copy(update={
        "epochs": config.segmenter_epochs, "learning_rate": config.segmenter_learning_rate, "seed": config.seed})
    again = _replayed(config, len(training_new), len(training_old))
    training = _pairs(training_new, range(len(training_new))) + _pairs(training_old, again)
    validation, held_out = ([pair for images in (validation_new, validation_old) for pair in _pairs(images, halves(images)[half])]
                            for half in (0, 1))
    history = _History(log)
    segmenter = train_segmenter(training, validation, changed, log=history, checkpoint=checkpoint, start=start)
    _calibrate(segmenter, held_out, config.seed, log)
    segmenter.parents = {"training": training_new.digest, "validation": validation_new.digest, "training_old": training_old.digest,
                         "validation_old": validation_old.digest, "micrographs": micrographs.digest, "champion": folder_digest(champion)}
    segmenter.preparation = preparation
    return _save_segmenter(segmenter, history, out)


def _replayed(config: settings.Recalibration, new: int, old: int) -> list[int]:
    """Indices of the old images that are seen again, in order; each more than once only where there are too few."""
    rng = np.random.default_rng(config.seed)
    wanted = round(config.replay * new)
    rounds = [rng.permutation(old) for _ in range(-(-wanted // old))]
    return sorted(int(i) for i in np.concatenate([*rounds, []])[:wanted])


def _champions_preparation(champion: Segmenter, folder: Path, micrographs: ImageSet) -> Preparation:
    """What the champion prepares micrographs with, which the new ones have to have been prepared with, too."""
    if champion.preparation is None:
        raise UserError(f"{folder} holds a segmenter that was trained without micrographs; one that the training pipeline made would be right")
    own, given = champion.preparation.to_dict(), micrographs.info["preparation"]
    unlike = [key for key in ("grain_diameter_px", "clahe_clip", "clahe_tile_px") if own[key] != given[key]]
    if unlike:
        raise UserError(f"{micrographs.path} was not prepared as the champion prepares micrographs ({unlike[0]} {given[unlike[0]]}, "
                        f"the champion's {own[unlike[0]]}); a session prepared with the champion's preparation would be right")
    return champion.preparation


def _calibrate(segmenter: Segmenter, held_out: Sequence[tuple[np.ndarray, np.ndarray]], seed: int, log: Log | None) -> None:
    """Give a segmenter its confidence, and tell how far that can be relied upon."""
    segmenter.calibration = calibrated(segmenter, held_out, seed)
    if log and segmenter.calibration:
        log(0, {f"confidence_{name}": value for name, value in segmenter.calibration.figures.items()})


def _save_segmenter(segmenter: Segmenter, history: _History, out: Path) -> Path:
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


def run_labelled_fields(preparation: Preparation, micrographs: Path, masks: Path, out: Path) -> ImageSet:
    """Micrographs with expert masks as a set that segmenters can be compared on, prepared by a champion's `preparation`."""
    return labelled_fields(preparation, micrographs, masks, out)


def run_promotion_evidence(config: settings.Promotion, challenger: Path, champion: Path | None, benchmark: Mapping[str, ImageSet], out: Path,
                           own_looks: Collection[str] = ()) -> Path:
    """Challenger and champion on the same images of the same sets: ``evidence.json`` and ``decision.json`` in `out`.

    `benchmark` are frozen sets by name; each is verified first. Of the champion's own look are those that it was trained with (held
    out, its ``validation`` and ``micrographs``) and the ones named in `own_looks`. `champion` is None for the first model.
    """
    for images in benchmark.values():
        images.verify()
    folders = [folder for folder in (challenger, champion) if folder is not None]
    segmenters = [Segmenter.load(folder) for folder in folders]
    indices = {name: evidence.scored_images(name, images, segmenters, config.images) for name, images in benchmark.items()}
    found = [evidence.gather(segmenter, folder_digest(folder), benchmark, indices, config, own_looks)
             for segmenter, folder in zip(segmenters, folders, strict=True)]
    reference = found[1] if champion is not None else None
    with whole_folder(out) as folder:
        evidence.save(folder, reference, found[0])
        decide(reference, found[0], config).save(folder)
    return out


def run_reference(config: settings.Drift, segmenter: Path, micrographs: ImageSet, synthetic: ImageSet, out: Path) -> Path:
    """What in-control sessions look like to a champion, in `out` (`graincast.monitor.drift.Reference`).

    `micrographs` are those that its translator learned from, `synthetic` the images that it was trained on. Too few of the
    former cannot tell how much sessions differ: then ``untested.json`` says so, to `run_drift`, too.
    """
    if len(micrographs) < FEWEST_IMAGES:
        with whole_folder(out) as folder:
            (folder / UNTESTED).write_text(json.dumps({"sentence": f"Drift was not tested: the champion learned from {len(micrographs)} "
                                                       f"micrographs, and {FEWEST_IMAGES} at least tell how much they differ."}))
        return out
    reference = make_reference(config, Segmenter.load(segmenter), micrographs, synthetic)
    reference.facts.update(segmenter=folder_digest(segmenter), parents={"micrographs": micrographs.digest, "synthetic": synthetic.digest})
    with whole_folder(out) as folder:
        reference.save(folder)
    return out


def run_drift(config: settings.Drift, reference: Path, segmenter: Path, session: ImageSet, out: Path) -> Path:
    """The verdict on a session in `out`: ``drift.json`` (`graincast.monitor.drift.Drift`), ``descriptors.parquet`` (a row an image),
    ``patches.parquet``, ``drift.png`` and ``evidently.html``; of a reference of too few micrographs the first alone.

    `session` is prepared as the champion's micrographs were; `reference` is the champion's own.
    """
    from graincast.monitor.evidently_report import write_report
    from graincast.report.drift_figure import drift_figure

    if (reference / UNTESTED).exists():
        with whole_folder(out) as folder:
            Drift(False, "none", "none", False, [], json.loads((reference / UNTESTED).read_text())["sentence"], {}).save(folder)
        return out
    known = Reference.load(reference)
    if known.facts["segmenter"] != folder_digest(segmenter):
        raise UserError(f"the drift reference {reference} was made for another segmenter than {segmenter}; the champion's own would be right")
    described = describe_session(known, Segmenter.load(segmenter), session)
    verdict, placed = judge(known, config, described), place(known, described)
    with whole_folder(out) as folder:
        placed.images.to_parquet(folder / "descriptors.parquet", index=False)
        described.patches.to_parquet(folder / "patches.parquet", index=False)
        (folder / "drift.png").write_bytes(drift_figure(known, verdict, placed.places))
        of_columns = write_report(known.images, placed.images, column_bounds(known, config, placed.images), folder / EVIDENTLY,
                                  verdict.sentence)
        replace(verdict, scores=verdict.scores | of_columns).save(folder)
    return out


def run_check_session(config: settings.Gates, segmenter: Path, folder: Path, out: Path) -> Path:
    """A session as `segmenter` sees it, in `out`: its prepared ``images`` and the result of its ``gate``.

    A session that fails leaves its gate, which says why, and no images: bad data are a result, not an error.
    """
    preparation = Segmenter.load(segmenter).preparation
    assert preparation is not None  # or nobody could have registered it
    with whole_folder(out) as whole:
        try:
            gate = check_session(run_ingest_session(preparation, folder, whole / SESSION_IMAGES, config), config)
        except BadSession as error:
            gate = Gate.refused("session", str(error))
        if not gate.passed:
            shutil.rmtree(whole / SESSION_IMAGES, ignore_errors=True)
        (whole / SESSION_GATE).mkdir()
        gate.save(whole / SESSION_GATE)
    return out


def run_session_report(name: str, session: Path, out: Path, *, grains: Path | None = None, drift: Path | None = None,
                       decision: Path | None = None, failed: str | None = None, history: Path | None = None,
                       run: Mapping[str, str] | None = None) -> Path:
    """A session in `out`: ``report.html``, what it links to, and ``session.json`` with ``headline``, ``figures`` and ``alerts``.

    `session`, `grains`, `drift` and `decision` are what `run_check_session`, `run_segment_session`, `run_drift` and
    `run_promotion_evidence` made, as far as the session came; `failed` says why a recalibration did not end, `history` is a chart of
    the sessions before, `run` tells versions and hashes.
    """
    gate = Gate.load(session / SESSION_GATE)
    measured = Gate.load(grains / SESSION_GATE) if grains else None
    verdict = Drift.load(drift) if drift else None
    decided = Decision.load(decision) if decision else None
    tested = drift is not None and (drift / EVIDENTLY).exists()
    charts = {"Where the session lies": drift / "drift.png"} if drift and tested else {}
    page = session_report.SessionReport(
        name, int(gate.figures.get("images", 0)), gate.quarantined, gate.failures,
        warnings=[*gate.warnings, *(measured.failures + measured.warnings if measured else ())], docs=f"{SESSION_GATE}/index.html",
        grain_docs="grains/index.html" if measured else None, segmentation=grains,
        verdict=verdict.sentence if verdict else None, moved=session_report.moved_rows(verdict) if verdict else (),
        charts={**charts, **({"Drift of the sessions so far": history} if history else {})}, evidently=EVIDENTLY if tested else None,
        decision=[failed] if failed else session_report.decision_sentences(decided), evidence=session_report.evidence_table(decided), run=run or {})
    with whole_folder(out) as folder:
        shutil.copytree(session / SESSION_GATE, folder / SESSION_GATE)
        if grains:
            shutil.copytree(grains / SESSION_GATE, folder / "grains")
        if drift and tested:
            shutil.copy2(drift / EVIDENTLY, folder)
        (folder / "report.html").write_text(session_report.build_session_report(page), encoding="utf-8")
        told = {"headline": session_report.headline(page), "figures": session_report.figures(page, verdict),
                "alerts": session_report.alerts(page)}
        (folder / "session.json").write_text(json.dumps(told, indent=1))
    return out


def run_segment_session(config: settings.Gates, segmenter: Path, session: ImageSet, source: Path, out: Path,
                        exports: Sequence[str] = USUAL) -> Path:
    """What the champion finds in the accepted files of a session: see `graincast.inference.segment_files`; and the ``gate`` of the grains.

    `session` says which files of the folder `source` passed the session's gate; the others are left alone. The files are
    segmented at their own size, so that label maps and tables fit what the instrument wrote. Grains that do not pass, or are of
    quite another size than the micrograph itself suggests, are told, not hidden.
    """
    files = [source / name for name in session.rows["source"]]
    with whole_folder(out) as folder:
        segment_files(Segmenter.load(segmenter), files, folder, names=list(session.rows["id"]), exports=exports)  # files of sub-folders share stems
        (folder / SESSION_GATE).mkdir()
        check_grains(read_grains(folder), config, _suggested_diameters(session)).save(folder / SESSION_GATE)
    return out


def _suggested_diameters(session: ImageSet) -> dict[str, float]:
    """Mean grain diameter that each micrograph itself suggests, in um where its pixel size is known and in px otherwise, by its id."""
    pixel = session.rows["original_pixel_size_um"].fillna(1.0)
    return {name: float(size) for name, size in zip(session.rows["id"], session.rows["grain_diameter_px"] * pixel, strict=True)}


def run_join(sets: Sequence[ImageSet], out: Path, *, even: bool = False) -> ImageSet:
    """Several sets as one, in order; kind, configuration and preparation are the first one's, ids get the set's number.

    `even` leaves out the last image of a set with an odd number, so that in sets of validation images every second one keeps
    its role (`halves`).
    """
    first = sets[0]
    with ImageSetWriter(out, first.kind, config=first.info["config"], parents={f"part_{k}": part.digest for k, part in enumerate(sets)}) as writer:
        writer.info |= {key: value for key, value in first.info.items() if key not in ("format", "kind", "config", "parents")}
        for number, part in enumerate(sets):
            for index in range(len(part) - (len(part) % 2 if even else 0)):
                row = part.rows.iloc[index]
                facts = {str(key): value for key, value in row.items() if key not in WRITTEN and not pd.isna(value)}
                labels = part.labels(index) if part.labelled else None
                writer.add(part.image(index), labels=labels, **{**facts, "id": f"{number}_{row['id']}"})
    return writer.result


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
    """Indices of the validation images that choose the epoch, and of those that do not: they are scored and calibrate the confidence."""
    if len(validation) < 2:
        raise UserError(f"{len(validation)} of the validation images passed the check of label fidelity; two are needed, "
                        "so a larger simulate.validation_structures or a smaller synthesise.min_fidelity would be right")
    return range(0, len(validation), 2), range(1, len(validation), 2)


def _pairs(images: ImageSet, indices: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(images.image(i), images.labels(i)) for i in indices]
