"""The figure of a verdict: what moved, and where the session lies among what the champion knows."""

from __future__ import annotations

import numpy as np

from graincast.monitor.descriptors import TABLE
from graincast.monitor.drift import Drift, Reference
from graincast.report import drawing

SHOWN = 600  # patches of a set, at most
GROUP_COLOURS = {"look": drawing.BLUE, "focus": drawing.PURPLE, "size": drawing.GREEN, "manifold": drawing.VERMILION}


def drift_figure(reference: Reference, drift: Drift, places: np.ndarray) -> bytes:
    """PNG: every descriptor's distance from the reference beside the threshold; the patches along two axes of the champion's features.

    Parameters
    ----------
    reference : Reference
    drift : Drift
    places : ndarray
        (patches, axes): the session's places in the reference's embedding.
    """
    figure = drawing.sheet(12, 6)
    bars, scatter = drawing.row_of_axes(figure, 2)
    names = [name for name in TABLE if f"t_{name}" in drift.scores]
    t = np.array([drift.scores[f"t_{name}"] for name in names])
    threshold = drift.scores["columns_threshold"]
    shown = np.sign(t) * np.log10(1 + np.abs(t))  # a strong drift would flatten the rest on a linear axis
    bars.barh(range(len(names)), shown, color=[GROUP_COLOURS[TABLE[name].group] for name in names])
    bars.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    bars.invert_yaxis()
    ticks = np.array([-100, -10, -3, 0, 3, 10, 100])
    bars.set_xticks(np.sign(ticks) * np.log10(1 + np.abs(ticks)), [str(tick) for tick in ticks])
    for side in (-1, 1):
        bars.axvline(side * np.log10(1 + threshold), color=drawing.INK, linewidth=1, linestyle="--")
    bars.set_xlabel("distance from the reference, sigma (dashed: threshold)")
    drawing.style(bars, "x")
    first, second = 0, min(1, reference.embedding.encoder_count - 1)
    for label, points, colour in (("synthetic", reference.synthetic, drawing.PALE), ("reference", reference.real, drawing.BLUE),
                                  ("session", places, drawing.VERMILION)):
        few = points[np.linspace(0, len(points) - 1, min(SHOWN, len(points))).round().astype(int)]
        scatter.scatter(few[:, first], few[:, second], s=8, color=colour, label=label, linewidths=0)
    scatter.set_xlabel(f"champion's features, axis {first + 1}")
    scatter.set_ylabel(f"axis {second + 1}")
    drawing.style(scatter)
    drawing.legend(scatter)
    drawing.heading(bars, "What moved")
    drawing.heading(scatter, "Patches as the champion sees them")
    return drawing.to_png(figure)

