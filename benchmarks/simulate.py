"""How fast the grain-growth simulator is, and how near the machine's limit: ``python -m benchmarks.simulate``.

Prints a table and, as the last line, one JSON object. Everything runs on all processors that the process may use, in one
go, compilation left out. What is compared takes turns, and the ratios are medians over the turns, so that other work on
the machine falls on both sides.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numba
import numpy as np
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.peers import FusedNumba, Peer, PlainNumpy, Pystencils, TunedNumpy, require_pystencils
from graincast.config import Simulate
from graincast.errors import UserError
from graincast.simulate.library import simulate_library
from graincast.simulate.phase_field import INTERVAL, RIM, TILE, GrainGrowth
from graincast.simulate.structure import simulate_structure
from graincast.simulate.tessellation import tessellate
from graincast.store import tracking

RECORD = Path(__file__).parent / "results" / "simulate.json"
TIME_STEP = 0.1

FLOPS = 20
"""Operations an update of one order parameter on one cell: 2 for its share of phi, 6 for the reaction, 3 for each of the
four pairs of neighbours."""

BYTES = 12
"""Bytes such an update moves at least between the first-level cache and what lies behind: the old value in, the new
value's line in, the new value out. The eight neighbours are in the cache already."""


class Scale(NamedTuple):
    """How large the problems are.

    Attributes
    ----------
    size, grains, steps : int
        The paper's structure.
    rounds : int
        Turns that what is compared takes.
    structures : int
        In the library.
    tiles : tuple of (int, int)
        Copies, down and across, of a structure with 50 grains at the paper's density.
    sides : tuple of int
        Sides of the fields that show how time and memory grow, px.
    memory : int
        Bytes of the arrays that measure the memory's bandwidth.
    """

    size: int = 512
    grains: int = 112
    steps: int = 1000
    rounds: int = 5
    structures: int = 300
    tiles: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 2), (2, 5), (4, 5))
    sides: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    memory: int = 1 << 30

    @property
    def structure(self) -> Simulate:
        """The settings of the paper's structure."""
        return Simulate(size=self.size, grains=self.grains, steps=self.steps, time_step=TIME_STEP)


PAPER = Scale()
QUICK = Scale(size=96, grains=12, steps=64, rounds=2, structures=4, tiles=((1, 1), (1, 2)), sides=(64, 128), memory=1 << 24)
"""Shows that everything runs, and nothing else."""

DENSITY = 5000 / 4096**2
"""Grains a cell in the fields of growing size."""

FEW_STEPS = 32
"""Steps that tell the cost of a step."""

REPEATS = 9
"""Turns of what takes milliseconds."""

KEYS = ("seconds_paper_structure", "speedup_vs_dense_numpy", "speedup_vs_dense_numba", "speedup_vs_pystencils",
        "library_300_minutes", "peak_gb_4096", "mcell_updates_per_s", "roofline_share")
"""The figures that come first; those that explain them follow."""

PEERS = {"dense_numpy": "NumPy, in place, grain by grain", "plain_numpy": "NumPy, whole arrays", "dense_numba": "Numba, one fused sweep",
         "pystencils": "generated C++, fused, OpenMP"}
"""Dense solvers, which step all order parameters on all cells, by the name that their figures bear."""

Figures = dict[str, Any]


class Fresh(NamedTuple):
    """What a call in a fresh process took."""

    seconds: float
    peak_gb: float


def in_fresh_process(work: Callable[..., object], *args: object) -> Fresh:
    """Call a function of this module in a process of its own.

    On Linux a new process inherits the peak memory of the one that starts it, so whatever is measured this way has to be
    measured before this process grows.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_watched, work, *args).result()


def _watched(work: Callable[..., object], *args: object) -> Fresh:
    start = time.perf_counter()
    work(*args)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return Fresh(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9)


def _compile(threads: int) -> None:
    """Fill Numba's cache."""
    simulate_structure(Simulate(size=64, grains=8, steps=FEW_STEPS, time_step=TIME_STEP), 0)
    GrainGrowth(_tessellation(64, 8), TIME_STEP, threads=threads).advance(FEW_STEPS)


def _tessellation(size: int, grains: int) -> np.ndarray:
    return tessellate((size, size), grains, np.random.default_rng(0), regularity=0.5, area_spread=0.5)


def _grow_library(config: Simulate) -> None:
    with tempfile.TemporaryDirectory() as folder:
        simulate_library(config, Path(folder) / "library")


def library(scale: Scale) -> Figures:
    """A library of structures written as ImageSets: minutes and peak memory."""
    validation = max(2, scale.structures // 10)
    translator = (scale.structures - validation) // 2
    counts = {"translator_structures": translator, "synthetic_structures": scale.structures - validation - translator,
              "validation_structures": validation}
    fresh = in_fresh_process(_grow_library, scale.structure.model_copy(update=counts))
    return {"library_300_minutes": fresh.seconds / 60, "library_300_peak_gb": fresh.peak_gb}


def field_memory(scale: Scale) -> Figures:
    """Peak memory of one structure, tessellation, growth, picture and labels, against the cells of the field."""
    peaks, seconds = {}, {}
    for side in scale.sides:
        config = Simulate(size=side, grains=max(2, round(DENSITY * side**2)), steps=FEW_STEPS, time_step=TIME_STEP)
        fresh = in_fresh_process(simulate_structure, config, 0)
        peaks[side], seconds[side] = fresh.peak_gb, fresh.seconds
    small, large = scale.sides[-2:]
    return {"peak_gb_4096": peaks[large], "peak_gb_by_side": peaks, "structure_s_by_side": seconds,
            "bytes_per_cell": 1e9 * (peaks[large] - peaks[small]) / (large**2 - small**2)}


def take_turns(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds that each job takes, by name, (rounds,): the jobs one after the other, then all over again."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(taken) for name, taken in seconds.items()}


def structure(scale: Scale, peers: Mapping[str, tuple[type[Peer], int]]) -> Figures:
    """One paper-size structure: its seconds, and how much faster its growth is than that of dense solvers.

    Parameters
    ----------
    scale : Scale
        Size of the problem.
    peers : mapping of str to (type, int)
        The dense solvers and the number of steps that each is timed on; the time of all steps follows from it.
    """
    start = _tessellation(scale.size, scale.grains)

    def grow(threads: int) -> Callable[[], object]:
        return lambda: GrainGrowth(start, TIME_STEP, threads=threads).advance(scale.steps)

    def stepping(peer: type[Peer], steps: int) -> Callable[[], object]:
        solver = peer(start, TIME_STEP)
        solver.advance(1)  # compiles
        return partial(solver.advance, steps)

    jobs: dict[str, Callable[[], object]] = {
        "structure": partial(simulate_structure, scale.structure, 0), "one thread": grow(1), "growth": grow(numba.get_num_threads()),
    }
    jobs |= {name: stepping(peer, steps) for name, (peer, steps) in peers.items()}
    taken = take_turns(jobs, scale.rounds)
    figures: Figures = {"seconds_paper_structure": float(np.median(taken["structure"])), "seconds_growth": float(np.median(taken["growth"])),
                        "seconds_growth_1_thread": float(np.median(taken["one thread"]))}
    for name, (_, steps) in peers.items():
        scaled = taken[name] * scale.steps / steps
        figures[f"speedup_vs_{name}"] = float(np.median(scaled / taken["growth"]))
        figures[f"seconds_{name}"] = float(np.median(scaled))
    return figures


def _cost(fields: Mapping[Any, np.ndarray], rounds: int) -> dict[Any, float]:
    """ns a cell and step of each starting field, all at the same stage of growth."""
    growths = {name: GrainGrowth(labels, TIME_STEP, threads=numba.get_num_threads()) for name, labels in fields.items()}
    for growth in growths.values():
        growth.advance(FEW_STEPS)
    taken = take_turns({name: partial(growth.advance, FEW_STEPS) for name, growth in growths.items()}, rounds)
    return {name: float(np.median(taken[name])) / FEW_STEPS / labels.size * 1e9 for name, labels in fields.items()}


def _tiled(labels: np.ndarray, down: int, across: int) -> np.ndarray:
    """Periodic copies of a periodic map, each with grains of its own: more grains, the same boundary length per area."""
    height, width = labels.shape
    rows, columns = _copies(labels, 0, down), _copies(labels, 1, across)
    copies = rows[:, :, None, :] * across + columns.transpose(1, 0, 2)[None]
    return (labels[None, :, None, :] + copies * labels.max()).reshape(down * height, across * width)


def _copies(labels: np.ndarray, axis: int, count: int) -> np.ndarray:
    """The copy along an axis that each cell belongs to, (count, height, width): grains across the seam stay whole."""
    lines = np.indices(labels.shape)[axis]
    occupied = np.zeros((labels.max() + 1, labels.shape[axis]), bool)
    occupied[labels, lines] = True
    # A grain begins behind the widest gap between the lines that it occupies; what lies before is its copy's from the other end.
    begins = [0]
    for line in occupied[1:]:
        places = np.flatnonzero(line)
        begins.append(np.roll(places, -1)[np.diff(places, append=places[0] + line.size).argmax()])
    return (np.arange(count)[:, None, None] - (lines < np.array(begins)[labels])) % count


def cost_by_grains(scale: Scale) -> Figures:
    """Cost of a step against the number of grains, the boundary length per area being the same."""
    start = _tessellation(round((50 * scale.size**2 / scale.grains) ** 0.5), 50)
    return {"ns_per_cell_step_by_grains": _cost({50 * down * across: _tiled(start, down, across) for down, across in scale.tiles}, scale.rounds)}


def cost_by_side(scale: Scale) -> Figures:
    """Cost of a step against the cells of the field."""
    side = scale.sides[0]
    start = _tessellation(side, max(2, round(DENSITY * side**2)))
    return {"ns_per_cell_step_by_side": _cost({wide: _tiled(start, wide // side, wide // side) for wide in scale.sides}, scale.rounds)}


def updates(scale: Scale, seconds: float) -> Figures:
    """What the solver touches, the order parameters near boundaries, and how many of them a second.

    Parameters
    ----------
    scale : Scale
        Size of the problem.
    seconds : float
        Time of the growth.
    """
    growth = GrainGrowth(_tessellation(scale.size, scale.grains), TIME_STEP, threads=numba.get_num_threads())
    every = max(1, scale.steps // 20)
    stepped = []
    for _ in range(0, scale.steps, every):
        growth.advance(every)
        stepped.append(growth.stepped)
    mean, cells = statistics.mean(stepped), scale.size**2
    return {"mcell_updates_per_s": mean * scale.steps / seconds / 1e6, "stepped_per_cell": mean / cells,
            "fraction_touched": mean / (cells * scale.grains), "following_share": _following(growth, scale, seconds)}


def _following(growth: GrainGrowth, scale: Scale, seconds: float) -> float:
    """Share of the growth's time in which windows and runs follow the grains; `growth` cannot go on after it."""
    with ThreadPoolExecutor(growth.threads) as pool:
        one = float(np.median(take_turns({"follow": partial(growth._follow, pool)}, REPEATS)["follow"]))
    at_first = 1 + math.log2(INTERVAL / TIME_STEP / RIM)
    return one * (at_first + scale.steps * TIME_STEP / INTERVAL) / seconds


def volume(scale: Scale) -> Figures:
    """Seconds of a thousand steps of a cubic volume, its grains as many cells across as the paper's."""
    side = scale.size // 4
    labels = tessellate((side,) * 3, max(2, round(side**3 / 6e4)), np.random.default_rng(0), regularity=0.5)
    growth = GrainGrowth(labels, TIME_STEP, threads=numba.get_num_threads())
    growth.advance(FEW_STEPS)
    taken = take_turns({"volume": partial(growth.advance, FEW_STEPS)}, 2)["volume"]
    return {"volume_side": side, "volume_grains": growth.grains, "volume_seconds_1000_steps": float(np.median(taken)) * 1000 / FEW_STEPS,
            "volume_stepped_per_cell": growth.stepped / side**3}


def roofline(scale: Scale, done: Figures) -> Figures:
    """How near the solver is to the machine's limit, by the roofline model [1]_.

    While a block of field lines takes `TILE` steps it stays in a core's cache, so that the bandwidth which counts is that
    of a triad on as much data; memory sees each value once in `TILE` steps. Dense rows of cells in the cache show what loads and
    stores allow. How much of the memory bandwidth the dense Numba solver uses shows that it is a fair opponent.

    References
    ----------
    .. [1] S. Williams, A. Waterman, D. Patterson, Commun. ACM 52 (2009) 65, doi:10.1145/1498765.1498785.
    """
    rate = 1e6 * done["mcell_updates_per_s"]
    block = int(2 * 4 * 2 * TILE * scale.size * done["stepped_per_cell"]) * numba.get_num_threads()
    memory, cache, peak = machine.bandwidth(scale.memory), machine.bandwidth(block), machine.arithmetic_peak()
    dense_rate = _dense_in_cache()
    opponent = BYTES * scale.size**2 * scale.grains * scale.steps / done["seconds_dense_numba"]
    return {"roofline_share": rate * FLOPS / min(peak, FLOPS / BYTES * cache), "block_kb": block / 1e3,
            "memory_gb_per_s": memory / 1e9, "memory_share": rate * BYTES / TILE / memory,
            "memory_share_dense_numba": opponent / memory,
            "cache_gb_per_s": cache / 1e9, "cache_share": rate * BYTES / cache,
            "peak_gflops": peak / 1e9, "arithmetic_share": rate * FLOPS / peak,
            "dense_in_cache_mcell_per_s": dense_rate / 1e6, "share_of_dense_in_cache": rate / dense_rate}


def _dense_in_cache() -> float:
    """Updates a second of a dense solver whose cells, 1 MB, lie in the caches."""
    dense = FusedNumba(np.arange(2).repeat(64 * 512).reshape(128, 512) + 1, TIME_STEP)
    dense.advance(1)
    return dense.order_parameters().size * FEW_STEPS / float(take_turns({"dense": partial(dense.advance, FEW_STEPS)}, REPEATS)["dense"].min())


def verdict(figures: Figures) -> str:
    """What holds the solver back, in words, from its figures."""
    roof = "arithmetic" if figures["peak_gflops"] < FLOPS / BYTES * figures["cache_gb_per_s"] else "cache bandwidth"
    others = {"memory bandwidth": figures["memory_share"], "arithmetic peak": figures["arithmetic_share"], "cache bandwidth": figures["cache_share"]}
    shares = ", ".join(f"{share:.0%} of the {name}" for name, share in others.items())
    return (f"Blocks of {figures['block_kb']:.0f} kB stay in the cache for {TILE} steps; the roof there is {roof}. The solver uses {shares}. "
            "Multiplications and additions are not fused, which halves the attainable peak. Dense rows in the cache, with about as many loads "
            f"and stores an update, reach {figures['dense_in_cache_mcell_per_s']:.0f} Mcell/s: the solver runs at "
            f"{figures['share_of_dense_in_cache']:.0%} of that. {figures['following_share']:.0%} of its time goes into following the boundaries; "
            f"while it steps it is at {figures['share_of_dense_in_cache'] / (1 - figures['following_share']):.0%}, the rest being what short runs "
            "of cells cost over long rows.")


def measure(scale: Scale, with_pystencils: bool) -> Figures:
    """All figures. Fresh processes come first (see `in_fresh_process`)."""
    peers: dict[str, tuple[type[Peer], int]] = {"plain_numpy": (PlainNumpy, 1), "dense_numpy": (TunedNumpy, 3), "dense_numba": (FusedNumba, 20)}
    if with_pystencils:
        peers["pystencils"] = (Pystencils, 20)
    threads = numba.get_num_threads()
    in_fresh_process(_compile, threads)
    figures: Figures = dict.fromkeys(KEYS)
    for figure in (field_memory, library):
        figures |= _announced(figure, scale)
    _compile(threads)
    figures |= _announced(structure, scale, peers)
    figures |= _announced(cost_by_grains, scale)
    figures |= _announced(cost_by_side, scale)
    figures |= _announced(volume, scale)
    figures |= _announced(updates, scale, figures["seconds_growth"])
    figures |= _announced(roofline, scale, figures)
    return figures


def _announced(figure: Callable[..., Figures], *args: object) -> Figures:
    print(f"measuring {figure.__name__.replace('_', ' ')} ...", file=sys.stderr, flush=True)
    return figure(*args)


def table(scale: Scale, figures: Figures) -> Table:
    """The figures for reading."""
    shown = Table("figure", "value", "how", box=SIMPLE)

    def by(key: str, unit: str) -> str:
        return "\n".join(f"{cost:.2f} {unit}  at {at}" for at, cost in figures[key].items())

    problem = f"{scale.size} x {scale.size}, {scale.grains} grains, {scale.steps} steps"
    shown.add_row("one structure", f"{figures['seconds_paper_structure']:.2f} s", f"{problem}: tessellation, growth, picture, labels")
    shown.add_row("  its growth", f"{figures['seconds_growth']:.2f} s", f"all threads; {figures['seconds_growth_1_thread']:.2f} s on 1 thread")
    for name, what in PEERS.items():
        if figures[f"speedup_vs_{name}"] is not None:
            shown.add_row(f"growth against {name}", f"{figures[f'speedup_vs_{name}']:.1f} x", f"{what}: {figures[f'seconds_{name}']:.1f} s")
    shown.add_row("library", f"{figures['library_300_minutes']:.2f} min", f"{scale.structures} structures, {figures['library_300_peak_gb']:.2f} GB")
    shown.add_row("peak memory", by("peak_gb_by_side", "GB"), f"one structure by side, px; {figures['bytes_per_cell']:.0f} bytes a further cell")
    shown.add_row("time", by("structure_s_by_side", "s"), f"of the same, with {FEW_STEPS} steps")
    shown.add_row("cost of a step", by("ns_per_cell_step_by_side", "ns"), "a cell of the field, by side")
    shown.add_row("", by("ns_per_cell_step_by_grains", "ns"), "by number of grains, at the same boundary length per area")
    shown.add_row("volume", f"{figures['volume_seconds_1000_steps']:.0f} s", f"1000 steps of {figures['volume_side']}^3 cells, "
                  f"{figures['volume_grains']} grains; {figures['volume_stepped_per_cell']:.1f} updates a cell and step")
    shown.add_row("cell updates", f"{figures['mcell_updates_per_s']:.0f} M/s", f"{figures['stepped_per_cell']:.2f} a cell of the field and step")
    shown.add_row("fraction touched", f"{figures['fraction_touched']:.2%}", "of all order parameters on all cells")
    shown.add_row("share of the roof", f"{figures['roofline_share']:.0%}", f"{FLOPS} operations and {BYTES} bytes an update")
    shown.add_row("memory", f"{figures['memory_gb_per_s']:.1f} GB/s", f"triad; the solver uses {figures['memory_share']:.0%}, "
                  f"dense_numba {figures['memory_share_dense_numba']:.0%}")
    shown.add_row("cache", f"{figures['cache_gb_per_s']:.1f} GB/s", f"triad on {figures['block_kb']:.0f} kB; uses {figures['cache_share']:.0%}")
    shown.add_row("arithmetic", f"{figures['peak_gflops']:.0f} GFlop/s", f"fused multiply-adds; the solver uses {figures['arithmetic_share']:.0%}")
    return shown


def record(figures: Figures) -> None:
    """Keep the figures with the command, the commit and the machine that they belong to."""
    command = shlex.join(["python", "-m", "benchmarks.simulate", *sys.argv[1:]])
    kept = {"command": command, "commit": tracking.git_commit(RECORD.parent), "machine": machine.describe(), "figures": figures}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(kept, indent=1) + "\n")


def _rounded(figures: Figures) -> Figures:
    """Four digits are more than the machine's noise leaves."""
    def short(value: Any) -> Any:
        return {key: short(item) for key, item in value.items()} if isinstance(value, dict) else float(f"{value:.4g}") if value is not None else None

    return {key: short(value) for key, value in figures.items()}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="tiny problems: shows that everything runs")] = False,
    without_pystencils: Annotated[bool, typer.Option("--without-pystencils", help="leave the comparison with pystencils out")] = False,
    keep: Annotated[bool, typer.Option("--record", help=f"write {RECORD.relative_to(Path(__file__).parents[1])}")] = False,
) -> None:
    """Measure the grain-growth simulator."""
    try:
        if quick and keep:
            raise UserError("--record keeps figures of the full problems: leave --quick out")
        if not without_pystencils:
            require_pystencils()
        scale = QUICK if quick else PAPER
        figures = measure(scale, not without_pystencils)
    except UserError as error:
        sys.exit(str(error))
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table(scale, figures), verdict(figures), sep="\n")
    figures = _rounded(figures)
    if keep:
        record(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
