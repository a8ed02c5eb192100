"""What the numbers of a run say: means, comparisons and the sentences a microscopist reads first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from graincast.report.inputs import OURS, ReportInputs


class Metric(NamedTuple):
    """How a segmentation metric is shown, and what a perfect prediction scores."""

    label: str
    best: float
    meaning: str


METRICS: dict[str, Metric] = {
    "ap50": Metric("AP50", 1, "matched / (matched + false + missed) grains; a match overlaps with IoU > 0.5"),
    "pq": Metric("PQ", 1, "panoptic quality: the matches, weighted by how well they overlap"),
    "bf1_2px": Metric("BF1 2 px", 1, "boundary F1; lines within 2 px of each other agree"),
    "bf1_4px": Metric("BF1 4 px", 1, "boundary F1; lines within 4 px of each other agree"),
    "bf1_075": Metric("BF1 0.75 %", 1, "boundary F1; lines within 0.75 % of the image diagonal agree"),
    "iou_grain": Metric("IoU grain", 1, "overlap (intersection over union) of the grain interiors"),
    "iou_boundary": Metric("IoU line", 1, "overlap of the boundary lines"),
    "miou": Metric("mIoU", 1, "mean of the two overlaps"),
    "iou_fg": Metric("IoU particles", 1, "overlap of all particles together"),
    "vi_split": Metric("VI split", 0, "variation of information from grains cut in pieces, bits"),
    "vi_merge": Metric("VI merge", 0, "variation of information from grains run together, bits"),
    "count_ratio": Metric("Count ratio", 1, "grains found / grains drawn"),
    "d_astm_g": Metric("Δ ASTM G", 0, "error of the ASTM E112 grain-size number: log2 of the count ratio"),
}
"""Metrics in the order in which they are shown."""

class Likeness(NamedTuple):
    """How a figure of realism is shown, what it compares, and what a good one looks like."""

    label: str
    meaning: str
    good: str


NEAR_FLOOR = "near the floor"
REALISM: dict[str, Likeness] = {
    "intensity_distance": Likeness("grey levels", "grey-level histograms, grey levels", NEAR_FLOOR),
    "entropy_distance": Likeness("local entropy", "Shannon entropies of patches, bits", NEAR_FLOOR),
    "sharpness_distance": Likeness("sharpness", "gradient magnitudes, grey levels per px", NEAR_FLOOR),
    "spectrum_distance": Likeness("power spectrum", "mean power spectra, dB", NEAR_FLOOR),
    "spectral_slope_distance": Likeness("spectral slope", "slopes of the power spectra", NEAR_FLOOR),
    "texture_kid": Likeness("KID, texture", "kernel distance of texture descriptors, times 1000", NEAR_FLOOR),
    "encoder_kid": Likeness("KID, encoder", "kernel distance of the segmenter's own features, times 1000", NEAR_FLOOR),
    "vgg16_kid": Likeness("KID, VGG16", "kernel distance of VGG16's features, times 1000", NEAR_FLOOR),
    "ssim_nearest": Likeness("SSIM, nearest", "structural similarity to the nearest {kind} patch",
                             "as {kind} against {kind}; more says smooth, not alike"),
    "label_fidelity": Likeness("label fidelity", "boundaries that lie where the labels have them", "near that of the untextured"),
}
"""The figures of realism in the order in which they are shown; ``{kind}`` is that of the micrographs."""


def mean_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean over the images of each set and method.

    Parameters
    ----------
    scores : pandas.DataFrame
        As in `ReportInputs`.

    Returns
    -------
    pandas.DataFrame
        ``set, method, images`` and the mean of every metric; sets in their order of appearance, `OURS` first
        in each.
    """
    metrics = [name for name in METRICS if name in scores]
    if scores.empty:
        return pd.DataFrame(columns=["set", "method", "images", *metrics])
    groups = scores.groupby(["set", "method"], sort=False)
    means = groups[metrics].mean().assign(images=groups.size()).reset_index()
    place = means["set"].map({name: i for i, name in enumerate(scores["set"].unique())})
    order = np.lexsort((means.index, means["method"] != OURS, place))
    return means[["set", "method", "images", *metrics]].iloc[order].reset_index(drop=True)


def best_methods(means: pd.DataFrame) -> set[tuple[int, str]]:
    """Cells (row, metric) of `mean_scores` that no rival in the same set beats; none without a rival."""
    cells: set[tuple[int, str]] = set()
    for _, rows in means.groupby("set", sort=False):
        for name in METRICS:
            if name in rows and len(rows) > 1:
                miss = (rows[name] - METRICS[name].best).abs()
                cells |= {(int(row), name) for row in rows.index[miss == miss.min()].to_numpy()}
    return cells


def decisive_set(scores: pd.DataFrame) -> str | None:
    """Name of the set that counts: the first that is not called synthetic, else the first, else None."""
    sets = list(dict.fromkeys(scores["set"])) if len(scores) else []
    return next((name for name in sets if "synthetic" not in name.lower()), sets[0] if sets else None)


def headline(inputs: ReportInputs) -> str:
    """Say in plain words what came out, a failure included.

    It speaks of `decisive_set`, and says so where there were only synthetic images to measure on. Warnings come last.
    """
    return " ".join(filter(None, [_agreement(inputs.scores), _count(inputs.scores), _size(inputs.grains), *warnings(inputs)]))


def warnings(inputs: ReportInputs) -> list[str]:
    """Sentences on what is doubtful about the segmenter's results and about the micrographs it learned from."""
    doubtful = [f"Not to be used: {doubt}." for doubt in inputs.doubts]
    return doubtful + [f"Warning: {sentence}." for sentence in inputs.micrographs.info.get("warnings", [])]


def _agreement(scores: pd.DataFrame) -> str:
    name, means = decisive_set(scores), mean_scores(scores)
    rows = means[means["set"] == name].set_index("method")
    if OURS not in rows.index or "ap50" not in rows:
        return "No image with a known truth was scored, so how well the grains are found is not known."
    ap50, images = float(rows["ap50"][OURS]), plural(int(rows["images"][OURS]), "image")
    sentence = (f"On {images} of the set “{name}”, {100 * ap50:.0f} of 100 grains, true or found, match "
                f"(AP50 {ap50:.2f})")
    others = rows["ap50"].drop(OURS).dropna()
    if len(others):
        sentence += f", {_compared(ap50, others.max())} the {others.idxmax()} ({others.max():.2f})"
    if "synthetic" in str(name).lower():
        sentence += "; these images are synthetic, there was no micrograph with a mask to measure on"
    return sentence + "."


def _compared(ours: float, theirs: float) -> str:
    if f"{ours:.2f}" == f"{theirs:.2f}":
        return "level with"
    return "better than" if ours > theirs else "worse than"


def _count(scores: pd.DataFrame) -> str:
    means = mean_scores(scores)
    ours = means[(means["set"] == decisive_set(scores)) & (means["method"] == OURS)]
    if ours.empty or "count_ratio" not in ours:
        return ""
    percent = 100 * (float(ours["count_ratio"].iloc[0]) - 1)
    if abs(percent) < 1:
        return "The number of grains there is right to within 1 %."
    return f"It counts {abs(percent):.0f} % too {'many' if percent > 0 else 'few'} grains there."


def _size(grains: pd.DataFrame) -> str:
    size = measured_size(grains)
    if size is None:
        return ""
    unit = unit_label(size["unit"])
    return (f"The mean grain diameter, {size['set']}, is {size['mean']:.3g} {unit} (standard deviation "
            f"{size['std']:.2g} {unit}, {plural(size['grains'], 'grain')}).")


def grain_sizes(grains: pd.DataFrame) -> pd.DataFrame:
    """Statistics of the equivalent circular diameter.

    Parameters
    ----------
    grains : pandas.DataFrame
        As in `ReportInputs`.

    Returns
    -------
    pandas.DataFrame
        ``set, unit, grains, mean, std, p10, median, p90``, a row a set and unit, in order of appearance.
    """
    columns = ["set", "unit", "grains", "mean", "std", "p10", "median", "p90"]
    if grains.empty:
        return pd.DataFrame(columns=columns)
    diameters = grains.groupby(["set", "unit"], sort=False)["equivalent_diameter"]
    table = pd.DataFrame({"grains": diameters.size(), "mean": diameters.mean(), "std": diameters.std(ddof=0),
                          "p10": diameters.quantile(0.1), "median": diameters.median(),
                          "p90": diameters.quantile(0.9)})
    return table.reset_index()[columns]


def is_measured(name: str) -> bool:
    """Whether a set of grains was measured on micrographs: not simulated, synthetic or truth by name."""
    return not any(word in name.lower() for word in ("simulated", "synthetic", "truth"))


def measured_size(grains: pd.DataFrame) -> dict[str, Any] | None:
    """The first row of `grain_sizes` that was measured on micrographs."""
    rows = (_plain(row) for _, row in grain_sizes(grains).iterrows())
    return next((row for row in rows if is_measured(row["set"])), None)


def source_name(row: Mapping[str, Any]) -> str:
    """What a manifest row is called: its source file, or its id where it has none."""
    return str(row["id"]) if pd.isna(row["source"]) else str(row["source"])


def unit_label(unit: str) -> str:
    """A unit as it is printed: ``um`` becomes ``µm``."""
    return "µm" if unit == "um" else unit


def plural(count: int, noun: str) -> str:
    """A count with its noun: ``1 image``, ``2 images``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def summarise(inputs: ReportInputs) -> dict[str, Any]:
    """The run in numbers, JSON-able: what `graincast.report.terminal.summary_table` prints."""
    fidelity, refused = inputs.synthetic.rows["fidelity"], inputs.micrographs.refused
    return {
        "title": inputs.title,
        "virtual": inputs.virtual,
        "headline": headline(inputs),
        "warnings": warnings(inputs),
        "micrographs": len(inputs.micrographs),
        "refused": [[source_name(_plain(row)), str(row["refused"])] for _, row in refused.iterrows()],
        "morphologies": len(inputs.morphologies),
        "synthetic": len(inputs.synthetic),
        "dropped": len(inputs.synthetic.refused),
        "fidelity": {"mean": float(fidelity.mean()), "min": float(fidelity.min())},
        "translator": _training(inputs.translator_history, "step"),
        "segmenter": _training(inputs.segmenter_history, "epoch"),
        "scores": [_plain(row) for _, row in mean_scores(inputs.scores).iterrows()],
        "realism": inputs.realism.summary if inputs.realism else {},
    }


def _training(history: pd.DataFrame, count: str) -> dict[str, float]:
    facts: dict[str, float] = {f"{count}s": len(history)}
    if "seconds" in history and len(history):
        facts["seconds"] = float(history["seconds"].iloc[-1])
    if "val_loss" in history and history["val_loss"].notna().any():
        best = history.iloc[history["val_loss"].argmin()]
        facts |= {f"best_{count}": int(best[count]) + 1, "val_loss": float(best["val_loss"])}
    return facts


def _plain(row: pd.Series) -> dict[str, Any]:
    """A row as a dict of Python's own types; NaN and infinities, which JSON lacks, become None."""
    values = {str(k): v.item() if isinstance(v, np.generic) else v for k, v in row.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
