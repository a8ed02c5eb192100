"""The whole loop in a subprocess, on a copy of the checkout with ZenML, MLflow and DVC of its own.

Nothing is mocked: the pipeline is started as a user starts it, and what it left behind is asked of the tools.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import yaml

ROOT = Path(__file__).parents[1]
TINY = {
    "session": {"folder": None, "masks": None, "virtual": {"micrographs": 2, "held_out": 1, "size": 256}},
    "simulate": {"translator_structures": 2, "synthetic_structures": 3, "validation_structures": 2, "size": 128, "grains": 18, "steps": 300},
    "ingest": {},
    "translator": {"steps": 4, "crop": 64, "filters": 8},
    "synthesise": {"min_fidelity": -1.0},
    "segmenter": {"epochs": 2, "crop": 64},
    "evaluate": {"require_plausible": False},
    "gates": {},
    "drift": {},
}
STEPS = ["simulate", "virtual_session", "ingest_virtual", "gate_library", "gate_micrographs", "train_translator", "synthesise", "gate_synthetic",
         "train_segmenter", "evaluate_virtual", "report", "drift_reference", "promote"]
PIPELINE = "pipelines.training.training_pipeline"

pytestmark = pytest.mark.slow


class Checkout:
    """A copy of this checkout with state of its own; `run` starts commands in its environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in listed.splitlines():
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        (root / ".venv").symlink_to(sys.prefix)
        (root / "home").mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ZENML", "MLFLOW", "DVC", "GRAINCAST"))}
        # the compiled simulator may be shared, everything else is the copy's own
        numba = os.environ.get("NUMBA_CACHE_DIR", str(root / "numba"))
        self.environment = {**kept, "HOME": str(root / "home"), "NUMBA_CACHE_DIR": numba, "COLUMNS": "100"}
        subprocess.run(["git", "init", "-q"], cwd=root, check=True)
        assert self.run("python -m pipelines.stack").returncode == 0

    def start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", "-c", f". ./env.sh && {command}"], cwd=self.root, env=self.environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        process = self.start(command)
        output, _ = process.communicate(timeout=600)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def configure(self, name: str, **changes: dict) -> str:
        tree = {section: {**values, **changes.get(section, {})} for section, values in TINY.items()}
        (self.root / name).write_text(yaml.safe_dump({"parameters": {"config": tree}}))
        return f"zenml pipeline run {PIPELINE} -c {name}"

    def steps(self) -> dict[str, str]:
        """Step statuses of the newest pipeline run, in the order in which the steps ran."""
        newest = "(select id from pipeline_run order by created desc limit 1)"
        return dict(self.zenml(f"select name, status from step_run where pipeline_run_id = {newest} order by created"))

    def ask(self, code: str) -> dict:
        program = f"import json; from zenml.client import Client; run = Client().list_pipeline_runs(sort_by='desc:created', size=1).items[0]; {code}"
        done = self.run(f"python -c {json.dumps(program)} 2>/dev/null")
        assert done.returncode == 0, done.stdout
        return json.loads(done.stdout.strip().splitlines()[-1])

    def zenml(self, query: str) -> list[tuple]:
        with sqlite3.connect(next((self.root / ".graincast" / "zenml").rglob("zenml.db"))) as database:
            return database.execute(query).fetchall()

    def mlflow(self, query: str) -> list[tuple]:
        with sqlite3.connect(self.root / ".graincast" / "mlflow.db") as database:
            return database.execute(query).fetchall()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def first_run(checkout: Checkout) -> subprocess.CompletedProcess[str]:
    return checkout.run(checkout.configure("tiny.yaml"))


def test_completes_and_shows_what_it_found(checkout: Checkout, first_run: subprocess.CompletedProcess[str]):
    assert first_run.returncode == 0, first_run.stdout
    assert checkout.zenml("select status from pipeline_run") == [("completed",)]
    assert checkout.steps() == dict.fromkeys(STEPS, "completed")
    shown = first_run.stdout
    for text in ("VIRTUAL", "local threshold", "label fidelity", "realism", "models:/graincast-segmenter/1", "mlflow ui", "zenml login --local"):
        assert text in shown
    assert "\r" not in first_run.stdout  # no progress bars where no one watches
    assert not [path for path in (checkout.root / "home").rglob("*") if path.is_file()]  # the user's own configuration is left alone


def test_every_dataset_is_in_dvc_and_only_pointers_in_zenml(checkout: Checkout, first_run):
    outputs = checkout.ask("print(json.dumps({name: out[0].run_metadata for step in run.steps.values() for name, out in step.outputs.items()}))")
    versioned = {name: metadata for name, metadata in outputs.items() if "dvc_md5" in metadata}
    assert len(versioned) == 16
    for metadata in versioned.values():
        md5 = metadata["dvc_md5"]
        assert (checkout.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).is_file()
    store = [p for p in (checkout.root / ".graincast/zenml").rglob("*") if p.is_file() and p.suffix not in {".db", ".html", ".png", ".log"}]
    assert max(p.stat().st_size for p in store) < 100_000


def test_mlflow_has_a_parent_run_and_a_child_for_each_training(checkout: Checkout, first_run):
    assert {status for (status,) in checkout.mlflow("select status from runs")} == {"FINISHED"}
    children = checkout.mlflow("select r.name from runs r join tags t on r.run_uuid = t.run_uuid where t.key = 'mlflow.parentRunId'")
    assert sorted(name.split("-")[0] for (name,) in children) == ["train_segmenter", "train_translator"]
    curves = {key for (key,) in checkout.mlflow("select distinct key from metrics")}
    assert {"cycle", "polarity", "train_loss", "val_loss"} <= curves
    assert any(key.endswith("/graincast/ap50") for key in curves)
    tags = dict(checkout.mlflow("select t.key, t.value from tags t join runs r on r.run_uuid = t.run_uuid "
                                "where r.run_uuid not in (select run_uuid from tags where key = 'mlflow.parentRunId')"))
    assert {"zenml_run_id", "dvc.micrographs", "dvc.synthetic_training", "dvc.segmenter"} <= set(tags)
    assert ("segmenter.learning_rate", "0.001") in checkout.mlflow("select key, value from params")


def test_segments_files_with_the_registered_model(checkout: Checkout, first_run):
    images = next((checkout.root / "runs").glob("*/virtual_session/session/held_out/images"))
    (checkout.root / "mixed").mkdir()
    for image in images.iterdir():
        shutil.copy(image, checkout.root / "mixed")
    (checkout.root / "mixed" / "broken.tif").write_text("no image")
    done = checkout.run("graincast segment mixed --out found")
    assert done.returncode == 1, done.stdout
    found = checkout.root / "found"
    (image,) = images.iterdir()
    labels = tifffile.imread(found / f"{image.stem}_labels.tif")
    assert labels.shape == tifffile.imread(image).shape
    grains = pd.read_csv(found / f"{image.stem}_grains.csv")
    assert len(grains) == len(np.unique(labels[labels > 0]))
    assert {"area_um2", "equivalent_diameter_um", "aspect_ratio", "circularity", "orientation_deg"} <= set(grains.columns)
    assert (found / f"{image.stem}_overlay.png").stat().st_size > 1000
    entries = {entry["file"]: entry for entry in json.loads((found / "summary.json").read_text())["images"]}
    assert entries[image.name]["grains"] == len(grains)
    assert "broken.tif" in entries["broken.tif"]["refused"]
    assert not list(found.glob("*partial*"))


def test_an_unchanged_run_comes_from_the_cache(checkout: Checkout, first_run):
    done = checkout.run(checkout.configure("tiny.yaml"))
    assert done.returncode == 0, done.stdout
    assert checkout.steps() == {**dict.fromkeys(STEPS, "cached"), "report": "completed", "promote": "completed"}
    assert "local threshold" in done.stdout


def test_another_learning_rate_trains_and_evaluates_only(checkout: Checkout, first_run):
    done = checkout.run(checkout.configure("other.yaml", segmenter={"learning_rate": 2e-3}))
    assert done.returncode == 0, done.stdout
    fresh = {name for name, status in checkout.steps().items() if status == "completed"}
    assert fresh == {"train_segmenter", "evaluate_virtual", "report", "drift_reference", "promote"}


def test_a_model_that_finds_nothing_is_reported_but_not_registered(checkout: Checkout, first_run):
    registered = checkout.mlflow("select count(*) from model_versions")
    command = checkout.configure("untrained.yaml", segmenter={"epochs": 1, "learning_rate": 1e-9}, evaluate={"require_plausible": True})
    done = checkout.run(command)
    assert done.returncode != 0
    assert "the segmenter was not registered: " in done.stdout
    assert "Not to be used: " in done.stdout
    assert "Traceback" not in done.stdout
    assert checkout.mlflow("select count(*) from model_versions") == registered
    newest = max((checkout.root / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)
    assert "Not to be used: " in (newest / "report" / "report.html").read_text()


def test_dvc_repro_gives_the_same_hashes(checkout: Checkout, first_run):
    checkout.run(checkout.configure("tiny.yaml"))
    shutil.copy(checkout.root / "tiny.yaml", checkout.root / "configs" / "demo.yaml")
    done = checkout.run("dvc repro")
    assert done.returncode == 0, done.stdout
    lock = yaml.safe_load((checkout.root / "dvc.lock").read_text())
    by_road = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    outputs = checkout.ask("print(json.dumps({name: out[0].run_metadata.get('dvc_md5') "
                           "for step in run.steps.values() for name, out in step.outputs.items()}))")
    same = {
        "data/session": "virtual_session", "data/micrographs": "micrographs", "data/translator": "translator", "data/segmenter": "segmenter",
        "data/morphologies/translator": "translator_morphologies", "data/morphologies/synthetic": "synthetic_morphologies",
        "data/morphologies/validation": "validation_morphologies", "data/synthetic/training": "synthetic_training",
        "data/synthetic/validation": "synthetic_validation", "data/evaluation": "evaluation", "data/drift_reference": "drift_reference",
        "data/gates/library": "library_gate", "data/gates/micrographs": "micrographs_gate", "data/gates/synthetic": "synthetic_gate",
    }
    assert by_road == {path: outputs[name] for path, name in same.items()}


def test_ctrl_c_loses_nothing(checkout: Checkout, first_run):
    command = checkout.configure("long.yaml", simulate={"seed": 7}, translator={"steps": 100_000})
    process = checkout.start(f"exec {command}")
    assert process.stdout
    seen = _read_until(process, lambda line: "Step `train_translator` has started" in line)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in seen + rest
    resumed = checkout.run(checkout.configure("long.yaml", simulate={"seed": 7}))
    assert resumed.returncode == 0, resumed.stdout
    statuses = checkout.steps()
    # A set: of two steps that start together, either may be listed first.
    assert {name for name, status in statuses.items() if status == "cached"} == {
        "simulate", "virtual_session", "ingest_virtual", "gate_library", "gate_micrographs"}


def test_ctrl_c_leaves_no_half_written_set(checkout: Checkout):
    process = checkout.start(f"exec {checkout.configure('many.yaml', simulate={'seed': 8, 'translator_structures': 5000})}")
    deadline = time.monotonic() + 300
    while not (partials := list((checkout.root / "runs").glob("*/simulate/**/.partial-*"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in shown
    assert not [partial for partial in partials if partial.exists()]
    assert not list(partials[0].parent.glob("*"))


def test_two_runs_at_once(checkout: Checkout, first_run):
    commands = [checkout.configure(f"seed{seed}.yaml", simulate={"seed": seed}) for seed in (11, 12)]
    processes = [checkout.start(command) for command in commands]
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output


def test_zenml_configuration_is_never_found_empty(tmp_path: Path):
    """A loop of writers beside a reader: ZenML's own way of writing fails this within a few hundred rounds."""
    write = runpy.run_path(str(ROOT / "bin" / "zenml"))["write_whole"]
    file, content = tmp_path / "config.yaml", "key: value\n" * 20
    write(str(file), content)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [write(str(file), content) for _ in range(3000)])
        while not writing.done():
            assert file.read_text() == content
        writing.result()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(("make", "message"), [
    (lambda c: c.configure("bad.yaml", segmenter={"learnng_rate": 1}), "unknown key 'segmenter.learnng_rate', did you mean 'learning_rate'?"),
    (lambda c: c.configure("bad.yaml", session={"folder": "nowhere"}), "session.folder: 'nowhere' does not exist"),
    (lambda c: c.configure("bad.yaml", session={"folder": "texts"}), "a.tif"),
    (lambda c: "graincast segment empty --out found", "empty"),
    (lambda c: "graincast segment texts --out found --model 99", "99"),
    (lambda c: "graincast stage simulat", "there is no stage 'simulat'"),
])
def test_bad_input_gets_one_sentence(checkout: Checkout, first_run, make: Callable[[Checkout], str], message: str):
    (checkout.root / "empty").mkdir(exist_ok=True)
    (checkout.root / "texts").mkdir(exist_ok=True)
    (checkout.root / "texts" / "a.tif").write_text("no image")
    done = checkout.run(make(checkout))
    assert done.returncode != 0
    assert message in done.stdout
    assert "graincast: " in done.stdout
    assert "Traceback" not in done.stdout


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path):
    """The limit on a file's size stands for the full disk: writing fails in the middle of the image stack."""
    program = (
        "import resource, signal, sys; from pathlib import Path; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "import numpy as np; from graincast.store.imageset import ImageSetWriter\n"
        f"with ImageSetWriter(Path({str(tmp_path / 'set')!r}), 'demo') as writer: writer.add(np.zeros((300, 300), np.uint8), id='a')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "free some space and run again" in done.stderr
    assert list(tmp_path.iterdir()) == []


def _read_until(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> str:
    assert process.stdout
    seen = ""
    for line in process.stdout:
        seen += line
        if wanted(line):
            return seen
    raise AssertionError(f"the process ended early:\n{seen}")
