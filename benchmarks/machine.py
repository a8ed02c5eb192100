"""What this machine can do at best: bandwidth and arithmetic rate, measured with all threads, and what it is."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

TRIAD_BYTES = 16
"""Bytes that one element of the triad a = b + s c moves: two reads, one write, and the read that a write to a line
outside the cache brings with it."""

FMA_CHAIN = 16
"""Fused multiply-adds on one value between load and store; neighbouring values are independent, which fills the
pipelines."""

REPEATS = 7
MEASURED_S = 0.1  # at least as long does each measurement take, roughly


def bandwidth(footprint: int) -> float:
    """Bytes a second that all threads together move in a STREAM triad [1]_.

    Parameters
    ----------
    footprint : int
        Bytes of all arrays together: far more than the last-level cache measures memory, less measures the cache that
        holds them.

    Returns
    -------
    float
        Best of `REPEATS`, B/s, with the write-allocates counted (`TRIAD_BYTES`).

    References
    ----------
    .. [1] J. D. McCalpin, "Memory bandwidth and machine balance in current high performance computers", IEEE TCCA
       Newsletter (1995) 19.
    """
    threads = numba.get_num_threads()
    elements = max(64, footprint // (3 * 4 * threads))
    arrays = np.ones((3, threads, elements), np.float32)
    rounds = max(1, int(MEASURED_S * 20e9 / (TRIAD_BYTES * threads * elements)))
    return TRIAD_BYTES * threads * elements * rounds / _least_seconds(lambda: _triads(*arrays, np.float32(0), rounds))


def arithmetic_peak() -> float:
    """Float32 operations a second of all threads together, in independent fused multiply-adds on data in the L1 cache.

    Returns
    -------
    float
        Best of `REPEATS`, 1/s, a fused multiply-add counted as two operations.

    Notes
    -----
    A Zen 4 core has two pipelines of eight lanes: 32 operations a cycle, 115 GFlop/s at 3.6 GHz. 117 were measured.
    """
    values = np.ones((numba.get_num_threads(), 2048), np.float32)
    operations = 2 * FMA_CHAIN * values.size
    rounds = max(1, int(MEASURED_S * 100e9 / operations))
    return operations * rounds / _least_seconds(lambda: _multiply_add(values, rounds, np.float32(0.999), np.float32(0.001)))


def last_level_cache() -> int | None:
    """Bytes of the largest cache, where the system tells (Linux)."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=None)


def describe() -> dict[str, Any]:
    """Processor, threads in use, last-level cache and versions."""
    return {"processor": _processor(), "threads": numba.get_num_threads(), "last_level_cache_mb": (last_level_cache() or 0) / 2**20 or None,
            "system": platform.platform(terse=True), "python": platform.python_version(), "numpy": np.__version__, "numba": numba.__version__}


def _processor() -> str:
    """Its name; Linux keeps that in /proc/cpuinfo only."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _least_seconds(work: Callable[[], object]) -> float:
    work()  # compiles
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@numba.njit(cache=True, parallel=True)
def _triads(target: np.ndarray, first: np.ndarray, second: np.ndarray, factor: float, rounds: int) -> None:
    for thread in numba.prange(len(target)):
        for _ in range(rounds):
            _triad(target[thread], first[thread], second[thread], factor)


@numba.njit(cache=True)
def _triad(target: np.ndarray, first: np.ndarray, second: np.ndarray, factor: float) -> None:
    for i in range(target.size):
        target[i] = first[i] + factor * second[i]


@numba.njit(cache=True, parallel=True, fastmath={"contract"})
def _multiply_add(values: np.ndarray, rounds: int, factor: float, term: float) -> None:
    for thread in numba.prange(len(values)):
        own = values[thread]
        for _ in range(rounds):
            for i in range(own.size):
                value = own[i]
                for _ in range(FMA_CHAIN):
                    value = value * factor + term
                own[i] = value
