"""Whether a grain's confidence is what it says: ``python -m benchmarks.confidence --run runs/NAME``.

Takes the segmenter and the synthetic validation images of a training run (``make demo``), calibrates it as training does, and lets it segment
new micrographs of the virtual SEM, whose grains are known: in the look that the run learned from and in two that it never saw, in which
the specimens are etched less and the detector sees more of the grains' orientations (`LOOKS`). For each look: the share of wrong grains and
the reliability of the confidence (`graincast.segment.confidence.reliability`), beside the Brier score of a constant that knew the share. Then the
share of lines that are true ones by what `line_confidence` says of them, and the speed. ``confidence.png`` in ``--work`` is the reliability diagram.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
from scipy import ndimage as ndi

from benchmarks import machine
from graincast import stages
from graincast.config import VirtualSem, VirtualSession
from graincast.evaluate.evaluation import match_masks
from graincast.evaluate.metrics import read_mask, right_grains
from graincast.microscope.reader import read_micrograph
from graincast.segment.confidence import grain_confidence, line_confidence, reliability, reliability_bins
from graincast.segment.instances import instances
from graincast.segment.segmenter import Segmenter
from graincast.segment.train import calibrated
from graincast.store import tracking
from graincast.store.imageset import ImageSet

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LOOKS = {"learned": VirtualSem(), "etched less": VirtualSem(groove_depth_um=0.1, channelling=0.2),
         "etched far less": VirtualSem(groove_depth_um=0.06, channelling=0.3)}
"""The last one is the new look of `benchmarks.recalibration`."""
LINE_BINS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BESIDE_TRUTH_PX = 3
"""A line is a true one this near to a drawn one."""
Judged = tuple[np.ndarray, np.ndarray]


def main() -> None:
    """Judge the confidence."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--micrographs", type=int, default=4, help="of each look")
    parser.add_argument("--seed", type=int, default=31, help="of their grains; the features were chosen on 777")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "confidence", help="where micrographs and diagram are kept")
    parser.add_argument("--record", action="store_true", help="keep the figures under benchmarks/results")
    options = parser.parse_args()
    segmenter = Segmenter.load(options.run / "train_segmenter" / "segmenter")
    validation = ImageSet(options.run / "synthesise" / "synthetic" / "validation")
    segmenter.calibration = calibrated(segmenter, [(validation.image(i), validation.labels(i)) for i in stages.halves(validation)[1]],
                                       segmenter.config["seed"])
    if segmenter.calibration is None:
        raise SystemExit("nothing to calibrate on")
    found = {"validation": segmenter.calibration.figures}
    grains: dict[str, Judged] = {}
    lines: list[Judged] = []
    seconds = pixels = 0.0
    for name, sem in LOOKS.items():
        parts = []
        for image, mask in session(options.work / "sessions", name, sem, options.micrographs, options.seed):
            maps, scale = segmenter.micrograph_maps(read_micrograph(image))
            labels, truth = instances(maps, segmenter.cut, scale), read_mask(mask)[: maps.shape[1]]
            start = time.process_time()
            parts.append((grain_confidence(labels, maps, segmenter.calibration), right_grains(labels, ~truth)))
            seconds, pixels = seconds + time.process_time() - start, pixels + labels.size
            strength = line_confidence(labels, maps)
            drawn = np.isfinite(strength)
            lines.append((strength[drawn], ndi.distance_transform_edt(~truth)[drawn] <= BESIDE_TRUTH_PX))
        grains[name] = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        found[name] = reliability(*grains[name])
    for figures in found.values():
        figures["brier_constant"] = figures["errors"] * (1 - figures["errors"])
    found = {name: {key: round(value, 4) for key, value in figures.items()} for name, figures in found.items()}
    strength, true = (np.concatenate([part[k] for part in lines]) for k in (0, 1))
    bin_of = np.digitize(strength, LINE_BINS[1:-1])
    of_lines = {f"{low:g} to {high:g}": {"share": round(float((bin_of == k).mean()), 4), "true": round(float(true[bin_of == k].mean()), 4)}
                for k, (low, high) in enumerate(itertools.pairwise(LINE_BINS)) if (bin_of == k).any()}
    diagram(grains, options.work / "confidence.png")
    result = {"reliability": found, "true_lines": of_lines, "mpx_per_s_with_scoring": round(pixels / seconds / 1e6, 2),
              "weights": segmenter.calibration.weights, "bias": segmenter.calibration.bias}
    for name, figures in found.items():
        print(f"{name:16}", figures)
    if options.record:
        command = f"python -m benchmarks.confidence --run RUN --micrographs {options.micrographs} --seed {options.seed} --record"
        (RESULTS / "confidence.json").write_text(json.dumps({"command": command, "commit": tracking.git_commit(ROOT), "machine": machine.describe(),
                                                             **result}, indent=1) + "\n")
    print(json.dumps(result))


def session(work: Path, name: str, sem: VirtualSem, micrographs: int, seed: int) -> list[tuple[Path, Path]]:
    """Micrographs of a look and their masks, kept in `work`."""
    folder = work / f"{name.replace(' ', '_')}-{micrographs}-{seed}"
    if not folder.exists():
        stages.run_virtual_sem(VirtualSession(micrographs=1, held_out=micrographs, sem=sem, seed=seed), folder)
    return match_masks(folder / "held_out" / "images", folder / "held_out" / "masks")


def diagram(grains: dict[str, Judged], path: Path) -> None:
    """Draw the share of right grains against the mean confidence, bins of equal count, with binomial standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (confidence, right) in grains.items():
        share, told, was = reliability_bins(confidence, right).T
        axes.errorbar(told, was, np.sqrt(was * (1 - was) / (share * len(right))), marker="o", markersize=4, linewidth=1, capsize=2, label=name)
    axes.set(xlabel="confidence", ylabel="share of right grains", xlim=(0.3, 1.01), ylim=(0.3, 1.01))
    axes.legend(title="look", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
