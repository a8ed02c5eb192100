"""The loop in production in a subprocess: a champion, sessions in an inbox, drift, recalibration, promotion, kill -9.

A champion that is good enough is trained in less than a minute of CPU time: small virtual micrographs, ten structures.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from graincast.config import VirtualSem, VirtualSession
from graincast.microscope.virtual_sem import write_session
from tests.test_pipeline import Checkout

CONFIG = {
    "session": {"folder": None, "masks": None, "virtual": {"micrographs": 5, "held_out": 1, "size": 256}},
    "simulate": {"translator_structures": 2, "synthetic_structures": 10, "validation_structures": 4, "size": 128, "grains": 12, "steps": 300},
    "translator": {"steps": 12, "crop": 64, "filters": 8},
    "synthesise": {"min_fidelity": -1.0},
    "segmenter": {"epochs": 10, "crop": 64, "batch": 4, "crops_per_image": 2},
    "promotion": {"old_look_loss": 0.3, "label_free_loss": 0.5, "margin": 0.0},
    "monitoring": {"inbox": "inbox", "settle_seconds": 0},
    "recalibration": {"translator_steps": 4, "segmenter_epochs": 6},
}
MONITOR = "zenml pipeline run pipelines.monitoring.monitoring_pipeline -c production.yaml"
STRICT = MONITOR.replace("production", "strict")
"""The same, where nothing is ever promoted and no session is set aside for its dead processes."""
CHANGED = VirtualSem(gain=1.25, offset=0.12, electrons=100, channelling=0.3, groove_depth_um=0.07)
"""A look in which the champion finds less than a third of the grains."""
STEPS = ("champion", "check_session", "segment_session", "test_drift", "note_drift", "session_images", "champion_data",
         "recalibrate_translator", "synthesise", "gate_synthetic", "recalibrate_segmenter", "join_looks", "drift_reference", "promote",
         "report_session")

pytestmark = pytest.mark.slow


SCHEDULES = """
import json, os, subprocess
from pathlib import Path
from zenml.client import Client
from zenml.enums import StackComponentType
from pipelines import schedule

client, kind = Client(), StackComponentType.ORCHESTRATOR
usual = client.active_stack_model

def use(orchestrator):
    client.create_flavor(f"tests.cron_orchestrator.{orchestrator}Flavor", kind)
    client.create_stack_component(orchestrator, orchestrator.lower(), kind, {"crontab": str(Path(f"{orchestrator}.json").absolute())})
    client.create_stack(orchestrator, {of: parts[0].id for of, parts in usual.components.items()} | {kind: orchestrator})
    client.activate_stack(orchestrator)

def attempt(fault=None):
    os.environ["CRON_FAULT"] = fault or ""
    try:
        said = schedule.schedule("0 6 * * *", Path("production.yaml"), None)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    return said

def noted():
    return {str(found.id): found.name for found in client.list_schedules(name="startswith:graincast").items}

def crontab():
    file = Path(f"{client.active_stack.orchestrator.name}.json")
    return json.loads(file.read_text()) if file.exists() else {}

try:
    use("Cron")
    assert attempt("submit") == ("UserError: the orchestrator does not take the schedule: the cluster is away; "
                                 "run `graincast watch` instead (docs/operations.md)") and noted() == {}
    assert attempt("interrupt").startswith("KeyboardInterrupt") and noted() == {}
    assert "Cron runs the monitoring pipeline at '0 6 * * *'" in attempt() and len(noted()) == 1 and set(noted()) == set(crontab())
    assert "ZenML cannot delete it from 'Cron' (cron)" in attempt() and len(noted()) == 1  # and it stays as it is
    client.zen_store.delete_schedule(next(iter(noted())))

    use("StaticCron")
    assert "does not support dynamic pipelines" in attempt() and noted() == crontab() == {}

    use("DeletingCron")
    said, old = attempt(), noted()
    assert len(old) == 1 and set(old) == set(crontab()), said
    attempt("submit")
    assert noted() == old and set(old) == set(crontab())  # the old one stays until the new one is accepted
    said = attempt("delete")
    assert all(word in said for word in [*old.values(), "stands", "forbidden"]), said
    assert len(noted()) == len(crontab()) == 2 and set(old) < set(noted())
    said = attempt()
    assert len(noted()) == len(crontab()) == 1 and not set(old) & set(noted()), said
    [line] = crontab().values()
    assert line["cron"] == "0 6 * * *"
    due = subprocess.run(line["command"], env={**os.environ, **line["environment"]}, capture_output=True, text=True)
    assert due.returncode == 0, due.stdout + due.stderr
    [run] = client.list_pipeline_runs(schedule_id=next(iter(noted()))).items
    assert run.status == "completed"
finally:
    client.activate_stack(usual.id)
"""


class Lab(Checkout):
    """A checkout with an inbox."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        for name, changes in (("production", {}), ("strict", {"promotion": {"margin": 1.0}, "monitoring": {**CONFIG["monitoring"], "crashes": 40}})):
            (root / f"{name}.yaml").write_text(yaml.safe_dump({"parameters": {"config": CONFIG | changes}}))

    def deliver(self, name: str, seed: int, sem: VirtualSem | None = None) -> Path:
        """A session in the inbox."""
        made = self.root / "made" / name
        write_session(VirtualSession(micrographs=5, held_out=0, size=256, seed=seed, sem=sem or VirtualSem()), made)
        return Path(shutil.copytree(made / "micrographs", self.root / "inbox" / name))

    def ledger(self) -> dict[str, dict[str, Any]]:
        """What is known of every session, by name."""
        records = [json.loads(file.read_text()) for file in (self.root / ".graincast" / "monitoring" / "ledger").glob("*.json")]
        return {record["name"]: record for record in records if "digest" in record}

    def aliases(self) -> dict[str, int]:
        return dict(self.mlflow("select alias, version from registered_model_aliases"))

    def loads_its_champion(self) -> bool:
        return self.run("python -c 'from graincast.store import registry; registry.load_segmenter(\"champion\")'").returncode == 0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    made = Lab(tmp_path_factory.mktemp("lab"))
    trained = made.run("zenml pipeline run pipelines.training.training_pipeline -c production.yaml")
    assert trained.returncode == 0, trained.stdout
    assert "model 1: promoted" in trained.stdout
    return made


def test_first_model_passes_floors_and_is_on_record(lab: Lab):
    assert lab.aliases() == {"champion": 1}
    shown = lab.run("COLUMNS=300 graincast models --history").stdout
    assert "promote 1" in shown
    [(decisions,)] = lab.mlflow("select count(*) from runs join experiments using (experiment_id) where experiments.name = 'graincast-decisions'")
    assert decisions == 1


def test_results_load_where_the_library_lies_in_the_checkout(lab: Lab):
    """As in a user's checkout: ZenML then notes the library's classes by their path, as ``src.graincast...``."""
    noted = dict(lab.zenml("select name, data_type from artifact_version join artifact on artifact.id = artifact_version.artifact_id "
                           "where name = 'segmenter'"))
    assert noted, "the segmenter is an artifact"
    done = lab.run("python -c \"import sys; sys.path.insert(0, '.'); from importlib import import_module; from zenml.client import Client; "
                   "from steps.artifacts import FolderMaterializer; "
                   "version = Client().list_artifact_versions(artifact='segmenter').items[0]; "
                   "store = Client().active_stack.artifact_store; other = import_module('src.graincast.store.versioning').Artifact; "
                   "loader = FolderMaterializer(version.uri, store); loader.validate_load_type_compatibility(other); "
                   "print(loader.load(other).path.is_dir())\"")
    assert done.stdout.strip().endswith("True"), done.stdout


def test_session_in_control_is_segmented_and_its_bad_files_are_set_aside(lab: Lab):
    session = lab.deliver("in control", seed=7)
    (session / "empty.tif").touch()
    (session / "text.tif").write_text("no image")
    (session / "link.tif").symlink_to("/etc/hostname")
    (lab.root / "inbox" / "half").mkdir()
    (lab.root / "inbox" / "half" / "a.tif.part").write_bytes(b"II*")
    done = lab.run(MONITOR)
    assert done.returncode == 0, done.stdout
    record = lab.ledger()["in control"]
    assert (record["state"], record["failures"]) == ("done", 0)
    assert record["result"]["images"] == 5
    assert record["result"]["grains"] > 150
    assert lab.steps()["test_drift"] == "completed"
    assert "recalibrate_translator" not in lab.steps()
    told = (lab.root / ".graincast" / "monitoring" / "alerts.jsonl").read_text()
    assert all(name in told for name in ("empty.tif", "text.tif", "link.tif"))
    assert "root" not in told
    assert "half" not in lab.ledger()
    report = next((lab.root / "runs").glob("monitoring*/report_session/report"))
    assert (report / "evidently.html").exists()
    assert (report / "gate" / "index.html").exists()
    assert len(list(report.parent.parent.glob("segment_session/grains/*_labels.tif"))) == 5
    again = lab.run(MONITOR)
    assert again.returncode == 0, again.stdout
    assert lab.ledger()["in control"]["claims"] == record["claims"]  # processed once


def test_schedule_is_the_orchestrators_where_it_has_them(lab: Lab):
    """Replaced, kept and forgotten as it should be; and when its time comes, a session of the inbox is processed."""
    lab.deliver("scheduled", seed=8)
    (lab.root / "schedules.py").write_text(SCHEDULES)
    done = lab.run("python schedules.py")
    assert done.returncode == 0, done.stdout
    assert lab.ledger()["scheduled"]["state"] == "done"


def test_inference_pipeline_segments_a_folder(lab: Lab):
    done = lab.run("zenml pipeline run pipelines.inference.inference_pipeline -c production.yaml")
    assert done.returncode == 0, done.stdout
    assert len(list((lab.root / "runs").glob("inference*/segment_session/grains/*_labels.tif"))) == 5


@pytest.fixture
def killer(lab: Lab) -> Iterator[Any]:
    """Start the monitor, kill -9 it and all its children some time after a step starts; how far it came."""
    started: list[subprocess.Popen[str]] = []

    def kill_in(step: str, after: float, command: str = MONITOR) -> None:
        process = lab.start(f"PYTHONUNBUFFERED=1 {command}")
        started.append(process)
        assert process.stdout
        for line in process.stdout:
            if line.startswith(f"Step `{step}` has started"):
                time.sleep(after)
                break
        else:
            pytest.fail(f"the step {step} never started")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    yield kill_in
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_kill_9_loses_nothing_and_repeats_nothing(lab: Lab, killer: Any):
    """The last kill comes after the promotion, so that the new champion takes the session up."""
    lab.deliver("changed", seed=9, sem=CHANGED)
    for step, after in (("recalibrate_translator", 0.5), ("report_session", 0.0)):
        killer(step, after)
        assert lab.ledger()["changed"]["state"] == "claimed"
    assert lab.loads_its_champion()
    done = lab.run(MONITOR)
    assert done.returncode == 0, done.stdout
    record = lab.ledger()["changed"]
    assert (record["state"], record["failures"]) == ("done", 0)
    assert [claim["ended"] for claim in record["claims"]] == ["died"] * 2 + ["done"]
    told = [json.loads(line)["event"] for line in (lab.root / ".graincast" / "monitoring" / "alerts.jsonl").read_text().splitlines()]
    assert {"drift", "promotion"} <= set(told)  # though the process that found both did not live to report them


def test_recalibrated_model_was_promoted_and_can_be_rolled_back(lab: Lab):
    aliases = lab.aliases()
    assert aliases["champion"] > 1
    assert aliases["previous"] == 1
    done = lab.run("graincast rollback --reason 'a test'")
    assert done.returncode == 0, done.stdout
    assert lab.aliases()["champion"] == 1
    assert lab.loads_its_champion()


@pytest.mark.proof
def test_kill_9_at_every_boundary_and_in_the_middle_of_every_stage(lab: Lab, killer: Any):
    """Monitoring and recalibration, killed 30 times over one session: twice at each stage, as it starts and half-way through."""
    lab.deliver("rehearsal", seed=21, sem=CHANGED)
    shown = lab.run(STRICT).stdout
    took = {name: float(seconds) for name, seconds in re.findall(r"Step `(\w+)` has finished in `([\d.]+)s`", shown)}
    assert set(STEPS) <= set(took), shown
    lab.deliver("killed", seed=22, sem=CHANGED)
    for step in STEPS:
        for after in (0.0, took[step] / 2):
            killer(step, after, STRICT)
            assert lab.ledger().get("killed", {"state": "open"})["state"] in ("open", "claimed")
        assert lab.loads_its_champion()
    done = lab.run(STRICT)
    assert done.returncode == 0, done.stdout
    record = lab.ledger()["killed"]
    assert (record["state"], record["failures"]) == ("done", 0)
    assert [claim["ended"] for claim in record["claims"][:-1]] == ["died"] * (len(record["claims"]) - 1)
    assert lab.loads_its_champion()
    [(verdicts,)] = lab.mlflow("select count(*) from runs join experiments using (experiment_id) join tags using (run_uuid) "
                               "where experiments.name = 'graincast-monitoring' and key = 'session' and value = 'killed'")
    assert verdicts == 1
    whole = lab.ask("from steps import artifacts; "
                    "print(json.dumps([out[0].load().path.is_dir() for step in run.steps.values() for name, out in step.outputs.items() "
                    "if 'dvc_md5' in out[0].run_metadata]))")
    assert len(whole) > 10
    assert all(whole)
