"""How fast large micrographs are segmented, and whether that changes the grains: ``python -m benchmarks.segment_throughput [--record]``.

Every step counts: reading, preparation, prediction, instances, the label map and the table of grains. The field is one of the virtual
SEM, mirrored to size, as a compressed TIFF in tiles at the network's own scale (where there are most network pixels for a
micrograph's). Each run is a process of its own that knows the segmenter's folder and the file alone; its peak memory is that of the
whole process, interpreter and libraries included. Processor seconds stand beside wall-clock seconds, as other work on the machine
lengthens the latter; of several runs the fastest counts.

Tiled and whole results are compared, grain by grain, on a picture of `COMPARED_PX` px and on a smaller one mirrored to that size, whose
mirror axes are the seams between the blocks (``mirrored_...``). Ways to run the network take turns in one process, on one window; of each,
the least processor seconds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tifffile
import torch
from skimage.segmentation import find_boundaries

from benchmarks import machine
from graincast.config import Augment, VirtualSem
from graincast.config import Segmenter as SegmenterConfig
from graincast.errors import UserError
from graincast.evaluate.metrics import score_instances, score_labels
from graincast.measure.grains import summarise
from graincast.microscope.preparation import Preparation
from graincast.microscope.reader import read_micrograph
from graincast.microscope.virtual_sem import render
from graincast.segment import tiled
from graincast.segment.compiled import compiled
from graincast.segment.network import standardise
from graincast.segment.segmenter import Segmenter, eager
from graincast.segment.train import train_segmenter
from graincast.simulate.tessellation import tessellate
from graincast.store import tracking

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "segment_throughput.json"
GRAIN_PX, GRAIN_UM = 45.0, 2.15
PIXEL_UM = GRAIN_UM / GRAIN_PX
RENDERED_PX, COMPARED_PX = 1024, 2048
TRAINING_PX, TRAINING_IMAGES = 256, 12
WINDOW_PX = 1024
GOAL_MPX_PER_S, GOAL_GB = 1.5, 4.0

Figures = dict[str, Any]


def virtual(side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of the virtual SEM, uint8 (side, side), and its grains, 0 on the lines between them."""
    rng = np.random.default_rng(seed)
    labels = tessellate((side, side), max(round(side**2 / (np.pi / 4 * GRAIN_PX**2)), 4), rng, area_spread=0.35)
    return render(labels, PIXEL_UM, VirtualSem(), rng), np.where(find_boundaries(labels, mode="thick"), 0, labels).astype(np.int32)


def quick_segmenter(epochs: int) -> Segmenter:
    """A segmenter that has learnt the virtual SEM from its own pictures and truth: enough for figures of speed."""
    pairs = [virtual(TRAINING_PX, seed) for seed in range(TRAINING_IMAGES + 2)]
    config = SegmenterConfig(epochs=epochs, crop=128, batch=8, crops_per_image=4, device="cpu", augment=Augment(warp=0.1))
    segmenter = train_segmenter(pairs[2:], pairs[:2], config)
    segmenter.preparation = Preparation(
        target_pixel_size_um=PIXEL_UM, scale=None, grain_diameter_px=GRAIN_PX, clahe_clip=0.0, clahe_tile_px=4 * GRAIN_PX, cut_info_bar=True,
        min_size=64, max_saturated=0.5, min_contrast=0.01, default_pixel_size_um=None)
    return segmenter


def write_field(path: Path, rendered: np.ndarray, side: int) -> Path:
    """The rendered field mirrored to `side` px, so that grains go on over its edges."""
    field = np.pad(rendered, [(0, max(side - extent, 0)) for extent in rendered.shape], mode="symmetric")[:side, :side]
    tifffile.imwrite(path, field, tile=(256, 256), compression="zlib", resolution=(1e4 / PIXEL_UM,) * 2, resolutionunit="CENTIMETER")
    return path


def segmented(folder: Path, file: Path, out: Path) -> Figures:
    """The whole path on one file, in this process; compiling apart, which is once a process and not by the pixel."""
    start = time.perf_counter(), time.process_time()
    segmenter = Segmenter.load(folder, "cpu").compile(tiled.workers())
    loaded = time.perf_counter(), time.process_time()
    result = tiled.segment_large(segmenter, file, out)
    table = result.grains()
    table.to_csv(out.with_suffix(".csv"), index=False)
    wall_s, cpu_s = (now - then for now, then in zip((time.perf_counter(), time.process_time()), loaded, strict=True))
    return {"megapixels": result.shape[0] * result.shape[1] / 1e6, "wall_s": wall_s, "cpu_s": cpu_s, "load_s": loaded[0] - start[0],
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, "grains": summarise(table)["grains"]}


def runs(folder: Path, file: Path, out: Path, repeats: int) -> Figures:
    """Figures of the fastest of several processes, the largest peak, and how many other processes wanted the processor beforehand."""
    load, found = os.getloadavg()[0], []
    for _ in range(repeats):
        ended = subprocess.run([sys.executable, "-m", "benchmarks.segment_throughput", "--worker", str(folder), str(file), str(out)],
                               cwd=ROOT, capture_output=True, text=True, check=True)
        found.append(json.loads(ended.stdout.splitlines()[-1]))
    fastest = min(found, key=lambda figures: figures["wall_s"])
    return {"mpx_per_s": fastest["megapixels"] / fastest["wall_s"], "cpu_s_per_mpx": min(f["cpu_s"] for f in found) / fastest["megapixels"],
            "peak_gb": max(f["peak_gb"] for f in found), "load_average": load,
            **{key: fastest[key] for key in ("megapixels", "grains", "wall_s", "cpu_s", "load_s")}}


def agreement(segmenter: Segmenter, file: Path, out: Path) -> Figures:
    """Tiled against whole, by the same compiled network; and that whole against the one by torch in float32."""
    segmenter.compile(tiled.workers())
    tiled.segment_large(segmenter, file, out)
    found, micrograph = tifffile.imread(out).astype(np.int32), read_micrograph(file)
    whole = segmenter.segment_micrograph(micrograph)
    segmenter.run = eager(segmenter.network, "float32")
    reference = segmenter.segment_micrograph(micrograph)
    scores = {"tiled_vs_whole": score_instances(found, whole), "compiled_vs_float32": score_instances(whole, reference)}
    return {f"{name}_{key}": score[key] for name, score in scores.items() for key in ("ap50", "count_ratio")}


def backends(network: torch.nn.Module, picture: np.ndarray, rounds: int) -> Figures:
    """Of each way to run the network: processor seconds a million pixels, and how far its maps are from torch's in float32."""
    standard = standardise(picture[:WINDOW_PX, :WINDOW_PX])
    network = network.to(memory_format=torch.contiguous_format)  # `eager` gives images channels last, which decides the layout of what follows

    @torch.no_grad()
    def channels_first(image: np.ndarray) -> np.ndarray:
        return torch.sigmoid(network(torch.from_numpy(image)[None, None]))[0].numpy()

    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "torch_float32_channels_first": channels_first, "torch_float32": eager(network, "float32"), "torch_bfloat16": eager(network, "bfloat16"),
        "openvino_float32": compiled(network, "float32"), "openvino_bfloat16": compiled(network, "bfloat16")}
    maps = {name: run(standard) for name, run in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.process_time()
            run(standard)
            seconds[name].append(time.process_time() - start)
    differences = {name: np.abs(found - maps["torch_float32"]) for name, found in maps.items()}
    return {name: {"cpu_s_per_mpx": min(taken) / (standard.size / 1e6), "largest_difference": float(differences[name].max()),
                   "mean_difference": float(differences[name].mean())} for name, taken in seconds.items()}


def main() -> None:
    """Measure, print, and keep the figures if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a segmenter for micrographs of dark boundaries; none: one is trained for it")
    parser.add_argument("--size", type=int, default=6144, help="side of the field that speed is measured on, px (default: 6144)")
    parser.add_argument("--repeats", type=int, default=2, help="processes that segment it; the fastest counts (default: 2)")
    parser.add_argument("--quick", action="store_true", help="small and hardly trained: shows that everything runs")
    parser.add_argument("--record", action="store_true", help="keep the figures under benchmarks/results")
    parser.add_argument("--worker", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(segmented(*options.worker)))
        return
    if options.quick and options.record:
        raise UserError("--record keeps figures of the full fields: leave --quick out")
    quick = (1200, 1, 512, 700, 2)
    size, repeats, rendered_px, compared, epochs = quick if options.quick else (options.size, options.repeats, RENDERED_PX, COMPARED_PX, 12)
    segmenter = Segmenter.load(options.model, "cpu") if options.model else quick_segmenter(epochs)
    rendered, truth = virtual(rendered_px, 99)
    with TemporaryDirectory() as name:
        folder = Path(name)
        segmenter.save(folder)
        figures: Figures = runs(folder, write_field(folder / "large.tif", rendered, size), folder / "labels.tif", repeats)
        wide, _ = virtual(compared, 99)
        figures |= agreement(segmenter, write_field(folder / "compared.tif", wide, compared), folder / "compared_labels.tif")
        mirrored = agreement(segmenter, write_field(folder / "mirrored.tif", rendered, compared), folder / "mirrored_labels.tif")
        figures |= {f"mirrored_{key}": value for key, value in mirrored.items()}
    figures["ap50_of_the_segmenter"] = score_labels(segmenter.segment(rendered), truth)["ap50"]
    ways = backends(segmenter.network, rendered, rounds=1 if options.quick else 5)
    for way, row in ways.items():
        print(f"{way:30} {row['cpu_s_per_mpx']:7.3f} CPU s/Mpx   maps differ by {row['largest_difference']:.1e} at most, "
              f"{row['mean_difference']:.1e} on average")
    print(f"{figures['megapixels']:.0f} Mpx, {figures['grains']} grains: {figures['mpx_per_s']:.2f} Mpx/s, {figures['cpu_s_per_mpx']:.2f} CPU s/Mpx "
          f"at a load of {figures['load_average']:.1f}, "
          f"peak {figures['peak_gb']:.2f} GB (goals: {GOAL_MPX_PER_S} Mpx/s, {GOAL_GB} GB)")
    if options.record:
        RESULT.write_text(json.dumps({"command": f"python -m benchmarks.segment_throughput --record --size {size} --repeats {repeats}",
                                      "commit": tracking.git_commit(ROOT), "machine": machine.describe(), **_short(figures),
                                      "backends": {way: _short(row) for way, row in ways.items()}}, indent=1) + "\n")
    keys = ("mpx_per_s", "peak_gb", "tiled_vs_whole_ap50", "tiled_vs_whole_count_ratio")
    print(json.dumps(_short({key: figures[key] for key in (*keys, *(key for key in figures if key not in keys))})))


def _short(figures: Figures) -> Figures:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
