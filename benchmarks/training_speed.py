"""How fast the two trainings are: ``python -m benchmarks.training_speed``.

Prints a table and, as the last line, one JSON object. What is compared takes turns in one process, and the ratios are
medians over the turns, so that other work on the machine falls on both sides. Networks and losses are the product's own;
images are made up, since their content costs no time.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.simulate import _rounded, take_turns
from graincast.compute import background_threads, memory_format, pick_device, seeded
from graincast.config import Segmenter, Translator
from graincast.errors import UserError
from graincast.segment.network import build_network
from graincast.segment.train import _batches, training_step
from graincast.store import tracking
from graincast.synthesise.cyclegan.train import _batch, _Training

RECORD = Path(__file__).parent / "results" / "training_speed.json"
STANDARD = {"filters": 64, "residual_blocks": 9, "crop": 256, "batch": 1}
"""Setting of the CycleGAN paper (Zhu et al. 2017): ResNet-9 generators for 256 x 256, one image a step."""
PRECISIONS = ("float32", "auto")
IMAGE_PX, GRAIN_PX = 640, 32
DATA_TURNS = 20
MEASURED_S, MAX_TURNS = 15.0, 9  # what is quick takes more turns

Figures = dict[str, Any]


class Scale(NamedTuple):
    """How much is measured: least number of turns, batches whose making is watched, and the settings of both trainings by name."""

    turns: int
    batches: int
    translators: dict[str, Translator]
    segmenters: dict[str, Segmenter]


def full(device: str) -> Scale:
    """The settings that figures are kept of."""
    return Scale(3, 12, {"standard": Translator(**STANDARD, device=device), "ours": Translator(device=device)},
                 {"crop_128": Segmenter(device=device), "crop_512": Segmenter(crop=512, batch=2, device=device)})


def quick(device: str) -> Scale:
    """Shows that everything runs, and nothing else."""
    return Scale(1, 2, {"standard": Translator(filters=4, residual_blocks=0, crop=32, batch=1, device=device)},
                 {"crop_64": Segmenter(encoder="mobilenet_v2", crop=64, batch=2, device=device)})


def grains(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture, uint8 (`IMAGE_PX`, `IMAGE_PX`), of square grains, and their ids, int32."""
    count = IMAGE_PX // GRAIN_PX
    labels = np.kron(np.arange(1, count**2 + 1, dtype=np.int32).reshape(count, count), np.ones((GRAIN_PX, GRAIN_PX), np.int32))
    labels[GRAIN_PX - 1 :: GRAIN_PX] = labels[:, GRAIN_PX - 1 :: GRAIN_PX] = 0
    return (np.where(labels == 0, 20, 120) + rng.integers(0, 60, labels.shape)).astype(np.uint8), labels


def translator_step(config: Translator, compiled: bool = False) -> Callable[[], object]:
    """One step of generators and discriminators on crops that are there already."""
    device = pick_device(config.device)
    training = _Training(config, device)
    training.set_noise(0.02)
    if compiled:
        for net in (training.f, training.g):
            net._head = torch.compile(net._head)
        for net in (training.d_sem, training.d_sim):
            net.compile()
    shape = (config.batch, 1, config.crop, config.crop)
    sim, sem = (torch.rand(shape).mul(2).sub(1).to(device, memory_format=memory_format(device)) for _ in range(2))
    return partial(training.step, sim, sem)


def segmenter_step(config: Segmenter, compiled: bool = False) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """One step of the segmenter as `graincast.segment.train.train_segmenter` takes it, from images and targets to the loss."""
    device = pick_device(config.device)
    network = build_network(config.architecture, config.encoder, None).to(device).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.Adam(network.parameters(), config.learning_rate, fused=True)
    if compiled:
        network.compile()

    return partial(training_step, network, optimiser, device=device, precision=config.precision)


def batches(config: Segmenter, threads: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Augmented crops and their targets without end, made as in training."""
    rng = np.random.default_rng(config.seed)
    images = [grains(rng) for _ in range(4)] * 50  # epochs long enough for their beginnings not to count
    return itertools.chain.from_iterable(_batches(images, config, rng, threads) for _ in itertools.count())


def speeds(steps: dict[str, Callable[[], object]], images: int, turns: int) -> Figures:
    """Images a second by name of the step, and how many times as fast as ``float32`` the others are."""
    first = take_turns(steps, 1)  # compiles, and chooses kernels
    seconds = take_turns(steps, max(turns, min(MAX_TURNS, int(MEASURED_S / sum(taken[0] for taken in first.values())))))
    figures: Figures = {name: images / float(np.median(taken)) for name, taken in seconds.items()}
    return figures | {f"{name}_speedup": float(np.median(seconds["float32"] / taken)) for name, taken in seconds.items() if name != "float32"}


def variants(config: Any, make: Callable[..., Callable[[], object]], compiled: bool) -> dict[str, Callable[[], object]]:
    """A step in every precision, and compiled in ours."""
    steps = {precision: make(config.model_copy(update={"precision": precision})) for precision in PRECISIONS}
    return steps | ({"compiled": make(config, compiled=True)} if compiled else {})


def on_a_batch(config: Segmenter, compiled: bool = False) -> Callable[[], object]:
    """The segmenter's step on a batch that is there already."""
    return partial(segmenter_step(config, compiled), *next(batches(config, 0)))


def translator_data_share(config: Translator, step_seconds: float) -> float:
    """Part of the translator's training that the making of batches would take in turn with the steps; it goes on beside them."""
    rng = np.random.default_rng(0)
    morphologies = [grains(rng) for _ in range(4)]
    make = partial(_batch, morphologies, [picture for picture, _ in morphologies], config, 0)
    taken = take_turns({"data": make}, DATA_TURNS)["data"]
    return float(np.median(taken) / (np.median(taken) + step_seconds))


class Watched(NamedTuple):
    """Seconds of some steps of training, batches included, what of it went by without a batch, and the losses."""

    seconds: float
    waited: float
    losses: list[float]


def watched(config: Segmenter, threads: int, steps: int) -> Watched:
    """Train the segmenter for some steps on batches made in `threads` background threads, or in turn with the steps (0)."""
    waited, losses = 0.0, []
    with seeded(config.seed):
        step, made = segmenter_step(config), batches(config, threads)
        step(*next(made))
        start = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(made)
            waited += time.perf_counter() - asked
            losses.append(step(*batch))
    return Watched(time.perf_counter() - start, waited, losses)


def segmenter_data_share(config: Segmenter, scale: Scale) -> Figures:
    """Part of the segmenter's training that waits for batches: made in turn with the steps, and in the background."""
    threads = background_threads(pick_device(config.device))
    turns = [(watched(config, 0, scale.batches), watched(config, threads, scale.batches)) for _ in range(scale.turns)]
    difference = max(abs(a - b) for in_turn, background in turns for a, b in zip(in_turn.losses, background.losses, strict=True))
    shares = [[run.waited / run.seconds for run in turn] for turn in turns]
    speedup = float(np.median([in_turn.seconds / background.seconds for in_turn, background in turns]))
    return {"threads": threads, "share_in_turn": float(np.median(shares, 0)[0]), "share_in_background": float(np.median(shares, 0)[1]),
            "background_speedup": speedup, "largest_difference_of_losses": difference}


def measure(scale: Scale, compiled: bool) -> Figures:
    """All figures; see `table` for what they say."""
    figures: Figures = {"translator": {}, "segmenter": {}, "data": {}}
    for name, config in scale.translators.items():
        speed = figures["translator"][name] = speeds(variants(config, translator_step, compiled), config.batch, scale.turns)
        figures["data"][f"translator_{name}"] = {"share_in_turn": translator_data_share(config, config.batch / speed["auto"])}
    for name, config in scale.segmenters.items():
        figures["segmenter"][name] = speeds(variants(config, on_a_batch, compiled), config.batch, scale.turns)
    name, config = next(iter(scale.segmenters.items()))
    figures["data"][f"segmenter_{name}"] = segmenter_data_share(config, scale)
    return figures


def table(scale: Scale, figures: Figures) -> Table:
    """The figures, for people."""
    shown = Table("training", "setting", *("float32", "ours (auto)", "compiled"), "speed-up", box=SIMPLE, title="images a second")
    for kind, configs in (("translator", scale.translators), ("segmenter", scale.segmenters)):
        for name, config in configs.items():
            speed = figures[kind][name]
            network = (f"{config.filters} filters, {config.residual_blocks} blocks" if isinstance(config, Translator)
                       else f"{config.architecture}, {config.encoder}")
            columns = [f"{speed[column]:.3g}" if column in speed else "-" for column in (*PRECISIONS, "compiled")]
            speedups = [f"{speed[key]:.2f}" for key in ("auto_speedup", "compiled_speedup") if key in speed]
            shown.add_row(kind, f"{network}, {config.crop} px, batch {config.batch}", *columns, ", ".join(speedups))
    return shown


def data_table(figures: Figures) -> Table:
    """What the making of batches costs."""
    shown = Table("training", "making batches in turn", "waiting for background threads", "threads", "speed-up", box=SIMPLE,
                  title="share of the time")
    for name, share in figures["data"].items():
        background = ["-"] * 3
        if "threads" in share:
            background = [f"{share['share_in_background']:.1%}", str(share["threads"]), f"{share['background_speedup']:.2f}"]
        shown.add_row(name.replace("_", " "), f"{share['share_in_turn']:.1%}", *background)
    return shown


def describe(device: torch.device) -> Figures:
    """The machine, with PyTorch's share of it."""
    return machine.describe() | {"torch": torch.__version__, "torch_threads": torch.get_num_threads(), "device": device.type,
                                 "cuda_device": torch.cuda.get_device_name(device) if device.type == "cuda" else None}


def main(
    quick_: Annotated[bool, typer.Option("--quick", help="tiny networks: shows that everything runs")] = False,
    device: Annotated[str, typer.Option(help="auto (CUDA when it is there), cpu, cuda or cuda:N")] = "auto",
    compiled: Annotated[bool | None, typer.Option(help="measure torch.compile, too; default: on CUDA")] = None,
    keep: Annotated[bool, typer.Option("--record", help=f"write {RECORD.relative_to(Path(__file__).parents[1])}")] = False,
) -> None:
    """Measure the speed of both trainings."""
    try:
        if quick_ and keep:
            raise UserError("--record keeps figures of the full networks: leave --quick out")
        place = pick_device(device)
    except UserError as error:
        sys.exit(str(error))
    scale = (quick if quick_ else full)(device)
    with seeded(0):  # as the trainings run
        figures = measure(scale, place.type == "cuda" if compiled is None else compiled)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table(scale, figures), data_table(figures))
    figures = _rounded(figures)
    if keep:
        command = shlex.join(["python", "-m", "benchmarks.training_speed", *sys.argv[1:]])
        kept = {"command": command, "commit": tracking.git_commit(RECORD.parent), "machine": describe(place), "figures": figures}
        RECORD.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
