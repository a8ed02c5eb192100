"""A training in a process of its own, killed on the way."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from graincast.checkpoint import Checkpoint


def train_until_killed(train: Callable[..., Any], *arguments: Any, checkpoints: Path, step: int, halfway: bool = False) -> None:
    """Train in another process, with a checkpoint after every step, that gets SIGKILL in the given step.

    Parameters
    ----------
    train : callable
        Takes `arguments`, ``log`` and ``checkpoint``.
    checkpoints : Path
        Folder of the checkpoints.
    step : int
        The last step that is reported before the end.
    halfway : bool
        Kill it while the checkpoint of that step is being written, not before.
    """
    task = pickle.dumps((train, arguments, checkpoints, step, halfway, torch.get_num_threads()))
    done = subprocess.run([sys.executable, "-m", "tests.interrupted"], input=task, capture_output=True, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def _main() -> None:
    train, arguments, checkpoints, last, halfway, threads = pickle.loads(sys.stdin.buffer.read())

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def log(step: int, figures: Mapping[str, float]) -> None:
        if step == last:
            if halfway:
                os.fsync = lambda descriptor: kill()
            else:
                kill()

    torch.set_num_threads(threads)
    Checkpoint.SECONDS, Checkpoint.SHARE = 0.0, 1e9
    with Checkpoint(checkpoints, "training") as checkpoint:
        train(*arguments, log=log, checkpoint=checkpoint)


if __name__ == "__main__":
    _main()
