"""Have the stack's orchestrator run the monitoring pipeline on a schedule; ``python -m pipelines.schedule --cron "0 6 * * *" -c CONFIG``.

Only some orchestrators have schedules (Kubernetes, Kubeflow, Airflow, Vertex, ... but not the local one); without one,
a sentence says what to run instead. ``graincast schedule`` calls this, as the library itself knows nothing of ZenML.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from zenml.client import Client
from zenml.config.schedule import Schedule

from graincast.config import load_config, parse_config
from graincast.errors import UserError
from graincast.monitor.schedule import Times

NAME = "graincast-monitoring"
"""Of the schedule; there is one at a time."""


def schedule(cron: str, config: Path, inbox: str | None) -> str:
    """Schedule the monitoring pipeline, in place of an earlier schedule; a sentence that says so.

    Raises
    ------
    UserError
        If the orchestrator has no schedules, or no inbox is named.
    """
    Times(cron, 0)
    settings = load_config(config)
    folder = inbox or settings.monitoring.inbox
    if not folder:
        raise UserError(f"{config} names no monitoring.inbox; that key, or --inbox, would be right")
    client = Client()
    orchestrator = client.active_stack.orchestrator
    if not orchestrator.config.is_schedulable:
        watch = f"graincast watch {shlex.quote(folder)} -c {shlex.quote(str(config))} --cron {shlex.quote(cron)}"
        raise UserError(f"the orchestrator '{orchestrator.name}' ({orchestrator.flavor}) has no schedules; run `{watch}` instead, by hand, as a "
                        "systemd unit or from a cron line (docs/operations.md has both)")
    tree = settings.model_dump(exclude_unset=True)
    tree["monitoring"] = {**tree.get("monitoring", {}), "inbox": folder}
    parse_config(tree, str(config))
    _remove(client)
    _submit(client, cron, config, tree)
    return f"{orchestrator.name} runs the monitoring pipeline at '{cron}' (schedule '{NAME}'); `zenml pipeline schedule delete {NAME}` ends that"


def _remove(client: Client) -> None:
    """End the schedule there is, so that there are never two."""
    orchestrator = client.active_stack.orchestrator
    known = client.list_schedules(name=NAME).items
    if known and not orchestrator.supports_schedule_deletion:
        raise UserError(f"there is a schedule '{NAME}' already, and ZenML cannot delete it from '{orchestrator.name}' ({orchestrator.flavor}); "
                        f"delete it there, then with `zenml pipeline schedule delete {NAME}`")
    for before in known:
        client.delete_schedule(before.id)


def _submit(client: Client, cron: str, config: Path, tree: dict[str, Any]) -> None:
    from pipelines.monitoring import monitoring_pipeline

    document = {key: value for key, value in yaml.safe_load(config.read_text()).items() if key not in ("parameters", "schedule")}
    configured = monitoring_pipeline.with_options(schedule=Schedule(name=NAME, cron_expression=cron), **document)
    try:
        configured(config=tree)
    except (NotImplementedError, RuntimeError) as error:  # some have schedules, but none for dynamic pipelines
        for half_made in client.list_schedules(name=NAME).items:
            client.delete_schedule(half_made.id)
        raise UserError(f"the orchestrator does not take the schedule: {error}; run `graincast watch` instead (docs/operations.md)") from error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=schedule.__doc__)
    parser.add_argument("--cron", required=True)
    parser.add_argument("--config", "-c", type=Path, required=True)
    parser.add_argument("--inbox")
    arguments = parser.parse_args()
    try:
        print(schedule(arguments.cron, arguments.config, arguments.inbox))
    except UserError as error:
        print(f"graincast: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
