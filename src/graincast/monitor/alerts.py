"""Alerts: what a person should hear of, in a file and in the log, whatever else is told of it.

``alerts.jsonl`` has a line an alert, oldest first: ``when`` (UTC), ``event``, ``sentence``, ``figures``. Mail, chat and
the like read it or are sent the sentence by the pipeline, through the ZenML alerter of the stack where there is one.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graincast.errors import UserError

logger = logging.getLogger(__name__)

FILE = "alerts.jsonl"


def alert(event: str, sentence: str, figures: Mapping[str, Any] | None = None, folder: Path | str = ".") -> dict[str, Any]:
    """Tell a person something: a line in ``alerts.jsonl``, synced to disk, and one in the log.

    Parameters
    ----------
    event : str
        What kind of thing happened, e.g. ``drift``, ``session set aside``, ``run failed``.
    sentence : str
        What happened and what to do; one line.
    figures : Mapping, optional
        What it rests on, JSON-able; figures that are NaN or infinite become null.
    folder : Path
        Where the file lies; made if absent.

    Returns
    -------
    dict
        The alert as it was written.

    Raises
    ------
    UserError
        If the file cannot be written; the log has the line nevertheless.
    """
    entry = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "sentence": " ".join(sentence.split()),
             "figures": _finite(dict(figures or {}))}
    logger.warning("%s: %s", event, entry["sentence"])
    file = Path(folder) / FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _append(file, json.dumps(entry, allow_nan=False))
    except OSError as error:
        raise UserError(f"the alert '{entry['sentence']}' cannot be written to {file}: {error.strerror or error}") from error
    return entry


def _append(file: Path, line: str) -> None:
    """One line more, never mixed with another process's, and on a line of its own where a crash cut the last one short."""
    from filelock import FileLock

    with FileLock(file.with_name(f".{FILE}.lock")), file.open("ab+") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 1, 0))
        start = b"" if stream.read(1) in (b"", b"\n") else b"\n"
        stream.write(start + line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if hasattr(value, "item"):  # NumPy's scalars
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
