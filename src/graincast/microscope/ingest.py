"""From a folder of micrographs to an ImageSet in which grains have the simulation's size.

The set carries its `graincast.microscope.preparation.Preparation` (``info["preparation"]``), so that inference treats
new files as training treated its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from graincast.config import Ingest
from graincast.errors import Unavailable, UserError
from graincast.microscope import mixture
from graincast.microscope.preparation import Preparation, prepare
from graincast.microscope.quality import focus
from graincast.microscope.reader import find_micrographs, find_session_files, printable, read_micrograph, reason
from graincast.microscope.scale import estimate_grain_diameter
from graincast.store.imageset import ImageSet, ImageSetWriter

logger = logging.getLogger(__name__)

SAME_PIXEL_SIZE = 0.01  # relative spread below which pixel sizes count as one


def ingest(config: Ingest, folder: Path | str, grain_diameter_px: float, out: Path | str, exclude: Path | None = None,
           parents: Mapping[str, str] | None = None) -> ImageSet:
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
    exclude : Path, optional
        A folder within `folder` that holds no micrographs of the session, such as that of the masks.
    parents : mapping of str to str, optional
        Digests of the sets that `grain_diameter_px` comes from, for the record.

    Returns
    -------
    ImageSet
        Kind ``micrographs``, uint8; a row for every file. Beside the standard columns: ``scale``, what the original
        was (``original_height``, ``original_width``, ``original_pixel_size_um``, ``bit_depth``, ``bar_row``,
        ``grain_diameter_px`` as estimated, in its own pixels), ``source_sha256``, ``instrument`` (JSON) and the
        descriptors of `graincast.microscope.quality.describe`, taken from the original without its info bar.
        ``info["preparation"]`` holds the `Preparation`, ``info["warnings"]`` the sentences of
        `graincast.microscope.mixture.warnings`, ``info["groups"]`` the files of each group that looks alike.

    Raises
    ------
    UserError
        If the folder is missing or empty, every file was refused (naming the reasons), or what is left shows too few grains.

    Notes
    -----
    All files are brought to one pixel size, or as near to that as what is known allows. Files with a pixel size get
    the target ``median(grain diameter in um) / grain_diameter_px``: relative grain sizes between specimens stay
    true. Files without one share the factor ``grain_diameter_px / median(grain diameter in px)``. The medians run over
    the files that passed the checks and whose grains could be sized; a file whose grains could not (few, or isolated
    particles) takes the scale of the others, unless it is little more than noise.
    """
    folder = Path(folder)
    paths = find_micrographs(folder, exclude)
    root = folder.parent if folder.is_file() else folder
    names = _unique_names([path.relative_to(root) for path in paths])
    preparation = Preparation(None, None, float(grain_diameter_px), config.clahe_clip, config.clahe_tile_grains * grain_diameter_px,
                              config.cut_info_bar, config.min_size, config.max_saturated, config.min_contrast, config.pixel_size_um)
    surveys = [_survey(path, preparation, config.require_pixel_size) for path in tqdm(paths, "reading micrographs", disable=None)]
    target, scale = _choose(config, [s for s in surveys if s.refused is None], grain_diameter_px)
    preparation = replace(preparation, target_pixel_size_um=target, scale=scale)
    members: list[mixture.Member] = []
    scales: list[float] = []
    with ImageSetWriter(out, "micrographs", config=config.model_dump(), parents=parents) as writer:
        for path, name, survey in zip(tqdm(paths, "preparing micrographs", disable=None), names, surveys, strict=True):
            relative = path.relative_to(root)
            session = relative.parent.as_posix() if relative.parent.parts else root.resolve().name
            common = {"id": name, "session": session, "source": relative.as_posix(), **survey.facts}
            prepared = survey.refused or _prepare(path, survey, preparation)
            if isinstance(prepared, str):
                writer.refuse(prepared, **common)
                continue
            image, file_scale = prepared
            writer.add(image, pixel_size_um=_resampled_um(survey, preparation, file_scale), scale=file_scale, **common)
            scales.append(file_scale)
            members.append(_member(common["source"], image, survey.grain_diameter_px * file_scale, preparation))
        if missing := mixture.too_few(members):
            raise UserError(f"{folder}: {missing}")
        writer.info["preparation"] = replace(preparation, bright_boundaries=mixture.common_polarity(members),
                                             usual_scale=float(np.median(scales)) if scales else None).to_dict()
        writer.info["warnings"] = mixture.warnings(members)
        writer.info["groups"] = [[member.name for member in group] for group in mixture.group_by_look(members)]
    for sentence in writer.info["warnings"]:
        logger.warning("graincast: warning: %s", sentence)  # now, while the trainings to come can still be spared
    return writer.result


class BadSession(UserError):
    """A session of which nothing can be used."""


AWAY = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV, errno.ENXIO)
"""Errors of a drive that is away or broken, not of a file."""

Judge = Callable[[pd.DataFrame], Mapping[str, str]]
"""From a table of micrographs, the rows of their set, to the reason why one of them must not be used, by its id."""


def ingest_session(preparation: Preparation, folder: Path | str, out: Path | str, judge: Judge, *,
                   require_pixel_size: bool = False, most_files: int | None = None, config: Mapping[str, Any] | None = None) -> ImageSet:
    """Prepare a session's micrographs as those of a training were prepared.

    Parameters
    ----------
    preparation : Preparation
        The training's; no scale is chosen anew. Files without a pixel size, where the training had none such, get its ``usual_scale``;
        only where that is not known either, their scale comes from their own grains and a changed magnification does not show.
    folder : Path
        The session. Nothing in it is trusted, see `graincast.microscope.reader.find_session_files`.
    out : Path
        Where the set is written.
    judge : callable
        Names the micrographs to be left out, from all that is known of them.
    require_pixel_size : bool, optional
        Refuse files without one.
    most_files : int, optional
        Files beyond which the session is refused.
    config : mapping, optional
        What `judge` goes by, for the record.

    Returns
    -------
    ImageSet
        As of `ingest`, ``session`` being the folder's name, with ``focus`` (`graincast.microscope.quality.focus`) as well. Refused rows are
        files that cannot or must not be read, that the preparation refuses, and that `judge` does.

    Raises
    ------
    UserError
        If the folder holds no micrographs, more than `most_files`, or not one of them can be used (naming each).
    """
    folder = Path(folder)
    files = find_session_files(folder)
    if most_files is not None and len(files) > most_files:
        raise BadSession(f"session {printable(folder.name)} holds {len(files)} files, at most {most_files} may be (gates.most_images); "
                        "sessions of fewer would be right")
    names = _unique_names([Path(file.name) for file in files])
    settled = replace(preparation, scale=preparation.usual_scale) if preparation.scale is None else preparation
    pages: list[np.ndarray | None] = []
    rows: list[dict[str, Any]] = []
    for file, name in zip(tqdm(files, "reading session", disable=None), names, strict=True):
        survey = _Survey({}, refused=f"{Path(file.name).name} {file.refused}") if file.refused else _survey(file.path, settled, require_pixel_size)
        prepared = survey.refused or _prepare_alike(file.path, survey, settled)
        known = {"id": name, "session": printable(folder.resolve().name), "source": file.name, **survey.facts}
        if isinstance(prepared, str):
            pages.append(None)
            rows.append({**known, "refused": prepared})
        else:
            pages.append(prepared[0])
            rows.append({**known, "refused": None, "scale": prepared[1], "pixel_size_um": _resampled_um(survey, settled, prepared[1]),
                         "focus": focus(prepared[0], settled.grain_diameter_px)})
    left_out = judge(pd.DataFrame(rows))
    members: list[mixture.Member] = []
    with ImageSetWriter(out, "micrographs", config=config) as writer:
        for page, row in zip(pages, rows, strict=True):
            refused: str | None = row.pop("refused") or left_out.get(row["id"])
            if refused is not None:
                writer.refuse(refused, **row)
            elif page is not None:
                writer.add(page, **row)
                members.append(_member(row["source"], page, row["grain_diameter_px"] * row["scale"], preparation))
        if not members:
            raise BadSession(f"session {printable(folder.name)}: not one of its files can be used; " + "; ".join(writer.reasons()))
        writer.info |= {"preparation": preparation.to_dict(), "warnings": mixture.warnings(members),
                        "groups": [[member.name for member in group] for group in mixture.group_by_look(members)]}
    return writer.result


def _prepare_alike(path: Path, survey: _Survey, preparation: Preparation) -> tuple[np.ndarray, float] | str:
    """As `_prepare`, and refused where boundaries are bright that are dark in the training, or the other way round."""
    prepared = _prepare(path, survey, preparation)
    if not isinstance(prepared, str):
        try:
            preparation.check_polarity(prepared[0])
        except ValueError as error:
            return str(error)
    return prepared


@dataclass(frozen=True)
class _Survey:
    """What a first look at a file tells; the pixels are read again later, as the originals together may not fit in memory."""

    facts: dict[str, Any]
    pixel_size_um: float | None = None
    grain_diameter_px: float = math.nan
    refused: str | None = None


def _survey(path: Path, preparation: Preparation, require_pixel_size: bool) -> _Survey:
    facts: dict[str, Any] = {}
    try:
        facts["source_sha256"] = _sha256(path)
        micrograph = read_micrograph(path)
    except OSError as error:
        if error.errno in AWAY:
            raise Unavailable(f"{path} cannot be read: {error.strerror}; it is read again when its drive answers") from error
        return _Survey(facts, refused=f"{path.name} cannot be read: {error.strerror or type(error).__name__}")
    except UserError as error:
        return _Survey(facts, refused=reason(error, path))
    height, width = micrograph.image.shape
    pixel_size = preparation.pixel_size(micrograph)
    inspection = preparation.inspect(micrograph)
    facts |= {"original_height": height, "original_width": width, "bar_row": inspection.bar_row, "bit_depth": micrograph.bit_depth,
              "original_pixel_size_um": pixel_size or math.nan,
              "instrument": json.dumps(micrograph.instrument, sort_keys=True), **inspection.quality}
    if inspection.refused is not None:
        return _Survey(facts, refused=inspection.refused)
    if require_pixel_size and pixel_size is None:
        return _Survey(facts, refused="no pixel size: neither the file nor the key ingest.pixel_size_um gives one")
    try:
        diameter = estimate_grain_diameter(micrograph.image[:inspection.bar_row])
    except ValueError:
        diameter = math.nan  # the other files can still tell the scale
    facts["grain_diameter_px"] = diameter
    return _Survey(facts, pixel_size, diameter)


def _choose(config: Ingest, accepted: list[_Survey], grain_diameter_px: float) -> tuple[float | None, float | None]:
    """Settle target pixel size and scale for all files from what they told."""
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
    return target, scale


def _median(diameters: np.ndarray) -> float | None:
    """Median of the diameters that could be estimated; None if none could."""
    estimated = diameters[np.isfinite(diameters)]
    return float(np.median(estimated)) if estimated.size else None


def _prepare(path: Path, survey: _Survey, preparation: Preparation) -> tuple[np.ndarray, float] | str:
    """The prepared image with its scale, or the reason if no scale suits it or the file is not any more what was surveyed."""
    try:
        field = read_micrograph(path).image[:survey.facts["bar_row"]]
        if _sha256(path) != survey.facts["source_sha256"]:
            return f"{path.name} changed while it was read; run again once it is whole"
        return preparation.resample(field, survey.pixel_size_um)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or type(error).__name__}"
    except UserError as error:
        return reason(error, path)


def _member(name: str, image: np.ndarray, grain_diameter_px: float, preparation: Preparation) -> mixture.Member:
    """A prepared image, in whose pixels its grains' diameter is, as the checks of its folder see it."""
    view = mixture.GRAIN_PX / preparation.grain_diameter_px
    seen = prepare(image / np.float32(255), view, mixture.CLAHE_CLIP, mixture.CLAHE_TILE_PX)
    return mixture.Member.of(name, seen, grain_diameter_px * view)


def _resampled_um(survey: _Survey, preparation: Preparation, scale: float) -> float | None:
    """Pixel size of the prepared image, um."""
    return None if survey.pixel_size_um is None else preparation.target_pixel_size_um or survey.pixel_size_um / scale


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
