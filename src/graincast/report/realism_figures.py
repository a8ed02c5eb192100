"""How alike real, synthetic and untextured images are, drawn side by side (figure 3 of Zahran et al. 2026).

Everything but the dropped images' fidelity comes from `ReportInputs.realism` and is drawn as it is stored there. The
two halves of the real images, drawn thin, are the floor: how far apart images of one kind lie.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from graincast.evaluate.realism import HALVES, REAL, SYNTHETIC, UNTEXTURED, Realism
from graincast.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PALE,
    SKY,
    VERMILION,
    chart,
    heading,
    legend,
    row_of_axes,
    shared_legend,
    sheet,
    steps,
    style,
)
from graincast.report.findings import REALISM
from graincast.report.inputs import ReportInputs

COLOURS = {REAL: BLUE, SYNTHETIC: VERMILION, UNTEXTURED: GREY, HALVES[0]: BLUE, HALVES[1]: SKY}
DASHES = dict(zip(HALVES, ("--", ":"), strict=True))
NETWORKS = {"encoder": "the segmenter's own encoder", "vgg16": "VGG16"}
LEVELS_A_BIN = 2
"""Equalised images skip grey levels and would draw as a comb."""
HEADROOM = 1.6
"""How far the grey-level axis reaches above the tallest of the textured curves; the untextured peaks go far beyond."""


def figures(inputs: ReportInputs) -> dict[str, Figure]:
    """Draw what is known of the realism of a run.

    Returns
    -------
    dict of str to matplotlib.figure.Figure
        ``fidelity`` and, where realism was measured, ``intensity, spectrum, entropy, ssim, surfaces, embedding, kid``.
    """
    drawn = {"fidelity": label_fidelity(inputs)}
    draw: dict[str, Callable[[Realism, str], Figure]] = {
        "intensity": intensity_histograms, "spectrum": power_spectra, "entropy": entropy_distributions, "ssim": ssim_distributions,
        "surfaces": surfaces, "embedding": feature_maps, "kid": kernel_distances,
    }
    if inputs.realism is not None:
        drawn |= {name: function(inputs.realism, inputs.micrograph) for name, function in draw.items()}
    return drawn


# Distributions


def intensity_histograms(found: Realism, kind: str) -> Figure:
    """Grey-level histograms over the pixels of all patches; `kind` is that of the micrographs here and below."""
    figure, axes = chart(5.4, 3.5)
    edges = np.arange(0, 256 + LEVELS_A_BIN, LEVELS_A_BIN)
    shares = {name: 100 * values.reshape(-1, LEVELS_A_BIN).sum(axis=1) for name, _, values in _curves(found, "intensity")}
    for name, share in shares.items():
        _outline(axes, share, edges, name, kind)
    axes.set(xlim=(0, 256), ylim=(0, HEADROOM * max(share.max() for name, share in shares.items() if name != UNTEXTURED)))
    axes.set(xlabel="grey level (0 black, 255 white)", ylabel="share of pixels, %")
    legend(axes)
    return figure


def power_spectra(found: Realism, kind: str) -> Figure:
    """Radially averaged power over spatial frequency."""
    figure, axes = chart(5.4, 3.5)
    for name, frequency, power in _curves(found, "spectrum"):
        axes.plot(frequency, power, DASHES.get(name, "-"), color=COLOURS[name], linewidth=1 if name in HALVES else 1.6, label=_label(name, kind))
    axes.set(xscale="log", xlabel="spatial frequency, cycles per px", ylabel="mean power, dB")
    axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
    axes.minorticks_off()
    legend(axes)
    return figure


def entropy_distributions(found: Realism, kind: str) -> Figure:
    """Distributions of the Shannon entropy of the grey levels in the patches."""
    return _distributions(found, kind, "entropy", f"entropy of the grey levels in patches of {_side(found)} px, bits", ".2f")


def ssim_distributions(found: Realism, kind: str) -> Figure:
    """Distributions of the structural similarity of each patch to the real patch nearest to it."""
    return _distributions(found, kind, "ssim", f"SSIM to the nearest {kind} patch", ".3f")


def label_fidelity(inputs: ReportInputs) -> Figure:
    """Distribution of the synthetic images' label fidelity, kept and dropped, with the limit between them.

    The untextured pictures, whose boundaries cannot have moved, show how high it can come.
    """
    figure, axes = chart(5.4, 3.1)
    synthetic, limit = inputs.synthetic, inputs.config.get("synthesise", {}).get("min_fidelity")
    groups = {"kept": synthetic.rows["fidelity"].dropna()}
    if "fidelity" in synthetic.refused and synthetic.refused["fidelity"].notna().any():
        groups["dropped"] = synthetic.refused["fidelity"].dropna()
    axes.hist([values.to_numpy(float) for values in groups.values()], np.linspace(0, 1, 41).tolist(),
              stacked=True, color=[GREEN, PALE][: len(groups)],
              label=[f"{name} ({len(values)})" for name, values in groups.items()])
    if inputs.realism is not None:
        fidelity = inputs.realism.fidelity
        ceiling = fidelity.loc[fidelity["set"] == UNTEXTURED, "fidelity"].mean()
        axes.axvline(ceiling, color=GREY, linewidth=1.5, label=f"untextured, mean {ceiling:.2f}")
    if limit is not None:
        axes.axvline(limit, color=INK, linewidth=1, linestyle="--", label=f"limit {limit:g}")
    axes.set(xlim=(0, 1), xlabel="label fidelity (1: boundaries lie where the labels are)", ylabel="images")
    axes.locator_params(axis="y", integer=True)
    legend(axes, "upper left")
    return figure


def _distributions(found: Realism, kind: str, column: str, label: str, form: str) -> Figure:
    figure, axes = chart(5.4, 3.5)
    patches = found.patches
    everything = patches[column]
    margin = 0.02 * np.ptp(everything) + 1e-3
    edges = np.linspace(everything.min() - margin, everything.max() + margin, 49)
    groups = {name: patches.loc[patches["set"] == name, column] for name in (REAL, SYNTHETIC, UNTEXTURED)}
    groups |= {name: patches.loc[patches["half"] == name, column] for name in HALVES}
    for name, values in groups.items():
        share = 100 * np.histogram(values, edges)[0] / len(values)
        _outline(axes, share, edges, name, kind, "" if name in HALVES else f" (mean {values.mean():{form}})")
    axes.set(xlabel=label, ylabel="share of patches, %")
    legend(axes)
    return figure


def _outline(axes: Axes, share: np.ndarray, edges: np.ndarray, name: str, kind: str, note: str = "") -> None:
    if name in HALVES:
        axes.stairs(share, edges, color=COLOURS[name], linewidth=1, linestyle=DASHES[name], label=_label(name, kind))
    else:
        steps(axes, share, edges, COLOURS[name], _label(name, kind) + note)


def _curves(found: Realism, curve: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Set, abscissae and values of each of the curves, the floor last."""
    rows = found.curves[found.curves["curve"] == curve]
    by_set = {name: rows[rows["set"] == name] for name in (REAL, SYNTHETIC, UNTEXTURED, *HALVES)}
    return [(name, table["x"].to_numpy(), table["value"].to_numpy()) for name, table in by_set.items()]


# Patches and their features


def surfaces(found: Realism, kind: str) -> Figure:
    """A typical patch of each kind as a landscape, grey level as height."""
    figure = sheet(12, 3.4)
    for number, (name, patch) in enumerate(found.surfaces.items()):
        axes = figure.add_subplot(1, len(found.surfaces), number + 1, projection="3d")
        y, x = np.indices(patch.shape)
        axes.plot_surface(x, y, patch.astype(float), cmap="gray", vmin=0, vmax=255, rcount=64, ccount=64, linewidth=0, antialiased=False)
        axes.set(zlim=(0, 255), xticks=[0, patch.shape[1]], yticks=[0, patch.shape[0]], zticks=[0, 128, 255])
        axes.set_box_aspect((1, 1, 0.6))
        axes.view_init(elev=45, azim=-60)
        axes.tick_params(labelsize=8, labelcolor=INK, pad=-2)
        heading(axes, _label(name, kind))
    return figure


def feature_maps(found: Realism, kind: str) -> Figure:
    """t-SNE of the features that networks see in the patches, a panel a network."""
    shown = [name for name in NETWORKS if f"{name}_x" in found.patches]
    figure = sheet(5.4 * len(shown), 4.2)
    for axes, network in zip(row_of_axes(figure, len(shown)), shown, strict=True):
        style(axes)
        axes.grid(visible=False)
        axes.set(xticks=[], yticks=[])
        for column, names, marker in (("set", [UNTEXTURED], "s"), ("set", [SYNTHETIC], "^"), ("half", HALVES, "o")):
            for name in names:
                rows = found.patches[found.patches[column] == name]
                axes.scatter(rows[f"{network}_x"], rows[f"{network}_y"], 10, color=COLOURS[name], marker=marker, alpha=0.65, linewidths=0,
                             label=_label(name, kind))
        heading(axes, f"t-SNE of the features of {NETWORKS[network]}")
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
    return figure


def kernel_distances(found: Realism, kind: str) -> Figure:
    """The kernel distances with their intervals, on an axis that is logarithmic beyond 10."""
    table = found.figures[found.figures["figure"].str.endswith("_kid")]
    names = list(dict.fromkeys(table["figure"]))
    figure, axes = chart(5.4, 1.6 + 0.65 * len(names))
    style(axes, grid="x")
    for offset, name in ((-0.22, REAL), (0.0, SYNTHETIC), (0.22, UNTEXTURED)):
        rows = table[table["set"] == name].set_index("figure").loc[names]
        interval = np.abs(rows[["low", "high"]].sub(rows["value"], axis=0).to_numpy().T)
        axes.errorbar(rows["value"], np.arange(len(names)) + offset, xerr=interval, fmt="o", color=COLOURS[name], ms=5, capsize=3,
                      label=_label(name, kind))
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_yticks(range(len(names)), [REALISM[name].label for name in names])
    axes.set(xlim=(min(-10, 1.5 * table["low"].min()), 1e4), ylim=(len(names) - 0.5, -0.5), xlabel=f"kernel distance (KID) to {kind}, times 1000")
    shared_legend(figure)
    return figure


def _label(name: str, kind: str) -> str:
    return name.replace(REAL, kind)


def _side(found: Realism) -> int:
    return len(found.surfaces[SYNTHETIC])
