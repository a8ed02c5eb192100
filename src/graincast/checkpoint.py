"""Checkpoints: a training that was interrupted goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

from graincast.compute import Log
from graincast.errors import UserError

PARTIAL = ".partial-"


class Stateful(Protocol):
    """What can be stopped and brought back: networks, optimisers, schedules, `RandomState`."""

    def state_dict(self) -> Any:
        """Tensors, numbers and strings, in mappings and lists."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take over what `state_dict` gave."""
        ...


class RandomState:
    """A NumPy generator as a `Stateful`."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def state_dict(self) -> Mapping[str, Any]:
        """The state of the bit generator."""
        return self.rng.bit_generator.state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Draw from here on what would have been drawn then."""
        self.rng.bit_generator.state = state_dict


class Checkpoint:
    """An unfinished training on disk; a context manager that removes it once its body has ended well.

    Parameters
    ----------
    folder : Path or None
        Where checkpoints lie, of any number of trainings. None: none is kept.
    name : str
        What is trained; the file's name begins with it.

    Attributes
    ----------
    history : list of (int, dict)
        Step and figures of everything `record` has been told, the interrupted training's share included.

    Notes
    -----
    The file's name ends in a fingerprint of the library's code, PyTorch's version, configuration, data and kind of
    device. So a training finds its own checkpoint wherever its result will lie, and that of another code, another
    configuration or other data never. On a CPU, with the same number of threads, the result is that of the
    uninterrupted training to the byte.

    A file holds the state as `torch.save` writes it, behind its SHA-256. It is replaced as a whole and read without
    unpickling objects. A damaged one costs time, not results, so the training says so and begins anew.

    Examples
    --------
    ``with Checkpoint(folder, "segmenter") as checkpoint: train_segmenter(..., checkpoint=checkpoint)``
    """

    SECONDS = 30.0
    """Shortest time between two checkpoints, s: about what an interruption costs."""
    SHARE = 0.01
    """Largest share of the time that writing may take."""
    KEPT = 8
    """Checkpoints in a folder; the least recent of interrupted trainings that nobody took up again make way."""

    def __init__(self, folder: Path | None = None, name: str = "training") -> None:
        self.folder, self.name = folder, name
        self.history: list[tuple[int, dict[str, float]]] = []
        self._path: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._path:
            self._path.unlink(missing_ok=True)

    def resume(self, parts: Mapping[str, Stateful], device: torch.device, made_of: Iterable[Any], log: Log | None = None) -> int:
        """Bring `parts` to where an interrupted training left them, if there was one.

        Parameters
        ----------
        parts : Mapping of str to Stateful
            All that changes in training, PyTorch's own generators apart; `record` saves the same.
        device : torch.device
            Where the training runs.
        made_of : iterable
            Arrays and JSON-able values on which the result depends.
        log : callable, optional
            Told the interrupted training's figures now, and further ones by `record`.

        Returns
        -------
        int
            Steps that need not be taken again; 0 where there is no checkpoint.
        """
        self._parts, self._device, self._log, self.history = parts, device, log, []
        self._wait(0.0)
        if not self.folder:
            return 0
        _remove_half_written(self.folder)
        self._path = self.folder / f"{self.name}-{_fingerprint(device, made_of)[:16]}.pt"
        state = self._read(self._path)
        if state is None:
            return 0
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["torch"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], device)
        self.history = state["history"]
        _say(f"{self.name}: goes on from the checkpoint after step {len(self.history)}")
        if log:
            for step, figures in self.history:
                log(step, figures)
        return len(self.history)

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Take down what a step gave, hand it on, and save when it is time; the last act of every step.

        Raises
        ------
        UserError
            If the checkpoint cannot be written.
        """
        self.history.append((step, {name: float(value) for name, value in figures.items()}))
        if self._log:
            self._log(step, figures)
        if self._path and time.monotonic() >= self._due:
            start = time.monotonic()
            self._write(self._path)
            self._wait(time.monotonic() - start)

    def _wait(self, writing: float) -> None:
        self._due = time.monotonic() + max(self.SECONDS, writing / self.SHARE)

    def _write(self, path: Path) -> None:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        buffer = io.BytesIO()
        torch.save({"parts": {name: part.state_dict() for name, part in self._parts.items()}, "history": self.history,
                    "torch": torch.get_rng_state(), "cuda": cuda}, buffer)
        partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(hashlib.sha256(buffer.getbuffer()).digest())
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise UserError(f"the checkpoint {path} cannot be written: {error.strerror or error}; "
                            "free space in a folder that you may write to would be right") from error
        finally:
            partial.unlink(missing_ok=True)
        self._make_way(path.parent)

    def _make_way(self, folder: Path) -> None:
        """Remove the least recent checkpoints."""
        whole = [path for path in folder.iterdir() if not path.name.startswith(PARTIAL)]
        for old in sorted(whole, key=_modified)[: -self.KEPT]:
            old.unlink(missing_ok=True)

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"the checkpoint {path} cannot be read: {error.strerror}; a file that you may read, or none, would be right") from error
        digest, state = content[:32], content[32:]
        if hashlib.sha256(state).digest() != digest:
            _say(f"the checkpoint {path} is damaged; the training begins anew")
            return None
        return torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)


def _fingerprint(device: torch.device, made_of: Iterable[Any]) -> str:
    """SHA-256 of all that a training's result depends on."""
    sha = hashlib.sha256(json.dumps([_code(), torch.__version__, device.type]).encode())
    for part in made_of:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype.str}{part.shape}".encode())
            sha.update(np.ascontiguousarray(part).tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True).encode())
    return sha.hexdigest()


@cache
def _code() -> str:
    """SHA-256 of the library's source."""
    root = Path(__file__).parent
    sha = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        sha.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return sha.hexdigest()


def _remove_half_written(folder: Path) -> None:
    """Remove what processes that are no more were writing when they were killed."""
    for partial in folder.glob(f"{PARTIAL}*"):
        if not psutil.pid_exists(int(partial.name.removeprefix(PARTIAL).partition("-")[0])):
            partial.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    """Time of the last change, s; 0 where another process has removed the file."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _say(sentence: str) -> None:
    tqdm.write(sentence, file=sys.stderr)  # beside the progress bars, not through them
