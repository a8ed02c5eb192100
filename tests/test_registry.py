"""Registry and promotion against a real MLflow store: aliases, records, locks, kills, tampering, and what the evidence tells."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as iio
import mlflow
import numpy as np
import pytest
import tifffile
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from scipy import ndimage as ndi
from scipy.spatial import cKDTree
from skimage.segmentation import find_boundaries

from graincast.cli import main
from graincast.config import Promotion
from graincast.config import Segmenter as SegmenterConfig
from graincast.errors import Unavailable, UserError, is_down
from graincast.evaluate import evidence
from graincast.evaluate.evidence import Evidence, SetEvidence, gather, scored_images
from graincast.evaluate.fields import resample_labels
from graincast.evaluate.metrics import score_labels
from graincast.evaluate.promotion import Decision, decide
from graincast.microscope.preparation import Preparation
from graincast.segment.instances import Cut
from graincast.segment.network import build_network
from graincast.segment.segmenter import Segmenter
from graincast.stages import run_labelled_fields, run_promotion_evidence
from graincast.store import registry, tracking
from graincast.store.imageset import ImageSet, ImageSetWriter, folder_digest

ENCODER = "timm-mobilenetv3_small_minimal_100"  # the smallest there is
WRITES = ("create_run", "log_text", "log_batch", "set_tag", "set_terminated", "set_registered_model_tag", "delete_registered_model_tag",
          "set_registered_model_alias", "delete_registered_model_alias", "set_model_version_tag", "delete_model_version_tag")
"""What a decision changes the store with; a process is killed before each of them."""


PRELOADED = ("graincast.stages", "graincast.store.registry", "mlflow", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store",
             "mlflow.store.model_registry.sqlalchemy_store", "segmentation_models_pytorch", "pytest", "hypothesis", "typer", "rich.table")
"""What takes processes long to import."""


def save_segmenter(folder: Path, rise: float, parents: dict[str, str] | None = None) -> Path:
    """An untrained segmenter, told from others by `rise`."""
    folder.mkdir(parents=True)
    network = build_network("Linknet", ENCODER, None).eval()
    segmenter = Segmenter(network, Cut(30, rise=rise), SegmenterConfig(architecture="Linknet", encoder=ENCODER, precision="float32").model_dump())
    segmenter.parents = parents or {}
    segmenter.save(folder)
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """A store with versions 1, 2 and 3, its database as it was then, and its folder; made once, since that takes seconds."""
    folder = tmp_path_factory.mktemp("registry")
    before, uri = mlflow.get_tracking_uri(), f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment_id=tracking.ensure_experiment())
    for number in (1, 2, 3):
        with mlflow.start_run():
            made = save_segmenter(folder / "made" / str(number), number / 10)
            assert registry.ensure_registered(made, np.zeros((96, 96), np.uint8), {"dvc.training": f"data{number}"}) == number
    copy(folder / "mlflow.db", folder / "at-first.db")
    yield uri, folder / "at-first.db", folder
    mlflow.set_tracking_uri(before)


def copy(source: Path, target: Path) -> None:
    """A database's content, while others have it open."""
    with sqlite3.connect(source) as old, sqlite3.connect(target, timeout=60) as new:
        old.backup(new)


@pytest.fixture
def store(template: tuple[str, Path, Path]) -> str:
    """The store as it was at first: three versions, no alias, no decision."""
    uri, at_first, folder = template
    mlflow.set_tracking_uri(uri)
    copy(at_first, folder / "mlflow.db")
    return uri


def aliases() -> dict[str, int]:
    return {alias: found.number for found in registry.versions() for alias in found.aliases}


def decision(version: int, champion: int | None, promote: bool = True) -> Decision:
    known = {found.number: found.digest for found in registry.versions()}
    figures = {"fields": {"dvc": "abc", "challenger": {"ap50": 0.9}, "champion": {"ap50": 0.8}}}
    return Decision(promote, ("because",), "labelled fields", known[champion] if champion else None, known[version], figures)


def rise(reference: str | None = None) -> float:
    return registry.load_segmenter(reference, "cpu").cut.rise


# Aliases and records


def challenge(number: int) -> None:
    MlflowClient().set_registered_model_alias(registry.MODEL, registry.CHALLENGER, str(number))


def test_promotions_and_rollbacks_move_the_aliases_and_are_on_record(store: str) -> None:
    challenge(1)
    assert aliases() == {"challenger": 1}
    assert registry.promote(1, decision(1, None), by="run a").after == {"champion": 1}
    challenge(2)
    assert rise() == 0.1, "a challenger changes nothing"
    record = registry.promote(2, decision(2, 1), by="run b")
    assert (record.action, record.champion, record.before) == ("promote", 1, {"champion": 1, "challenger": 2})
    assert aliases() == {"champion": 2, "previous": 1} == record.after
    registry.promote_by_hand(3, "looks better", by="a person")
    assert aliases() == {"champion": 3, "previous": 2}
    registry.rollback("it merges grains", by="a person")
    assert aliases() == {"champion": 2, "previous": 1}
    assert rise() == 0.2
    registry.rollback("so does this", by="a person")
    assert aliases() == {"champion": 1}, "one further back, not forth again"
    with pytest.raises(UserError, match="no previous version"):
        registry.rollback("more", by="a person")

    kept = registry.history()
    assert [(r.action, r.version, r.champion) for r in kept] == [
        ("rollback", 1, 2), ("rollback", 2, 3), ("promote", 3, 2), ("promote", 2, 1), ("promote", 1, None)]
    assert {r.status for r in kept} == {"done"}
    assert all(later.before.get("champion") == earlier.after["champion"] for later, earlier in pairwise(kept))
    second = kept[3]
    assert (second.by, second.reasons, second.decided_by) == ("run b", ("because",), "labelled fields")
    assert second.figures["fields"]["champion"] == {"ap50": 0.8}
    assert {name: hashes["dvc.training"] for name, hashes in second.hashes.items()} == {"version": "data2", "champion": "data1"}
    assert MlflowClient().get_run(second.id).data.metrics["fields/challenger/ap50"] == 0.9
    assert second.when.endswith("+00:00")


def test_what_was_rolled_back_returns_only_by_hand(store: str) -> None:
    registry.promote_by_hand(1, "first", by="x")
    registry.promote_by_hand(2, "better", by="x")
    registry.rollback("it was not", by="x")
    refused = registry.promote(2, decision(2, 1), by="the next cached run")
    assert refused.action == "refuse"
    assert "rolled back before (it was not)" in refused.reasons[0]
    assert aliases() == {"champion": 1, "challenger": 2}
    registry.promote_by_hand(2, "it was after all", by="x")
    assert aliases() == {"champion": 2, "previous": 1}
    registry.promote_by_hand(1, "x", by="x")
    assert registry.promote(2, decision(2, 1), by="x").promoted, "the mark is gone"


def test_a_refusal_is_on_record_and_leaves_the_champion(store: str) -> None:
    registry.promote_by_hand(1, "first", by="x")
    record = registry.promote(2, decision(2, 1, promote=False), by="run c")
    assert (record.action, record.reasons) == ("refuse", ("because",))
    assert aliases() == {"champion": 1, "challenger": 2}
    assert registry.history()[0] == dataclasses.replace(record, status="done")


def test_a_comparison_with_another_champion_does_not_count(store: str) -> None:
    registry.promote_by_hand(1, "first", by="x")
    late = decision(3, 1)
    assert registry.promote(2, decision(2, 1), by="quick").promoted
    record = registry.promote(3, late, by="late")
    assert record.action == "refuse"
    assert "compare again" in record.reasons[0]
    assert aliases() == {"champion": 2, "previous": 1, "challenger": 3}
    with pytest.raises(UserError, match="but version 1 of graincast-segmenter has"):
        registry.promote(1, late, by="of another segmenter")


def test_of_two_runs_that_register_the_same_bytes_the_second_takes_the_version_of_the_first(
        store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, log_model = save_segmenter(tmp_path / "made", 0.4), registry._log_model

    def overtaken(*arguments: Any) -> str:
        uri = log_model(*arguments)
        monkeypatch.setattr(registry, "_log_model", log_model)
        assert registry.ensure_registered(folder, np.zeros((96, 96), np.uint8), {"git_commit": "abc"}) == 4
        return uri

    monkeypatch.setattr(registry, "_log_model", overtaken)
    with mlflow.start_run():
        assert registry.ensure_registered(folder, np.zeros((96, 96), np.uint8)) == 4
    assert registry.version(4).tags == {"dvc.segmenter": folder_digest(folder), "git_commit": "abc"}
    assert len(registry.versions()) == 4


@pytest.mark.parametrize("act", [
    lambda: registry.promote_by_hand(9, "why", by="x"), lambda: registry.promote_by_hand(1, " ", by="x"), lambda: registry.rollback("why", by="x"),
    lambda: registry.attach(1, "segmenter", Path()), lambda: registry.fetch_attached(1, "reference", Path("x")),
])
def test_what_cannot_be_is_said_and_moves_nothing(store: str, act: Any) -> None:
    with pytest.raises(UserError):
        act()
    assert aliases() == {}
    assert registry.history() == []


def test_further_folders_travel_with_a_version(store: str, tmp_path: Path) -> None:
    for text in ("old", "new"):
        (tmp_path / text / "sub").mkdir(parents=True)
        (tmp_path / text / "sub" / "file").write_text(text)
        digest = registry.attach(2, "reference", tmp_path / text)
        assert registry.version(2).hashes["reference"] == digest == folder_digest(tmp_path / text)
        got = registry.fetch_attached(2, "reference", tmp_path / f"got {text}")
        assert folder_digest(got) == digest
    assert (tmp_path / "got new" / "sub" / "file").read_text() == "new"
    with pytest.raises(UserError, match=r"version 1 .* carries no 'reference'"):
        registry.fetch_attached(1, "reference", tmp_path / "none")
    (file,) = (path for path in (Path(store.removeprefix("sqlite:///")).parent / "mlartifacts").rglob("sub/file") if path.read_text() == "new")
    file.write_text("bad")
    with pytest.raises(UserError, match=r"'reference' of version 2 .* tampered with"):
        registry.fetch_attached(2, "reference", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


# Tampering


@pytest.fixture
def weights(store: str) -> Iterator[Path]:
    """The weights of version 2 among MLflow's artifacts; put right again afterwards."""
    digest = registry.version(2).digest
    root = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts"
    (file,) = (path for path in root.rglob("segmenter.safetensors") if folder_digest(path.parent) == digest)
    content = file.read_bytes()
    yield file
    file.write_bytes(content)


def test_tampered_weights_are_not_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.promote_by_hand(1, "first", by="x")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(Segmenter, "load", lambda *_: pytest.fail("weights were read"))
    for reference in ("2", "models:/graincast-segmenter/2"):
        with pytest.raises(UserError, match=r"tampered with or damaged: its bytes have the DVC hash .* its tag says"):
            registry.load_segmenter(reference, "cpu")
    for promote in (lambda: registry.promote_by_hand(2, "good", by="x"), lambda: registry.promote(2, decision(2, 1), by="x")):
        with pytest.raises(UserError, match="tampered with"):
            promote()
    assert aliases() == {"champion": 1}


def test_a_file_beside_the_weights_is_tampering_too(weights: Path) -> None:
    stray = weights.with_name("stray.pkl")
    stray.write_bytes(b"not of this version")
    try:
        with pytest.raises(UserError, match="tampered with"):
            registry.load_segmenter("2", "cpu")
    finally:
        stray.unlink()
    assert rise("2") == 0.2


def test_data_outside_of_the_model_are_not_read(weights: Path, template: tuple[str, Path, Path]) -> None:
    description = weights.parents[2] / "MLmodel" if (weights.parents[2] / "MLmodel").exists() else weights.parents[1] / "MLmodel"
    right = description.read_text()
    elsewhere = template[2] / "made" / "2"
    description.write_text("\n".join(f"    data: {elsewhere}" if line.strip().startswith("data:") else line for line in right.splitlines()))
    try:
        with pytest.raises(UserError, match="outside of it"):
            registry.load_segmenter("2", "cpu")
    finally:
        description.write_text(right)


def test_a_version_without_a_hash_is_not_read(store: str) -> None:
    MlflowClient().delete_model_version_tag(registry.MODEL, "2", registry.DIGEST_TAG)
    with pytest.raises(UserError, match=r"no tag dvc\.segmenter"):
        registry.load_segmenter("2", "cpu")


# Several processes, killed processes


def act(uri: str, what: str, arguments: tuple[Any, ...], die_before: int | None, tell: Connection) -> None:
    """In a process of its own: call the registry; SIGKILL itself before the write of that number."""
    mlflow.set_tracking_uri(uri)
    if die_before is not None:
        left = iter(range(die_before, -1, -1))
        for name in WRITES:
            setattr(MlflowClient, name, _counted(getattr(MlflowClient, name), left))
    try:
        tell.send(dataclasses.asdict(getattr(registry, what)(*arguments, by=f"process {os.getpid()}")))
    except UserError as error:
        tell.send(str(error))


def _counted(write: Any, left: Iterator[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args, **kwargs)

    return counted


def in_processes(uri: str, *calls: tuple[str, tuple[Any, ...]], die_before: int | None = None) -> list[Any]:
    """What each call gave, all of them at once; None for a killed one."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    started = []
    for what, arguments in calls:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=act, args=(uri, what, arguments, die_before, send))
        process.start()
        send.close()
        started.append((process, receive))
    results = []
    for process, receive in started:
        process.join(120)
        assert process.exitcode in ((0, -signal.SIGKILL) if die_before is not None else (0,))
        results.append(receive.recv() if process.exitcode == 0 else None)
    return results


def test_two_promotions_at_once_follow_each_other(store: str) -> None:
    registry.promote_by_hand(1, "first", by="x")
    in_processes(store, ("promote_by_hand", (2, "a")), ("promote_by_hand", (3, "b")))
    later, earlier, _first = registry.history()
    assert {earlier.version, later.version} == {2, 3}
    assert earlier.after == later.before == {"champion": earlier.version, "previous": 1}
    assert aliases() == later.after == {"champion": later.version, "previous": earlier.version}


def test_of_two_challengers_of_one_champion_one_wins(store: str) -> None:
    registry.promote_by_hand(1, "first", by="x")
    results = in_processes(store, ("promote", (2, decision(2, 1))), ("promote", (3, decision(3, 1))))
    assert sorted(result["action"] for result in results) == ["promote", "refuse"]
    winner, loser = sorted((result["version"] for result in results), key=lambda n: results[n - 2]["action"])
    assert aliases() == {"champion": winner, "previous": 1, "challenger": loser}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["promote", "rollback"])
def test_a_killed_decision_leaves_a_whole_registry(store: str, template: tuple[str, Path, Path], what: str, tmp_path: Path) -> None:
    """Killed before every write in turn: the champion can be loaded at once, and the next one finds all or nothing done."""
    registry.promote_by_hand(1, "first", by="x")
    if what == "rollback":
        registry.promote_by_hand(3, "better", by="x")
    challenge(2)
    call = ("promote", (2, decision(2, 1))) if what == "promote" else ("rollback", ("bad",))
    before = aliases()
    after = {"champion": 2, "previous": 1} if what == "promote" else {"champion": 1, "challenger": 2}
    copy(template[2] / "mlflow.db", tmp_path / "prepared.db")
    seen = set()
    for point in range(20):
        copy(tmp_path / "prepared.db", template[2] / "mlflow.db")
        (result,) = in_processes(store, call, die_before=point)
        assert rise() in {before["champion"] / 10, after["champion"] / 10}
        if result is not None:
            break
        registry.repair()
        found = aliases()
        assert found in (before, after), f"killed before write {point}"
        assert registry.MOVE_TAG not in MlflowClient().get_registered_model(registry.MODEL).tags
        newest = registry.history()[0]
        moved = (newest.action, newest.version, newest.status) == (what, after["champion"], registry.DONE)
        assert moved == (found == after)
        assert ({registry.ROLLED_BACK_TAG} <= registry.version(3).tags.keys()) == (what == "rollback" and moved)
        seen.add(moved)
        registry.promote_by_hand(2 if found["champion"] != 2 else 3, "life goes on", by="x")
    assert result is not None
    assert point >= 8
    assert seen == {True, False}


def test_the_lock_is_waited_for_and_named(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "LOCK_SECONDS", 0.2)
    with FileLock(registry._lock_file()), pytest.raises(UserError, match=r"another promotion holds .*mlflow\.db\.graincast-lock"):
        registry.promote_by_hand(1, "first", by="x")
    assert aliases() == {}
    registry.promote_by_hand(1, "first", by="x")


@pytest.mark.slow
def test_a_locked_database_is_one_sentence(store: str, template: tuple[str, Path, Path]) -> None:
    with sqlite3.connect(template[2] / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        (said,) = in_processes(store, ("promote_by_hand", (1, "first")))
        other.execute("ROLLBACK")
    assert "is locked by another process" in said
    assert "\n" not in said
    assert aliases() == {}


@pytest.mark.parametrize(("uri", "sentence"), [
    ("http://user:secret@127.0.0.1:9", "http://127.0.0.1:9 does not answer"), ("sqlite:////proc/none/mlflow.db", "no folder for it")])
def test_a_store_that_is_down_is_one_sentence(uri: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        for command in (["models"], ["promote", "1", "--reason", "x"], ["rollback", "--reason", "x"]):
            monkeypatch.setattr(sys, "argv", ["graincast", *command])
            with pytest.raises(SystemExit) as ended:
                main()
            said = capsys.readouterr().err.strip()
            assert ended.value.code == 2
            assert sentence in said
            assert "secret" not in said
            assert "\n" not in said
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize("fault", [
    MlflowException("API request to http://user:s3cret@host/api failed with code 503"), PermissionError(13, "Permission denied"),
    OSError("Connection reset by http://user:s3cret@host")])
def test_what_the_store_cannot_give_now_is_nobodys_mistake(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "file").write_text("x")
    registry.attach(1, "reference", tmp_path / "reference")

    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fail)
    for act in (lambda: registry.fetch(1, tmp_path / "got"), lambda: registry.fetch_attached(1, "reference", tmp_path / "got")):
        with pytest.raises(Unavailable, match=r"^the model registry sqlite:///.* cannot be used: ") as down:
            act()
        assert "s3cret" not in str(down.value)
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize("reference", ["9", "nobody", "models:/another/1", "runs:/0123456789abcdef0123456789abcdef/segmenter"])
def test_a_model_that_is_not_there_is_the_askers_mistake(store: str, tmp_path: Path, reference: str) -> None:
    with pytest.raises(UserError, match=f"model '{reference}' cannot be loaded") as wrong:
        registry.fetch(reference, tmp_path / "got")
    assert not is_down(wrong.value)


def test_the_command_line_shows_and_moves(store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def graincast(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["graincast", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    assert "version 1 is the champion, before it was none" in graincast("promote", "1", "--reason", "first [of all]")
    registry.promote(2, decision(2, 1), by="run b")
    table = graincast("models")
    assert [word in table for word in ("champion", "previous", "fields: 0.900", "training data2")] == [True] * 4
    assert "version 1 is the champion, before it was 2" in graincast("rollback", "--reason", "it merges grains", "--by", "A. Person")
    history = graincast("models", "--history")
    assert [word in history for word in ("first [of all]", "it merges grains", "A. Person", "run b", "rollback 1")] == [True] * 5


# Decisions


def scores(ap50: list[float] | float, kind: str = "fields", own: bool = False, digest: str = "d", **figures: float) -> SetEvidence:
    values = tuple(ap50) if isinstance(ap50, list) else (ap50,) * 8
    return SetEvidence(kind, digest, own, tuple(map(str, range(len(values)))), values, {"stability": 0.9, **figures})


def verdict(champion: dict[str, SetEvidence] | None, challenger: dict[str, SetEvidence], **config: float) -> Decision:
    return decide(Evidence("old", champion) if champion is not None else None, Evidence("new", challenger), Promotion(**config))


def test_the_first_model_has_to_be_above_the_floors() -> None:
    assert verdict(None, {"a": scores(0.6), "b": scores(0.9, "unlabelled")}).promote
    low = verdict(None, {"a": scores(0.6), "b": scores(0.49)})
    assert (low.promote, low.decided_by) == (False, "floors")
    assert "b: AP50 0.490 is below the floor of 0.5" in low.reasons[0]
    assert not verdict(None, {"a": scores(0.9, "unlabelled", stability=0.3)}).promote
    doubtful = dataclasses.replace(scores(0.9, "unlabelled"), doubts=("it finds no boundary in 5 of 8 micrographs",))
    assert "no boundary" in verdict(None, {"a": scores(0.9), "m": doubtful}).reasons[0]


def test_a_better_one_is_promoted_and_an_equal_one_is_not() -> None:
    old = {"old": scores(0.9, "synthetic", own=True), "new": scores(0.6, "synthetic")}
    better = verdict(old, {"old": scores(0.89, "synthetic"), "new": scores(0.85, "synthetic")})
    assert (better.promote, better.decided_by, better.champion, better.challenger) == (True, "held-out synthetic images", "old", "new")
    same = verdict(old, {"old": scores(0.9, "synthetic"), "new": scores(0.605, "synthetic")})
    assert (same.promote, same.decided_by) == (False, "margin")
    assert "cannot be told apart" in same.reasons[0]


def test_what_chance_makes_is_no_gain() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        first, second = (list(np.clip(0.8 + rng.normal(0, 0.04, 6), 0, 1)) for _ in range(2))
        wrong += verdict({"a": scores(first)}, {"a": scores(second)}).promote
    assert wrong / 400 < 0.08, "one-sided 5 % of equals"


def test_one_that_forgets_the_champions_look_is_refused() -> None:
    old = {"old": scores(0.9, "synthetic", own=True), "new": scores(0.5, "synthetic")}
    kept = {"old": scores(0.881, "synthetic"), "new": scores(0.9, "synthetic")}
    lost = {"old": scores(0.879, "synthetic"), "new": scores(0.9, "synthetic")}
    assert verdict(old, kept).promote
    found = verdict(old, lost)
    assert (found.promote, found.decided_by) == (False, "loss of what the champion does well")
    assert "old, the champion's own look: AP50 falls from 0.900 to 0.879" in found.reasons[0]


def test_flattering_synthetic_images_do_not_outweigh_the_micrographs() -> None:
    old = {"synthetic": scores(0.6, "synthetic"), "micrographs": scores(0.8, "unlabelled")}
    assert not verdict(old, {"synthetic": scores(0.95, "synthetic"), "micrographs": scores(0.7, "unlabelled")}).promote
    assert verdict(old, {"synthetic": scores(0.95, "synthetic"), "micrographs": scores(0.78, "unlabelled")}).promote


def test_the_most_trusted_evidence_decides() -> None:
    old = {"f": scores(0.8), "s": scores(0.8, "synthetic"), "m": scores(0.8, "unlabelled")}
    worse = verdict(old, {"f": scores(0.7), "s": scores(0.95, "synthetic"), "m": scores(0.95, "unlabelled")})
    assert (worse.promote, worse.decided_by) == (False, "labelled fields")
    only = verdict({"m": scores(0.8, "unlabelled")}, {"m": scores(0.9, "unlabelled")})
    assert (only.promote, only.decided_by) == (True, "label-free evidence on micrographs")


def test_other_images_are_no_comparison() -> None:
    for other in ({"b": scores(0.9)}, {"a": scores(0.9, digest="other")}, {"a": scores([0.9] * 3)}):
        with pytest.raises(UserError, match="not scored on the same"):
            verdict({"a": scores(0.5)}, other)
    with pytest.raises(UserError, match="empty"):
        verdict(None, {})


# Evidence


def grains(seed: int, size: int = 256, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Voronoi grains with dark grooves and noise: picture, uint8, and ids that tile it."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    labels = 1 + cKDTree(rng.uniform(0, size, (count, 2))).query(np.stack([rows, columns], -1))[1]
    groove = ndi.gaussian_filter(find_boundaries(labels, mode="thick").astype(float), 1.0)
    picture = 160 + rng.normal(0, 8, count + 1)[labels] - 90 * groove + rng.normal(0, 3, (size, size))
    return np.clip(picture, 0, 255).astype(np.uint8), labels.astype(np.int32)


@pytest.fixture(scope="module")
def micrographs(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    with ImageSetWriter(tmp_path_factory.mktemp("set") / "micrographs", "micrographs") as writer:
        for seed in range(3):
            picture, labels = grains(seed)
            writer.add(picture, id=str(seed), scale=0.5, grain_diameter_px=2 * np.sqrt(4 * labels.size / (np.pi * labels.max())))
    return writer.result


def fake(find: Any, parents: dict[str, str] | None = None) -> Any:
    """A segmenter that finds, of the picture of this seed, what `find` makes of picture and truth."""
    pictures = {seed: grains(seed) for seed in range(3)}

    def segment(image: np.ndarray) -> np.ndarray:
        alike = [seed for seed, (picture, _) in pictures.items() if picture.shape == image.shape]
        seed = min(alike, key=lambda s: float(np.abs(pictures[s][0].astype(float) - image).mean()), default=0)
        return find(image, pictures[seed][1])

    return SimpleNamespace(segment=segment, parents=parents or {})


def fickle(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Grains cut where the picture's own noise says so."""
    parts = image[::32, ::32].astype(int) % 2
    return (truth * 2 + np.kron(parts, np.ones((32, 32), int))).astype(np.int32)


SPOILT = {
    "merged": (lambda image, truth: (truth + 3) // 4, "agreement"),
    "split": (lambda image, truth: (truth * 16 + np.add.outer(np.arange(256) // 6 % 4 * 4, np.arange(256) // 6 % 4)).astype(np.int32), "agreement"),
    "displaced": (lambda image, truth: np.roll(truth, (12, 12), (0, 1)), "contrast"),
    "fickle": (fickle, "stability"),
    "nothing": (lambda image, truth: np.ones_like(truth), "agreement"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_label_free_evidence_tells_good_from_bad_and_why(micrographs: ImageSet, fault: str) -> None:
    find, figure = SPOILT[fault]
    indices = {"m": range(3)}
    good, bad = (gather(fake(f), "x", {"m": micrographs}, indices, Promotion()).sets["m"] for f in (lambda image, truth: truth, find))
    assert good.figures["agreement"] == good.figures["stability"] == 1.0
    assert not good.doubts
    assert bad.score < good.score - Promotion().label_free_loss
    assert bad.figures[figure] < good.figures[figure] - 0.1
    assert not decide(Evidence("a", {"m": good}), Evidence("b", {"m": bad}), Promotion()).promote


def test_size_agreement_allows_for_the_estimate() -> None:
    assert evidence.size_agreement(1.2) == evidence.size_agreement(0.85) == 1.0
    assert evidence.size_agreement(2.5) == pytest.approx(evidence.size_agreement(0.4)) == pytest.approx(0.5)
    assert evidence.size_agreement(0.0) == 0.0
    assert np.isnan(evidence.size_agreement(float("nan")))


def labelled_set(path: Path, kind: str, count: int = 6) -> ImageSet:
    with ImageSetWriter(path, kind) as writer:
        for seed in range(count):
            picture, truth = grains(seed, 96, 8)
            writer.add(picture, labels=np.where(find_boundaries(truth, mode="thick"), 0, truth), id=str(seed))
    return writer.result


def test_only_images_that_chose_nothing_are_scored(tmp_path: Path) -> None:
    images = labelled_set(tmp_path / "set", "synthetic")
    stranger, chosen, trained = (fake(None, parents) for parents in ({}, {"validation_old": images.digest}, {"training": images.digest}))
    assert scored_images("s", images, [stranger], 12) == [0, 1, 2, 3, 4, 5]
    assert scored_images("s", images, [stranger, chosen], 12) == [1, 3, 5], "the same for both"
    assert scored_images("s", images, [stranger], 3) == [0, 2, 5]
    with pytest.raises(UserError, match="trained one of the segmenters"):
        scored_images("s", images, [chosen, trained], 12)


def test_the_stage_compares_verifies_and_repeats_itself(tmp_path: Path, micrographs: ImageSet) -> None:
    benchmark = {"fields": labelled_set(tmp_path / "fields", "fields", 2), "micrographs": micrographs}
    old = save_segmenter(tmp_path / "old", 0.2, {"micrographs": micrographs.digest})
    new = save_segmenter(tmp_path / "new", 0.3)
    config = Promotion(images=1)
    made = [run_promotion_evidence(config, new, old, benchmark, tmp_path / name, ["fields"]) for name in ("a", "b")]
    assert folder_digest(made[0]) == folder_digest(made[1])
    champion, challenger = evidence.load(made[0])
    assert champion is not None
    assert (champion.segmenter, challenger.segmenter) == (folder_digest(old), folder_digest(new))
    assert {name: found.own_look for name, found in champion.sets.items()} == {"fields": True, "micrographs": True}
    assert not any(found.own_look for found in challenger.sets.values() if found.kind == "unlabelled")
    found = Decision.load(made[0])
    assert (found.promote, found.decided_by) == (False, "floors"), "an untrained network"
    assert found.figures["fields"]["dvc"] == benchmark["fields"].digest
    truth, image = benchmark["fields"].labels(0), benchmark["fields"].image(0)
    by_hand = score_labels(Segmenter.load(new, "cpu").segment(image), truth)["ap50"]
    assert json.loads((made[0] / "evidence.json").read_text())["challenger"]["sets"]["fields"]["scores"] == [pytest.approx(by_hand)]
    assert Decision.load(run_promotion_evidence(config, new, None, benchmark, tmp_path / "first")).champion is None

    stack = tifffile.memmap(tmp_path / "fields" / "images.tif", mode="r+")
    stack[1, 5, 5] ^= 1
    stack.flush()
    with pytest.raises(UserError, match="corrupt"):
        run_promotion_evidence(config, new, old, {"fields": ImageSet(tmp_path / "fields")}, tmp_path / "c")


def test_masked_micrographs_become_labelled_fields(tmp_path: Path) -> None:
    picture, truth = grains(0, 300, 40)
    line = find_boundaries(truth, mode="thick")
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name, image in (("good", picture), ("flat", np.full_like(picture, 90))):
        iio.imwrite(tmp_path / "images" / f"{name}.png", image)
        iio.imwrite(tmp_path / "masks" / f"{name}.png", np.where(line, 255, 0).astype(np.uint8))
    preparation = Preparation(None, 0.8, 40.0, 0.0, 32.0, False, 64, 0.5, 0.01, None)
    made = run_labelled_fields(preparation, tmp_path / "images", tmp_path / "masks", tmp_path / "fields")
    assert (made.rows["id"].tolist(), made.refused["id"].tolist()) == (["good"], ["flat"])
    assert "no contrast" in made.refused["refused"][0]
    assert made.image(0).shape == (240, 240)
    assert evidence.kind_of(made) == evidence.FIELDS
    rows = ((np.arange(240) + 0.5) / 0.8).astype(int)
    right = truth[np.ix_(rows, rows)]
    assert score_labels(right, made.labels(0))["ap50"] > 0.95
    found = gather(fake(lambda image, _: right), "x", {"f": made}, {"f": [0]}, Promotion()).sets["f"]
    assert found.score > 0.95


@pytest.mark.parametrize("size", [170, 256, 400])
def test_masks_keep_their_grains_at_another_size(size: int) -> None:
    _, truth = grains(5, 256, 30)
    thin = find_boundaries(truth, mode="inner", connectivity=1)
    resized = resample_labels(~thin, (size, size))
    rows = ((np.arange(size) + 0.5) * 256 / size).astype(int)
    assert score_labels(resized, np.where(thin, 0, truth)[np.ix_(rows, rows)] if size == 256 else resized)["ap50"] == 1.0
    again = score_labels(resized, np.where(find_boundaries(truth[np.ix_(rows, rows)], mode="thick"), 0, truth[np.ix_(rows, rows)]))
    assert again["ap50"] > 0.95
    assert again["count_ratio"] == pytest.approx(1, abs=0.05)
