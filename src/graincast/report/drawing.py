"""What the figures of a report share: colours, sheets, axes, legends."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart by colour-blind readers too (https://jfly.uni-koeln.de/color/).
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
GREY, PALE, INK = "#8a8f98", "#d9dce1", "#1f2430"
CURVES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
PALETTE = (BLUE, GREY, *CURVES[1:])

DPI = 160


def to_png(figure: Figure) -> bytes:
    """Encode a figure; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, metadata={"Software": None})
    return buffer.getvalue()


def sheet(width: float, height: float) -> Figure:
    """An empty figure of this size, inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def chart(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = sheet(width, height)
    (axes,) = row_of_axes(figure, 1)
    style(axes)
    return figure, axes


def row_of_axes(figure: Figure, count: int) -> list[Axes]:
    """`count` axes side by side."""
    return list(figure.subplots(1, count, squeeze=False)[0])


def steps(axes: Axes, counts: np.ndarray, edges: np.ndarray, colour: str, label: str) -> None:
    """Outline of a histogram in per cent over a faint filling."""
    share = 100 * counts / max(counts.sum(), 1)
    axes.stairs(share, edges, color=colour, fill=True, alpha=0.12)
    axes.stairs(share, edges, color=colour, linewidth=1.5, label=label)


def palette(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def style(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """The look of all axes: two spines, a pale grid, small dark text."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(axis=grid, color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=GREY, labelcolor=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(size=10, color=INK)


def heading(axes: Axes, text: str) -> None:
    """Title of a panel."""
    axes.set_title(text, fontsize=10.5, color=INK)


def legend(axes: Axes, place: Literal["best", "upper left"] = "best") -> None:
    """Legend of a panel, without a frame."""
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc=place)


def shared_legend(figure: Figure) -> None:
    """One legend below all panels, each name once."""
    handles = {label: handle for axes in figure.axes
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles),
                  frameon=False, fontsize=9, labelcolor=INK)
