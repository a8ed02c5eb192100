"""How well drift is told from chance: ``python -m benchmarks.drift [--work FOLDER] [--data FOLDER] [--sessions N] [--record]``.

*Virtual sessions.* A champion learns a virtual microscope; its reference is `REFERENCE_SESSIONS` in-control sessions. Settings
of in-control sessions differ from one to the next (`JITTER`), as those of a microscope do. Then come further in-control
sessions, and sessions in which one thing has changed by a stated size (`KINDS`), all with other seeds than the reference
and than anything the thresholds or the rules of `graincast.monitor.drift` were chosen on (`DEVELOPMENT_SEED`).

*Real images* (``--data``; skipped where absent), none of which any threshold was chosen on: the NBT ceramic at 5000x with one
specimen in turn left out of the reference, its 2000x fields without their pixel size, specimen 4, whose grains are ten times
larger, and images of other materials. The champion is the virtual one, network and synthetic images, which has seen none of
them; the scale of all preparations is the median of the twelve 5000x fields'.

The last line is one JSON object; ``--record`` also keeps it in ``benchmarks/results/drift.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import machine
from graincast import stages
from graincast.config import Config, VirtualSem
from graincast.errors import UserError
from graincast.microscope.preparation import Preparation
from graincast.microscope.quality import describe
from graincast.microscope.reader import Micrograph, read_micrograph
from graincast.microscope.scale import estimate_grain_diameter
from graincast.microscope.virtual_sem import render
from graincast.monitor.descriptors import Described, describe_patches, describe_set
from graincast.monitor.drift import Drift, Reference, calibrate, describe_session, judge, make_reference
from graincast.segment.segmenter import Segmenter
from graincast.simulate.phase_field import evolve
from graincast.simulate.tessellation import tessellate
from graincast.store import tracking
from graincast.store.imageset import ImageSet, ImageSetWriter

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "drift.json"
SIZE = 160  # px, of a virtual field
PIXEL_UM, GRAIN_UM = 0.05, 1.9  # of the champion's microscope and specimens
REFERENCE_SESSIONS, REFERENCE_IMAGES = 6, 8
IMAGES = (5, 20)  # fewest and most in a session
REFERENCE_SEED, DEVELOPMENT_SEED, REPORT_SEED = 11, 22, 33
JITTER = {"gain": 0.02, "electrons": 0.06, "probe_um": 0.06, "groove_depth_um": 0.04, "channelling": 0.05, "line_gain": 0.1, "charging": 0.05,
          "shading": 0.1, "detector_noise": 0.05, "contamination": 0.2}
"""Standard deviation of the settings from one in-control session to the next, fraction of the setting."""
GRAIN_JITTER, OFFSET_JITTER = 0.03, 0.004
"""The same of the grain diameter (fraction) and of the offset (fraction of full scale)."""


@dataclass(frozen=True)
class Kind:
    """A kind of drift.

    Attributes
    ----------
    setting : str
        What changes.
    factors : tuple of float
        By which factors, in growing order of harm; the curve is measured at all of them.
    stated : float
        The one at which the detection rate counts.
    cause : str
        What the verdict should name.
    """

    setting: str
    factors: tuple[float, ...]
    stated: float
    cause: str = "look"


KINDS = {
    "defocus": Kind("probe_um", (1.5, 2.0, 3.0, 4.0), 3.0, "focus"),
    "gain": Kind("gain", (0.93, 0.87, 0.8, 0.7), 0.8),
    "noise": Kind("electrons", (0.75, 0.6, 0.4, 0.25), 0.4),
    "charging": Kind("charging", (3.0, 5.0, 7.0, 10.0), 7.0),
    "magnification": Kind("magnification", (1.1, 1.2, 1.35, 1.6), 1.35, "size"),
    "tones": Kind("channelling", (1.3, 1.6, 2.0, 3.0), 2.0),
}


# Virtual sessions


@lru_cache(maxsize=8192)
def grain_map(grain_px: float, seed: int) -> np.ndarray:
    """A dense grain map of `SIZE` px."""
    rng = np.random.default_rng([seed, 1])
    cells = tessellate((SIZE, SIZE), max(round(SIZE**2 / (math.pi / 4 * grain_px**2)), 4), rng, area_spread=0.5, regularity=0.5)
    return evolve(cells, round(0.4 * grain_px**2 / 10), 0.1).labels


def virtual_micrographs(rng: np.random.Generator, count: int, kind: str | None = None, factor: float = 1.0) -> list[np.ndarray]:
    """A session of virtual fields, uint8: in-control settings, but for what the kind changes by the factor."""
    settings = VirtualSem()
    settings = settings.model_copy(update={name: getattr(settings, name) * max(1 + spread * rng.standard_normal(), 0.1)
                                           for name, spread in JITTER.items()} | {"offset": settings.offset + OFFSET_JITTER * rng.standard_normal()})
    pixel, grain = PIXEL_UM, GRAIN_UM * (1 + GRAIN_JITTER * rng.standard_normal())
    if kind == "magnification":
        pixel *= factor if rng.random() < 0.5 else 1 / factor
    elif kind:
        name = KINDS[kind].setting
        settings = settings.model_copy(update={name: getattr(settings, name) * factor})
    return [render(grain_map(round(grain / pixel, 1), int(rng.integers(2**31))), pixel, settings, rng) for _ in range(count)]


def write_set(preparation: Preparation, micrographs: Sequence[tuple[str, str, Micrograph]], out: Path, pixel_size_um: float) -> ImageSet:
    """An ImageSet of (id, session, micrograph), prepared as the champion's were; files without a pixel size take `pixel_size_um`.

    A preparation that cuts no info bar is that of virtual fields, which nothing need inspect.
    """
    with ImageSetWriter(out, "micrographs") as writer:
        for name, session, micrograph in micrographs:
            inspection = preparation.inspect(micrograph) if preparation.cut_info_bar else None
            if inspection and inspection.refused:
                writer.refuse(inspection.refused, id=name, session=session)
                continue
            field = micrograph.image[:inspection.bar_row] if inspection else micrograph.image
            try:
                diameter = estimate_grain_diameter(field)
            except ValueError:
                diameter = math.nan
            try:
                image, scale = preparation.resample(field, preparation.pixel_size(micrograph, pixel_size_um))
            except ValueError as error:
                writer.refuse(str(error), id=name, session=session)
                continue
            writer.add(image, id=name, session=session, scale=scale, grain_diameter_px=diameter,
                       **(inspection.quality if inspection else describe(field, micrograph.bit_depth)))
    return writer.result


def virtual_set(preparation: Preparation, sessions: dict[str, list[np.ndarray]], out: Path) -> ImageSet:
    """An ImageSet of virtual sessions, whose pixel size nobody tells: they are prepared at the usual scale."""
    taken = [(f"{name}_{k}", name, Micrograph(image.astype(np.float32) / 255, 8))
             for name, images in sessions.items() for k, image in enumerate(images)]
    return write_set(replace(preparation, cut_info_bar=False), taken, out, PIXEL_UM)


def plan(seed: int, in_control: int, stated: int, curve: int) -> Iterator[tuple[str | None, float, np.random.Generator, int]]:
    """Kind, factor, source of randomness and number of images of every virtual session."""
    wanted: list[tuple[str | None, float, int]] = [(None, 1.0, in_control)]
    wanted += [(name, factor, stated if factor == kind.stated else curve) for name, kind in KINDS.items() for factor in kind.factors]
    for number, (name, factor, count) in enumerate(wanted):
        for k in range(count):
            rng = np.random.default_rng([seed, number, k])
            yield name, factor, rng, round(math.exp(rng.uniform(math.log(IMAGES[0]), math.log(IMAGES[1]))))


def virtual_reference(config: Config, segmenter: Segmenter, synthetic: ImageSet, scratch: Path) -> Reference:
    """The champion's reference of in-control sessions."""
    sessions = {f"session_{k}": virtual_micrographs(np.random.default_rng([REFERENCE_SEED, k]), REFERENCE_IMAGES) for k in range(REFERENCE_SESSIONS)}
    assert segmenter.preparation is not None
    return make_reference(config.drift, segmenter, virtual_set(segmenter.preparation, sessions, scratch / "reference"), synthetic)


def describe_virtual(reference: Reference, segmenter: Segmenter, micrographs: list[np.ndarray], scratch: Path) -> Described:
    """A virtual session in numbers."""
    assert segmenter.preparation is not None
    return describe_session(reference, segmenter, virtual_set(segmenter.preparation, {"session": micrographs}, scratch / "session"))


# The champion


def champion(config: Config, work: Path) -> tuple[Segmenter, ImageSet]:
    """A segmenter trained on the virtual SEM, with the synthetic images it learned from; trained once, kept in `work`."""
    def kept(name: str, makes: Any) -> Path:
        folder = work / "champion" / name
        if not folder.exists():
            makes(folder)
        return folder

    session = kept("session", lambda out: stages.run_virtual_sem(config.session.virtual, out))
    library = kept("morphologies", lambda out: stages.run_simulate(config.simulate, out))
    splits = {name: ImageSet(library / name) for name in ("translator", "synthetic", "validation")}
    seen = ImageSet(kept("micrographs", lambda out: stages.run_ingest(config.ingest, session / "micrographs", splits["translator"], out)))
    translator = kept("translator", lambda out: stages.run_train_translator(config.translator, splits["translator"], seen, out))
    drawn = kept("synthetic", lambda out: stages.run_synthesise(config.synthesise, splits, translator, out))
    training, validation = ImageSet(drawn / "training"), ImageSet(drawn / "validation")
    segmenter = kept("segmenter", lambda out: stages.run_train_segmenter(config.segmenter, training, validation, seen, out))
    return Segmenter.load(segmenter), training


def trained(run: Path) -> tuple[Segmenter, ImageSet]:
    """The same of a finished run of `make demo`."""
    return Segmenter.load(next(run.glob("train_segmenter/*/segmenter.safetensors")).parent), ImageSet(next(run.glob("synthesise/*/training")))


# Real images

NBT = "nbt-ceramic-sem/images"
NBT_5000X = ("1_001", "1_003", "2_001", "3_001", "3_002", "5_001", "5_004", "6_001", "6_004", "6_005", "6_007", "8_001")
NBT_2000X = ("1_002", "2_002", "5_002", "6_002", "8_002")
NBT_COARSE = ("4_001", "4_004")
NBT_OUTERMOST = "18"
"""Specimens of the coarsest and the finest grains (2.89 and 1.30 um measured by hand): left out, the others' range does not hold them."""


class RealStudy:
    """NBT references without a specimen, and sessions judged against them; every file is prepared and described once."""

    def __init__(self, config: Config, segmenter: Segmenter, synthetic: ImageSet, data: Path, scratch: Path) -> None:
        self.config, self.segmenter, self.data, self.scratch = config, segmenter, data, scratch
        self.preparation = self._preparation()
        self.drawn = describe_patches(list(synthetic)[::4], segmenter, config.drift.patch)
        self.fine = self._describe([(stem, stem[0], read_micrograph(data / NBT / f"{stem}.tif")) for stem in NBT_5000X])

    def _preparation(self) -> Preparation:
        """The champion's, with the scale at which the 5000x fields' grains, as estimated without labels, have its grain size on the median."""
        own = self.segmenter.preparation
        assert own is not None
        files = [read_micrograph(self.data / NBT / f"{stem}.tif") for stem in NBT_5000X]
        sizes = [estimate_grain_diameter(file.image[:own.inspect(file).bar_row]) * (file.pixel_size_um or math.nan) for file in files]
        self.pixel_um = float(np.median([file.pixel_size_um for file in files]))
        return replace(own, target_pixel_size_um=float(np.median(sizes)) / own.grain_diameter_px, scale=None, bright_boundaries=None)

    def _describe(self, taken: Sequence[tuple[str, str, Micrograph]]) -> Described:
        images = write_set(self.preparation, taken, self.scratch / "session", self.pixel_um)
        return describe_set(images, self.segmenter, self.config.drift.patch, self.preparation.grain_diameter_px)

    def reference(self, without: str = "", one_session: bool = False) -> Reference:
        """Of the 5000x fields of all specimens but one; a specimen is a session, or all are one, as they lie in one folder."""
        kept = part(self.fine, [k for k, stem in enumerate(NBT_5000X) if stem[0] != without])
        if one_session:
            kept = replace(kept, images=kept.images.assign(session="nbt"))
        return calibrate(self.config.drift, kept, self.drawn, self.preparation.grain_diameter_px)

    def judge(self, reference: Reference, files: Sequence[Path], pixel_known: bool = True) -> Drift | str:
        """The verdict on files as a session, or why they were refused before that."""
        taken = [(file.stem, "session", read_micrograph(file)) for file in files]
        if not pixel_known:
            taken = [(stem, session, replace(micrograph, pixel_size_um=None)) for stem, session, micrograph in taken]
        try:
            return judge(reference, self.config.drift, self._describe(taken))
        except UserError as error:  # every file was refused
            return str(error)

    def judge_left_out(self, specimen: str, one_session: bool = False) -> Drift:
        """The verdict on a specimen's 5000x fields by the reference of the others."""
        own = part(self.fine, [k for k, stem in enumerate(NBT_5000X) if stem[0] == specimen])
        return judge(self.reference(specimen, one_session), self.config.drift, own)

    def nbt(self, *stems: str) -> list[Path]:
        """Files of these fields."""
        return [self.data / NBT / f"{stem}.tif" for stem in stems]


def part(described: Described, images: Sequence[int]) -> Described:
    """Some of the images."""
    chosen = described.patches["image"].isin(images).to_numpy()
    patches = described.patches[chosen].reset_index(drop=True)
    patches["image"] = np.searchsorted(images, patches["image"])
    return Described(described.images.iloc[list(images)].reset_index(drop=True), patches, described.encoder[chosen], described.texture[chosen])


def real_figures(study: RealStudy) -> tuple[dict[str, Any], list[str]]:
    """Figures of the real images, and a line about each session."""
    lines: list[str] = []

    def told(name: str, verdict: Drift | str) -> Drift | str:
        lines.append(f"{name:32s} " + (f"refused: {verdict}" if isinstance(verdict, str) else
                                       f"{verdict.cause:8s} score {max(verdict.scores['columns_score'], verdict.scores['embedding_score']):6.2f}  "
                                       f"{', '.join(entry['descriptor'] for entry in verdict.moved[:4])}"))
        return verdict

    figures = _nbt_figures(study, told, one_session=False)
    lines.append("the same, all specimens of the reference in one session:")
    figures["nbt_one_session"] = _nbt_figures(study, told, one_session=True)
    whole = study.reference()
    others = sorted(file for file in (study.data / "out-of-distribution").iterdir() if file.suffix.lower() in (".jpg", ".png", ".tif"))
    strange = {file.stem: told(file.stem, study.judge(whole, [file], pixel_known=False)) for file in others}
    together = told("all of them as a session", study.judge(whole, others, pixel_known=False))
    return figures | {"ood_caught": sum(_caught(v) for v in strange.values()), "ood_images": len(strange),
                      "ood_named": {name: _name(v) for name, v in strange.items()}, "ood_session": _name(together),
                      "ood_trained_on": sum(_trained_on(v) for v in [*strange.values(), together])}, lines


def _nbt_figures(study: RealStudy, told: Callable[[str, Drift | str], Drift | str], one_session: bool) -> dict[str, Any]:
    left_out = {specimen: _name(told(f"NBT specimen {specimen} left out", study.judge_left_out(specimen, one_session))) for specimen in "123568"}
    whole = study.reference(one_session=one_session)
    zoomed = {stem: told(f"NBT {stem} at 2000x, size unknown", study.judge(whole, study.nbt(stem), pixel_known=False)) for stem in NBT_2000X}
    together = told("all five as a session", study.judge(whole, study.nbt(*NBT_2000X), pixel_known=False))
    coarse = told("NBT specimen 4", study.judge(whole, study.nbt(*NBT_COARSE)))
    inside = [specimen for specimen in left_out if specimen not in NBT_OUTERMOST]
    return {"nbt_false_alarms": sum(left_out[specimen] != "none" for specimen in inside), "nbt_inside": len(inside), "nbt_left_out": left_out,
            "nbt_2000x_caught": sum(_caught(v) for v in zoomed.values()), "nbt_2000x_named": {stem: _name(v) for stem, v in zoomed.items()},
            "nbt_2000x_session": _name(together), "nbt_specimen_4": _name(coarse)}


def _caught(verdict: Drift | str) -> bool:
    return isinstance(verdict, str) or verdict.drifted


def _trained_on(verdict: Drift | str) -> bool:
    return not isinstance(verdict, str) and verdict.mendable


def _name(verdict: Drift | str) -> str:
    return "refused" if isinstance(verdict, str) else verdict.cause


# Report


def virtual_figures(verdicts: Sequence[tuple[str | None, float, int, Drift]]) -> dict[str, Any]:
    """Rates of a study's verdicts: (kind, factor, images, verdict)."""
    def share(values: Sequence[bool]) -> float:
        return round(float(np.mean(values)), 4)

    def of(kind: str | None, factor: float) -> list[Drift]:
        return [verdict for name, size, _, verdict in verdicts if name == kind and size == factor]

    clean = of(None, 1.0)
    return {
        "n_sessions": len(verdicts), "false_alarm_rate": share([v.drifted for v in clean]), "in_control_sessions": len(clean),
        "detection_rate": {name: share([v.drifted for v in of(name, kind.stated)]) for name, kind in KINDS.items()},
        "cause_named": {name: share([v.cause == kind.cause for v in of(name, kind.stated) if v.drifted]) for name, kind in KINDS.items()},
        "stated": {name: f"{kind.setting} x {kind.stated:g}" for name, kind in KINDS.items()},
        "curve": {name: {f"{factor:g}": [share([v.drifted for v in of(name, factor)]), len(of(name, factor))] for factor in kind.factors}
                  for name, kind in KINDS.items()},
    }


def virtual_part(options: argparse.Namespace, config: Config, segmenter: Segmenter, synthetic: ImageSet, scratch: Path) -> dict[str, Any]:
    """Judge virtual sessions."""
    reference = virtual_reference(config, segmenter, synthetic, scratch)
    verdicts = []
    for kind, factor, rng, count in tqdm([*plan(options.seed, *options.sessions)], "virtual sessions", disable=None):
        described = describe_virtual(reference, segmenter, virtual_micrographs(rng, count, kind, factor), scratch)
        verdicts.append((kind, factor, count, judge(reference, config.drift, described)))
    figures = virtual_figures(verdicts)
    for name, curve in figures["curve"].items():
        print(f"{name:14s} " + "  ".join(f"x{factor}: {rate:.0%} of {count}" for factor, (rate, count) in curve.items())
              + f"   cause named {figures['cause_named'][name]:.0%}")
    print(f"in control     {figures['false_alarm_rate']:.1%} of {figures['in_control_sessions']} called drift", flush=True)
    return figures


def real_part(options: argparse.Namespace, config: Config, segmenter: Segmenter, synthetic: ImageSet, scratch: Path) -> dict[str, Any]:
    """Judge real images, where there are any."""
    if not options.data.is_dir():
        print(f"no real images: {options.data} is absent")
        return {}
    figures, lines = real_figures(RealStudy(config, copy(segmenter), synthetic, options.data.resolve(), scratch))
    print("\n".join(lines), flush=True)
    return figures


PARTS = {"virtual": virtual_part, "real": real_part}


def record(options: argparse.Namespace, config: Config, figures: dict[str, Any]) -> None:
    """Keep the figures; those of a part that this run left out stay as they were."""
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {"made": {}, "figures": {}}
    for part in options.parts:
        kept["made"][part] = {
            "command": f"python -m benchmarks.drift --parts {part} --sessions {' '.join(map(str, options.sessions))} --seed {options.seed}",
            "champion": "that of make demo" if options.run else "trained by the benchmark", "commit": tracking.git_commit(ROOT)}
    kept["figures"].update(figures)
    kept |= {"config": config.drift.model_dump(), "jitter": JITTER | {"grain": GRAIN_JITTER, "offset": OFFSET_JITTER}, "machine": machine.describe()}
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "drift", help="where the champion is kept")
    parser.add_argument("--run", type=Path, help="take the champion of this finished run of `make demo` instead")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the real images")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--sessions", type=int, nargs=3, default=(100, 20, 8), metavar=("IN_CONTROL", "STATED", "CURVE"),
                        help="numbers of virtual sessions: in control, of each kind at its stated size, and at every other size")
    parser.add_argument("--seed", type=int, default=REPORT_SEED)
    parser.add_argument("--record", action="store_true", help="keep the figures under benchmarks/results")
    options = parser.parse_args()
    config, start = Config(), time.perf_counter()
    segmenter, synthetic = trained(options.run) if options.run else champion(config, options.work)
    figures: dict[str, Any] = {}
    for part in options.parts:
        with TemporaryDirectory() as temporary:
            figures |= PARTS[part](options, config, segmenter, synthetic, Path(temporary))
        figures[f"{part}_seconds"] = round(time.perf_counter() - start, 1)
    if options.record:
        record(options, config, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
