"""What ``zenml pipeline run`` shows when something goes wrong: one sentence where the user can mend it.

ZenML logs the traceback of a failed step and Python prints it again. A `UserError` and Ctrl-C say all
there is to say in a line; every other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

import logging
import sys
from types import TracebackType

import zenml  # noqa: F401  (sets up its logging and sys.excepthook when imported, so it must come first)
from zenml.exceptions import RunInterruptedException

from graincast.errors import UserError, is_down, without_login

FILTERED = (
    "zenml.orchestrators.local.local_orchestrator",
    "zenml.integrations.mlflow.experiment_trackers.mlflow_experiment_tracker",
)


def install() -> None:
    """Shorten ZenML's messages in this process."""
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if sentence := _sentence(error):
            print(f"graincast: {sentence}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    sys.excepthook = excepthook
    for name in FILTERED:
        logging.getLogger(name).addFilter(_filter)


def _sentence(error: BaseException | None) -> str | None:
    """What stands for the traceback of `error`, if anything does."""
    if isinstance(error, UserError):
        return without_login(str(error))
    if error is not None and is_down(error):
        said = without_login(str(error)).strip().splitlines()[0]
        return f"a store or server does not answer ({said}); run again when it does, finished stages are kept"
    if isinstance(error, KeyboardInterrupt | RunInterruptedException):
        return "interrupted; the next run takes every finished stage from the cache"
    return None


def _filter(record: logging.LogRecord) -> bool:
    """Drop the tracebacks that a sentence stands for, and a warning about a flavour that MLflow dropped."""
    if record.exc_info and _sentence(record.exc_info[1]):
        record.exc_info = None
    return "disable MLflow autologging" not in record.getMessage()
