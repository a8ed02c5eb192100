"""From a folder of micrographs to an ImageSet in which grains have the simulation's size.

The set carries its `graincast.microscope.preparation.Preparation` (``info["preparation"]``), so that inference treats
new files as training treated its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from graincast.config import Ingest
from graincast.errors import UserError
from graincast.microscope.info_bar import find_info_bar
from graincast.microscope.preparation import Preparation
from graincast.microscope.quality import describe
from graincast.microscope.reader import find_micrographs, read_micrograph
from graincast.microscope.scale import estimate_grain_diameter
from graincast.store.imageset import ImageSet, ImageSetWriter

SAME_PIXEL_SIZE = 0.01  # relative spread below which pixel sizes count as one
LEAST_SIGNAL_TO_NOISE = 2.0  # of an image whose grains cannot be sized; pure noise has 1


def ingest(config: Ingest, folder: Path | str, grain_diameter_px: float, out: Path | str) -> ImageSet:
    """Read, check and prepare every micrograph of a folder.

    Parameters
    ----------
    config : Ingest
        Settings.
    folder : Path
        Folder of micrographs, searched with its sub-folders (each one a session), or one file.
    grain_diameter_px : float
        Equivalent circular grain diameter of the simulation, px, that the micrographs' grains are brought to.
    out : Path
        Where the set is written.

    Returns
    -------
    ImageSet
        Kind ``micrographs``, uint8; a row for every file. Beside the standard columns: ``scale``, what the original
        was (``original_height``, ``original_width``, ``original_pixel_size_um``, ``bit_depth``, ``bar_row``,
        ``grain_diameter_px`` as estimated, in its own pixels), ``source_sha256``, ``instrument`` (JSON) and the
        descriptors of `describe`, taken from the original without its info bar. ``info["preparation"]`` holds the
        `Preparation`.

    Raises
    ------
    UserError
        If the folder is missing or empty, or every file was refused (naming the reasons).

    Notes
    -----
    All files are brought to one pixel size, or as near to that as what is known allows. Files with a pixel size get
    the target ``median(grain diameter in um) / grain_diameter_px``: relative grain sizes between specimens stay
    true. Files without one share the factor ``grain_diameter_px / median(grain diameter in px)``. The medians run over
    the files that passed the checks and whose grains could be sized; a file whose grains could not (few, or isolated
    particles) takes the scale of the others, unless it is little more than noise.
    """
    folder = Path(folder)
    paths = find_micrographs(folder)
    root = folder.parent if folder.is_file() else folder
    names = _unique_names([path.relative_to(root) for path in paths])
    surveys = [_survey(path, config) for path in tqdm(paths, "reading micrographs", disable=None)]
    preparation = _choose(config, [s for s in surveys if s.refused is None], grain_diameter_px)
    with ImageSetWriter(out, "micrographs", config=config.model_dump()) as writer:
        writer.info["preparation"] = preparation.to_dict()
        for path, name, survey in zip(tqdm(paths, "preparing micrographs", disable=None), names, surveys, strict=True):
            relative = path.relative_to(root)
            session = relative.parent.as_posix() if relative.parent.parts else root.resolve().name
            common = {"id": name, "session": session, "source": relative.as_posix(), **survey.facts}
            reason = survey.refused
            if reason is None:
                reason = _add(writer, path, survey, preparation, config, common)
            if reason is not None:
                writer.refuse(reason, **common)
    return writer.result


@dataclass(frozen=True)
class _Survey:
    """What a first look at a file tells; the pixels are read again later, so that a large folder fits in memory."""

    facts: dict[str, Any]
    pixel_size_um: float | None = None
    grain_diameter_px: float = math.nan
    refused: str | None = None


def _survey(path: Path, config: Ingest) -> _Survey:
    facts: dict[str, Any] = {"source_sha256": _sha256(path)}
    try:
        micrograph = read_micrograph(path)
    except UserError as error:
        return _Survey(facts, refused=str(error).replace(str(path), path.name))
    height, width = micrograph.image.shape
    pixel_size = micrograph.pixel_size_um or config.pixel_size_um
    bar_row = find_info_bar(micrograph.image, micrograph.scan_rows) if config.cut_info_bar else height
    facts |= {"original_height": height, "original_width": width, "bar_row": bar_row, "bit_depth": micrograph.bit_depth,
              "original_pixel_size_um": pixel_size or math.nan,
              "instrument": json.dumps(micrograph.instrument, sort_keys=True)}
    field = micrograph.image[:bar_row]
    if min(field.shape) < config.min_size:
        return _Survey(facts, refused=f"too small: {width} x {bar_row} px, at least {config.min_size} px are needed")
    quality = describe(field)
    facts |= quality
    if config.require_pixel_size and pixel_size is None:
        return _Survey(facts, refused="no pixel size: neither the file nor the key ingest.pixel_size_um gives one")
    if quality["contrast"] < config.min_contrast:
        return _Survey(facts, refused=f"no contrast: grey values span {quality['contrast']:.4f} of full scale, "
                                      f"at least {config.min_contrast} is needed")
    if quality["saturated_fraction"] > config.max_saturated:
        return _Survey(facts, refused=f"saturated: {quality['saturated_fraction']:.0%} of the pixels are black or white, "
                                      f"at most {config.max_saturated:.0%} may be")
    try:
        diameter = estimate_grain_diameter(field)
    except ValueError as error:
        if config.scale is None and quality["signal_to_noise"] < LEAST_SIGNAL_TO_NOISE:
            return _Survey(facts, refused=f"structureless: {error}")
        diameter = math.nan  # the other files can still tell the scale
    facts["grain_diameter_px"] = diameter
    return _Survey(facts, pixel_size, diameter)


def _choose(config: Ingest, accepted: list[_Survey], grain_diameter_px: float) -> Preparation:
    """Settle pixel size and scale for all files from what they told."""
    known = np.array([[s.pixel_size_um, s.grain_diameter_px] for s in accepted if s.pixel_size_um is not None])
    known = known.reshape(-1, 2)
    target = scale = None
    if config.scale is not None:
        scale = config.scale
        if len(known) and np.ptp(known[:, 0]) <= SAME_PIXEL_SIZE * known[0, 0]:
            target = float(np.median(known[:, 0])) / scale
    else:
        in_um = _median(known.prod(axis=1))
        in_px = _median(np.array([s.grain_diameter_px for s in accepted if s.pixel_size_um is None]))
        target = in_um / grain_diameter_px if in_um else None
        scale = grain_diameter_px / in_px if in_px else None
    return Preparation(target, scale, float(grain_diameter_px), config.clahe_clip,
                       config.clahe_tile_grains * grain_diameter_px, config.cut_info_bar)


def _median(diameters: np.ndarray) -> float | None:
    """Median of the diameters that could be estimated; None if none could."""
    estimated = diameters[np.isfinite(diameters)]
    return float(np.median(estimated)) if estimated.size else None


def _add(writer: ImageSetWriter, path: Path, survey: _Survey, preparation: Preparation, config: Ingest,
         common: dict[str, Any]) -> str | None:
    """Prepare a file and add it; returns the reason if no scale suits it."""
    height, width = survey.facts["bar_row"], survey.facts["original_width"]
    pixel_size = survey.pixel_size_um
    micrograph = read_micrograph(path)
    try:
        scale = preparation.scale_for(pixel_size, micrograph.image[:height])
    except ValueError as error:
        return f"scale unknown: {error}; the key ingest.scale can fix it"
    if min(height, width) * scale < config.min_size:
        return (f"too small: {width * scale:.0f} x {height * scale:.0f} px once its grains are "
                f"{preparation.grain_diameter_px:.0f} px wide, at least {config.min_size} px are needed")
    image, scale, _ = preparation.prepare(micrograph, pixel_size)
    resampled_um = None if pixel_size is None else preparation.target_pixel_size_um or pixel_size / scale
    writer.add(image, pixel_size_um=resampled_um, scale=scale, **common)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unique_names(paths: list[Path]) -> list[str]:
    """An id for each file from its path; the extension joins where two files differ by nothing else."""
    stems = ["_".join(path.with_suffix("").parts) for path in paths]
    often = Counter(stems)
    names = [stem if often[stem] == 1 else f"{stem}_{path.suffix[1:]}" for stem, path in zip(stems, paths, strict=True)]
    often = Counter(names)
    return [name if often[name] == 1 else f"{name}_{i}" for i, name in enumerate(names)]
