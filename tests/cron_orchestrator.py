"""An orchestrator that has schedules: ZenML's local one with a crontab, a file of one line a schedule, as a cluster's would be.

A due line is run by hand, in a process of its own that does what ZenML's entry point does in an orchestrator's container. Three kinds,
as there are in the field: schedules that can be deleted through ZenML, that cannot, and that take no dynamic pipelines.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

from zenml.orchestrators import BaseOrchestrator, BaseOrchestratorFlavor, LocalOrchestrator
from zenml.orchestrators.local.local_orchestrator import LocalOrchestratorConfig

RUN = """
import sys
from zenml.client import Client
from zenml.execution.pipeline.dynamic.runner import DynamicPipelineRunner
DynamicPipelineRunner(snapshot=Client().get_snapshot(sys.argv[1]), run=None).run_pipeline()
"""
FAULT = "CRON_FAULT"
"""Environment variable: ``submit`` or ``delete`` fails, or ``interrupt`` comes while the cluster is asked."""


class Config(LocalOrchestratorConfig):
    """Where the crontab is."""

    crontab: str

    @property
    def is_schedulable(self) -> bool:
        return True


class Cron(LocalOrchestrator):
    """Schedules stay until they are deleted in the crontab itself."""

    @property
    def crontab(self) -> Path:
        return Path(self.config.crontab)

    def lines(self) -> dict[str, Any]:
        return json.loads(self.crontab.read_text()) if self.crontab.exists() else {}

    def get_orchestrator_run_id(self) -> str:
        return os.environ.setdefault("CRON_RUN", str(uuid.uuid4()))

    def submit_dynamic_pipeline(self, snapshot: Any, stack: Any, environment: dict[str, str], placeholder_run: Any = None) -> Any:
        if fault := {"submit": OSError("the cluster is away"), "interrupt": KeyboardInterrupt()}.get(os.environ.get(FAULT, "")):
            raise fault
        command = [sys.executable, "-c", RUN, str(snapshot.id)]
        line = {"cron": snapshot.schedule.cron_expression, "command": command, "environment": environment}
        self.crontab.write_text(json.dumps(self.lines() | {str(snapshot.schedule.id): line}))


class DeletingCron(Cron):
    """Schedules are deleted through ZenML."""

    def delete_schedule(self, schedule: Any) -> None:
        if os.environ.get(FAULT) == "delete":
            raise OSError("forbidden")
        lines = self.lines()
        del lines[str(schedule.id)]
        self.crontab.write_text(json.dumps(lines))


class StaticCron(Cron):
    """Takes no dynamic pipelines."""

    submit_dynamic_pipeline = BaseOrchestrator.submit_dynamic_pipeline


class CronFlavor(BaseOrchestratorFlavor):
    implementation_class = Cron
    config_class = Config

    @property
    def name(self) -> str:
        return self.implementation_class.__name__.lower()


class DeletingCronFlavor(CronFlavor):
    implementation_class = DeletingCron


class StaticCronFlavor(CronFlavor):
    implementation_class = StaticCron
