"""Alerts from steps and pipelines: the file and the log always, the stack's alerter where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zenml.client import Client

from graincast.monitor import alerts
from steps.artifacts import ROOT

STATE = ROOT / ".graincast" / "monitoring"
"""Where the loop in production keeps what it must remember."""


def alert(event: str, sentence: str, figures: Mapping[str, Any] | None = None) -> None:
    """Tell a person; see `graincast.monitor.alerts.alert`."""
    alerts.alert(event, sentence, figures, STATE)
    alerter = Client().active_stack.alerter
    if alerter is None:
        return
    try:
        alerter.post(f"graincast, {event}: {sentence}")
    except Exception as error:  # whatever a chat service's library raises: the monitor goes on, and the file says so
        alerts.alert("alerter failed", f"the stack's alerter '{alerter.name}' did not take the alert: {error}", folder=STATE)
