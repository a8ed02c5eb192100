"""How well the simulator keeps to the laws of grain growth: ``python -m benchmarks.grain_growth``.

The proofs of ``tests/test_grain_growth.py`` on large samples: several structures of 4000 grains. Prints a table and, as
the last line, one JSON object. The same seeds give the same figures on any machine.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import typer
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scipy.stats import ks_2samp, linregress

from benchmarks import machine
from graincast.simulate.phase_field import GrainGrowth
from graincast.store import tracking
from tests.oracles import (
    History,
    amount,
    areas,
    boundary_energy_errors,
    discs,
    grain_angles,
    grow_history,
    moving_boundary_errors,
    random_cells,
    time_step_errors,
)

RECORD = Path(__file__).parent / "results" / "grain_growth.json"
SHAPE, GRAINS = (1024, 1024), 4000
STRUCTURES, FRAMES, FRAME_STEPS = 4, 40, 240

LINEAR = slice(6, None)
"""Frames after the transient: the sizes are distributed as later on."""

EARLY, LATE = 12, 39
"""Frames whose size distributions are compared, the mean area being about twice as large."""

MOVING, FLAT, DIVISORS = [1, 1.5, 2, 2.5], [1, 2, 3], [1, 2, 4, 8]
"""Refinements of the grid for the moving and for the flat boundary, and of the time step."""

STAGES = (0, 10, 20, 30)
"""First of ten frames each at which the von Neumann-Mullins slope is taken."""

FRACTIONS = [0.0, 0.03, 0.06, 0.12]
"""Area fractions of the pinning particles."""

PARTICLE_RADIUS = 3.0  # px
PINNED_SHAPE, PINNED_GRAINS, PINNED_FRAMES, PINNED_STEPS = (384, 384), 600, 25, 800

Figures = dict[str, Any]


def circle_rate(radius: float) -> float:
    """-dA/dt of a shrinking circle by 2 pi L kappa."""
    side = int(2.5 * radius)
    y, x = np.mgrid[:side, :side] - side / 2 + 0.3
    growth = GrainGrowth(np.where(x**2 + y**2 < radius**2, 1, 2), 0.15)
    growth.advance(200)
    before = amount(growth)
    growth.advance(1000)
    return (before - amount(growth)) / (2 * np.pi * 1000 * 0.15)


def pinned_areas(fraction: float) -> np.ndarray:
    """Mean grain area, px, in the course of time with particles of this area fraction."""
    count = round(fraction * PINNED_SHAPE[0] * PINNED_SHAPE[1] / (np.pi * PARTICLE_RADIUS**2))
    particles = discs(PINNED_SHAPE, count, PARTICLE_RADIUS, seed=1) if count else None
    growth = GrainGrowth(random_cells(PINNED_SHAPE, PINNED_GRAINS, seed=1), 0.15, obstacles=particles)
    mean = []
    for _ in range(PINNED_FRAMES):
        growth.advance(PINNED_STEPS)
        grains = growth.picture() > 0.5
        mean.append(grains.sum() / np.unique(growth.labels()[grains]).size)
    return np.array(mean)


def evaluate(histories: list[History], angles: np.ndarray, pinned: list[np.ndarray]) -> Figures:
    """The figures of all proofs."""
    mean = np.mean([history.mean_areas() for history in histories], axis=0)
    linear = linregress(histories[0].times[LINEAR], mean[LINEAR])
    half = len(histories) // 2
    early = np.concatenate([history.scaled_sizes(EARLY) for history in histories[:half]])
    late = np.concatenate([history.scaled_sizes(LATE) for history in histories[half:]])
    distance = ks_2samp(early, late)
    starts = [np.sqrt(areas(random_cells(SHAPE, GRAINS, seed), GRAINS)) for seed in range(half)]
    start = np.concatenate([sizes / sizes.mean() for sizes in starts])
    sides = linregress(*side_rates(histories, range(EARLY, FRAMES)))
    slopes = np.array([linregress(*side_rates(histories, range(first, first + 10))).slope for first in STAGES]) / (np.pi / 3)
    diameters = np.sqrt(4 / np.pi * np.array([mean[first:first + 10].mean() for first in STAGES]))
    moving, flat, time = moving_boundary_errors(MOVING), boundary_energy_errors(FLAT), time_step_errors(DIVISORS)
    return {
        "circle_rate": {f"{radius}": circle_rate(radius) for radius in (20, 40, 80)},
        "moving_boundary_errors": moving, "moving_boundary_orders": orders(moving, MOVING),
        "boundary_energy_errors": flat, "boundary_energy_orders": orders(flat, FLAT),
        "time_step_errors": time, "time_step_orders": orders(time, DIVISORS),
        "growth_rate": linear.slope, "growth_r_squared": linear.rvalue**2, "growth_factor": mean[-1] / mean[LINEAR][0],
        "ks_distance": distance.statistic, "ks_p": distance.pvalue, "ks_grains": [len(early), len(late)],
        "ks_p_of_the_start": ks_2samp(start, late).pvalue,
        "mullins_r": sides.rvalue, "mullins_slope_by_pi_3": sides.slope / (np.pi / 3), "mullins_intercept": sides.intercept,
        "mullins_observations": side_rates(histories, range(EARLY, FRAMES)).shape[1],
        "mullins_slopes_by_pi_3": list(slopes), "mean_diameters": list(diameters),
        "mullins_slope_of_large_grains_by_pi_3": linregress(1 / diameters, slopes).intercept,
        "junctions": len(angles), "angle_mean_deviation": np.abs(angles - 120).mean(), "angle_standard_deviation": angles.std(),
        "pinning": {f"{fraction:g}": {"mean_area": one[-1], "growth_in_the_last_third": one[-1] / one[-PINNED_FRAMES // 3] - 1}
                    for fraction, one in zip(FRACTIONS, pinned, strict=True)},
    }


def side_rates(histories: list[History], frames: range) -> np.ndarray:
    """n - 6 and dA/dt of all structures, (2, grains)."""
    return np.concatenate([history.side_rates(frames) for history in histories], axis=1)


def orders(errors: list[float], factors: Sequence[float]) -> list[float]:
    """Apparent orders of convergence."""
    return list(-np.diff(np.log(errors)) / np.diff(np.log(factors)))


def table(figures: Figures) -> Table:
    """What was found beside what should be."""
    shown = Table("law", "expected", "found", box=SIMPLE)

    def several(values: list[float], digits: int = 2) -> str:
        return ", ".join(f"{value:.{digits}f}" for value in values)

    shown.add_row("circle: -dA/dt by 2 pi L kappa", "1, whatever the radius",
                  "; ".join(f"{rate:.3f} ({radius} px)" for radius, rate in figures["circle_rate"].items()))
    shown.add_row("order in space: moving boundary", "2", several(figures["moving_boundary_orders"]))
    shown.add_row("order in space: boundary energy", "2", several(figures["boundary_energy_orders"]))
    shown.add_row("order in time", "1", several(figures["time_step_orders"]))
    shown.add_row("mean area: R^2 of the line", "at least 0.99", f"{figures['growth_r_squared']:.4f} (area x {figures['growth_factor']:.1f})")
    shown.add_row("mean area: rate by L kappa", "", f"{figures['growth_rate']:.2f}")
    shown.add_row("self-similarity: p of the KS test", "not small", f"{figures['ks_p']:.2f} ({figures['ks_grains'][0]} and {figures['ks_grains'][1]} "
                  f"grains; the start: {figures['ks_p_of_the_start']:.0e})")
    shown.add_row("von Neumann-Mullins: r", "at least 0.9", f"{figures['mullins_r']:.4f} ({figures['mullins_observations']} observations)")
    shown.add_row("von Neumann-Mullins: slope by pi / 3", "1", f"{several(figures['mullins_slopes_by_pi_3'])} "
                  f"(mean diameters of {several(figures['mean_diameters'], 0)} px)")
    shown.add_row("... in the limit of large grains", "the circle's rate", f"{figures['mullins_slope_of_large_grains_by_pi_3']:.3f}")
    shown.add_row("junctions: mean of |angle - 120|", "at most 6 degrees", f"{figures['angle_mean_deviation']:.2f} "
                  f"(standard deviation {figures['angle_standard_deviation']:.2f}, {figures['junctions']} junctions)")
    for fraction, one in figures["pinning"].items():
        shown.add_row(f"Zener: mean area, fraction {fraction}", "",
                      f"{one['mean_area']:.0f} px, {one['growth_in_the_last_third']:+.0%} in the last third")
    return shown


def draw(path: Path, figures: Figures, histories: list[History], angles: np.ndarray, pinned: list[np.ndarray]) -> None:
    """The laws as six plots."""
    mpl.use("Agg")
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    times = histories[0].times
    mean = np.mean([history.mean_areas() for history in histories], axis=0)
    line = linregress(times[LINEAR], mean[LINEAR])

    growth = axes[0, 0]
    for history in histories:
        growth.plot(times, history.mean_areas(), color="0.75", lw=1)
    growth.plot(times, mean, "o", ms=3)
    growth.plot(times, line.intercept + line.slope * times, "k-", lw=1)
    growth.set(title="Mean area grows linearly", xlabel="time, 1/L", ylabel="mean grain area, px²")

    mullins = axes[0, 1]
    excess, rates = side_rates(histories, range(EARLY, FRAMES))
    spread = np.random.default_rng(0).uniform(-0.25, 0.25, excess.size)
    mullins.plot(excess + 6 + spread, rates, ".", ms=2, alpha=0.3)
    n = np.array([3, 12])
    mullins.plot(n, np.pi / 3 * (n - 6), "k-", lw=1, label=r"$\frac{\pi}{3} L \kappa (n - 6)$")
    mullins.set(title="von Neumann-Mullins", xlabel="sides n", ylabel="dA/dt, Lκ")
    mullins.legend(frameon=False)

    sizes = axes[0, 2]
    bins = np.linspace(0, 2.6, 27)
    for frame in (EARLY, (EARLY + LATE) // 2, LATE):
        scaled = np.concatenate([history.scaled_sizes(frame) for history in histories])
        sizes.stairs(np.histogram(scaled, bins, density=True)[0], bins, label=f"t = {times[frame]:.0f}, {len(scaled)} grains")
    sizes.set(title="Scaled sizes are self-similar", xlabel="diameter by its mean", ylabel="density", ylim=(0, 1.4))
    sizes.legend(frameon=False, loc="upper right")

    axes[1, 0].hist(angles.ravel(), np.arange(108, 132.5, 0.5))
    axes[1, 0].axvline(120, color="k", lw=1)
    axes[1, 0].set(title="Angles at triple junctions", xlabel="degrees", ylabel="number")

    pinning = axes[1, 1]
    for fraction, one in zip(FRACTIONS, pinned, strict=True):
        pinning.plot((1 + np.arange(PINNED_FRAMES)) * PINNED_STEPS * 0.15, one, label=f"{fraction:.0%} particles")
    pinning.set(title="Zener pinning", xlabel="time, 1/L", ylabel="mean grain area, px²")
    pinning.legend(frameon=False)

    convergence = axes[1, 2]
    for name, key, factors, order in (("moving boundary, spacing", "moving_boundary_errors", MOVING, 2),
                                      ("boundary energy, spacing", "boundary_energy_errors", FLAT, 2),
                                      ("time step", "time_step_errors", DIVISORS, 1)):
        finer = np.array(factors, float)
        points = convergence.loglog(finer, figures[key], "o", label=f"{name} (line: order {order})")
        convergence.loglog(finer, figures[key][0] / finer**order, "-", lw=1, color=points[0].get_color())
    convergence.xaxis.set_major_locator(FixedLocator(DIVISORS))
    convergence.xaxis.set_minor_locator(NullLocator())
    convergence.xaxis.set_major_formatter("{x:g}")
    convergence.set(title="Convergence", xlabel="refinement", ylabel="relative error (time step: of phi)", ylim=(2e-5, 1))
    convergence.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    keep: Annotated[bool, typer.Option("--record", help=f"write {RECORD.relative_to(Path(__file__).parents[1])}")] = False,
    figure: Annotated[Path | None, typer.Option("--figure", help="draw the laws into this file")] = None,
) -> None:
    """Hold the grain-growth simulator against the laws of grain growth."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the solver holds no lock
        growing = [pool.submit(grow_history, SHAPE, GRAINS, seed, FRAMES, FRAME_STEPS) for seed in range(STRUCTURES)]
        pinned = list(pool.map(pinned_areas, FRACTIONS))
        histories = [one.result() for one in growing]
    angles = np.concatenate([grain_angles(history.last) for history in histories])
    figures = json.loads(json.dumps(evaluate(histories, angles, pinned), default=float), parse_float=lambda text: float(f"{float(text):.4g}"))
    (Console() if sys.stdout.isatty() else Console(width=130)).print(table(figures))
    if figure:
        draw(figure, figures, histories, angles, pinned)
    if keep:
        command = shlex.join(["python", "-m", "benchmarks.grain_growth", *sys.argv[1:]])
        kept = {"command": command, "commit": tracking.git_commit(RECORD.parent), "machine": machine.describe(), "figures": figures}
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
