"""What a session looks like, in numbers: per image, per patch, and as the champion's own network sees it.

Grey levels are described twice. The *raw* descriptors come from the file's own pixels (the manifest has them), since the
preparation stretches grey levels and so hides gain and offset. The others come from the prepared image, which is what the
champion works on: grains there have the size that it was trained with.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy import ndimage as ndi

from graincast.compute import autocast, memory_format
from graincast.evaluate.realism_features import MIN_PATCH, Patches, cut_patches, describe
from graincast.microscope.quality import noise_level, sharpness
from graincast.segment.network import STRIDE
from graincast.segment.segmenter import Segmenter
from graincast.store.imageset import ImageSet

PER_IMAGE = 24
"""Patches drawn from an image at most: equal numbers from images of any size, so that their means scatter alike."""
BATCH = 64  # patches through the network at a time
TRAIL_GRAINS = (0.1, 0.2, 0.4)  # how far behind a bright feature its charging trail is sought, fractions of a grain diameter
TONE_SIGMAS = (0.15, 1.0)  # widths of the Gaussians between which grains' tones lie, fractions of a grain diameter
SMALLEST_SHARE = 1e-3  # added to shares before their logarithm: fewer pixels than one in a thousand are none

Group = Literal["look", "focus", "size", "manifold"]


@dataclass(frozen=True)
class Descriptor:
    """A figure of an image.

    Attributes
    ----------
    up, down : str
        What a microscopist would call a rise and a fall.
    group : str
        What a change of it speaks of.
    tolerance : float
        Standard deviation, in the descriptor's own units (binary logarithms where it is one), that in-control sessions may have
        for all that anybody minds: what is smaller than a few of these is no drift however many images show it.
    log : bool
        Whether changes are ratios; its logarithm (base 2) is then what is compared.
    """

    up: str
    down: str
    group: Group = "look"
    tolerance: float = 0.05
    log: bool = False


GRAIN_SIZE, MANIFOLD = "grain_size", "manifold"
RAW = {
    "mean": Descriptor("brighter: detector offset or gain higher", "darker: detector offset or gain lower", tolerance=0.01),
    "contrast": Descriptor("more contrast: detector gain higher", "less contrast: detector gain lower", tolerance=0.05, log=True),
    "saturated_fraction": Descriptor("more pixels black or white: gain or offset cuts grey levels off", "fewer pixels black or white",
                                     tolerance=0.4, log=True),
    "noise": Descriptor("noisier: fewer electrons or a faster scan", "less noise: more electrons or a slower scan", tolerance=0.1, log=True),
    "signal_to_noise": Descriptor("more structure over noise", "less structure over noise", tolerance=0.1, log=True),
    "sharpness": Descriptor("sharper than trained", "less sharp than trained: defocus, or noise that hides detail", "focus", tolerance=0.015),
    "entropy": Descriptor("more grey levels in use", "fewer grey levels in use", tolerance=0.05),
    "shading": Descriptor("stronger shading across the field", "weaker shading across the field", tolerance=0.2, log=True),
}
"""Columns of the manifest (`graincast.microscope.quality.describe`)."""
PATCH = {
    "grey_mean": Descriptor("grey levels shifted to bright", "grey levels shifted to dark", tolerance=2.0),
    "grey_spread": Descriptor("more local contrast", "less local contrast", tolerance=0.05, log=True),
    "grey_entropy": Descriptor("richer local grey levels", "poorer local grey levels", tolerance=0.03),
    "grain_noise": Descriptor("noisier at the grains' scale", "smoother at the grains' scale", tolerance=0.1, log=True),
    "edges": Descriptor("steeper edges", "flatter edges", tolerance=0.07, log=True),
    "fineness": Descriptor("more detail at the pixels' scale: finer texture, or noise", "less detail at the pixels' scale: smoother",
                           tolerance=0.015),
    "slope": Descriptor("spectrum flatter: more fine texture or noise", "spectrum steeper: less fine texture", tolerance=0.03),
    "texture": Descriptor("more pitted texture", "more line-like texture", tolerance=0.01),
}
"""Of the patches of the prepared image; an image has their mean."""
IMAGE = {
    "tones": Descriptor("grain tones stronger (channelling contrast)", "grain tones weaker (channelling contrast)", tolerance=0.05, log=True),
    "streaks": Descriptor("rows streaked: charging or line noise", "rows less streaked", tolerance=0.1, log=True),
    "trails": Descriptor("bright trails along the scan: charging", "dark trails along the scan: charging", tolerance=0.005),
    GRAIN_SIZE: Descriptor("coarser grains than trained", "finer grains than trained", "size", tolerance=0.07, log=True),
}
"""Of whole images."""
CHAMPION = {
    "champion_lines": Descriptor("the champion finds more boundary: finer grains or false lines",
                                 "the champion finds less boundary: coarser grains or missed lines", "size", tolerance=0.07, log=True),
    "champion_doubt": Descriptor("the champion is less sure where boundaries lie", "the champion is surer where boundaries lie",
                                 tolerance=0.07, log=True),
}
"""Of the champion's output on the patches."""
DISTANCE = {MANIFOLD: Descriptor("farther from the synthetic images than any that were trained for", "nearer to the synthetic images", "manifold",
                                 tolerance=0.05)}
TABLE = RAW | PATCH | IMAGE | CHAMPION | DISTANCE


@dataclass(frozen=True)
class Described:
    """A set of images in numbers.

    Attributes
    ----------
    images : pandas.DataFrame
        A row an image: ``id, session`` and the descriptors of `TABLE` but for `MANIFOLD`, logarithms where the table says so;
        NaN where there is none.
    patches : pandas.DataFrame
        A row a patch: ``image`` (number of its image) and the descriptors of `PATCH` and `CHAMPION`, in plain units.
    encoder : ndarray
        (patches, channels), float32: the champion's bottleneck features.
    texture : ndarray
        (patches, 41), float32: `graincast.evaluate.realism_features.describe`.
    """

    images: pd.DataFrame
    patches: pd.DataFrame
    encoder: np.ndarray
    texture: np.ndarray


def describe_set(images: ImageSet, segmenter: Segmenter, patch: int, grain_px: float) -> Described:
    """Describe every image of a set.

    Parameters
    ----------
    images : ImageSet
        Prepared images, uint8; the raw descriptors are taken from its manifest where that has them.
    segmenter : Segmenter
        The champion, whose features and output are asked for.
    patch : int
        Side of the patches, px. Smaller images are mirrored at their edges until two fit.
    grain_px : float
        Grain diameter that the preparation aims at, px.
    """
    rows, pictures = images.rows, list(images)
    described = describe_patches(pictures, segmenter, patch)
    means = described.patches.groupby("image").mean()
    about = pd.DataFrame({"id": rows["id"], "session": rows["session"].astype("string").fillna("")})
    values = {**{name: rows[name].to_numpy(float) for name in RAW if name in rows},
              **{name: means[name].to_numpy(float) for name in (*PATCH, *CHAMPION)},
              **_image_figures(pictures, grain_px), GRAIN_SIZE: _grain_size(rows, pictures, grain_px)}
    for name, value in values.items():
        about[name] = _logarithm(name, value)
    return replace(described, images=about)


def describe_patches(pictures: Sequence[np.ndarray], segmenter: Segmenter, patch: int) -> Described:
    """The patches of prepared images, uint8, alone: ``images`` has no columns."""
    patches = _patches([_large_enough(picture, 2 * patch) for picture in pictures], patch)
    statistics = describe(patches.grey)
    output, features = _champion(segmenter, patches)
    frame = pd.DataFrame({"image": patches.image, **_statistics(patches, statistics), **output})
    return Described(pd.DataFrame(index=range(len(pictures))), frame, features, statistics["texture"].astype(np.float32))


def _logarithm(name: str, values: np.ndarray) -> np.ndarray:
    if not TABLE[name].log:
        return values
    smallest = SMALLEST_SHARE if name in ("saturated_fraction", *CHAMPION) else 1e-6
    return np.log2(values + smallest)


def _large_enough(image: np.ndarray, side: int) -> np.ndarray:
    short = [max(side - extent, 0) for extent in image.shape]
    return np.pad(image, [(0, missing) for missing in short], mode="symmetric") if any(short) else image


def _patches(pictures: list[np.ndarray], patch: int) -> Patches:
    """Up to `PER_IMAGE` patches of each image; which ones depends on the image's own pixels alone."""
    drawn = []
    for number, picture in enumerate(pictures):
        whole = cut_patches({"image": [picture]}, max(patch, MIN_PATCH))["image"]
        rng = np.random.default_rng(zlib.crc32(picture.tobytes()))
        chosen = whole.take(np.sort(rng.permutation(len(whole))[:PER_IMAGE]))
        drawn.append(Patches(chosen.grey, chosen.standard, np.full(len(chosen), number)))
    return Patches(*(np.concatenate([getattr(part, name) for part in drawn]) for name in ("grey", "standard", "image")))


def _statistics(patches: Patches, statistics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    grey = patches.grey.astype(np.float32)
    noise = np.array([noise_level(one) for one in grey])
    gradients = statistics["gradient"] @ (np.arange(statistics["gradient"].shape[1]) + 0.5)
    codes = statistics["texture"].astype(float) ** 2
    spots = codes[:, -2:].sum(axis=1) + codes[:, -10]  # of the widest local binary patterns: bright and dark spots, and what is not uniform
    return {"grey_mean": grey.mean(axis=(1, 2)), "grey_spread": grey.std(axis=(1, 2)), "grey_entropy": statistics["entropy"], "grain_noise": noise,
            "edges": gradients, "fineness": np.array([sharpness(one, level) for one, level in zip(grey, noise, strict=True)]),
            "slope": statistics["slope"], "texture": spots}


@torch.no_grad()
def _champion(segmenter: Segmenter, patches: Patches) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The champion's output on patches, and its encoder's deepest stage averaged over each, (n, channels), in one go.

    Of the output: the share of the patch that is boundary, and the doubt, the mean of 4 p (1 - p).
    """
    network, side = segmenter.network, patches.standard.shape[-1]
    device = next(network.parameters()).device
    short = -side % STRIDE
    padded = np.pad(patches.standard[:, None], ((0, 0), (0, 0), (0, short), (0, short)), mode="symmetric")
    deepest: list[torch.Tensor] = []
    hook = network.get_submodule("encoder").register_forward_hook(lambda _module, _input, stages: deepest.append(stages[-1].float().mean(dim=(2, 3))))
    probabilities = []
    try:
        for batch in torch.from_numpy(padded).to(device, memory_format=memory_format(device)).split(BATCH):
            with autocast(device, segmenter.config["precision"]):
                probabilities.append(torch.sigmoid(network(batch)[:, 0, :side, :side].float()).cpu())
    finally:
        hook.remove()
    p = torch.cat(probabilities)
    output = {"champion_lines": (p > 0.5).float().mean(dim=(1, 2)).numpy(), "champion_doubt": (4 * p * (1 - p)).mean(dim=(1, 2)).numpy()}
    return output, torch.cat(deepest).cpu().numpy()


def _image_figures(pictures: Iterable[np.ndarray], grain_px: float) -> dict[str, np.ndarray]:
    rows = [{"tones": _tones(grey, grain_px), "streaks": _streaks(grey, grain_px), "trails": _trails(grey, grain_px)}
            for grey in (picture.astype(np.float32) for picture in pictures)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _tones(grey: np.ndarray, grain_px: float) -> float:
    """Spread of grey between about half and twice a grain's size over all spread: how far grains differ in tone."""
    reduction = max(int(TONE_SIGMAS[0] * grain_px / 2), 1)  # coarser pixels, for speed; half a sigma of the narrow Gaussian at most
    coarse = ndi.uniform_filter(grey, reduction)[::reduction, ::reduction]
    narrow, wide = (ndi.gaussian_filter(coarse, share * grain_px / reduction) for share in TONE_SIGMAS)
    return float((narrow - wide).std() / max(float(grey.std()), 1e-3))


def _streaks(grey: np.ndarray, grain_px: float) -> float:
    """Change from row to row over change from column to column, both of the image averaged along them over a grain."""
    def change(axis: int) -> float:
        averaged = ndi.uniform_filter1d(grey, max(round(grain_px), 3), axis=1 - axis)
        return float(np.square(np.diff(averaged, 2, axis=axis)).mean())

    return (change(0) + 1e-3) / (change(1) + 1e-3)


def _trails(grey: np.ndarray, grain_px: float) -> float:
    """How much brighter it is behind bright features than before them along a row; charging leaves trails, and on one side only."""
    standard = (grey - grey.mean()) / max(float(grey.std()), 1e-3)
    bright = np.maximum(standard, 0)
    found = []
    for share in TRAIL_GRAINS:
        step = max(round(share * grain_px), 1)
        middle = bright[:, step:-step]
        found.append(float((middle * (standard[:, 2 * step :] - standard[:, : -2 * step])).mean()))
    return float(np.mean(found))


def _grain_size(rows: pd.DataFrame, pictures: list[np.ndarray], grain_px: float) -> np.ndarray:
    """Grain diameter in the prepared image over that which the preparation aims at; NaN where grains cannot be sized."""
    if {"grain_diameter_px", "scale"} <= set(rows):
        return (rows["grain_diameter_px"] * rows["scale"]).to_numpy(float) / grain_px
    from graincast.microscope.scale import estimate_grain_diameter

    def size(picture: np.ndarray) -> float:
        try:
            return estimate_grain_diameter(picture.astype(np.float32))
        except ValueError:
            return float("nan")

    return np.array([size(picture) for picture in pictures]) / grain_px
