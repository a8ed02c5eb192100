"""Keep the figures of a pipeline run: ``python -m benchmarks.record NAME COMMAND``.

Writes ``benchmarks/results/NAME.json`` with the newest run's summary, mean scores and realism, the COMMAND that made
it, the commit it ran at, the dataset hashes and the machine.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch
from mlflow import MlflowClient
from zenml.client import Client

from graincast.store import tracking

ROOT = Path(__file__).parents[1]


def main(name: str, command: str) -> None:
    """Write the record of the newest completed run."""
    run = Client().list_pipeline_runs(sort_by="desc:created", size=1, status="completed").items[0]
    summary = json.loads(next((ROOT / "runs" / run.name).glob("report/summary.json")).read_text())
    seconds = {step.name: round((step.end_time - step.start_time).total_seconds(), 1)
               for step in run.steps.values() if step.end_time and step.start_time and step.status.value == "completed"}
    hashes = {output: artifacts[0].run_metadata["dvc_md5"] for step in run.steps.values() for output, artifacts in step.outputs.items()
              if "dvc_md5" in artifacts[0].run_metadata and output != "report"}
    logged = MlflowClient().search_runs([tracking.ensure_experiment()], f"tags.zenml_run = '{run.name}'")[0]
    record = {
        "command": command, "commit": logged.data.tags["git_commit"], "run": run.name, "seconds": seconds, "dvc": hashes,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                    "cuda": torch.cuda.is_available(), "python": platform.python_version(), "torch": torch.__version__},
        "summary": summary,
    }
    out = ROOT / "benchmarks" / "results" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(out.relative_to(ROOT))


if __name__ == "__main__":
    main(*sys.argv[1:])
