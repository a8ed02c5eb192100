"""What can be wrong with a folder of micrographs although each can be read: told before a model is trained on it.

One translator learns one look. A folder that mixes materials, magnifications or contrasts gives it several, and what
comes out resembles none. The checks here compare prepared micrographs, so grey level and magnification, which
preparation evens out, do not count, and what it could not even out does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from scipy import ndimage as ndi
from scipy.cluster.hierarchy import fcluster, linkage
from skimage.morphology import black_tophat, disk, white_tophat

LINE_PX = 4
"""Half the largest width of a boundary line, px, at the simulation's scale; grains are several times wider."""
GRAIN_PX, CLAHE_CLIP, CLAHE_TILE_PX = 30.0, 0.01, 120.0
"""The view in which micrographs are compared, however the networks see them: mean grain diameter, px, and histogram
equalisation (`graincast.microscope.preparation.prepare`). All thresholds here were measured in it."""
WINDOW_PX = 1024
"""Side of the window in the middle of a prepared micrograph that is looked at; it holds hundreds of grains."""
DETAIL_PX = (0.7, 1.4, 2.8, 5.6, 11.2)
"""Standard deviations of the Gaussians whose differences part the detail of a micrograph into octaves, px."""
ROWS_PX = 8.0
"""Standard deviation of the Gaussian that takes shading out of a profile of row or column means, px."""
WITHIN = np.array([
    (0.0018, 0.0032, 0.0034, 0.0027, 0.0003, -0.0006, 0.0004),
    (0.0032, 0.0330, 0.0209, 0.0103, -0.0008, 0.0003, -0.0067),
    (0.0034, 0.0209, 0.0223, 0.0179, -0.0012, 0.0001, -0.0085),
    (0.0027, 0.0103, 0.0179, 0.0206, -0.0018, 0.0004, -0.0085),
    (0.0003, -0.0008, -0.0012, -0.0018, 0.0020, -0.0008, 0.0028),
    (-0.0006, 0.0003, 0.0001, 0.0004, -0.0008, 0.0011, -0.0019),
    (0.0004, -0.0067, -0.0085, -0.0085, 0.0028, -0.0019, 0.0123),
])
"""Covariance of the fields of `Look` between micrographs of one material: the mean over 17 fields of the NBT ceramic (at two
magnifications), 30 of TiO2 particles, 8 of etched 316L steel and 5 of a superalloy."""
APART, APART_IN_PAIRS = 4.5, 2.5
"""Mahalanobis distance beyond which two looks belong to different groups, and what is added to it for two micrographs (for n:
twice that over n), as few micrographs leave gaps by chance. Measured, by single linkage: up to 3.5 within each of those
materials (99 % of random pairs: below 3.6 to 7.6), 5.9 where a specimen of ten times larger grains is among them;
between materials 5.2 (NBT ceramic and a faint SEM field), 6.0 (NBT ceramic and steel) and more. Drawn at random, folders
of 2 to 25 of one material raised 0 to 0.3 % false alarms (TiO2, whose fields hold particles of all sizes, up to 12 %);
5 + 5 of two materials were told apart, to the file, in 99 to 100 % (TiO2 and steel 71 %, NBT and the faint field 77 %)."""
SIZES_APART = 2.0
"""Factor between grain diameters beyond which one model cannot see both: the segmenter's augmentation zooms by 1.35 either way,
a range of 1.8."""
ENOUGH_TO_SIZE = 20
"""Grains that a micrograph must hold for its estimated diameter to be compared."""
CLEAR_BALANCE = 0.15
"""`boundary_balance` from which boundaries are clearly bright, or its negative clearly dark. Measured: -0.34 perovskite film,
-0.27 to -0.05 NBT ceramic, -0.21 etched iron, 0.30 a two-phase alloy; TiO2 particles, which have no lines, stay within 0.1.
Unequalised, as the networks see them by default: -0.43, -0.13 to 0.01, -0.35, 0.39, and 0.13 to 0.26."""
STREAKED = 2.2
"""`streaks` of a charged micrograph. 49 uncharged SEM fields: 0.7 to 1.95, mean of the logarithm 0.15, standard deviation
0.21, so 2.2 lies three of these above; bright trails of four times a feature's excess over 3 um make 3."""
FEWEST_GRAINS, ENOUGH_GRAINS = 20, 50
"""Grains, of the simulation's mean size, that all micrographs together must and should show. 20 fill one crop of 128 px, the
translator's default: with fewer it sees one and the same picture at every step. 50 is what ASTM E112 asks of a field
for its planimetric method, and what brings the standard error of the mean grain area below 10 %."""
NAMES_SHOWN = 6
LOOK_IN_WORDS = ("whether boundaries are bright or dark", "fineness of detail", "fineness of detail", "fineness of detail",
                 "distribution of grey levels", "distribution of grey levels", "sharpness of edges")
"""What each field of `Look` stands for."""


@dataclass(frozen=True)
class Look:
    """How a prepared micrograph looks, whatever its brightness and gain.

    Attributes
    ----------
    balance : float
        -1 to 1: what is thin and bright against what is thin and dark (`boundary_balance`).
    fineness_1, fineness_2, fineness_3 : float
        Natural logarithm of how many times stronger detail of one octave is than that of the next coarser one
        (`DETAIL_PX`).
    skewness : float
        -1 to 1: how far the median grey lies below the middle between 5th and 95th percentile, in halves of that range.
    evenness : float
        0 to 1: distance of the quartiles of grey over that of 5th and 95th percentile.
    edginess : float
        Natural logarithm of mean square over squared mean gradient: high where few, sharp edges stand in smooth areas.
    """

    balance: float
    fineness_1: float
    fineness_2: float
    fineness_3: float
    skewness: float
    evenness: float
    edginess: float


def look_of(image: np.ndarray) -> Look:
    """Describe a prepared micrograph, uint8 (height, width)."""
    grey = _middle(image)
    blurred = [ndi.gaussian_filter(grey, sigma) for sigma in DETAIL_PX]
    octaves = [math.log(float(np.square(fine - coarse).mean()) + 1e-6) for fine, coarse in itertools.pairwise(blurred)]
    low, first, median, third, high = (float(p) for p in np.percentile(grey, [5, 25, 50, 75, 95]))
    spread = max(high - low, 1.0)
    gradient = ndi.gaussian_gradient_magnitude(grey, 1.0)
    return Look(boundary_balance(image), octaves[0] - octaves[1], octaves[1] - octaves[2], octaves[2] - octaves[3],
                (high + low - 2 * median) / spread, (third - first) / spread,
                math.log(float(np.square(gradient).mean()) / (float(gradient.mean()) ** 2 + 1e-6) + 1e-6))


def thin_structure(image: np.ndarray) -> tuple[float, float]:
    """Mean white and mean black top-hat (Meyer 1979: what an opening removes, and a closing fills), grey levels.

    Parameters
    ----------
    image : ndarray
        Prepared micrograph, uint8 (height, width), grains at the simulation's scale.
    """
    smooth = ndi.gaussian_filter(_middle(image), 1.0)
    disc = disk(LINE_PX)
    return float(white_tophat(smooth, disc).mean()), float(black_tophat(smooth, disc).mean())


def boundary_balance(image: np.ndarray) -> float:
    """-1 (every thin line is dark) to 1 (every one is bright); near 0 where grains differ in tone alone.

    Parameters
    ----------
    image : ndarray
        Prepared micrograph, uint8 (height, width).
    """
    white, black = thin_structure(image)
    return (white - black) / max(white + black, 1e-6)


def _middle(image: np.ndarray) -> np.ndarray:
    top, left = (max(side - WINDOW_PX, 0) // 2 for side in image.shape)
    return image[top:top + WINDOW_PX, left:left + WINDOW_PX].astype(np.float32)


def has_bright_boundaries(image: np.ndarray) -> bool | None:
    """Whether boundaries are brighter than grains in a prepared micrograph; None where neither is clear (`CLEAR_BALANCE`)."""
    balance = boundary_balance(image)
    return None if abs(balance) < CLEAR_BALANCE else balance > 0


def streaks(image: np.ndarray) -> float:
    """How much stronger lines along the scan show than lines across it: near 1 for grains, the larger the more rows are charged.

    Parameters
    ----------
    image : ndarray
        Prepared micrograph, uint8 (height, width), scanned along its rows.

    Returns
    -------
    float
        Standard deviation of the row means over that of the column means, shading apart, each as for a square image.
    """
    grey = _middle(image)
    rows, columns = (float(_profile(grey, axis).std()) * math.sqrt(grey.shape[axis]) for axis in (1, 0))
    return rows / max(columns, 1e-6)


def _profile(grey: np.ndarray, axis: int) -> np.ndarray:
    means = grey.mean(axis=axis)
    return means - ndi.gaussian_filter1d(means, ROWS_PX)


@dataclass(frozen=True)
class Member:
    """A micrograph as its folder's checks see it, in the view that micrographs are compared in (`GRAIN_PX`).

    Attributes
    ----------
    name : str
        The file, relative to its folder.
    look : Look
    streaks : float
        See `streaks`.
    grain_diameter_px : float
        As estimated without labels, px of the view; NaN: no grains could be made out.
    area_px : int
        Of the view.
    """

    name: str
    look: Look
    streaks: float
    grain_diameter_px: float
    area_px: int

    @classmethod
    def of(cls, name: str, image: np.ndarray, grain_diameter_px: float) -> Member:
        """Look at a micrograph, uint8 (height, width), in the view that micrographs are compared in (`GRAIN_PX`)."""
        return cls(name, look_of(image), streaks(image), grain_diameter_px, image.size)

    @property
    def bright_boundaries(self) -> bool | None:
        """As `has_bright_boundaries`."""
        return None if abs(self.look.balance) < CLEAR_BALANCE else self.look.balance > 0


def common_polarity(members: Sequence[Member]) -> bool | None:
    """Whether boundaries are bright in all micrographs where they are clearly either; None if they are not, or differ."""
    clear = {member.bright_boundaries for member in members} - {None}
    return clear.pop() if len(clear) == 1 else None


def group_by_look(members: Sequence[Member]) -> list[list[Member]]:
    """Groups of micrographs that look alike, the largest first.

    Notes
    -----
    Single linkage of the looks by their Mahalanobis distance (`WITHIN`), cut at `APART`: a session whose looks vary is one
    group as long as they vary by degrees.
    """
    if len(members) < 2:
        return [list(members)]
    looks = np.linalg.solve(np.linalg.cholesky(WITHIN), np.array([astuple(member.look) for member in members]).T).T
    numbers = fcluster(linkage(looks, "single"), APART + 2 * APART_IN_PAIRS / len(members), "distance")
    return _by_number(members, numbers)


def group_by_size(members: Sequence[Member]) -> list[list[Member]]:
    """Groups of micrographs between whose grain diameters lies a gap of a factor `SIZES_APART`, the largest group first.

    Only micrographs that hold enough grains for a size (`ENOUGH_TO_SIZE`) take part.
    """
    sized = sorted((m for m in members if m.area_px >= ENOUGH_TO_SIZE * math.pi / 4 * m.grain_diameter_px**2), key=lambda m: m.grain_diameter_px)
    if not sized:
        return []
    steps = np.diff(np.log([member.grain_diameter_px for member in sized]))
    return _by_number(sized, np.concatenate([[0], np.cumsum(steps > math.log(SIZES_APART))]))


def _by_number(members: Sequence[Member], numbers: np.ndarray) -> list[list[Member]]:
    groups = [[member for member, own in zip(members, numbers, strict=True) if own == number] for number in np.unique(numbers)]
    return sorted(groups, key=lambda group: (-len(group), min(member.name for member in group)))


def too_few(members: Sequence[Member]) -> str | None:
    """What is missing where micrographs show less than the translator must (`FEWEST_GRAINS`) see; None: nothing."""
    grains = _grains_in(members)
    if not members or grains >= FEWEST_GRAINS:
        return None
    return f"{_amount(members, grains)}, too little to learn a look from: {FEWEST_GRAINS} are the least; {_remedy(members, grains)}"


def warnings(members: Sequence[Member]) -> list[str]:
    """What a microscopist should know before a model is trained on these micrographs.

    Parameters
    ----------
    members : sequence of Member
        The accepted micrographs of a folder.

    Returns
    -------
    list of str
        A sentence each, with the files it speaks of; empty: nothing stands out.
    """
    if not members:
        return []
    inverted = _polarities(members)
    others = [] if inverted else [m for m in members if m.streaks <= STREAKED]  # their looks differ for a reason that is told already
    checks = (inverted, _looks(others), _sizes(members), _charged(members), _without_grains(members), _few(members))
    return [sentence for sentence in checks if sentence]


def _polarities(members: Sequence[Member]) -> str | None:
    bright, dark = ([m for m in members if m.bright_boundaries is wanted] for wanted in (True, False))
    if not bright or not dark:
        return None
    fewer = min(bright, dark, key=len)
    return (f"contrast is inverted in some files: boundaries are bright in {_files(bright)} and dark in {_files(dark)}; "
            f"inverting the grey values of the {'former' if fewer is bright else 'latter'}, or training on them separately, would be right")


def _looks(members: Sequence[Member]) -> str | None:
    groups = group_by_look(members)
    if len(groups) < 2:
        return None
    centres = np.array([np.mean([astuple(m.look) for m in group], axis=0) for group in groups]) / np.sqrt(np.diag(WITHIN))
    differs = LOOK_IN_WORDS[int(np.ptp(centres, axis=0).argmax())]
    return (f"these look like {len(groups)} different materials, magnifications or ways of imaging, and one model learns one look: "
            f"{_named_groups(groups)}; they differ most in {differs}; a folder and a training for each would be right")


def _sizes(members: Sequence[Member]) -> str | None:
    groups = group_by_size(members)
    if len(groups) < 2:
        return None
    means = [float(np.median([m.grain_diameter_px for m in group])) for group in groups]
    return (f"grains differ {max(means) / min(means):.1f} times in size after all that is known of the magnification: {_named_groups(groups)}; "
            "pixel sizes (ingest.pixel_size_um) if magnifications are mixed, or a training for each group, would be right")


def _charged(members: Sequence[Member]) -> str | None:
    charged = [m for m in members if m.streaks > STREAKED]
    if not charged:
        return None
    return (f"rows are streaked by charging (or by scratches along the scan) in {_files(charged)}; a lower voltage, a coating or faster "
            "scanning would be right, and these files left out meanwhile")


def _without_grains(members: Sequence[Member]) -> str | None:
    without = [m for m in members if not math.isfinite(m.grain_diameter_px)]
    if not without:
        return None
    return (f"no grains could be made out in {_files(without)}: isolated particles, very few grains, or none; "
            "leaving out those that show none would be right")


def _few(members: Sequence[Member]) -> str | None:
    grains = _grains_in(members)
    return f"{_amount(members, grains)}, which is little to learn a look from; {_remedy(members, grains)}" if grains < ENOUGH_GRAINS else None


def _grains_in(members: Sequence[Member]) -> float:
    return sum(m.area_px for m in members) / (math.pi / 4 * GRAIN_PX**2)


def _amount(members: Sequence[Member], grains: float) -> str:
    return f"{_count(len(members), 'micrograph')} together show about {_count(round(grains), 'grain')}" if len(members) > 1 else (
        f"the only micrograph shows about {_count(round(grains), 'grain')}")


def _remedy(members: Sequence[Member], grains: float) -> str:
    more = math.ceil(len(members) * (ENOUGH_GRAINS / grains - 1))
    return f"{more} more like {'it' if len(members) == 1 else 'these'}, {ENOUGH_GRAINS} grains in all, would be right"


def _named_groups(groups: Sequence[Sequence[Member]]) -> str:
    letters = (chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(groups)))
    return "; ".join(f"{letter} = {_files(group)}" for letter, group in zip(letters, groups, strict=False))


def _files(members: Sequence[Member]) -> str:
    names = sorted(member.name for member in members)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{_count(len(names), 'file')} ({', '.join(names[:NAMES_SHOWN])}{more})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
