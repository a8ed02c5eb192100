"""From micrograph files to grain maps, measurements, and the exports of a folder."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from tqdm.auto import tqdm

from graincast import __version__
from graincast.compute import ahead
from graincast.errors import UserError
from graincast.export.kinds import KINDS, REPORT, USUAL, Piece, Segmented, reduction
from graincast.found import doubts, find_grains
from graincast.measure.field import FieldSizes, measure_field
from graincast.measure.session import SessionSizes, measure_session
from graincast.microscope.preparation import TooLarge
from graincast.microscope.reader import find_micrographs, printable, read_micrograph, reason
from graincast.segment.segmenter import Segmenter
from graincast.store.imageset import PARTIAL, folder_digest, whole_file

AT_ONCE = 4
"""Files that are segmented side by side, at most: each takes some hundred bytes a pixel."""
FIELD, SUMMARY, PAGE = "_field.json", "summary.json", "report.html"
"""How the name of a micrograph's record ends; the folder's summary and page."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Attributes
    ----------
    source : Path
        The micrograph.
    sizes : FieldSizes, optional
        What was measured; None: the file was refused.
    refused : str, optional
        The reason.
    warnings : sequence of str
        What a reader of the figures should know.
    before : bool
        Whether it had been done before, and stands.
    overlay : Path, optional
        The picture, where one was written.
    """

    source: Path
    sizes: FieldSizes | None = None
    refused: str | None = None
    warnings: Sequence[str] = ()
    before: bool = False
    overlay: Path | None = None

    @property
    def file(self) -> str:
        """The micrograph's name, as it can be printed."""
        return printable(self.source.name)

    @property
    def summary(self) -> dict[str, Any] | None:
        """The field's figures (`graincast.measure.field.measure_field`), or None; ``astm_grain_size_number`` is the planimetric one."""
        if self.sizes is None:
            return None
        return {**self.sizes.to_dict(), "astm_grain_size_number": self.sizes.values["astm_e112_g_planimetric"]}


def segment_files(segmenter: Segmenter, sources: Sequence[Path], out: Path, pixel_size_um: float | None = None,
                  names: Sequence[str] | None = None, exports: Sequence[str] = USUAL) -> list[Outcome]:
    """Segment micrographs, measure what was found and write it.

    For each file the chosen kinds of `graincast.export.kinds.KINDS`, ``NAME_labels.tif`` and the like, and ``NAME_field.json``: the
    field's figures, and of which content, model and settings these are results. That record is written last, so what it names is
    whole; a later run that finds it true leaves the file alone. ``summary.json`` lists every file, the refused ones with
    their reason, and sums up the session; ``report.html`` shows it.

    Parameters
    ----------
    segmenter : Segmenter
        With its preparation inside.
    sources : sequence of Path
        Files, and folders that are searched recursively, all but `out` where that lies within.
    out : Path
        Folder for the results, other than the micrographs' own; made if absent. Results of another content, model or
        setting are replaced.
    pixel_size_um : float, optional
        Pixel size of files whose metadata has none, um.
    names : sequence of str, optional
        What the results are called, one a file; `sources` are files then. Their stems unless given.
    exports : sequence of str
        Names from `graincast.export.kinds.KINDS`, and ``report``.

    Returns
    -------
    list of Outcome
        One a file, in the order of `sources`.

    Raises
    ------
    UserError
        If nothing is found, `out` is a source or a source file's folder (so that results never become micrographs), two
        files would write the same results, or `out` cannot be written.
    """
    for source in sources:
        if out.resolve() in (source.resolve(), source.resolve().parent if source.is_file() else None):
            raise UserError(f"results cannot go where the micrographs are, {out}; another folder would be right")
    files = [file for source in sources for file in _micrographs(source, out)]
    names = [file.stem for file in files] if names is None else names
    if len(names) != len(files):
        raise ValueError(f"{len(names)} names for {len(files)} files")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"several micrographs are called '{twice[0]}'; their results in {out} would overwrite each other, "
                        "so segment their folders one by one")
    run = _Run(segmenter, out, pixel_size_um, [kind for kind in KINDS if kind in exports])
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in (SUMMARY, PAGE):  # of an earlier run, until this one has ended
            (out / stale).unlink(missing_ok=True)
        several = ahead(run.outcome, files, names, threads=min(AT_ONCE, os.cpu_count() or 1))  # most of the work holds no interpreter lock
        outcomes = list(tqdm(several, desc="segment", unit="image", total=len(files), disable=None))
        session, doubts = _session(dict(zip(names, outcomes, strict=True)))
        if REPORT in exports:
            from graincast.report.folder import write_folder_report

            with whole_file(out / PAGE) as path:
                write_folder_report(path, sources, outcomes, session, doubts, run.provenance)
        _write_json(out / SUMMARY, _summary(outcomes, session, doubts, run))
    except OSError as error:
        raise UserError(f"results cannot be written to {out}: {error}") from error
    return outcomes


def _micrographs(source: Path, out: Path) -> list[Path]:
    """The files that a source stands for; results of earlier runs that lie in it, in another folder than `out`, are none."""
    files = find_micrographs(source, exclude=out)
    if not source.is_dir():
        return files
    records = ((record.parent, _read_record(record)) for folder in {file.parent for file in files} for record in folder.glob(f"*{FIELD}"))
    results = {folder / each for folder, record in records if record for kind in record["files"].values() for each in kind}
    if results.issuperset(files):
        raise UserError(f"{source} holds nothing but results; a folder of micrographs would be right")
    return [file for file in files if file not in results]


class _Run:
    """One model with its settings, on its way through files; used from several threads."""

    def __init__(self, segmenter: Segmenter, out: Path, pixel_size_um: float | None, kinds: Sequence[str]) -> None:
        self.segmenter, self.out, self.pixel_size_um, self.kinds = segmenter, out, pixel_size_um, kinds
        with tempfile.TemporaryDirectory(prefix="graincast-") as folder:
            segmenter.save(Path(folder))
            model = folder_digest(Path(folder))
        self._large = threading.Lock()
        self._of_large = copy.copy(segmenter)  # it is compiled on the way, and other files' results must not depend on whether it was
        self.provenance = {"model": model, "pixel_size_um_if_unknown": pixel_size_um, "graincast": __version__}

    def outcome(self, file: Path, name: str) -> Outcome:
        record = self.out / f"{name}{FIELD}"
        if printable(name) != name:  # not every kind of export can be called by it
            return Outcome(file, refused=f"{printable(file.name)} has a name that cannot be printed; another name would be right")
        try:
            content = _content(file)
        except UserError as error:
            return Outcome(file, refused=reason(error, file))
        key = {"file": file.name, "sha256": content, **self.provenance}
        known = _read_record(record)
        if known and known["of"] == key and self._stands(known["files"]):
            return self._outcome(file, known, before=True)
        if known:
            _remove([record, *(self.out / each for kind in known["files"].values() for each in kind)])
        try:
            written, sizes, warnings = self._results(file, name, content)
        except UserError as error:
            return Outcome(file, refused=reason(error, file))
        fresh = {"of": key, "files": written, "warnings": warnings, "unit": sizes.unit, "values": sizes.to_dict(),
                 "whole_grains": {column: sizes.whole[column].tolist() for column in _sized(sizes.unit)}}
        _write_json(record, fresh)
        return self._outcome(file, fresh, before=False)

    def _results(self, file: Path, name: str, content: str) -> tuple[dict[str, dict[str, str]], FieldSizes, list[str]]:
        """What was written, kind by kind, what was measured, and what to know of it."""
        with contextlib.ExitStack() as until_written:
            results = self._segment(file, content)
            if results is None:
                until_written.enter_context(self._large)  # one at a time, for memory's sake
                scratch = until_written.enter_context(tempfile.TemporaryDirectory(prefix=PARTIAL, dir=self.out))
                results = self._segment_large(file, content, Path(scratch))
            found, sizes, warnings = results
            return {kind: self._write(kind, name, found) for kind in self.kinds}, sizes, warnings

    def _segment(self, file: Path, content: str) -> tuple[Segmented, FieldSizes, list[str]] | None:
        """As a whole; None: it is too large for that."""
        from graincast.segment.tiled import LARGE_PX

        if _declared(file)[0] > LARGE_PX:
            return None
        micrograph = read_micrograph(file)
        _check_unchanged(file, content)
        if micrograph.image.size > LARGE_PX:
            return None
        try:
            found = find_grains(self.segmenter, micrograph, self.pixel_size_um)
        except UserError as error:
            if isinstance(error.__cause__, TooLarge):  # once its grains are as wide as the network wants them
                return None
            raise
        return Segmented.of(file.name, micrograph.image, found), found.sizes, found.warnings

    def _segment_large(self, file: Path, content: str, scratch: Path) -> tuple[Segmented, FieldSizes, list[str]]:
        """Block by block; `scratch` holds the label map while it is needed."""
        from graincast.microscope.streamed import BAND_ROWS, StreamedMicrograph
        from graincast.segment.tiled import StreamedLabels, segment_large

        result = segment_large(self._of_large, file, scratch / "labels.tif", self.pixel_size_um)
        height, width = result.shape
        every = reduction(result.shape)
        labels = np.memmap(scratch / "labels.raw", np.int32, "w+", shape=result.shape)
        image = np.empty((-(-height // every), -(-width // every)), np.float32)
        with StreamedLabels(result.labels) as ids, StreamedMicrograph(file) as micrograph:
            for top in range(0, height, band := every * max(BAND_ROWS // every, 1)):
                rows = slice(top, min(top + band, height))
                labels[rows] = ids.labels(rows, slice(None))
                image[top // every : -(-rows.stop // every)] = micrograph.window(rows, slice(None))[::every, ::every]
        _check_unchanged(file, content)
        grains = result.grains()
        sizes = measure_field(labels[: result.bar_row], result.pixel_size_um, grains)
        found = Segmented(file.name, image, labels, grains, result.pixel_size_um, every, windows=lambda: (Piece(*block) for block in result.blocks()))
        unsure = ["segmented block by block, without a confidence in each grain"] if self.segmenter.calibration else []
        return found, sizes, [*doubts(height * width, _declared(file)[1]), *unsure, *sizes.warnings]

    def _write(self, kind: str, name: str, found: Segmented) -> dict[str, str]:
        path = self.out / f"{name}{KINDS[kind].suffix}"
        with whole_file(path) as partial:
            KINDS[kind].write(found, partial)
        return {path.name: _content(path)}

    def _stands(self, files: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether all that is asked for lies there as it was written."""
        try:
            return all(_content(self.out / file) == content for kind in self.kinds for file, content in files[kind].items())
        except (KeyError, UserError):
            return False

    def _outcome(self, file: Path, record: Mapping[str, Any], before: bool) -> Outcome:
        sizes = FieldSizes(record["unit"], record["values"], pd.DataFrame(record["whole_grains"], dtype=float))
        # one that was not asked for this time need not be there any more
        overlay = next((self.out / each for each in record["files"]["overlay"]), None) if "overlay" in self.kinds else None
        return Outcome(file, sizes, warnings=record["warnings"], before=before, overlay=overlay)


def _sized(unit: str) -> tuple[str, str]:
    """What `measure_session` wants to know of each whole grain."""
    return f"equivalent_diameter_{unit}", f"area_{unit}2"


def _declared(file: Path) -> tuple[int, int]:
    """Pixels of a TIFF's first page, and its pages, by its head; 0 and 1: another format, told when it is read, or what cannot be read."""
    if file.suffix.lower() not in (".tif", ".tiff"):
        return 0, 1
    try:
        with tifffile.TiffFile(file) as tif:
            return int(tif.pages[0].imagewidth * tif.pages[0].imagelength), len(tif.pages)
    except (OSError, ValueError, IndexError, tifffile.TiffFileError):
        return 0, 1  # reading it says what is wrong


def _check_unchanged(file: Path, content: str) -> None:
    if _content(file) != content:
        raise UserError(f"{file} changed while it was read; once nothing writes to it any more, another run would be right")


def _session(outcomes: Mapping[str, Outcome]) -> tuple[SessionSizes | None, list[str]]:
    """The session's sizes, or none and why."""
    fields = {name: outcome.sizes for name, outcome in outcomes.items() if outcome.sizes is not None}
    try:
        sizes = measure_session(fields)
    except UserError as error:
        return None, [str(error)]
    return sizes, sizes.warnings


def _summary(outcomes: Iterable[Outcome], session: SessionSizes | None, doubts: Sequence[str], run: _Run) -> dict[str, Any]:
    images = [{"file": outcome.file, **({**outcome.summary, "warnings": outcome.warnings, "done": "before" if outcome.before else "now"}
                                                if outcome.summary else {"refused": outcome.refused})} for outcome in outcomes]
    return {**count(outcomes), "session": session and session.to_dict(), "warnings": doubts, **run.provenance, "images": images}


def count(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many files were done now, had been done before, and were refused."""
    states = Counter("refused" if outcome.refused else "done_before" if outcome.before else "done_now" for outcome in outcomes)
    return {state: states[state] for state in ("done_now", "done_before", "refused")}


def _content(file: Path) -> str:
    """SHA-256 of a file."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def _read_record(path: Path) -> dict[str, Any] | None:
    """What an earlier run noted of a file; None: nothing, or what cannot be read."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and {"of", "files", "warnings", "unit", "values", "whole_grains"} <= record.keys() else None


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(document, indent=1, allow_nan=False))
