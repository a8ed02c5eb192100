"""Have the stack's orchestrator run the monitoring pipeline on a schedule; ``python -m pipelines.schedule --cron "0 6 * * *" -c CONFIG``.

Only some orchestrators have schedules (Kubernetes, Kubeflow, Airflow, Vertex, ... but not the local one); without one,
a sentence says what to run instead. ``graincast schedule`` calls this, as the library itself knows nothing of ZenML.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import uuid
from pathlib import Path
from typing import Any

import yaml
from zenml.client import Client
from zenml.config.schedule import Schedule

from graincast.config import load_config, parse_config
from graincast.errors import UserError
from graincast.monitor.schedule import Times

NAME = "graincast-monitoring"
"""What the names of schedules begin with; each has its own, so that a new one is accepted before the old one goes."""


def schedule(cron: str, config: Path, inbox: str | None) -> str:
    """Schedule the monitoring pipeline, in place of an earlier schedule; a sentence that says so.

    The earlier one goes only after the orchestrator took the new one, and stays whatever fails before.

    Raises
    ------
    UserError
        If the orchestrator has no schedules, does not take this one or cannot end an earlier one, or no inbox is named.
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
    tree["monitoring"] = {**tree.get("monitoring", {}), "inbox": str(Path(folder).absolute())}  # the orchestrator's processes start elsewhere
    parse_config(tree, str(config))
    earlier = client.list_schedules(name=f"startswith:{NAME}").items
    if earlier and not orchestrator.supports_schedule_deletion:
        raise UserError(f"there is a schedule '{earlier[0].name}' already, and ZenML cannot delete it from '{orchestrator.name}' "
                        f"({orchestrator.flavor}); delete it there, then with `zenml pipeline schedule delete {earlier[0].name}`")
    name = f"{NAME}-{uuid.uuid4().hex[:8]}"
    _submit(client, name, cron, config, tree)
    for old in earlier:
        _end(client, old, name)
    return f"{orchestrator.name} runs the monitoring pipeline at '{cron}' (schedule '{name}'); `zenml pipeline schedule delete {name}` ends that"


def _end(client: Client, old: Any, new: str) -> None:
    try:
        client.delete_schedule(old.id)
    except Exception as error:  # whatever the orchestrator's own client raises
        raise UserError(f"the schedule '{new}' stands, but the old one stands, too ({error}); end that with "
                        f"`zenml pipeline schedule delete {old.name}`") from error


def _submit(client: Client, name: str, cron: str, config: Path, tree: dict[str, Any]) -> None:
    from pipelines.monitoring import monitoring_pipeline

    document = {key: value for key, value in yaml.safe_load(config.read_text()).items() if key not in ("parameters", "schedule")}
    configured = monitoring_pipeline.with_options(schedule=Schedule(name=name, cron_expression=cron), **document)
    try:
        configured(config=tree)
    except BaseException as error:  # Ctrl-C, too
        _forget(client, name)
        if not isinstance(error, Exception):
            raise
        raise UserError(f"the orchestrator does not take the schedule: {error}; run `graincast watch` instead (docs/operations.md)") from error


def _forget(client: Client, name: str) -> None:
    """ZenML notes a schedule before it asks the orchestrator; one that was not taken goes again."""
    for half_made in client.list_schedules(name=name).items:
        try:
            client.delete_schedule(half_made.id)  # also where the orchestrator had taken it before the failure
        except Exception:  # whatever its client raises when it never heard of it
            client.zen_store.delete_schedule(half_made.id)


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
