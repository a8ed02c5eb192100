"""The method against its rivals on real micrographs: ``python -m benchmarks.real_micrographs [--only FIELD] [--seeds N]``.

For every field the same U-Net is trained on the same budget from five sources of labels, and two classical methods
stand beside it:

============  ========================================================================================================
ours          simulations, translated by a CycleGAN that saw the field's unlabelled images, and untranslated
untextured    the same simulations as they are (the paper's second baseline)
virtual_sem   the same simulations rendered by the virtual SEM with its default settings
scarce        four patches of the field with the expert's labels (the paper's first baseline), cross-fitted: patches
              from one half of the field, scores from the other, and the other way round
threshold     local threshold, its window and offset chosen with the masks of the first two fields in view, which flatters it
watershed     marker watershed
ceiling       every grain of the expert's, outlined along what the image shows: no rival, but what a method that errs nowhere gets
============  ========================================================================================================

No choice of ours looks at a mask: scale, polarity and tones come from the unlabelled images, the epoch and the levels
that cut maps into grains (`benchmarks.cut`) from synthetic images. Masks are read by `truth` alone, which serves the
scores, ``scarce`` and ``ceiling``.

Every training lies in ``--work`` under a digest of its configuration and code, so that an interrupted study goes on where it
stopped. The last line is one JSON object: field, method, metric, mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pandas as pd
from scipy import ndimage as ndi
from skimage import measure, morphology, segmentation

from benchmarks import machine
from graincast import stages
from graincast.compute import dihedral, random_crop
from graincast.config import Config, VirtualSem, load_config
from graincast.errors import UserError
from graincast.evaluate.baseline import local_threshold_segment
from graincast.evaluate.metrics import MIN_AREA_PX, read_mask, score_grains
from graincast.evaluate.overlay import overlay
from graincast.microscope.preparation import Preparation, to_grey8
from graincast.microscope.reader import Micrograph, read_micrograph
from graincast.microscope.virtual_sem import render
from graincast.segment.instances import instances
from graincast.segment.segmenter import Segmenter
from graincast.segment.train import Pair, train_segmenter
from graincast.store import tracking
from graincast.store.imageset import ImageSet, whole_folder
from graincast.synthesise.generate import TRANSLATED, UNTRANSLATED
from graincast.synthesise.polarity import boundaries_are_bright
from steps.sources import source_files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PRESETS = {"cpu": "demo", "gpu": "paper"}
METRICS = ("bf1_2px", "bf1_4px", "bf1_075", "miou", "iou_grain", "iou_boundary", "ap50", "pq", "d_astm_g", "vi_split", "vi_merge")
PATCHES = 4
TEXTURE = ("relief", "tones", "mottle", "veins", "specks", "scratches")
"""Effects of the augmentation that draw what a morphology leaves open."""
VIRTUAL_GRAIN_UM = 1.9
"""Mean grain diameter for which the virtual SEM's default settings are meant, um."""
WATERSHED_SIGMA, WATERSHED_RISE_PX = 2.0, 8
"""Smoothing, and rise of the distance to the lines that a marker needs, px of the original; chosen with the masks in view."""
CORE_PX, CORE_SHARE, CEILING_SIGMA = 5, 0.7, 1.5
"""Depth from which on a pixel of the expert's grain is its own without question, px and share of the largest, and smoothing, px."""
NBT = "nbt-ceramic-sem"
NBT_SPECIMENS = ("1", "2", "3", "5", "6", "8")
NBT_5000X = ("1_001", "1_003", "2_001", "3_001", "3_002", "5_001", "5_004", "6_001", "6_004", "6_005", "6_007", "8_001")


@dataclass(frozen=True)
class Material:
    """A field of the study.

    Attributes
    ----------
    train : str
        Unlabelled images that ours learns from: pattern below the data folder.
    test : str
        Labelled images: pattern; the masks lie in ``masks`` beside ``images``. Empty: no masks, grain lengths are compared.
    settings : dict
        What a user would set, having looked at the images: section to key to value.
    leave_one_out : bool
        Train a model for every specimen, on the images of the others.
    """

    train: str
    test: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    leave_one_out: bool = False


def _single(name: str, **settings: dict[str, Any]) -> Material:
    return Material(f"single-fields/images/{name}.png", f"single-fields/images/{name}.png", settings)


MATERIALS = {
    "perovskite_sem": _single("perovskite_sem"),
    "pure_iron_optical": _single("pure_iron_optical"),
    # the estimate of the grain size finds nothing here and says so; by eye some eight grains lie side by side in 1500 px
    "faint_boundaries_sem": _single("faint_boundaries_sem", ingest={"scale": 0.25}),
    "two_phase_alloy_fesem_1": _single("two_phase_alloy_fesem_1"),
    "two_phase_alloy_fesem_2": _single("two_phase_alloy_fesem_2"),
    "nbt_ceramic_sem": Material(f"{NBT}/images/*.tif", ""),
    "nbt_leave_one_out": Material(f"{NBT}/images/*.tif", "", leave_one_out=True),
    "steel_316l_optical": Material("steel-316l-optical/images/field{01..24}_*.jpg", "steel-316l-optical/images/field{25..30}_*.jpg"),
}


class Study:
    """The trainings of one material and seed, each kept in `work` under a digest of what made it."""

    def __init__(self, name: str, material: Material, data: Path, work: Path, config: Config, seed: int) -> None:
        self.name, self.material, self.data, self.work, self.base, self.seed = name, material, data, work, config, seed
        sections = config.model_dump()
        for section, keys in self.material.settings.items():
            sections[section] |= keys
        for section in ("simulate", "translator", "synthesise", "segmenter"):
            sections[section]["seed"] = seed
        self.config = Config.model_validate(sections)
        self.seconds: dict[str, float] = {}

    def without(self, specimen: str) -> Study:
        """The same study on the images whose names do not start with `specimen`; its times count here."""
        material = replace(self.material, train=self.material.train.replace("*", f"[!{specimen}]*"), leave_one_out=False)
        other = Study(f"{self.name}_{specimen}", material, self.data, self.work, self.base, self.seed)
        other.seconds = self.seconds
        return other

    def kept(self, stage: str, makes: Callable[[Path], object], *depends: object) -> Path:
        """The folder that `makes` fills, made only where no run before has made it from the same code and the same `depends`."""
        code = [hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in source_files(stage)]
        digest = hashlib.sha256(json.dumps([code, depends], sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder, clock = self.work / stage.removeprefix("run_") / digest, self.work / "seconds" / f"{digest}.json"
        if not folder.exists():
            start = time.perf_counter()
            makes(folder)
            clock.parent.mkdir(parents=True, exist_ok=True)
            clock.write_text(json.dumps(round(time.perf_counter() - start, 1)))
        self.seconds[f"{stage.removeprefix('run_')} {digest[:4]}"] = json.loads(clock.read_text())
        return folder

    def morphologies(self) -> dict[str, ImageSet]:
        config = self.config.simulate
        folder = self.kept("run_simulate", lambda out: stages.run_simulate(config, out), config.model_dump())
        return {split: ImageSet(folder / split) for split in ("translator", "synthetic", "validation")}

    def micrographs(self) -> ImageSet:
        """The unlabelled images, prepared."""
        source, splits, config = self.unlabelled(), self.morphologies(), self.config.ingest
        return ImageSet(self.kept("run_ingest", lambda out: stages.run_ingest(config, source, splits["translator"], out),
                                  config.model_dump(), splits["translator"].digest, self.name))

    def prepared(self, image: Path) -> np.ndarray:
        """An image as the networks see it."""
        return Preparation.from_dict(self.micrographs().info["preparation"]).prepare(read_micrograph(image)).image

    def unlabelled(self) -> Path:
        """A folder of links to the images that ours learns from."""
        folder = self.work / "unlabelled" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        for image in find(self.data, self.material.train):
            if not (folder / image.name).exists():
                (folder / image.name).symlink_to(image)
        return folder

    def synthetic(self) -> dict[str, ImageSet]:
        """The synthetic sets of ours, which the translator draws."""
        splits, micrographs, config = self.morphologies(), self.micrographs(), self.config
        translator = self.kept(
            "run_train_translator", lambda out: stages.run_train_translator(config.translator, splits["translator"], micrographs, out),
            config.translator.model_dump(), splits["translator"].digest, micrographs.digest)
        drawn = self.kept("run_synthesise", lambda out: stages.run_synthesise(config.synthesise, splits, translator, out),
                          config.synthesise.model_dump(), translator.name)
        return {name: ImageSet(drawn / name) for name in ("training", "validation")}

    def segmenter(self, training: Sequence[Pair], validation: Sequence[Pair], *depends: object, **changes: Any) -> Segmenter:
        """A segmenter trained on the given pairs, on the terms that all methods share."""
        config = self.config.segmenter.model_copy(update=changes)

        def train(out: Path) -> None:
            trained = train_segmenter(training, validation, config)
            with whole_folder(out) as folder:
                trained.save(folder)

        trained = Segmenter.load(self.kept("run_train_segmenter", train, config.model_dump(), *depends))
        trained.preparation = Preparation.from_dict(self.micrographs().info["preparation"])
        return trained


Predict = Callable[[Micrograph], np.ndarray]


def ours(study: Study, *, looks: Sequence[str] = (TRANSLATED, UNTRANSLATED), without: Sequence[str] = (), merge_level: float | None = None,
         symmetries: int = 1) -> Predict:
    """Translated and untranslated simulations; half of the validation images choose the epoch, as in the product.

    What follows is for the ablation: other looks in the training set, effects of the augmentation left out, another level
    of the merging of weak boundaries, and maps averaged over the first `symmetries` of the square's eight.
    """
    trained = our_segmenter(study, looks=looks, without=without)
    if merge_level is not None:
        trained.cut = replace(trained.cut, merge_level=merge_level)
    return trained.segment_micrograph if symmetries == 1 else partial(_averaged, trained, symmetries)


def our_segmenter(study: Study, *, looks: Sequence[str] = (TRANSLATED, UNTRANSLATED), without: Sequence[str] = ()) -> Segmenter:
    """The network behind `ours`."""
    sets = study.synthetic()
    choosing, _ = stages.halves(sets["validation"])
    rows = sets["training"].rows["look"]
    training = _pairs(sets["training"], [int(i) for i in np.flatnonzero(rows.isin(looks))])
    augment = study.config.segmenter.augment.model_copy(update=dict.fromkeys(without, 0.0))
    return study.segmenter(training, _pairs(sets["validation"], choosing), sets["training"].digest, sets["validation"].digest,
                           *(looks if len(looks) == 1 else ()), augment=augment, crops_per_image=_same_budget(study, len(training)))


def _averaged(segmenter: Segmenter, symmetries: int, micrograph: Micrograph) -> np.ndarray:
    """Grains from maps averaged over symmetries of the square; of a micrograph without an info bar."""
    total, scale = segmenter.micrograph_maps(micrograph)
    for symmetry in range(1, symmetries):
        turned = replace(micrograph, image=np.ascontiguousarray(dihedral(micrograph.image, symmetry)))
        maps, _ = segmenter.micrograph_maps(turned)
        back = maps[..., ::-1] if symmetry >= 4 else maps
        total = total + np.rot90(back, -symmetry % 4, axes=(-2, -1))
    return instances(total / symmetries, segmenter.cut, scale)


def untextured(study: Study) -> Predict:
    """The simulated pictures as they are, with the augmentation of gain, offset, focus and noise alone."""
    splits = study.morphologies()
    plain = study.config.segmenter.augment.model_copy(update=dict.fromkeys((*TEXTURE, "warp"), 0.0))
    return study.segmenter(*(_pairs(splits[name], range(len(splits[name]))) for name in ("synthetic", "validation")),
                           *(splits[name].digest for name in ("synthetic", "validation")),
                           augment=plain, crops_per_image=_same_budget(study, len(splits["synthetic"]))).segment_micrograph


def virtual_sem(study: Study) -> Predict:
    """The simulated morphologies as the virtual SEM images them: no image of the material takes part."""
    splits = study.morphologies()
    pixel_um = VIRTUAL_GRAIN_UM / study.micrographs().info["preparation"]["grain_diameter_px"]

    def imaged(images: ImageSet) -> list[Pair]:
        return [(render(labels, pixel_um, VirtualSem(drift_px=0), np.random.default_rng([study.seed, i])), labels)
                for i, labels in enumerate(images.labels(k) for k in range(len(images)))]

    return study.segmenter(*(imaged(splits[name]) for name in ("synthetic", "validation")),
                           "virtual SEM", pixel_um, *(splits[name].digest for name in ("synthetic", "validation")),
                           crops_per_image=_same_budget(study, len(splits["synthetic"]))).segment_micrograph


def scarce(study: Study) -> Predict:
    """`PATCHES` patches with the expert's labels. Where the labelled images are also the unlabelled ones, two networks: each
    learns from one half of the field and serves the other."""
    labelled = [(study.prepared(image), truth(image)) for image in find(study.data, study.material.train)]
    if len(labelled) > 1:
        return _from_patches(study, labelled).segment_micrograph
    [(image, mask)] = labelled
    networks = [_from_patches(study, [(image[_half(image.shape, which)], mask[_half(mask.shape, which)])]) for which in (1, 0)]

    def predict(micrograph: Micrograph) -> np.ndarray:
        predicted = [network.micrograph_maps(micrograph) for network in networks]
        maps = predicted[1][0].copy()
        first = (slice(None), *_half(maps.shape[1:], 0))
        maps[first] = predicted[0][0][first]
        return instances(maps, networks[0].cut, predicted[0][1])

    return predict


def _from_patches(study: Study, labelled: Sequence[tuple[np.ndarray, np.ndarray]]) -> Segmenter:
    """A segmenter trained on random patches of prepared images and their masks, at the masks' own size."""
    rng = np.random.default_rng(study.seed)
    side = min(study.config.segmenter.crop, *(min(image.shape) // 32 * 32 for image, _ in labelled))
    patches = []
    for place in rng.permutation(np.resize(np.arange(len(labelled)), max(PATCHES, len(labelled))))[:PATCHES]:
        image, mask = labelled[place]
        grains = _resized(measure.label(~mask, connectivity=1), image.shape)
        window = random_crop(image, side, rng)
        patches.append((image[window], grains[window]))
    digest = hashlib.sha256(b"".join(array.tobytes() for patch in patches for array in patch)).hexdigest()
    return study.segmenter(patches, patches, "scarce", digest, crop=side, crops_per_image=_same_budget(study, PATCHES))


def _half(shape: tuple[int, ...], which: int) -> tuple[slice, slice]:
    """The first (0) or second (1) half of a field along its longer axis."""
    axis = int(shape[1] > shape[0])
    middle = shape[axis] // 2
    part = slice(0, middle) if which == 0 else slice(middle, None)
    return (part, slice(None)) if axis == 0 else (slice(None), part)


def _resized(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return labels[np.ix_(*(((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(shape, labels.shape, strict=True)))].astype(np.int32)


def _same_budget(study: Study, images: int) -> int:
    """Crops an image and epoch that give as many optimiser steps as ours takes."""
    synthetic = study.config.simulate.synthetic_structures * (study.config.synthesise.copies + 1)
    return round(synthetic * study.config.segmenter.crops_per_image / images)


def _pairs(images: ImageSet, indices: Sequence[int]) -> list[Pair]:
    return [(images.image(i), images.labels(i)) for i in indices]


def threshold(study: Study) -> Predict:
    """The classical baseline of the product, with the settings that do best on the masks of iron and perovskite."""
    return lambda micrograph: local_threshold_segment(_dark_lines(micrograph))


def watershed(study: Study) -> Predict:
    """Watershed of the smoothed grey levels from the middles of what a local threshold calls grain."""
    def predict(micrograph: Micrograph) -> np.ndarray:
        grey = _dark_lines(micrograph)
        depth = ndi.gaussian_filter(ndi.distance_transform_edt(local_threshold_segment(grey) > 0), 1.0)
        seeds, _ = ndi.label(morphology.h_maxima(depth, WATERSHED_RISE_PX))
        return segmentation.watershed(-ndi.gaussian_filter(grey.astype(float), WATERSHED_SIGMA), seeds)

    return predict


def ceiling(study: Study) -> Predict:
    """The expert's own grains, grown from their cores by a watershed of the grey levels: all found, lines where the boundaries show.

    How far this stays from a full score says how exactly the masks were drawn.
    """
    masks = {read_micrograph(image).image.tobytes(): truth(image) for image in find(study.data, study.material.test)}

    def predict(micrograph: Micrograph) -> np.ndarray:
        grains = morphology.remove_small_objects(measure.label(~masks[micrograph.image.tobytes()], connectivity=1), max_size=MIN_AREA_PX - 1)
        grains = segmentation.relabel_sequential(grains)[0]
        depth = ndi.distance_transform_edt(grains > 0)
        deepest = np.concatenate([[np.inf], ndi.maximum(depth, grains, np.arange(1, grains.max() + 1))])[grains]
        cores = np.where(depth >= np.minimum(CORE_PX, CORE_SHARE * deepest), grains, 0)
        return segmentation.watershed(-ndi.gaussian_filter(_dark_lines(micrograph).astype(float), CEILING_SIGMA), cores)

    return predict


def _dark_lines(micrograph: Micrograph) -> np.ndarray:
    """The micrograph as uint8, turned to its negative where boundaries are bright."""
    grey = to_grey8(micrograph.image)
    return 255 - grey if boundaries_are_bright([grey]) else grey


METHODS: dict[str, Callable[[Study], Predict]] = {
    "ours": ours, "untextured": untextured, "virtual_sem": virtual_sem, "scarce": scarce, "threshold": threshold, "watershed": watershed,
    "ceiling": ceiling}
SEEDLESS = ("threshold", "watershed", "ceiling")
ABLATIONS: dict[str, Callable[[Study], Predict]] = {
    "translated_only": partial(ours, looks=(TRANSLATED,)),
    "untranslated_only": partial(ours, looks=(UNTRANSLATED,)),
    "without_texture": partial(ours, without=TEXTURE),
    "without_warp": partial(ours, without=("warp",)),
    "without_merging": partial(ours, merge_level=0.0),
    "with_flips": partial(ours, symmetries=8),
}
"""Ours with one thing changed."""


def find(data: Path, pattern: str) -> list[Path]:
    """Files of the data folder by a pattern, in which {01..24} stands for the numbers of a range."""
    if "{" not in pattern:
        return sorted(data.glob(pattern))
    before, _, rest = pattern.partition("{")
    span, _, after = rest.partition("}")
    first, last = span.split("..")
    return sorted(path for number in range(int(first), int(last) + 1) for path in data.glob(f"{before}{number:0{len(first)}d}{after}"))


def truth(image: Path) -> np.ndarray:
    """The expert's mask of an image, True on the boundary lines."""
    return read_mask(next((image.parents[1] / "masks").glob(f"{image.stem}.*")))


def score(study: Study, method: str, out: Path) -> dict[str, float]:
    """Mean scores of a method over the test images; an overlay of the first one goes to `out`."""
    predict = {**METHODS, **ABLATIONS}[method](study)
    rows = []
    for number, image in enumerate(find(study.data, study.material.test)):
        micrograph, mask = read_micrograph(image), truth(image)
        labels = predict(micrograph)
        rows.append(score_grains(labels, mask))
        if not number:
            out.mkdir(parents=True, exist_ok=True)
            iio.imwrite(out / f"{study.name}-{method}-{study.seed}.png", overlay(to_grey8(micrograph.image), labels, mask))
    return pd.DataFrame(rows)[list(METRICS)].mean().to_dict()


def grain_lengths(study: Study, method: str, out: Path) -> dict[str, float]:
    """Mean grain length of each NBT specimen at 5000x, um, and how well the means follow the hand-measured ones.

    The length of a grain is its largest extent (Feret), which is what a hand draws; it was fixed before any figure was seen.
    Grains that the border cuts do not count. With `Material.leave_one_out` the model that measures a specimen has not seen it.
    """
    by_hand = pd.read_csv(study.data / NBT / "measured_lengths.csv", dtype={"sample": str}).groupby("sample")["grain_length_um"].mean()
    means = pd.Series({specimen: _mean_length(study.without(specimen) if study.material.leave_one_out else study, method, specimen, out)
                       for specimen in NBT_SPECIMENS})
    error = means / by_hand[means.index] - 1
    return {"pearson_r": float(np.corrcoef(means, by_hand[means.index])[0, 1]), "mean_absolute_error": float(error.abs().mean()),
            **{f"specimen_{specimen}_um": float(value) for specimen, value in means.items()}}


def _mean_length(study: Study, method: str, specimen: str, out: Path) -> float:
    predict = {**METHODS, **ABLATIONS}[method](study)
    lengths: list[float] = []
    for name in (name for name in NBT_5000X if name.startswith(specimen)):
        micrograph = read_micrograph(study.data / NBT / "images" / f"{name}.tif")
        labels = predict(micrograph)
        field = labels[: int(np.flatnonzero(labels.any(axis=1)).max()) + 1]
        grains = measure.regionprops(segmentation.clear_border(field))
        lengths += [grain.feret_diameter_max * (micrograph.pixel_size_um or np.nan) for grain in grains]
        out.mkdir(parents=True, exist_ok=True)
        iio.imwrite(out / f"{study.name}-{name}-{method}-{study.seed}.png", overlay(to_grey8(micrograph.image), labels, field=labels > 0))
    return float(np.mean(lengths))


Figures = dict[str, dict[str, list[dict[str, float]]]]  # field, method: a row of metrics a seed


@dataclass
class Done:
    """What has been measured so far: figures, and seconds of the trainings behind them, by field, method and seed."""

    figures: Figures = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    seconds: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    refused: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def run(self, study: Study, method: str, overlays: Path) -> None:
        """Measure one method; a refusal is a result, too."""
        try:
            scored = (score if study.material.test else grain_lengths)(study, method, overlays)
        except UserError as error:
            self.refused[study.name][method] = str(error)
            print(f"{study.name} {method} {study.seed} refused: {error}", flush=True)
            return
        self.figures[study.name][method].append(scored)
        self.seconds[study.name][method].append(study.seconds)
        print(study.name, method, study.seed, {metric: round(value, 3) for metric, value in scored.items()}, study.seconds, flush=True)


def table(figures: Figures) -> pd.DataFrame:
    """Mean and, from two seeds, standard deviation of every metric; a row a field and method."""
    rows = {}
    for name, methods in figures.items():
        for method, seeds in methods.items():
            frame = pd.DataFrame(seeds)
            spread = frame.std() if len(frame) > 1 else None
            rows[name, method] = {metric: f"{frame[metric].mean():.3f}" + ("" if spread is None else f" ± {spread[metric]:.3f}") for metric in frame}
    return pd.DataFrame(rows).T.fillna("")


def summary(figures: Figures) -> dict[str, Any]:
    """The last line's object."""
    def spread(seeds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
        return {metric: {"mean": round(float(values.mean()), 4), "std": round(float(values.std(ddof=min(len(values) - 1, 1))), 4)}
                for metric, values in pd.DataFrame(seeds).items()}

    return {"fields": {name: {method: spread(seeds) for method, seeds in methods.items()} for name, methods in figures.items()}}


def record(done: Done, preset: str) -> Path:
    """Keep the figures under ``benchmarks/results/``, those of fields and methods that this run left out as they were."""
    path = RESULTS / f"real_micrographs_{preset}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"fields": {}, "made": {}, "refused": {}}
    made = {"command": "python -m benchmarks.real_micrographs " + _without_places(sys.argv[1:]), "commit": tracking.git_commit(ROOT)}
    for name, methods in summary(done.figures)["fields"].items():
        kept["fields"].setdefault(name, {}).update(methods)
        for method in methods:
            kept["made"].setdefault(name, {})[method] = {**made, "seeds": len(done.figures[name][method]), "seconds": done.seconds[name][method]}
    for name, reasons in done.refused.items():
        kept["refused"].setdefault(name, {}).update(reasons)
    kept["machine"] = machine.describe()
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def _without_places(arguments: Sequence[str]) -> str:
    """The command line but for the folders of this machine."""
    places = [i for i, argument in enumerate(arguments) if argument in ("--work", "--data")]
    return " ".join(argument for i, argument in enumerate(arguments) if i not in places and i - 1 not in places)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*MATERIALS], default=[*MATERIALS], metavar="FIELD", help=", ".join(MATERIALS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ABLATIONS], default=[*METHODS], metavar="METHOD",
                        help=", ".join(METHODS) + "; ours with one thing changed: " + ", ".join(ABLATIONS))
    parser.add_argument("--preset", choices=[*PRESETS], default="cpu")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each method with other random numbers throughout")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the labelled micrographs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study", help="where trainings and overlays are kept")
    parser.add_argument("--record", action="store_true", help="keep the figures under benchmarks/results")
    options = parser.parse_args()
    config = load_config(ROOT / "configs" / f"{PRESETS[options.preset]}.yaml")
    done = Done()
    for name in options.only:
        material = MATERIALS[name]
        for method in options.methods if material.test else ["ours"]:
            for seed in range(options.first_seed, options.first_seed + (1 if method in SEEDLESS else options.seeds)):
                done.run(Study(name, material, options.data.resolve(), options.work.resolve(), config, seed), method, options.work / "overlays")
    with pd.option_context("display.width", 250, "display.max_columns", None):
        print(table(done.figures).to_string())
    if options.record:
        print(record(done, options.preset))
    print(json.dumps(summary(done.figures)))


if __name__ == "__main__":
    main()
