"""Grain growth drawn: the figure of a series and its animation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from graincast.evaluate.overlay import PREDICTED, overlay
from graincast.growth import Growth
from graincast.kinetics import IDEAL, Kinetics, radius_at
from graincast.report import drawing

COLOURS = {"true": drawing.BLUE, "segmented": drawing.VERMILION}
NAMES = {"true": "simulation", "segmented": "segmented"}
MARKERS = {"true": "o", "segmented": "x"}
SHOWN_FRAMES = 4
FRAME_MS, LAST_MS = 300, 2000
"""Time that a frame of the animation, and its last one, is shown, ms."""
GIF_DPI = 72
CURVE_COLOURS = 96
"""Entries of the palette for the curve; most others are greys."""


def figure(growth: Growth) -> bytes:
    """PNG: micrographs with the segmented boundaries above; below mean size with spread, kinetics, and errors against time."""
    sheet = drawing.sheet(12.5, 7.4)
    grid = sheet.add_gridspec(2, 12, height_ratios=(1, 1.15))
    for place, number in enumerate(_shown(growth)):
        _picture(sheet.add_subplot(grid[0, 3 * place : 3 * place + 3]), growth, number)
    size, law, errors = (sheet.add_subplot(grid[1, column : column + 4]) for column in (0, 4, 8))
    _size_against_time(size, growth, len(growth.table))
    _kinetics(law, growth)
    _errors(errors, growth)
    return drawing.to_png(sheet)


def animate(growth: Growth, path: Path) -> None:
    """GIF: the micrograph, the same with the segmented boundaries, and the curve as far as it has come.

    All frames share one palette, so that greys do not flicker: a ramp of greys, the overlay's colour and the last curve's.
    """
    pages = [_page(growth, number) for number in range(len(growth.table))]
    width, height = pages[-1].size
    curve = pages[-1].crop((2 * width // 3, 0, width, height)).quantize(CURVE_COLOURS, Image.Quantize.MEDIANCUT)
    palette = Image.new("P", (1, 1))
    greys = np.repeat(np.linspace(0, 255, 255 - CURVE_COLOURS).round().astype(int), 3).tolist()
    palette.putpalette((curve.getpalette() or [])[: 3 * CURVE_COLOURS] + list(PREDICTED) + greys)
    shown = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    shown[0].save(path, format="GIF", save_all=True, append_images=shown[1:], duration=[FRAME_MS] * (len(shown) - 1) + [LAST_MS], loop=0,
                  optimize=False)


def _page(growth: Growth, number: int) -> Image.Image:
    page = Figure(figsize=(13.2, 4.5), dpi=GIF_DPI, layout="constrained", facecolor="white")
    plain, cut, curve = page.subplots(1, 3)
    _picture(plain, growth, number, boundaries=False)
    _picture(cut, growth, number)
    _size_against_time(curve, growth, number + 1)
    FigureCanvasAgg(page)
    buffer = io.BytesIO()
    page.savefig(buffer, format="png", dpi=GIF_DPI)
    return Image.open(buffer).convert("RGB")


def _shown(growth: Growth) -> list[int]:
    return [round(k) for k in np.linspace(0, len(growth.table) - 1, SHOWN_FRAMES)]


def _picture(axes: Axes, growth: Growth, number: int, boundaries: bool = True) -> None:
    view, row = growth.views[number], growth.table.iloc[number]
    axes.imshow(overlay(view.micrograph, view.labels) if boundaries else view.micrograph, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()
    drawing.heading(axes, f"{row['segmented_grains']:.0f} grains segmented, {row['true_grains_in_view']:.0f} true" if boundaries
                    else f"t = {row['time_per_mobility']:.0f} / L")


def _size_against_time(axes: Axes, growth: Growth, seen: int) -> None:
    """Mean diameter and its spread in the first `seen` frames, with the fits' curves once all are seen; axes of all frames."""
    table, unit = growth.table, growth.unit
    time = table["time_per_mobility"]
    for kind, colour in COLOURS.items():
        mean, spread = table[f"{kind}_mean_diameter_{unit}"], table[f"{kind}_std_diameter_{unit}"]
        fit = growth.fits.get(kind)
        label = NAMES[kind] + (f", n = {fit.exponent.value:.2f}" if fit and seen == len(table) else "")
        axes.plot(time[:seen], mean[:seen], MARKERS[kind], color=colour, markersize=5, label=label)
        axes.fill_between(time[:seen], (mean - spread)[:seen], (mean + spread)[:seen], color=colour, alpha=0.13, linewidth=0)
        if fit and seen == len(table):
            late = time[table["fitted"]].to_numpy()
            fine = np.linspace(late[0], late[-1], 100)
            axes.plot(fine, 2 * _law(fit, fine, late[0]), color=colour, linewidth=1.2)
    top = max((table[f"{kind}_mean_diameter_{unit}"] + table[f"{kind}_std_diameter_{unit}"]).max() for kind in COLOURS)
    axes.set(xlim=(0, 1.04 * time.max()), ylim=(0, 1.08 * top), xlabel="time, 1/L", ylabel=f"mean grain diameter, {unit}")
    drawing.style(axes)
    drawing.heading(axes, "Mean size (band: standard deviation)")
    drawing.legend(axes, "upper left")


def _kinetics(axes: Axes, growth: Growth) -> None:
    """R^2 against time, a line where growth is ideal, with the line fitted at n = 2."""
    table = growth.table
    time, fitted = table["time_per_mobility"], table["fitted"]
    for kind, colour in COLOURS.items():
        squared = (table[f"{kind}_mean_diameter_{growth.unit}"] / 2) ** 2
        axes.plot(time[fitted], squared[fitted], MARKERS[kind], color=colour, markersize=5)
        axes.plot(time[~fitted], squared[~fitted], MARKERS[kind], color=colour, markersize=5, alpha=0.3)
        if kind in growth.fits:
            fit, late = growth.fits[kind], time[fitted].to_numpy()
            squares = fit.ideal_initial_radius.value**IDEAL + fit.ideal_rate.value * (late - late[0])
            axes.plot(late, squares, color=colour, linewidth=1.2, label=f"{NAMES[kind]}: k = {fit.ideal_rate}")
    axes.set(xlabel="time, 1/L", ylabel=f"R², {growth.unit}²", xlim=(0, 1.04 * time.max()), ylim=(0, None))
    drawing.style(axes)
    drawing.heading(axes, "$R^2 - R_0^2 = k\\,t$ (faint: not fitted)")
    if growth.fits:
        drawing.legend(axes, "upper left")


def _errors(axes: Axes, growth: Growth) -> None:
    """Error of the count and of the mean size, and ap50, in per cent."""
    table = growth.table
    size_error = 100 * (table[f"segmented_mean_diameter_{growth.unit}"] / table[f"true_mean_diameter_{growth.unit}"] - 1)
    curves = {"ap50 below 100": (100 * (table["ap50"] - 1), drawing.GREEN), "number": (table["count_error_percent"], drawing.PURPLE),
              "mean diameter": (size_error, drawing.VERMILION)}
    for label, (values, colour) in curves.items():
        axes.plot(table["time_per_mobility"], values, "-", marker=".", color=colour, linewidth=1.2, label=label)
    axes.axhline(0, color=drawing.INK, linewidth=0.8)
    axes.set(xlabel="time, 1/L", ylabel="segmented against simulation, %")
    drawing.style(axes)
    drawing.heading(axes, "Error")
    drawing.legend(axes)


def _law(fit: Kinetics, times: np.ndarray, since: float) -> np.ndarray:
    return radius_at(times, since, fit.exponent.value, fit.initial_radius, fit.rate)
