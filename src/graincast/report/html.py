"""The report of a run: one HTML document that needs no network."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from graincast.evaluate import overlay
from graincast.evaluate.realism import REAL, SYNTHETIC, UNTEXTURED
from graincast.report.drawing import to_png
from graincast.report.figures import figures
from graincast.report.findings import (
    METRICS,
    REALISM,
    best_methods,
    decisive_set,
    grain_sizes,
    headline,
    mean_scores,
    measured_size,
    plural,
    source_name,
    summarise,
    unit_label,
)
from graincast.report.inputs import ReportInputs
from graincast.report.page import MANY, TIMES, Picture, Table, data_address, embedded, number, render, text
from graincast.store.imageset import ImageSet

PACKAGES = ("graincast", "numpy", "scipy", "numba", "scikit-image", "torch", "segmentation-models-pytorch",
            "zenml", "mlflow", "dvc", "great-expectations", "evidently")
STANDARD_COLUMNS = frozenset({"id", "session", "source", "pixel_size_um", "seed", "height", "width",
                              "checksum"})


def write_report(inputs: ReportInputs, folder: Path) -> None:
    """Write ``report.html``, its figures as ``figures/NAME.png`` and `summarise`'s ``summary.json`` into an existing folder."""
    drawn = figures(inputs)
    encoded = {name: to_png(figure) for name, figure in drawn.items()}
    (folder / "report.html").write_text(_render(inputs, drawn, encoded), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summarise(inputs), indent=1))
    (folder / "figures").mkdir()
    for name, png in encoded.items():
        (folder / "figures" / f"{name}.png").write_bytes(png)


def build_report(inputs: ReportInputs) -> str:
    """Render a run as one HTML document.

    Parameters
    ----------
    inputs : ReportInputs

    Returns
    -------
    str
        The document. Styles and images are inside it, it has no script and fetches nothing; the same inputs
        and software versions give the same text.
    """
    drawn = figures(inputs)
    return _render(inputs, drawn, {name: to_png(figure) for name, figure in drawn.items()})


def _render(inputs: ReportInputs, drawn: Mapping[str, Figure], encoded: Mapping[str, bytes]) -> str:
    return render(
        "report.html",
        title=inputs.title,
        virtual=inputs.virtual,
        micrograph=inputs.micrograph,
        headline=headline(inputs),
        tiles=_tiles(inputs),
        pictures=_pictures(inputs, drawn, encoded),
        realism=_realism_table(inputs),
        notes=inputs.realism.notes if inputs.realism else [],
        scores=_score_tables(inputs.scores),
        metrics=[(metric.label, metric.meaning) for name, metric in METRICS.items() if name in inputs.scores],
        overlays=[_overlay_picture(caption, image) for caption, image in inputs.overlays.items()],
        line_colours={"predicted": overlay.PREDICTED, "true": overlay.TRUE, "both": overlay.BOTH},
        grains=_grain_table(inputs.grains),
        read=_read_table(inputs.micrographs),
        refused=_refused_table(inputs.micrographs, "Files that were refused", "File"),
        fidelity=_fidelity_table(inputs.synthetic),
        dropped=_refused_table(inputs.synthetic, "Synthetic images that were dropped", "Image"),
        run=inputs.run,
        datasets=_dataset_table(inputs),
        software=_software_table(),
        config=yaml.safe_dump(dict(inputs.config), sort_keys=False, allow_unicode=True),
    )


# The figures at the top


def _tiles(inputs: ReportInputs) -> list[tuple[str, str, str]]:
    """Value, name and small print of each figure at the top."""
    fidelity = inputs.synthetic.rows["fidelity"].mean()
    tiles = [(str(len(inputs.micrographs)), f"{inputs.micrograph} micrographs read",
              f"{len(inputs.micrographs.refused)} refused"),
             (str(len(inputs.synthetic)), "labelled synthetic images",
              f"{len(inputs.synthetic.refused)} dropped; label fidelity {fidelity:.2f}")]
    means = mean_scores(inputs.scores)
    for row in means[means["set"] == decisive_set(inputs.scores)].to_dict("records"):
        if "ap50" in row:
            tiles.append((f"{row['ap50']:.2f}", f"AP50, {row['method']}",
                          f"{row['set']}, {plural(row['images'], 'image')}"))
    if size := measured_size(inputs.grains):
        tiles.append((f"{size['mean']:.3g} {unit_label(size['unit'])}", "mean grain diameter",
                      f"{size['set']}, {plural(size['grains'], 'grain')}"))
    return tiles


# Pictures


def _pictures(inputs: ReportInputs, drawn: Mapping[str, Figure], encoded: Mapping[str, bytes]) -> dict[str, Picture]:
    captions = _captions(inputs.micrograph)
    pictures = {}
    for name, figure in drawn.items():
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        source = data_address(encoded[name])
        pictures[name] = Picture(source, width, height, *captions[name], chart=name != "images")
    return pictures


def _captions(kind: str) -> dict[str, tuple[str, str]]:
    """Alternative text and caption of each figure; `kind` is that of the micrographs."""
    return {
        "images": (f"Rows of four crops: {kind} micrograph, simulated picture, synthetic image, and that "
                   "image with the boundaries of its labels",
                   f"Each row: a {kind} micrograph as the training saw it; a simulated morphology; the "
                   "synthetic image drawn from it; the same with the boundaries of its labels in blue. Grey "
                   "levels are untouched: 0 is black, 255 white."),
        "intensity": (f"Overlaid histograms of the grey levels of {kind}, synthetic and untextured images",
                      f"Grey levels. Good: the synthetic curve lies as near the {kind} one as its two halves (thin) lie to each other; "
                      "the untextured pictures have no noise and make a narrow peak, cut off at the top."),
        "spectrum": (f"Radially averaged power spectra of {kind}, synthetic and untextured images",
                     f"Power spectra: left coarse structure, right fine detail and noise. Good: synthetic on {kind} throughout; a drop "
                     "at the right means too smooth, a bump an artificial pattern."),
        "entropy": (f"Overlaid histograms of the local entropy of {kind}, synthetic and untextured images",
                    f"Local entropy: noise and fine detail raise it. Good: synthetic as near {kind} as the thin halves are to each other."),
        "ssim": (f"Overlaid histograms of the structural similarity to the nearest {kind} patch",
                 f"Structural similarity to the nearest {kind} patch; of {kind} ones, to the nearest in another image. SSIM was made for two "
                 f"pictures of one scene: unpaired textures score low, even {kind} against {kind}, and smooth pictures higher than noisy ones. "
                 f"Good: the synthetic curve on the {kind} one, not to the right of it."),
        "surfaces": (f"Grey levels of a typical patch as a landscape: two {kind} ones, a synthetic one, an untextured one",
                     f"Typical patches as landscapes, grey level as height. Good: the synthetic one is as rough as the two {kind} ones, with "
                     "grooves or ridges where the untextured one beside it, from which it was drawn, has its valleys."),
        "embedding": (f"Maps of the features of {kind}, synthetic and untextured patches",
                      f"Maps of what networks see in the patches (t-SNE: neighbours mean something, distances between groups little). "
                      f"Good: synthetic mixed with {kind} as the two halves of the {kind} ones are with each other; untextured apart."),
        "kid": ("Kernel distances with their intervals",
                f"Kernel distances (KID). Good: the interval of synthetic reaches that of {kind} against {kind}; at the least it lies far "
                "from the untextured one. The features are not Inception's: compare within graincast only."),
        "scores": ("Bars of the mean scores of each method, one panel a set, with a dot for each image",
                   "Bars are means, dots single images; 1 is perfect."),
        "grain_size": ("Histograms of the equivalent grain diameters of each set",
                       "Equivalent circular diameters as measured, and divided by the mean of their set."),
        "translator": ("Loss curves of the translator over its training steps",
                       "Translator. Faint lines: every step; strong lines: running mean. A polarity guard "
                       "above 0 means that contrast is turning round; a discriminator near 0 has won, near "
                       "0.25 it is guessing."),
        "segmenter": ("Loss and validation curves of the segmenter over its epochs",
                      "Segmenter: losses and scores after each epoch."),
        "fidelity": ("Histogram of the label fidelity of the synthetic images",
                     "How well the boundaries in each synthetic image lie where its labels have them. Good: near the untextured pictures, "
                     "in which they lie there exactly."),
    }


def _overlay_picture(caption: str, image: np.ndarray) -> Picture:
    return embedded(image, f"Segmentation overlay: {caption}", caption)


# Tables


def _realism_table(inputs: ReportInputs) -> Table | None:
    if inputs.realism is None:
        return None
    kind, found = inputs.micrograph, inputs.realism.summary
    rows = [[REALISM[name].label, *(_estimate(found[name], group) for group in (SYNTHETIC, UNTEXTURED, REAL)),
             REALISM[name].meaning.format(kind=kind), REALISM[name].good.format(kind=kind)] for name in REALISM if name in found]
    head = ["Figure", "Synthetic", "Untextured", f"Floor: {kind} against {kind}", "What is compared", "Good is"]
    caption = (f"Synthetic and untextured (simulated) images compared with the {kind} ones; floor: two halves of the {kind} ones compared "
               "with each other. Distances are 0 for what is alike. In brackets 95 % intervals")
    return Table(caption, head, rows, frozenset({1, 2, 3}))


def _estimate(values: Mapping[str, float], group: str) -> str:
    """A value with its interval, where it has one."""
    text = number(values.get(group))
    return f"{text} ({number(values[f'{group}_low'])} to {number(values[f'{group}_high'])})" if f"{group}_low" in values else text


def _score_tables(scores: pd.DataFrame) -> list[Table]:
    if scores.empty:
        return []
    means = mean_scores(scores)
    metrics = [name for name in METRICS if name in means]
    labels = [METRICS[name].label for name in metrics]
    rows = [[row["set"], row["method"], str(row["images"]), *(number(row[name]) for name in metrics)]
            for row in means.to_dict("records")]
    every = [[row["set"], row["method"], str(row["image"]), *(number(row[name]) for name in metrics)]
             for row in scores.to_dict("records")]
    best = frozenset((row, 3 + metrics.index(name)) for row, name in best_methods(means))
    columns = frozenset(range(3, 3 + len(metrics)))
    return [Table("Mean over the images of each set; the best method of a set is bold",
                  ["Set", "Method", "Images", *labels], rows, columns | {2}, best),
            Table("Scores of every image", ["Set", "Method", "Image", *labels], every, columns, folded=True)]


def _grain_table(grains: pd.DataFrame) -> Table | None:
    head = ["Set", "Grains", "Mean", "Std. dev.", "10 %", "Median", "90 %", "Unit"]
    statistics = ("mean", "std", "p10", "median", "p90")
    rows = [[row["set"], str(row["grains"]), *(number(row[s]) for s in statistics), unit_label(row["unit"])]
            for row in grain_sizes(grains).to_dict("records")]
    caption = "Equivalent circular diameter of the grains"
    return Table(caption, head, rows, frozenset(range(1, 7))) if rows else None


def _read_table(micrographs: ImageSet) -> Table:
    rows = micrographs.rows
    described = [str(c) for c in rows if c not in STANDARD_COLUMNS and pd.api.types.is_float_dtype(rows[c])]
    head = ["File", "Session", "Size used, px", "Pixel size, µm", *(c.replace("_", " ") for c in described)]
    cells = [[source_name(_named(row)), text(row["session"]), f"{row['width']} {TIMES} {row['height']}",
              *(number(row[c], ".4g") for c in ("pixel_size_um", *described))]
             for row in rows.to_dict("records")]
    numeric = frozenset(range(2, len(head)))
    return Table("Files that were read", head, cells, numeric, folded=len(cells) > MANY)


def _refused_table(images: ImageSet, caption: str, what: str) -> Table | None:
    rows = [[source_name(_named(row)), row["refused"]] for row in images.refused.to_dict("records")]
    return Table(caption, [what, "Reason"], rows, folded=len(rows) > MANY) if rows else None


def _fidelity_table(synthetic: ImageSet) -> Table:
    fidelity, dropped = synthetic.rows["fidelity"].dropna(), len(synthetic.refused)
    rows = [["Translated", str(len(fidelity) + dropped)], ["Kept", str(len(fidelity))],
            ["Dropped", str(dropped)], ["Untranslated beside them", str(len(synthetic) - len(fidelity))],
            ["Label fidelity of those kept: mean", number(fidelity.mean())],
            ["Label fidelity of those kept: lowest", number(fidelity.min())]]
    return Table("Synthetic images and their label fidelity", ["What", "Value"], rows, frozenset({1}))


def _dataset_table(inputs: ReportInputs) -> Table:
    sets = {f"{inputs.micrograph} micrographs": inputs.micrographs, "morphologies": inputs.morphologies,
            "synthetic": inputs.synthetic}
    rows = [[name, str(len(s)), str(len(s.refused)), s.digest] for name, s in sets.items()]
    return Table("Datasets", ["Set", "Images", "Refused", "DVC hash"], rows, frozenset({1, 2}))


def _software_table() -> Table:
    rows = [["Python", platform.python_version()], *([name, _installed(name)] for name in PACKAGES)]
    return Table("Software", ["Package", "Version"], rows)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a machine that only trains has no zenml, mlflow or dvc
        return "not installed"


def _named(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}
