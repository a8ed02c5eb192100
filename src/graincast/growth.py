"""Grain growth as the microscope would see it: a simulated time series, imaged by the translator, measured by the segmenter.

The simulation knows every grain at every time, so it tells how well the segmented series gives mean size, spread and the
kinetics of growth (`graincast.kinetics`), which is what figure 6 of Zahran et al. 2026 asks.

Notes
-----
*Look.* All frames are translated with the same seed, so noise and what lies on the surface stay in their place. What belongs to
a grain (its tilt and doming) goes with its id (`drawn_ids`). Tones are spread as the translator wants them when they are drawn,
not from the grains that each frame happens to have. The translator normalises by the whole image, so greys still shift as
boundaries become fewer, by less than a level.

*Sizes.* The field is periodic, so the simulation counts each grain once and whole. A micrograph cuts grains at its border; those are
left out, and the others count by how probable it was that a grain of their extent lies whole in the field (Miles 1974, Lantuejoul
1980), for large grains are cut more often.

*Fit.* Frames from the one at which the mean area has grown by `SCALING` on, as long as `FEWEST_GRAINS` are left: before, the size
distribution is still that of the start; after, too few grains say anything.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import ndimage as ndi
from tqdm import tqdm

from graincast.config import Simulate
from graincast.errors import UserError
from graincast.evaluate.metrics import score_instances
from graincast.kinetics import FEWEST_TIMES, Kinetics, Sizes, difference, fit_kinetics
from graincast.labels import fill_lines
from graincast.measure.scan import border_weights, scan
from graincast.simulate import library, structure
from graincast.store.imageset import whole_folder

if TYPE_CHECKING:
    from graincast.segment.segmenter import Segmenter
    from graincast.synthesise.cyclegan.train import CycleGAN

SIZE_PX = 1024
"""Side of the field: some 300 grains are left at the end, and their mean size is known to 2.5 %."""
FRAMES = 16
START, END = 0.5, 1.4
"""Mean grain diameter at the start and at the end, in that of the segmenter's training: grains become four times as large (in
area) while the fit looks on, and never much smaller or larger than the segmenter's augmentation showed it (1.35 either way)."""
AREA_RATE = 1.14
"""Growth of the mean grain area, in L kappa, measured by ``python -m benchmarks.grain_growth``; here it only says how many steps
lead to `END`."""
SCALING = 2.0
"""Growth of the mean area after which scaled sizes are distributed alike (``docs/simulator.md``)."""
FEWEST_GRAINS = 100
BLOCKS = 5
"""Blocks along each side of the field, for the intervals: at the end some three grains wide."""
WRAP_PX = 16
"""Margin copied from the other side of the periodic field; wider than a boundary."""
VIEW_PX = 320
"""Side of the part of a frame that is shown."""

TABLE, FITS, FIGURE, ANIMATION = "growth.csv", "growth.json", "growth.png", "growth.gif"
KINDS = ("true", "segmented")


@dataclass(frozen=True)
class View:
    """A corner of a frame for the figures: micrograph, uint8, and segmented grains, int32, both (height, width)."""

    micrograph: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Growth:
    """A series and what was fitted to it.

    Attributes
    ----------
    table : pandas.DataFrame
        A row a frame: ``step``, ``time_per_mobility`` (in 1/L, the grid's spacing and kappa being 1), ``true_grains`` (in the periodic
        field), ``true_grains_in_view`` (as the field's border cuts them), ``segmented_grains``, ``count_error_percent`` (the
        latter against those in view), ``ap50``, and for ``true_`` and ``segmented_`` each ``mean_diameter_*`` and
        ``std_diameter_*`` (``*``: um where the simulation has a pixel size, else px), and ``fitted``: whether the fit uses it.
    unit : str
        ``um`` or ``px``.
    fits : dict of str to Kinetics
        By ``true`` and ``segmented``; empty where too few frames lie in the scaling regime or too few grains are found, of which
        `doubt` tells.
    doubt : str or None
        One sentence.
    views : list of View
        One a frame.
    """

    table: pd.DataFrame
    unit: str
    fits: dict[str, Kinetics]
    doubt: str | None
    views: list[View]

    def to_dict(self) -> dict[str, Any]:
        """What ``growth.json`` holds."""
        chosen = self.table[self.table["fitted"]]
        told: dict[str, Any] = {
            "law": "R^n - R0^n = k (t - t0); R: half of the mean equivalent diameter, t0: time of the first fitted frame",
            "length_unit": self.unit, "time_unit": "1/L (mobility)", "confidence": 0.95,
            "fitted_frames": chosen.index.tolist(), "fitted_steps": chosen["step"].tolist(), "doubt": self.doubt,
            "mean_abs_count_error_percent": float(chosen["count_error_percent"].abs().mean()) if len(chosen) else None,
            "mean_ap50": float(chosen["ap50"].mean()) if len(chosen) else None,
            **{kind: fit.to_dict() for kind, fit in self.fits.items()},
        }
        if self.fits:
            told["segmented_less_true"] = {name: asdict(difference(self.fits["segmented"], self.fits["true"], name))
                                           for name in ("exponent", "ideal_rate", "log_slope")}
        return told


def growth_of(translator: CycleGAN, segmenter: Segmenter, config: Simulate, out: Path, *, frames: int | Sequence[int] = FRAMES,
              size: int = SIZE_PX, seed: int = 0) -> Growth:
    """Simulate, image, segment and measure a series of growth, and write it.

    Parameters
    ----------
    translator : CycleGAN
        Makes micrographs of the frames.
    segmenter : Segmenter
        With a preparation, which tells the grain size it was trained at.
    config : graincast.config.Simulate
        What grains look like and how they grow; ``size``, ``grains``, ``grain_diameter_um`` and ``steps`` are chosen by this
        function. Lengths are in um where ``pixel_size_um`` is set.
    out : Path
        The folder to make: ``growth.csv``, ``growth.json``, ``growth.png`` and ``growth.gif``.
    frames : int or sequence of int
        Number of frames, evenly in time; or the time steps to look at, rising, from 1 on.
    size : int
        Side of the field, px.
    seed : int
        Draws the surface and the noise; grains are drawn by ``config.seed``.

    Returns
    -------
    Growth

    Raises
    ------
    UserError
        If there are fewer than `graincast.kinetics.FEWEST_TIMES` frames, they do not rise, the segmenter has no preparation, or
        the field cannot be simulated.
    """
    from graincast.report import growth_figure

    grown, steps = plan(config, translator, segmenter, frames, size)
    library.check(grown)
    growth = measure_series(simulate_series(grown, steps), translator, segmenter, grown, seed)
    with whole_folder(out) as folder:
        growth.table.to_csv(folder / TABLE, index_label="frame", float_format="%.6g")
        (folder / FITS).write_text(json.dumps({**growth.to_dict(), "seed": seed, "simulate": grown.model_dump()}, indent=1))
        (folder / FIGURE).write_bytes(growth_figure.figure(growth))
        growth_figure.animate(growth, folder / ANIMATION)
    return growth


def plan(config: Simulate, translator: CycleGAN, segmenter: Segmenter, frames: int | Sequence[int] = FRAMES,
         size: int = SIZE_PX) -> tuple[Simulate, list[int]]:
    """The simulation whose grains are of the segmenter's size and of the translator's spread of tones, and the time steps to look at;
    see `growth_of`."""
    if segmenter.preparation is None:
        raise UserError("this segmenter was trained without micrographs and does not know its grain size; one that the training pipeline made "
                        "would be right")
    start, end = (np.pi / 4 * (factor * segmenter.preparation.grain_diameter_px) ** 2 for factor in (START, END))
    grown = config.model_copy(update={"size": size, "grains": max(round(size**2 / start), 2), "grain_diameter_um": None,
                                      "grey_spread": config.grey_spread * translator.tones.spread})
    last = (end - start) / AREA_RATE / config.time_step
    steps = [round(last * k / frames) for k in range(1, frames + 1)] if isinstance(frames, int) else list(frames)
    if len(steps) < FEWEST_TIMES:
        raise UserError(f"--frames: {len(steps)} frames tell no kinetics; at least {FEWEST_TIMES}, better {FRAMES}, would be right")
    if steps[0] < 1 or any(late <= early for early, late in itertools.pairwise(steps)):
        raise UserError(f"--frames {','.join(map(str, steps))}: time steps that rise, from 1 on, would be right, e.g. 2000,4000,8000,16000")
    return grown, steps


def simulate_series(config: Simulate, steps: Sequence[int]) -> list[structure.Frame]:
    """The frames of one structure."""
    return list(tqdm(structure.simulate_frames(config, 0, steps), desc="simulate", unit="frame", total=len(steps), disable=None))


def translate_series(frames: Sequence[structure.Frame], translator: CycleGAN, seed: int) -> Iterator[np.ndarray]:
    """Micrographs, uint8 (height, width), of frames that `simulate_series` made of a `plan`, all with the same look (see the module's
    notes)."""
    held = replace(translator, tones=replace(translator.tones, spread=1.0, place=seed))
    for frame, ids in zip(frames, drawn_ids([frame.labels for frame in frames]), strict=True):
        yield held.to_sem(frame.picture, ids, seed)


def drawn_ids(series: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Ids under which the grains of a series are drawn.

    Parameters
    ----------
    series : sequence of ndarray
        Labels of a periodic field at successive times, int32 (height, width), 0 = boundary.

    Returns
    -------
    list of ndarray
        The same with other ids. Parts of a grain that the border cuts have ids of their own, for they are tilted about centres of
        their own; the part on the side where the grain was first seen keeps the grain's. The highest id is of a part
        that is seen at all times, so that as many numbers are drawn for every frame.
    """
    count = 1 + max(int(labels.max()) for labels in series)
    home = np.full((2, count), -1)  # half of the field in which a grain was first seen, by axis; -1: not yet
    parts = []
    for labels in series:
        present = np.unique(labels)
        part = labels.copy()
        for axis, side in enumerate(labels.shape):
            new = present[home[axis, present] < 0]
            home[axis, new] = np.array(ndi.center_of_mass(labels >= 0, labels, new))[:, axis] >= side / 2 if len(new) else []
            cut = np.zeros(count, bool)
            cut[np.intersect1d(labels.take(0, axis), labels.take(-1, axis))] = True
            cut[0] = False
            far = np.expand_dims(np.arange(side) >= side // 2, 1 - axis)
            part += np.where(cut[labels] & (far != home[axis][labels]), (axis + 1) * count, 0).astype(part.dtype)
        parts.append(part)
    seen = np.zeros(4 * count, int)
    for part in parts:
        seen[np.unique(part)] += 1
    seen[0] = 0  # boundary stays 0
    rank = np.empty(seen.size, np.int32)
    order = np.argsort(seen, kind="stable")
    order = np.concatenate([[0], order[(seen[order] > 0)], order[(seen[order] == 0) & (order > 0)]])  # no numbers for what is never seen
    rank[order] = np.arange(seen.size)
    return [rank[part] for part in parts]


def measure_series(frames: Sequence[structure.Frame], translator: CycleGAN, segmenter: Segmenter, config: Simulate, seed: int) -> Growth:
    """Segment and measure every frame, and fit; as `growth_of` returns it."""
    unit, pixel = ("um", config.pixel_size_um) if config.pixel_size_um else ("px", 1.0)
    rows, sums, views = [], [], []
    micrographs = translate_series(frames, translator, seed)
    for frame, micrograph in tqdm(zip(frames, micrographs, strict=True), desc="segment", unit="frame", total=len(frames), disable=None):
        found, true = segmenter.segment(micrograph), structure.separate(frame.labels)
        agreement = score_instances(found, fill_lines(true))
        sums.append((periodic_sizes(frame.labels, pixel), visible_sizes(found, pixel)))
        rows.append({"step": frame.step, "time_per_mobility": frame.step * config.time_step,
                     "true_grains": int(np.unique(frame.labels[frame.labels > 0]).size), "true_grains_in_view": int(true.max()),
                     "segmented_grains": int(found.max()), "count_error_percent": 100 * (agreement["count_ratio"] - 1),
                     "ap50": agreement["ap50"]})
        views.append(View(micrograph[:VIEW_PX, :VIEW_PX], found[:VIEW_PX, :VIEW_PX]))
    table = pd.DataFrame(rows)
    sizes = {kind: Sizes(*np.stack([pair[k] for pair in sums], axis=-1)) for k, kind in enumerate(KINDS)}
    for kind, one in sizes.items():
        table[f"{kind}_mean_diameter_{unit}"], table[f"{kind}_std_diameter_{unit}"] = one.mean, one.deviation
    area = config.size**2 / table["true_grains"]
    table["fitted"] = (area >= SCALING * config.size**2 / config.grains) & (table["true_grains"] >= FEWEST_GRAINS)
    chosen = table["fitted"].to_numpy()
    if chosen.sum() < FEWEST_TIMES:
        doubt = (f"{chosen.sum()} frames lie in the scaling regime (mean area at least {SCALING:g} times that of the start, at least {FEWEST_GRAINS} "
                 f"grains), {FEWEST_TIMES} at least are needed for kinetics; later frames or a larger field would be right")
        return Growth(table, unit, {}, doubt, views)
    unseen = int((~(table[f"segmented_std_diameter_{unit}"][chosen] > 0)).sum())
    if unseen:
        doubt = (f"in {unseen} of the frames to be fitted the segmenter left fewer than two grains whole; a better one, or a larger field, "
                 "would be right")
        return Growth(table, unit, {}, doubt, views)
    times = table["time_per_mobility"].to_numpy()[chosen]
    return Growth(table, unit, {kind: fit_kinetics(times, one.at(chosen)) for kind, one in sizes.items()}, None, views)


def periodic_sizes(labels: np.ndarray, pixel_size: float = 1.0) -> np.ndarray:
    """Sums over the equivalent diameters of a periodic field's grains, by block: number, sum, sum of squares; (3, blocks).

    `labels` are (height, width) with 0 = boundary; boundaries are shared out between the grains beside them.
    """
    grown = fill_lines(np.pad(labels, WRAP_PX, mode="wrap"))[WRAP_PX:-WRAP_PX, WRAP_PX:-WRAP_PX]
    _, first, area = np.unique(grown, return_index=True, return_counts=True)
    return _by_block(first, area, np.ones(len(area)), labels.shape, pixel_size)


def visible_sizes(labels: np.ndarray, pixel_size: float = 1.0) -> np.ndarray:
    """The same of grains 1..N that tile an image, those that its border does not cut, each with its `border_weights`."""
    scanned = scan(labels)
    whole = ~scanned.at_border
    boxes = scanned.boxes[whole]
    weight = border_weights(boxes, (0, 0, *labels.shape))
    return _by_block(boxes[:, 0] * labels.shape[1] + boxes[:, 1], scanned.area_px2[whole], weight, labels.shape, pixel_size)


def _by_block(place: np.ndarray, area: np.ndarray, weight: np.ndarray, shape: tuple[int, ...], pixel_size: float) -> np.ndarray:
    """Weighted sums of grains by the block that `place`, an index into the flat image, lies in."""
    row, column = np.unravel_index(place, shape)
    block = row * BLOCKS // shape[0] * BLOCKS + column * BLOCKS // shape[1]
    diameter = 2 * np.sqrt(area / np.pi) * pixel_size
    return np.stack([np.bincount(block, weight * diameter**power, BLOCKS**2) for power in range(3)])


def load_models(model: str | None = None, run: Path | None = None, translator: Path | None = None,
                segmenter: Path | None = None) -> tuple[CycleGAN, Segmenter]:
    """A translator and the segmenter that was trained on what it made.

    Parameters
    ----------
    model : str, optional
        A registered version (``3``) or alias (``challenger``), whose translator is fetched from DVC by the hash that the version
        carries. None: the champion, or the newest version while there is none.
    run : Path, optional
        Folder of a training run, to take both from instead.
    translator, segmenter : Path, optional
        Their folders, both or none of them.

    Raises
    ------
    UserError
        If more than one of these is given, or one lacks what it should hold; `Unavailable` if the registry or a DVC remote
        does not answer.
    """
    from graincast.segment.segmenter import Segmenter
    from graincast.synthesise.cyclegan.train import CycleGAN

    if (translator is None) != (segmenter is None):
        raise UserError("--translator and --segmenter belong together; both, or neither of them, would be right")
    if sum(way is not None for way in (model, run, translator)) > 1:
        raise UserError("--model, --run and --translator exclude each other; one of them would be right")
    if translator and segmenter:
        return CycleGAN.load(translator), Segmenter.load(segmenter)
    if run:
        return CycleGAN.load(_in_run(run, "translator")), Segmenter.load(_in_run(run, "segmenter"))
    state = Path(os.environ.get("GRAINCAST_ROOT", ".")) / ".graincast"
    state.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="growth-", dir=state) as scratch:  # DVC puts what it fetches into a checkout alone
        return _registered(model, Path(scratch))


def _in_run(run: Path, name: str) -> Path:
    """Folder of a model in that of a run; of several the one in the last folder by name."""
    found = sorted(run.glob(f"*/{name}/{name}.safetensors"))
    if not found:
        raise UserError(f"--run {run}: no trained {name} lies in it; the folder of a training run (runs/training_pipeline-...) would be right")
    return found[-1].parent


def _registered(model: str | None, into: Path) -> tuple[CycleGAN, Segmenter]:
    from graincast.segment.segmenter import Segmenter
    from graincast.store import registry, versioning
    from graincast.synthesise.cyclegan.train import CycleGAN

    known = registry.versions()
    champion = [one for one in known if registry.CHAMPION in one.aliases]
    wanted = [one for one in known if model in (str(one.number), *one.aliases)] if model else champion or known[:1]
    if not wanted:
        numbers = ", ".join(str(one.number) for one in known) or "none yet, train one (make demo)"
        raise UserError(f"{registry.MODEL} has no version or alias '{model or registry.CHAMPION}'; registered: {numbers}; --run FOLDER takes the "
                        "models of a training run instead")
    version = wanted[0]
    if "translator" not in version.hashes:
        raise UserError(f"version {version.number} of {registry.MODEL} carries no hash of its translator; --translator FOLDER --segmenter FOLDER, "
                        "or a version that a pipeline of this graincast trained, would be right")
    translator = versioning.fetch(versioning.Version(version.hashes["translator"], 0, 0), into / "translator")
    return CycleGAN.load(translator), Segmenter.load(registry.fetch(version.number, into / "segmenter"))
