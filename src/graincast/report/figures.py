"""The figures of a report, as matplotlib figures that share no global state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from skimage.morphology import skeletonize

from graincast.evaluate.overlay import TRUE
from graincast.report import realism_figures
from graincast.report.drawing import CURVES, GREY, INK, heading, legend, palette, row_of_axes, shared_legend, sheet, steps, style
from graincast.report.findings import METRICS, OURS, is_measured, mean_scores, plural, unit_label
from graincast.report.inputs import ReportInputs
from graincast.store.imageset import ImageSet
from graincast.synthesise.generate import TRANSLATED

CROP = 256
"""Largest side of the image crops shown side by side, px."""
CHARTED = ("ap50", "pq", "bf1_2px", "bf1_4px", "miou")
"""Scores between 0 and 1 that are drawn; the tables hold all."""


def figures(inputs: ReportInputs) -> dict[str, Figure]:
    """Draw every figure of a run that has something to show.

    Parameters
    ----------
    inputs : ReportInputs

    Returns
    -------
    dict of str to matplotlib.figure.Figure
        ``images``, those of `graincast.report.realism_figures`, ``scores, grain_size, translator, segmenter``; those
        without data are left out. Overlays are images already and stay in `ReportInputs.overlays`.
    """
    drawn: dict[str, tuple[bool, Callable[[ReportInputs], Figure]]] = {
        "images": (True, side_by_side),
        "scores": (bool(_charted(inputs.scores)), score_comparison),
        "grain_size": (len(inputs.grains) > 0, grain_size_distributions),
        "translator": (len(inputs.translator_history) > 0, translator_losses),
        "segmenter": (len(inputs.segmenter_history) > 0, segmenter_curves),
    }
    return {name: draw(inputs) for name, (has_data, draw) in drawn.items() if has_data} | realism_figures.figures(inputs)


# Images


def side_by_side(inputs: ReportInputs, rows: int = 3) -> Figure:
    """Micrographs, simulated pictures and synthetic images at one pixel scale, their grey levels untouched.

    Every crop has the same side, 0 is black and 255 white, and a crop's pixel is a whole number of the
    figure's pixels. A synthetic image stands beside the morphology whose labels it carries.
    """
    real, synthetic = inputs.micrographs, inputs.synthetic
    side = min(CROP, smallest_side(inputs))
    translated = np.flatnonzero(synthetic.rows["look"] == TRANSLATED)
    rows = min(rows, max(len(real), len(translated)))
    panels = []
    for row, (i, j) in enumerate(zip(_spread(len(real), rows), (int(translated[k]) for k in _spread(len(translated), rows)), strict=True)):
        image, labels = synthetic.image(j), synthetic.labels(j)
        picture = inputs.morphologies.image(_origin(synthetic, j, inputs.morphologies))
        pages = (real.image(i), picture, image, _outlined(image, labels))
        panels.append([_crop(page, side, (row + 0.5) / rows) for page in pages])
    heads = (f"{inputs.micrograph.capitalize()} micrograph", "Simulated (phase field)",
             "Synthetic (translated)", "Synthetic with its labels")
    return _image_grid(heads, panels, *_scale_bar(real, side))


def smallest_side(inputs: ReportInputs) -> int:
    """Smallest height or width of the images of all three sets, px."""
    sets = (inputs.micrographs, inputs.morphologies, inputs.synthetic)
    return min(int(images.rows[["height", "width"]].to_numpy().min()) for images in sets)


def _image_grid(heads: Sequence[str], panels: Sequence[Sequence[np.ndarray]],
                bar_px: float, bar: str) -> Figure:
    """Rows of equal square panels under their column heads, a scale bar below, laid out in whole pixels."""
    side = panels[0][0].shape[0]
    zoom = max(1, round(CROP / side))
    cell, gap, head, foot = side * zoom, 12, 34, 40
    width = len(heads) * (cell + gap) - gap
    height = head + len(panels) * (cell + gap) - gap + foot
    figure = Figure(figsize=(width / 96, height / 96), dpi=96, facecolor="white")
    for r, row in enumerate(panels):
        for c, image in enumerate(row):
            left, bottom = c * (cell + gap), foot + (len(panels) - 1 - r) * (cell + gap)
            axes = figure.add_axes((left / width, bottom / height, cell / width, cell / height))
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), facecolor="none")
    page.set_axis_off()
    for c, text in enumerate(heads):
        middle = c * (cell + gap) + cell / 2
        page.text(middle, height - head / 2, text, ha="center", va="center", size=13, color=INK)
    note = f"{bar}; all images at the same scale in pixels"
    page.fill_between([0, bar_px * zoom], 18, 23, color=INK, linewidth=0)
    page.text(bar_px * zoom + 10, 20, note, va="center", size=12, color=INK)
    return figure


def _crop(image: np.ndarray, side: int, place: float) -> np.ndarray:
    """Square of `side` px: in the middle of the shorter axis, at the fraction `place` of the longer one."""
    free = np.array(image.shape[:2]) - side
    at = [place, 0.5] if free[0] > free[1] else [0.5, place]
    y, x = (free * at).astype(int)
    return image[y : y + side, x : x + side]


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices spread evenly over `count`, repeated where there are fewer."""
    return [int(i) for i in np.linspace(0, count - 1, wanted).round()]


def _origin(synthetic: ImageSet, index: int, morphologies: ImageSet) -> int:
    """Index of the morphology whose instance ids a synthetic image carries."""
    labels = synthetic.labels(index)
    for i in range(len(morphologies)):
        if np.array_equal(labels, morphologies.labels(i)):
            return i
    raise ValueError(f"synthetic image {synthetic.rows['id'][index]} has the labels of no morphology")


def _outlined(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """RGB image with the middle of the labels' boundary lines drawn one pixel wide."""
    rgb = np.repeat(image[..., None], 3, axis=2)
    rgb[skeletonize(labels == 0)] = TRUE
    return rgb


def _scale_bar(real: ImageSet, side: int) -> tuple[float, str]:
    """Length in px, and label, of the longest round (1, 2, 5) scale bar within a quarter of `side`."""
    sizes = real.rows["pixel_size_um"]
    known = sizes.notna().all() and sizes.nunique() == 1
    unit = float(sizes.iloc[0]) if known else 1.0
    longest = side / 4 * unit
    power = 10.0 ** np.floor(np.log10(longest))
    length = max(step * power for step in (1, 2, 5) if step * power <= longest)
    return length / unit, f"{length:g} {'µm' if known else 'px'}"


# Scores


def score_comparison(inputs: ReportInputs) -> Figure:
    """Scores between 0 and 1 of each set and method: a bar for the mean, a dot for each image."""
    metrics, means = _charted(inputs.scores), mean_scores(inputs.scores)
    sets = list(dict.fromkeys(means["set"]))
    methods = sorted(set(means["method"]), key=lambda name: (name != OURS, name))
    colours = palette(methods)
    thick = 0.8 / len(methods)
    figure = sheet(5.4 * len(sets), 0.9 + 0.55 * len(metrics))
    for axes, name in zip(row_of_axes(figure, len(sets)), sets, strict=True):
        style(axes, grid="x")
        scored = inputs.scores[inputs.scores["set"] == name]
        for k, method in enumerate(methods):
            values = scored.loc[scored["method"] == method, metrics]
            y = np.arange(len(metrics)) + (k - (len(methods) - 1) / 2) * thick
            axes.barh(y, values.mean(), thick * 0.9, color=colours[method], alpha=0.75, label=method)
            axes.plot(values, np.broadcast_to(y, values.shape), "o", color=INK, alpha=0.6, ms=2.5, mew=0)
        axes.set_xlim(0, 1.02)
        axes.set_yticks(range(len(metrics)), [METRICS[metric].label for metric in metrics])
        axes.invert_yaxis()
        heading(axes, f"{name} ({plural(scored['image'].nunique(), 'image')})")
    shared_legend(figure)
    return figure


def _charted(scores: pd.DataFrame) -> list[str]:
    return [name for name in CHARTED if name in scores and scores[name].notna().any()]


# Grains


def grain_size_distributions(inputs: ReportInputs) -> Figure:
    """Equivalent circular diameters, a panel a unit, and once more divided by the mean of each set.

    Divided by the mean, sets of different units compare; normal grain growth leaves the shape of that
    distribution as it is (Atkinson 1988, doi:10.1016/0001-6160(88)90079-X).
    """
    grains = inputs.grains
    units = list(dict.fromkeys(grains["unit"]))
    colours = palette(sorted(dict.fromkeys(grains["set"]), key=lambda name: not is_measured(name)))
    means = grains.groupby(["set", "unit"])["equivalent_diameter"].transform("mean")
    figure = sheet(10.8 if len(units) == 1 else 12, 3.7)
    *absolute, relative = row_of_axes(figure, len(units) + 1)
    for axes, unit in zip(absolute, units, strict=True):
        _size_histogram(axes, grains[grains["unit"] == unit], colours)
        axes.set_xlabel(f"equivalent grain diameter, {unit_label(unit)}")
    scaled = grains.assign(equivalent_diameter=grains["equivalent_diameter"] / means)
    _size_histogram(relative, scaled, colours)
    relative.set_xlabel("equivalent grain diameter / mean of its set")
    figure.axes[0].set_ylabel("share of grains, %")
    shared_legend(figure)
    return figure


def _size_histogram(axes: Axes, grains: pd.DataFrame, colours: Mapping[str, str]) -> None:
    style(axes)
    edges = np.linspace(0, 1.05 * grains["equivalent_diameter"].quantile(0.999), 31)
    for name, colour in colours.items():
        diameters = grains.loc[grains["set"] == name, "equivalent_diameter"]
        if len(diameters):
            steps(axes, np.histogram(diameters, edges)[0], edges, colour, name)
    axes.set_xlim(0, edges[-1])


# Training

TRANSLATOR_PANELS = {
    "Reconstruction": {"cycle": "cycle", "identity": "identity", "polarity": "polarity guard"},
    "Generators": {"adversarial_f": "F: simulation to SEM", "adversarial_g": "G: SEM to simulation"},
    "Discriminators": {"discriminator_sem": "SEM", "discriminator_sim": "simulation"},
}
"""Losses drawn together, with their names in the legend."""


def translator_losses(inputs: ReportInputs) -> Figure:
    """The translator's weighted losses: every step faint, the running mean over 5 % of the steps strong."""
    history = inputs.translator_history
    window = max(1, len(history) // 20)
    figure = sheet(12, 3.1)
    for axes, (title, losses) in zip(row_of_axes(figure, 3), TRANSLATOR_PANELS.items(), strict=True):
        style(axes)
        for (name, label), colour in zip(losses.items(), CURVES, strict=False):
            if name in history:
                axes.plot(history["step"] + 1, history[name], color=colour, alpha=0.2, linewidth=0.7)
                smooth = history[name].rolling(window, min_periods=1, center=True).mean()
                axes.plot(history["step"] + 1, smooth, color=colour, linewidth=1.6, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        heading(axes, title)
        legend(axes)
    figure.axes[0].set_ylabel("weighted loss")
    return figure


def segmenter_curves(inputs: ReportInputs) -> Figure:
    """The segmenter's losses and, where there are some, its validation metrics; the best epoch marked."""
    history = inputs.segmenter_history
    metrics = [str(name) for name in history if str(name).startswith("val_") and name != "val_loss"]
    panels = {"Loss": {"train_loss": "training", "val_loss": "held-out synthetic"}}
    if metrics:
        panels["On held-out synthetic images"] = {name: _metric_label(name[4:]) for name in metrics}
    figure = sheet(5.4 * len(panels), 3.1)
    for axes, (title, curves) in zip(row_of_axes(figure, len(panels)), panels.items(), strict=True):
        style(axes)
        for (name, label), colour in zip(curves.items(), CURVES * len(curves), strict=False):
            axes.plot(history["epoch"] + 1, history[name], color=colour, marker="o", ms=2.5, label=label)
        if history["val_loss"].notna().any():
            best = history["epoch"].iloc[history["val_loss"].argmin()] + 1
            axes.axvline(best, color=GREY, linewidth=1, linestyle="--", label="lowest validation loss")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True)
        heading(axes, title)
        legend(axes)
    return figure


def _metric_label(name: str) -> str:
    return METRICS[name].label if name in METRICS else name.replace("_", " ")
