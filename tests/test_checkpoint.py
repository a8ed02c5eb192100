"""An interrupted training goes on and ends, to the byte, as if nothing had happened."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from graincast.checkpoint import Checkpoint
from graincast.config import Segmenter, Translator
from graincast.errors import UserError
from graincast.segment.train import train_segmenter
from graincast.synthesise.cyclegan.train import train_cyclegan
from tests.interrupted import train_until_killed

Rows = list[tuple[int, dict[str, float]]]


class Training(NamedTuple):
    """A training of four steps, and what it gives when nothing interrupts it."""

    train: Callable[..., Any]
    arguments: tuple[Any, ...]
    rows: Rows
    result: bytes

    def run(self, folder: Path | None = None, *arguments: Any) -> tuple[Rows, bytes]:
        """Figures and saved bytes, of the training or of one with other `arguments`."""
        rows: Rows = []
        with Checkpoint(folder, "training") as checkpoint:
            trained = self.train(*(arguments or self.arguments), log=lambda step, figures: rows.append((step, dict(figures))), checkpoint=checkpoint)
        return rows, _saved(trained)


def grains(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture, uint8 (96, 96), of square grains, and their ids."""
    labels = np.kron(np.arange(1, 37, dtype=np.int32).reshape(6, 6), np.ones((16, 16), np.int32))
    labels[15::16] = labels[:, 15::16] = 0
    noise = np.random.default_rng(seed).integers(0, 60, labels.shape)
    return (np.where(labels == 0, 20, 120) + noise).astype(np.uint8), labels


def _saved(trained: Any) -> bytes:
    with TemporaryDirectory() as folder:
        trained.save(Path(folder))
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


@pytest.fixture(scope="module", params=["translator", "segmenter"])
def training(request: pytest.FixtureRequest) -> Training:
    pairs = [grains(seed) for seed in range(3)]
    if request.param == "translator":
        # a pool smaller than the images drawn, so that history comes out of it, too
        config = Translator(steps=4, batch=2, crop=32, filters=4, residual_blocks=1, pool=3, device="cpu")
        train, arguments = train_cyclegan, (pairs, [picture[::-1] for picture, _ in pairs], config)
    else:
        config = Segmenter(encoder="mobilenet_v2", epochs=4, crops_per_image=2, batch=2, crop=64, device="cpu")
        train, arguments = train_segmenter, (pairs[:2], pairs[2:], config)
    rows, result = Training(train, arguments, [], b"").run()
    return Training(train, arguments, rows, result)


def others(training: Training) -> tuple[Any, ...]:
    """The same training with another seed."""
    *data, config = training.arguments
    return *data, config.model_copy(update={"seed": 1})


@pytest.mark.parametrize(("step", "halfway", "kept"), [(0, False, 0), (3, False, 3), (2, True, 2)])
def test_a_killed_training_ends_as_the_uninterrupted_one(training: Training, tmp_path, capsys, step: int, halfway: bool, kept: int):
    folder = tmp_path / "checkpoints"
    train_until_killed(training.train, *training.arguments, checkpoints=folder, step=step, halfway=halfway)
    rows, result = training.run(folder)
    assert ("goes on from the checkpoint after step" in capsys.readouterr().err) == bool(kept)
    assert rows == training.rows  # every loss, exactly, those before the interruption included
    assert result == training.result
    assert not list(folder.glob("*"))


def test_killed_twice(training: Training, tmp_path, capsys):
    for step in (1, 2):
        train_until_killed(training.train, *training.arguments, checkpoints=tmp_path / "checkpoints", step=step)
    assert training.run(tmp_path / "checkpoints") == (training.rows, training.result)
    assert "goes on from the checkpoint after step 2" in capsys.readouterr().err


@pytest.fixture
def interrupted(training: Training, tmp_path) -> Path:
    """Folder with the checkpoint of a training that was killed in its third step."""
    train_until_killed(training.train, *training.arguments, checkpoints=tmp_path / "checkpoints", step=2)
    return tmp_path / "checkpoints"


def test_another_configuration_or_other_data_start_anew(training: Training, interrupted: Path, capsys):
    *data, config = training.arguments
    (checkpoint,) = interrupted.iterdir()
    fewer = (data[0][:1], *data[1:], config)
    for arguments in (others(training), fewer):
        rows, _ = training.run(interrupted, *arguments)
        assert rows[0] != training.rows[0]
        assert "goes on" not in capsys.readouterr().err
        assert list(interrupted.iterdir()) == [checkpoint]  # left to the training that it belongs to


def test_a_damaged_checkpoint_is_named_and_the_training_begins_anew(training: Training, interrupted: Path, capsys):
    (checkpoint,) = interrupted.iterdir()
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    assert training.run(interrupted) == (training.rows, training.result)
    said = [line for line in capsys.readouterr().err.splitlines() if "checkpoint" in line]
    assert said == [f"the checkpoint {checkpoint} is damaged; the training begins anew"]


def test_a_segmenter_that_had_stopped_improving_stops(tmp_path):
    pairs = [grains(seed) for seed in range(2)]
    config = Segmenter(encoder="mobilenet_v2", epochs=20, crops_per_image=1, batch=1, crop=64, patience=1, learning_rate=0.5, device="cpu")
    arguments = (pairs[:1], pairs[1:], config)
    rows, result = Training(train_segmenter, arguments, [], b"").run()
    assert len(rows) < 20
    train_until_killed(train_segmenter, *arguments, checkpoints=tmp_path, step=rows[-1][0])
    assert Training(train_segmenter, arguments, [], b"").run(tmp_path) == (rows, result)


class Counter:
    """A training of nothing but a number and PyTorch's random draws."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def state_dict(self) -> list[float]:
        return self.drawn

    def load_state_dict(self, state_dict: list[float]) -> None:
        self.drawn = list(state_dict)

    def train(self, checkpoint: Checkpoint, steps: int, made_of: Any = "counter") -> list[float]:
        for step in range(checkpoint.resume({"counter": self}, torch.device("cpu"), [made_of]), steps):
            self.drawn.append(float(torch.rand(())))
            checkpoint.record(step, {"drawn": self.drawn[-1]})
        return self.drawn


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(Checkpoint, "SHARE", 1e9)


def test_pytorchs_draws_go_on(tmp_path, every_step):
    torch.manual_seed(3)
    whole = Counter().train(Checkpoint(), 5)
    torch.manual_seed(3)
    Counter().train(Checkpoint(tmp_path), 2)
    torch.manual_seed(4)
    assert Counter().train(Checkpoint(tmp_path), 5) == whole


@pytest.mark.parametrize("damage", [lambda content: content[:-10], lambda content: b"", lambda content: content[::-1]])
def test_any_damage_is_noticed(tmp_path, capsys, every_step, damage: Callable[[bytes], bytes]):
    Counter().train(Checkpoint(tmp_path), 2)
    (checkpoint,) = tmp_path.iterdir()
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    assert not Counter().train(Checkpoint(tmp_path), 0)
    assert capsys.readouterr().err.count("is damaged") == 1


def test_what_a_kill_left_half_written_is_removed(tmp_path, every_step):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, written = (tmp_path / f".partial-{pid}-counter-0.pt" for pid in (gone.pid, os.getpid()))
    for partial in (left, written):
        partial.write_bytes(b"half")
    Counter().train(Checkpoint(tmp_path), 0)
    assert list(tmp_path.iterdir()) == [written]


def test_checkpoints_wait_for_their_time(tmp_path, monkeypatch):
    Counter().train(Checkpoint(tmp_path), 100)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(Checkpoint, "SHARE", 1e-9)
    Counter().train(Checkpoint(tmp_path), 100)  # the first writing is followed by 1e9 times as long without one
    assert len(Counter().train(Checkpoint(tmp_path), 0)) == 1


def test_forgotten_checkpoints_make_way(tmp_path, every_step):
    runs = Checkpoint.KEPT + 3
    for run in range(runs):
        Counter().train(Checkpoint(tmp_path), 1, made_of=run)
    assert len(list(tmp_path.iterdir())) == Checkpoint.KEPT
    assert len(Counter().train(Checkpoint(tmp_path), 0, made_of=runs - 1)) == 1
    assert not Counter().train(Checkpoint(tmp_path), 0, made_of=0)


def test_a_failed_training_keeps_its_checkpoint_a_whole_one_does_not(tmp_path, every_step):
    def failing() -> None:
        with Checkpoint(tmp_path / "folder") as checkpoint:
            Counter().train(checkpoint, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    with Checkpoint(tmp_path / "folder") as checkpoint:
        assert len(Counter().train(checkpoint, 2)) == 2
    assert not list((tmp_path / "folder").iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, every_step):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"the checkpoint .*file.* cannot be (written|read)"):
        Counter().train(Checkpoint(tmp_path / "file"), 1)


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(tmp_path, every_step):
    Counter().train(Checkpoint(tmp_path), 2)
    (checkpoint,) = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands for the full disk: writing fails in the middle
    try:
        with pytest.raises(UserError, match=r"checkpoint .* cannot be written: File too large; free space"):
            Counter().train(Checkpoint(tmp_path), 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [checkpoint]
    assert len(Counter().train(Checkpoint(tmp_path), 0)) == 2


def test_arrays_tell_trainings_apart(tmp_path, every_step):
    made_of = [np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((2, 3), np.float32), np.ones((2, 3))]
    for run in made_of[:3]:
        Counter().train(Checkpoint(tmp_path), 1, made_of=run)
    assert [len(Counter().train(Checkpoint(tmp_path), 0, made_of=run)) for run in made_of] == [1, 1, 1, 0]
