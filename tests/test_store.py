"""The store against the real tools: ImageSets on disk, DVC's own hashes and remotes, MLflow on sqlite."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from uuid import uuid4

import mlflow
import numpy as np
import pytest
import tifffile
import yaml
from dvc.data_cloud import DataCloud
from dvc.repo import Repo
from mlflow.exceptions import MlflowException
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sqlalchemy.exc import OperationalError

from graincast.config import Config
from graincast.config import Segmenter as SegmenterConfig
from graincast.errors import Unavailable, UserError, is_down, without_login
from graincast.microscope.reader import from_array
from graincast.segment.instances import Cut
from graincast.segment.network import build_network
from graincast.segment.segmenter import Segmenter
from graincast.store import registry, tracking, versioning
from graincast.store.imageset import ImageSet, ImageSetWriter, content_digest, folder_digest, whole_folder
from graincast.store.versioning import Artifact, Version
from steps.sources import source_files
from tests.test_inference import PREPARATION, micrograph

SOURCES = Path(__file__).parents[1] / "src"


def test_no_sentence_has_a_login() -> None:
    from pipelines import console

    address = "http://user:p@ss:w0rd@host:5000/api?mail=a@b (postgresql+psycopg2://u:s3cret@db/x)"
    shown = "http://host:5000/api?mail=a@b (postgresql+psycopg2://db/x)"
    assert without_login(address) == shown
    assert console._sentence(UserError(address)) == console._sentence(Unavailable(address)) == shown
    down = console._sentence(MlflowException(f"API request to {address} failed: Max retries exceeded"))
    assert down is not None
    assert shown in down
    assert console._sentence(ValueError(address)) is None


@pytest.mark.parametrize(("said", "down"), [("database or disk is full", True), ("attempt to write a readonly database", True),
                                            ("database is locked", True), ("no such column", False), ("full_name was refused successfully", False)])
def test_a_store_that_cannot_take_anything_is_down(said: str, down: bool) -> None:
    assert is_down(OperationalError("INSERT", {}, sqlite3.OperationalError(said))) is down
    assert not is_down(ValueError(said))


# ImageSet


def write_set(path: Path, count: int = 3) -> ImageSet:
    rng = np.random.default_rng(0)
    with ImageSetWriter(path, "test", config={"seed": 0}) as writer:
        for i in range(count):
            image = rng.integers(0, 256, (20 + i, 30 - i), dtype=np.uint8)
            writer.add(image, id=f"i{i}", labels=image.astype(np.int32) % 7, pixel_size_um=0.1, extra=i)
        writer.refuse("all black", id="bad", source="bad.tif")
    return writer.result


def test_a_set_gives_back_what_was_put_in(tmp_path: Path) -> None:
    images = write_set(tmp_path / "set")
    rng = np.random.default_rng(0)
    for i in range(3):
        expected = rng.integers(0, 256, (20 + i, 30 - i), dtype=np.uint8)
        np.testing.assert_array_equal(images.image(i), expected)
        np.testing.assert_array_equal(images.labels(i), expected % 7)
    assert images.rows["extra"].tolist() == [0, 1, 2]
    assert images.refused["refused"].tolist() == ["all black"]
    images.verify()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write_set(tmp_path / "a").digest == write_set(tmp_path / "b").digest


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_interrupted_writer_leaves_the_older_set_alone(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    before = write_set(tmp_path / "set").digest

    def write() -> None:
        with ImageSetWriter(tmp_path / "set", "test") as writer:
            writer.add(np.zeros((4, 4), np.uint8), id="a")
            raise failure

    with pytest.raises(failure):
        write()
    assert folder_digest(tmp_path / "set") == before
    assert os.listdir(tmp_path) == ["set"]


def test_a_half_written_set_is_refused(tmp_path: Path) -> None:
    images = write_set(tmp_path / "set")
    (images.path / "set.json").unlink()
    with pytest.raises(UserError, match="no whole ImageSet"):
        ImageSet(images.path)


def test_verify_finds_a_changed_pixel(tmp_path: Path) -> None:
    images = write_set(tmp_path / "set")
    stack = tifffile.memmap(images.path / "images.tif", mode="r+")
    stack[1, 5, 5] ^= 1
    stack.flush()
    with pytest.raises(UserError, match="image i1 is corrupt"):
        ImageSet(images.path).verify()


def test_an_empty_set_names_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bad\.tif: too small"), ImageSetWriter(tmp_path / "s", "t") as writer:
        writer.refuse("too small", id="bad", source="bad.tif")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fills_at_the_end_leaves_the_older_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    before = folder_digest(write_folder(tmp_path / "set"))
    rename = os.rename

    def fail(source: object, target: object = None) -> None:
        if call == "fsync" or (Path(str(target)).name == "set" and not str(source).endswith("-old")):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(Unavailable, match=r"set cannot be written: No space left .*; free some space"), whole_folder(tmp_path / "set") as folder:
        (folder / "new").write_text("new")
    assert folder_digest(tmp_path / "set") == before
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/graincast"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(UserError, match=f"{place} cannot be written"), whole_folder(tmp_path / place):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.tif").symlink_to("/proc/self/mem")  # reading its first byte fails, for root too
    with pytest.raises(UserError, match=r"session\.folder: .*cannot be read"):
        content_digest(tmp_path, "session.folder")


@pytest.mark.parametrize("content", ["equal", "other"])
def test_of_two_makers_of_a_folder_the_first_stays_and_the_equal_one_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """The other process's folder appears between this one's two renames."""
    rename = os.rename

    def overtaken(source: Path, target: Path) -> None:
        if Path(target).name == "set":
            write_folder(Path(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    outcome = pytest.raises(UserError, match="not empty") if content == "other" else nullcontext()
    with outcome, whole_folder(tmp_path / "set") as folder:
        write_folder(folder, ("a.bin", "sub/deep/b.bin") if content == "equal" else ("c.bin",))
    assert sorted(p.name for p in tmp_path.rglob("*.bin")) == ["a.bin", "b.bin"]
    assert os.listdir(tmp_path) == ["set"]


# Versions


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project without git; the process stands elsewhere."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    monkeypatch.setenv("DVC_SYSTEM_CONFIG_DIR", str(tmp_path / "system"))
    (tmp_path / "project").mkdir()
    (tmp_path / "elsewhere").mkdir()
    versioning.initialise(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "project"


def write_folder(path: Path, names: tuple[str, ...] = ("a.bin", "sub/deep/b.bin")) -> Path:
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(name.encode() * (i + 1))
    return path


def set_remote(project: Path, remote: Path) -> None:
    with Repo(str(project)) as repo, repo.config.edit("local") as config:
        config["remote"] = {"store": {"url": str(remote)}}
        config["core"]["remote"] = "store"


NAMES = [
    ("one",),
    ("a", "b/c", "b/d/e"),
    (".hidden", "Über größe.txt", "two  spaces", "quote'\"s", "comma,colon:", "日本語/ファイル"),
    ("10", "9", "a.b", "a_b", "Z", "z"),
    ("a/b", "a-b", "a b", "a.b"),
]


@pytest.mark.parametrize("names", NAMES)
def test_the_hash_is_the_one_of_dvc(project: Path, names: tuple[str, ...]) -> None:
    ours = write_folder(project / "runs" / "ours", names)
    version = versioning.add(ours)
    write_folder(project / "theirs", names)
    with Repo(str(project)) as repo:
        repo.add(str(project / "theirs"))
    recorded = yaml.safe_load((project / "theirs.dvc").read_text())["outs"][0]
    assert (version.md5, version.size, version.files) == (recorded["md5"], recorded["size"], recorded["nfiles"])
    assert folder_digest(ours) == version.md5


def test_the_hash_is_the_one_of_dvc_repro(project: Path) -> None:
    version = versioning.add(write_folder(project / "runs" / "ours"))
    stage = {"cmd": "mkdir out && cp -r runs/ours/. out", "deps": ["runs/ours"], "outs": ["out"]}
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"copy": stage}}))
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=project, check=True)
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    assert lock["stages"]["copy"]["outs"][0]["md5"] == version.md5


def test_the_bytes_exist_once(project: Path) -> None:
    folder = write_folder(project / "runs" / "ours")
    versioning.add(folder)
    for file in (f for f in folder.rglob("*") if f.is_file()):
        assert file.stat().st_nlink == 2, "neither copied nor left outside the cache"
        assert not file.stat().st_mode & 0o222, "writing into the cache through the link is refused"


def test_a_version_comes_back_from_the_cache(project: Path) -> None:
    folder = write_folder(project / "runs" / "ours")
    version = versioning.add(folder)
    shutil.rmtree(folder)
    assert versioning.fetch(version, folder) == folder
    assert folder_digest(folder) == version.md5
    (folder / "stray").write_text("not of this version")
    versioning.fetch(version, folder)
    assert folder_digest(folder) == version.md5


def test_another_machine_pulls_from_the_remote(project: Path, tmp_path: Path) -> None:
    set_remote(project, tmp_path / "remote")
    version = versioning.add(write_folder(project / "runs" / "ours"))
    other = tmp_path / "other"
    other.mkdir()
    versioning.initialise(other)
    set_remote(other, tmp_path / "remote")
    assert folder_digest(versioning.fetch(version, other / "runs" / "ours")) == version.md5


def test_a_lost_version_is_named(project: Path) -> None:
    lost = Version("0" * 32 + ".dir", 1, 1)
    with pytest.raises(UserError, match=r"0{32}\.dir is lost.*no DVC remote is configured; .*enable_cache: false"):
        versioning.fetch(lost, project / "runs" / "x")
    assert not (project / "runs" / "x").exists()


def test_a_damaged_cache_is_mended_from_the_remote(project: Path, tmp_path: Path) -> None:
    set_remote(project, tmp_path / "remote")
    folder = write_folder(project / "runs" / "ours")
    version = versioning.add(folder)
    (folder / "a.bin").chmod(0o644)
    (folder / "a.bin").write_bytes(b"written through the link")
    (folder / "a.bin").chmod(0o444)
    assert folder_digest(versioning.fetch(version, folder)) == version.md5


def test_an_unreachable_remote_is_named(project: Path, tmp_path: Path) -> None:
    (tmp_path / "remote").write_text("a file, not a folder")
    set_remote(project, tmp_path / "remote")
    with pytest.raises(Unavailable, match="store"):
        versioning.add(write_folder(project / "runs" / "ours"))


def test_a_remote_that_does_not_answer_is_tried_again(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_remote(project, tmp_path / "remote")
    version = versioning.add(write_folder(project / "runs" / "ours"))
    shutil.rmtree(project / "runs")
    shutil.rmtree(project / ".dvc" / "cache")

    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("https://user:s3cret@host/bucket timed out")

    monkeypatch.setattr(DataCloud, "pull", fail)
    with pytest.raises(Unavailable, match="cannot be pulled from DVC remote 'store': https://host/bucket timed out"):
        versioning.fetch(version, project / "runs" / "ours")
    monkeypatch.undo()
    assert folder_digest(versioning.fetch(version, project / "runs" / "ours")) == version.md5


def test_dvc_lock_does_not_stop_a_run(project: Path) -> None:
    with Repo(str(project)) as repo, repo.lock:
        version = versioning.add(write_folder(project / "runs" / "ours"))
        shutil.rmtree(project / "runs")
        versioning.fetch(version, project / "runs" / "ours")


def test_processes_add_at_once(project: Path) -> None:
    folders = [write_folder(project / "runs" / str(i), ("same", "sub/same", f"own{i}")) for i in range(4)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        versions = list(pool.map(versioning.add, folders))
    for folder, version in zip(folders, versions, strict=True):
        shutil.rmtree(folder)
        assert folder_digest(versioning.fetch(version, folder)) == version.md5


def test_garbage_collection_spares_the_folders_of_runs(project: Path) -> None:
    folder = write_folder(project / "runs" / "ours")
    version = versioning.add(folder)
    with Repo(str(project)) as repo:
        repo.gc(workspace=True)
    assert versioning.fetch(version, folder) == folder
    versioning.add(folder)


def test_a_git_checkout_is_left_as_it_is(tmp_path: Path, project: Path) -> None:
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    versioning.initialise(checkout)
    (checkout / ".gitignore").write_text("runs/\n")
    status = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, check=True).stdout
    versioning.add(write_folder(checkout / "runs" / "ours"))
    after = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, check=True).stdout
    assert after == status


@pytest.mark.parametrize("what", ["absent", "empty", "outside"])
def test_what_cannot_be_versioned_is_named(project: Path, tmp_path: Path, what: str) -> None:
    folder = (tmp_path if what == "outside" else project) / what
    if what == "empty":
        folder.mkdir()
    if what == "outside":
        write_folder(folder)
    with pytest.raises(UserError, match=what):
        versioning.add(folder)


# Materializer


def test_zenml_keeps_only_the_pointer(project: Path, tmp_path: Path) -> None:
    from zenml.artifact_stores import LocalArtifactStore
    from zenml.artifact_stores.local_artifact_store import LocalArtifactStoreConfig
    from zenml.enums import StackComponentType

    from steps.artifacts import FolderMaterializer

    now = datetime.now(UTC)
    store = LocalArtifactStore(
        name="store", id=uuid4(), config=LocalArtifactStoreConfig(path=str(tmp_path / "zenml")), flavor="local",
        type=StackComponentType.ARTIFACT_STORE, user=uuid4(), created=now, updated=now,
    )  # fmt: skip
    images = write_set(project / "runs" / "run" / "ingest")
    uri = tmp_path / "zenml" / "artifact"
    uri.mkdir(parents=True)
    materializer = FolderMaterializer(str(uri), store)
    materializer.save(images)
    assert os.listdir(uri) == ["pointer.json"]
    assert json.loads((uri / "pointer.json").read_text())["md5"] == images.digest
    assert materializer.compute_content_hash(images) == images.digest
    metadata = materializer.extract_metadata(images)
    assert (metadata["dvc_md5"], metadata["images"], metadata["refused"]) == (images.digest, 3, 1)
    shutil.rmtree(project / "runs")
    loaded = FolderMaterializer(str(uri), store).load(ImageSet)
    assert isinstance(loaded, ImageSet)
    assert loaded.digest == metadata["dvc_md5"]
    loaded.verify()

    report = Artifact(project / "runs" / "run" / "report", "report")
    with whole_folder(report.path) as folder:
        (folder / "report.html").write_text("<p>grains</p>")
    materializer = FolderMaterializer(str(uri), store)
    materializer.save(report)
    (page,) = materializer.save_visualizations(report)
    assert Path(page).read_text() == "<p>grains</p>"
    loaded = FolderMaterializer(str(uri), store).load(Artifact)
    assert isinstance(loaded, Artifact)
    assert (loaded.kind, loaded.path.resolve()) == ("report", report.path.resolve())


# Tracking


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an MLflow database; made once, since that takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    with pytest.raises(UserError, match="no model 'graincast-segmenter' is registered"):
        registry.load_segmenter()
    mlflow.set_experiment(experiment_id=tracking.ensure_experiment())
    yield folder
    mlflow.set_tracking_uri(before)


def test_the_whole_configuration_becomes_parameters(server: Path) -> None:
    with mlflow.start_run() as run:
        tracking.log(params=Config().model_dump(), metrics={"ap50": 0.5, "nan": float("nan")}, tags={"a": "b", "c": None})
    data = mlflow.get_run(run.info.run_id).data
    assert data.params["segmenter.augment.zoom"] == str(Config().segmenter.augment.zoom)
    assert data.params["session.folder"] == "None"
    assert data.metrics == {"ap50": 0.5}
    assert data.tags["a"] == "b"
    assert "c" not in data.tags
    assert run.info.artifact_uri.startswith((server / "mlartifacts").as_uri())


def test_nothing_is_logged_without_a_run() -> None:
    with pytest.raises(RuntimeError, match="no MLflow run"):
        tracking.log(metrics={"a": 1.0})


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt])
def test_loss_curves_arrive_whole(server: Path, failure: type[BaseException] | None) -> None:
    def train(log: tracking.MetricLog) -> None:
        for step in range(700):
            log(step, {"loss": 1 / (step + 1), "other": float(step), "undefined": float("nan")})
        if failure:
            raise failure

    with mlflow.start_run() as run, suppress(KeyboardInterrupt), tracking.MetricLog() as log:
        train(log)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(i, 1 / (i + 1)) for i in range(700)]


def test_files_and_folders_become_artifacts(server: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "figures", ("a.png", "sub/b.png"))
    (tmp_path / "report.html").write_text("<p>")
    with mlflow.start_run() as run:
        tracking.log(files=[folder, tmp_path / "report.html"])
    client = mlflow.MlflowClient()
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"figures", "report.html"}


def test_the_commit_is_known_only_in_git(tmp_path: Path) -> None:
    assert tracking.git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("a")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "m"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert tracking.git_commit(tmp_path) == head
    (tmp_path / "file").write_text("b")
    assert tracking.git_commit(tmp_path) == f"{head}-dirty"


@pytest.fixture(scope="module")
def registered(server: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Segmenter, np.ndarray]:
    """Two untrained segmenters, registered as versions 1 and 2; the first one and an image."""
    image = np.rint(255 * micrograph()).astype(np.uint8)
    segmenters = []
    for level in (0.3, 0.6):
        network = build_network("Unet", "resnet18", None).eval()
        segmenters.append(Segmenter(network, Cut(30, rise=level), SegmenterConfig(precision="float32").model_dump(), PREPARATION))
        folder = tmp_path_factory.mktemp("segmenter")
        segmenters[-1].save(folder)
        with mlflow.start_run():
            version = registry.ensure_registered(folder, image, {"git_commit": "abc", "none": None})
        with mlflow.start_run():
            assert registry.ensure_registered(folder, image) == version, "the same bytes are one version"
    return segmenters[0], image


def test_references_find_their_segmenter(registered: tuple[Segmenter, np.ndarray]) -> None:
    assert registry.load_segmenter().cut.rise == 0.6, "the newest, while there is no champion"
    mlflow.MlflowClient().set_registered_model_alias(registry.MODEL, registry.CHAMPION, 1)
    first, image = registered
    for reference in (None, "1", "champion", f"models:/{registry.MODEL}/1"):
        loaded = registry.load_segmenter(reference)
        assert loaded.cut.rise == 0.3
    np.testing.assert_array_equal(loaded.segment(image), first.segment(image))
    for reference in ("9", "nobody", "models:/other/1"):
        with pytest.raises(UserError, match=reference):
            registry.load_segmenter(reference)


def test_the_registered_model_describes_itself(registered: tuple[Segmenter, np.ndarray]) -> None:
    version = mlflow.MlflowClient().get_model_version(registry.MODEL, "1")
    info = mlflow.models.get_model_info(f"models:/{registry.MODEL}/1")
    assert version.tags.keys() == {"dvc.segmenter", "git_commit"}
    assert [(column.name, column.required) for column in info.signature.inputs] == [("image", True), ("pixel_size_um", False)]
    assert info.signature.outputs.input_names() == ["labels", "grains", "pixel_size_um"]
    assert info.saved_input_example_info is not None


def test_the_model_serves_where_graincast_is_not_installed(
    server: Path, registered: tuple[Segmenter, np.ndarray], tmp_path: Path
) -> None:
    first, image = registered
    np.save(tmp_path / "image.npy", image)
    script = f"""
import sys
sys.path = [p for p in sys.path if p != {str(SOURCES)!r}]
import mlflow, numpy as np, pandas as pd
mlflow.set_tracking_uri("sqlite:///{server}/mlflow.db")
model = mlflow.pyfunc.load_model("models:/{registry.MODEL}/1")
np.save("labels.npy", model.predict(pd.DataFrame([{{"image": np.load("image.npy"), "pixel_size_um": 0.05}}]))["labels"][0])
import graincast
print(graincast.__file__)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(server) in run.stdout
    labels = np.load(tmp_path / "labels.npy")
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, first.segment_micrograph(from_array(image), 0.05))


def test_another_registry_gets_the_segmenter_too(server: Path, tmp_path: Path) -> None:
    """A run from the cache against a second MLflow server registers there what the first one has."""
    folder = tmp_path / "segmenter"
    folder.mkdir()
    Segmenter(build_network("Unet", "resnet18", None).eval(), Cut(30), SegmenterConfig(precision="float32").model_dump()).save(folder)
    program = (
        "import sys, mlflow, numpy as np; from pathlib import Path; from graincast.store import registry, tracking\n"
        "mlflow.set_experiment(experiment_id=tracking.ensure_experiment())\n"
        "for _ in range(2):\n"
        "    with mlflow.start_run(): print(registry.ensure_registered(Path(sys.argv[1]), np.zeros((96, 96), np.uint8)))"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/second.db"}
    done = subprocess.run([sys.executable, "-c", program, str(folder)], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_the_requirements_of_a_served_segmenter_are_all_it_imports(tmp_path: Path) -> None:
    """Every package that is neither one of them nor theirs is blocked; the segmenter carries a preparation."""
    allowed, pending = set(), {canonicalize_name(name) for name in registry.REQUIREMENTS}
    while pending:
        name = pending.pop()
        allowed.add(name)
        needed = [Requirement(line) for line in metadata.requires(name) or [] if "extra ==" not in line]
        pending |= {canonicalize_name(need.name) for need in needed if not need.marker or need.marker.evaluate()} - allowed
    owners = {package: {canonicalize_name(name) for name in names} for package, names in metadata.packages_distributions().items()}
    blocked = [package for package, names in owners.items() if not names & {*allowed, "graincast"}]
    assert {"zenml", "dvc", "pyarrow", "matplotlib", "rsciio", "mlflow", "pydantic", "tqdm", "openvino", "roifile"} & allowed <= {"tqdm"}

    network = build_network("Unet", "resnet18", None).eval()
    Segmenter(network, Cut(30), SegmenterConfig(precision="float32").model_dump(), PREPARATION).save(tmp_path)
    tifffile.imwrite(tmp_path / "example.tif", np.rint(255 * micrograph()).astype(np.uint8))
    program = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
import numpy as np
from graincast.store.pyfunc import _load_pyfunc
served = _load_pyfunc({str(tmp_path)!r})
assert served.segmenter.preparation
np.save("labels.npy", served.predict(open("example.tif", "rb").read())["labels"][0])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "labels.npy").shape == (160, 160)


# What the stages are made of


COMMANDS = {
    "virtual-sem": ["run_virtual_sem"], "simulate": ["run_simulate"], "ingest": ["run_ingest"], "train-translator": ["run_train_translator"],
    "synthesise": ["run_synthesise"], "train-segmenter": ["run_train_segmenter"], "evaluate": ["run_evaluate", "masked_files"],
    "gate-library": ["run_gate_library"], "gate-micrographs": ["run_gate_session"], "gate-synthetic": ["run_gate_synthetic"],
    "drift-reference": ["run_reference"],
}  # fmt: skip


@pytest.mark.parametrize("stage", COMMANDS)
def test_both_roads_depend_on_all_the_code_a_stage_runs(stage: str) -> None:
    files = source_files(*COMMANDS[stage])
    program = yaml.safe_load((SOURCES.parent / "dvc.yaml").read_text())["stages"]
    assert program.keys() == COMMANDS.keys()
    uncovered = [file for file in files if not any(Path(file).is_relative_to(dependency) for dependency in program[stage]["deps"])]
    assert not uncovered


def test_sources_follow_the_imports_of_functions_but_not_those_for_types() -> None:
    segmenter = source_files("run_train_segmenter")
    assert {"src/graincast/stages.py", "src/graincast/labels.py", "src/graincast/microscope/preparation.py"} <= set(segmenter)
    assert "src/graincast/synthesise/cyclegan/train.py" not in segmenter
    with pytest.raises(LookupError, match="run_nothing"):
        source_files("run_nothing")
