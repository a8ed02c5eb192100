"""Device, precision, seeding and weight files: what every training and prediction shares."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from graincast.errors import UserError

MAX_BACKGROUND_THREADS = 8
T = TypeVar("T")
Log = Callable[[int, Mapping[str, float]], None]
"""Receives (step, losses and metrics by name) while something trains."""


def pick_device(name: str) -> torch.device:
    """Device for a configuration's ``device``: ``auto`` takes CUDA when it is there.

    Raises
    ------
    UserError
        If the name is unknown, or names a CUDA device this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}' is unknown; auto, cpu, cuda or cuda:N would be right") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}' is not there ({torch.cuda.device_count()} CUDA devices found); auto would be right")
    return device


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocast context for a configuration's ``precision`` (``auto``, ``float32``, ``bfloat16``)."""
    enabled = precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def memory_format(device: torch.device) -> torch.memory_format:
    """Layout of image batches: channels last on CUDA; on CPUs instance norm makes contiguous ones about 3 times faster."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body with torch's generators at `seed` and deterministic algorithms; restore both afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs about 5 % of every step
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def background_threads(device: torch.device) -> int:
    """Threads that make batches for a training: one where the processor trains, else enough to keep up with CUDA."""
    return min(MAX_BACKGROUND_THREADS, os.cpu_count() or 1) if device.type == "cuda" else 1


def ahead(function: Callable[..., T], *arguments: Iterable[Any], threads: int) -> Iterator[T]:
    """What ``map(function, *arguments)`` gives, in the same order, made beforehand in background threads.

    Parameters
    ----------
    function : callable
        Independent of the order of its calls, so that the number of threads does not show.
    *arguments : iterable
        As for `map`; read in the caller's thread.
    threads : int
        Each has up to one result made and one in the making. 0: no threads, nothing beforehand.
    """
    if not threads:
        yield from map(function, *arguments)
        return
    calls = zip(*arguments, strict=False)
    pool = ThreadPoolExecutor(threads, "batches")
    try:
        pending = deque(pool.submit(function, *call) for call in itertools.islice(calls, 2 * threads))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, *call) for call in itertools.islice(calls, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def random_crop(image: np.ndarray, side: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Slices of a random `side` x `side` window of a 2-D `image`, which must be at least that large."""
    y, x = (int(rng.integers(0, extent - side + 1)) for extent in image.shape[:2])
    return slice(y, y + side), slice(x, x + side)


def dihedral(array: np.ndarray, symmetry: int) -> np.ndarray:
    """One of the eight symmetries (0 to 7) of the square, applied to the last two axes."""
    turned = np.rot90(array, symmetry % 4, axes=(-2, -1))
    return turned[..., ::-1] if symmetry >= 4 else turned


def state_arrays(*networks: torch.nn.Module) -> list[np.ndarray]:
    """Everything that the networks' states hold, in their order: what a training that starts from them depends on."""
    return [value.detach().cpu().numpy() for network in networks for value in network.state_dict().values()]


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able header as one safetensors file; the same content gives the same bytes."""
    # a single metadata entry, as safetensors writes several in no particular order
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, path, metadata={"graincast": json.dumps(header, sort_keys=True)})


def load_weights(path: Path, what: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote; a UserError says where there is no such file, or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["graincast"])  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path.parent} holds no {what} ({path.name} expected): {error}") from error
