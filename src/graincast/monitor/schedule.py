"""``graincast watch``: a long-lived process that runs the monitoring pipeline when it is due.

A state file says which scheduled time was taken last and whether its run ended. So a restart repeats nothing, a run
that was cut off is made again (the ledger of `graincast.monitor.inbox` knows which of its sessions are done), and
however many scheduled times were missed, they are caught up by one run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from graincast.config import Monitoring
from graincast.errors import UserError
from graincast.monitor.alerts import alert
from graincast.monitor.inbox import Ledger, look_into, write_whole

logger = logging.getLogger(__name__)

SLICE_SECONDS = 30.0
"""Longest sleep; the clock is asked again then, since it may have been set or the computer have slept."""

POLL_SECONDS = 0.2
"""How soon the end of the pipeline's process is noticed."""

STOPPED = 128 + signal.SIGTERM
"""Exit status of a run that was ended because this process was told to stop."""

LAST_WORDS_SECONDS = 10.0
"""Between SIGTERM and SIGKILL, for a pipeline that did not end in time."""


@dataclass(frozen=True)
class Times:
    """When runs are due: by a cron expression, or every so many seconds.

    Parameters
    ----------
    cron : str or None
        Minute, hour, day of the month, month and day of the week, in the computer's local time, or ``@hourly`` and
        the like.
    every_seconds : float
        From the start of one run to the start of the next, where `cron` is None.

    Raises
    ------
    UserError
        If `cron` is no such expression, or one that never comes (30 February).

    Notes
    -----
    In the hour that is left out when summer time begins, a time of day comes an hour later; in the hour that comes
    twice when it ends, it comes once, the first time.
    """

    cron: str | None
    every_seconds: float

    def __post_init__(self) -> None:
        from croniter import CroniterError, croniter

        if self.cron is None:
            return
        try:
            if len(self.cron.split()) != 5 and not self.cron.startswith("@"):
                raise CroniterError("that is not five fields")
            croniter(self.cron, datetime(2000, 1, 1)).get_next(datetime)
        except (CroniterError, ValueError) as error:
            raise UserError(f"monitoring.cron: '{self.cron}' is no time that comes ({error}); "
                            "five fields such as '0 6 * * 1-5' would be right") from None

    def next(self, after: float) -> float:
        """The first time after a moment; both in seconds since the epoch."""
        if self.cron is None:
            return after + self.every_seconds
        from croniter import croniter

        times = croniter(self.cron, datetime.fromtimestamp(after))
        while (moment := _epoch(times.get_next(datetime))) <= after:  # the hour that comes twice
            pass
        return moment

    def latest(self, after: float, until: float) -> float | None:
        """The last time that came after one moment and not after another, or None: however many came, one is returned."""
        if self.cron is None:
            return until if until - after >= self.every_seconds else None
        from croniter import croniter

        times = croniter(self.cron, datetime.fromtimestamp(until - until % 60 + 60))  # before which it looks for one
        moment = _epoch(times.get_prev(datetime))
        while moment > until:  # the hour that is left out
            moment = _epoch(times.get_prev(datetime))
        return moment if moment > after else None


def _epoch(local: datetime) -> float:
    """Seconds since the epoch of a time of day in local time, of which the first if there are two."""
    return local.timestamp()


class _Flag:
    """A `threading.Event` that a signal handler may set.

    Python runs handlers in the main thread, wherever it is; inside an Event's `wait` it may hold the lock that the
    Event's `set` would then wait for, for ever. A SimpleQueue's `put` is made to come in between.
    """

    def __init__(self) -> None:
        self._on, self._calls = False, SimpleQueue[None]()

    def set(self) -> None:
        self._on = True
        self._calls.put(None)

    def is_set(self) -> bool:
        return self._on

    def wait(self, seconds: float) -> bool:
        if not self._on:
            with suppress(Empty):
                self._calls.get(timeout=max(0.0, seconds))
        return self._on


class Watch:
    """The process behind ``graincast watch``.

    Parameters
    ----------
    inbox : Path
        The inbox. One process watches it; any further one is refused.
    config : Monitoring
        When to run, and what `look_into` needs.
    command : sequence of str
        What a run is, e.g. ``zenml pipeline run ...``.
    state : Path
        Folder of the state file, the alerts and the ledger (`Ledger.open`).
    folder : Path
        Where the command runs.

    Notes
    -----
    A run without anything new in the inbox is not started; the time counts as taken. SIGTERM and SIGINT end the
    process: a running pipeline is interrupted, as by Ctrl-C, and gets ``grace_seconds`` to end; a second signal kills it.
    """

    def __init__(self, inbox: Path, config: Monitoring, command: Sequence[str], state: Path, folder: Path) -> None:
        self.inbox, self.config, self.command, self.folder = Path(inbox).absolute(), config, list(command), folder
        self.times = Times(config.cron, config.every_seconds)
        self.state = Path(state)
        self._file = state_file(self.state, self.inbox)
        self._stop, self._hurry = _Flag(), _Flag()
        self._told: str | None = None
        self._waiting: dict[str, str] = {}

    def run(self) -> None:
        """Watch until SIGTERM or SIGINT.

        Raises
        ------
        UserError
            If another process watches the inbox, or the state cannot be read or written.
        """
        with self._alone() as alone, self._signals():
            if not alone:
                raise UserError(f"{self.inbox} is watched already by another process; end that one first")
            self._begin()
            while not self._stop.is_set():
                now = time.time()
                due = self._due(now)
                if due is None:
                    self._stop.wait(max(0.0, min(self.times.next(self._load()["due"]) - now, SLICE_SECONDS)))
                else:
                    self._take(due)
            logger.info("stopped")

    def once(self) -> int:
        """One run now, if there is anything new; the command's exit status, or 0.

        Raises
        ------
        UserError
            If the inbox, or the state, cannot be read or written.
        """
        with self._alone() as alone, self._signals():
            if not alone:
                logger.info("the run before is still going, nothing to do")
                return 0
            return self._take(time.time(), once=True)

    # when

    def _begin(self) -> None:
        """Say what is watched; with cron, times count from the first start on."""
        state = self._load()
        if state["due"] is None:
            now = time.time()
            self._save({"due": now - (self.times.every_seconds if self.times.cron is None else 0), "finished": True, "status": None})
        elif not state["finished"]:
            logger.info("the last run was cut off, it is made again")
        elif (missed := self._due(time.time())) is not None and self.times.cron:
            logger.info("the run of %s was missed, it is made now", _clock(missed))
        when = f"at '{self.times.cron}'" if self.times.cron else f"every {self.times.every_seconds:g} s"
        logger.info("watching %s %s", self.inbox, when)

    def _due(self, now: float) -> float | None:
        """The scheduled time that a run now stands for, if one is due."""
        state = self._load()
        if state["due"] > now:  # kept, so that the next time after this comes; counted from a later `now`, none ever would
            logger.warning("the clock was set back, the last run is of %s; times count from now on", _clock(state["due"]))
            state["due"] = now
            self._save(state)
        return state["due"] if not state["finished"] else self.times.latest(state["due"], now)

    # what

    def _take(self, due: float, once: bool = False) -> int:
        """Run for a scheduled time; the exit status."""
        self._save({"due": due, "finished": False, "status": None})
        try:
            new = self._anything_new()
        except UserError as error:  # a network drive that is away comes back
            if once:
                raise
            self._tell("inbox unreadable", str(error))
            self._save({"due": due, "finished": True, "status": None})
            return 1
        if self._stop.is_set():
            return STOPPED
        status = self._run_command() if new else 0
        if status is None:
            return STOPPED  # not finished: the next start makes the run again
        self._save({"due": due, "finished": True, "status": status})
        if status:
            self._tell("run failed", f"monitoring {self.inbox.name} ended with exit status {status}; the log above says why")
        else:
            self._told = None
        return status

    def _anything_new(self) -> bool:
        """Whether a pipeline would find something to do or to say; its own look then tells what is new."""
        found = look_into(self.inbox, Ledger.open(self.state, self.config), self.config.settle_seconds)
        counts = [len(found.ready), len(found.waiting), len(found.refused), len(found.set_aside)]
        logger.info("%d sessions ready, %d not whole yet, %d refused, %d set aside", *counts)
        for name, sentence in found.waiting.items():
            if self._waiting.get(name) != sentence:  # not at every look
                logger.info("session '%s' waits: %s", name, sentence)
        self._waiting = found.waiting
        return bool(found.ready or found.news)

    def _run_command(self) -> int | None:
        """The command's exit status; None where it was ended because this process was told to stop."""
        process = subprocess.Popen(self.command, cwd=self.folder, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            while process.poll() is None and not self._stop.is_set():
                self._stop.wait(POLL_SECONDS)
            if process.poll() is not None:
                return process.returncode
            logger.info("stopping the run; a second signal kills it")
            self._end(process)
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        for how, seconds in ((signal.SIGINT, self.config.grace_seconds), (signal.SIGTERM, LAST_WORDS_SECONDS)):
            os.killpg(process.pid, how)
            end = time.monotonic() + seconds
            while process.poll() is None and not self._hurry.is_set() and time.monotonic() < end:
                self._hurry.wait(POLL_SECONDS)
            if process.poll() is not None or self._hurry.is_set():
                return

    def _tell(self, event: str, sentence: str) -> None:
        """Alert once, not at every run, until a run ends well."""
        if sentence != self._told:
            alert(event, sentence, folder=self.state)
        else:
            logger.warning("%s: %s", event, sentence)
        self._told = sentence

    # state

    def _load(self) -> dict[str, Any]:
        try:
            state = json.loads(self._file.read_text())
            if not isinstance(state["due"], int | float) or not isinstance(state["finished"], bool):
                raise TypeError("neither time nor outcome")
        except FileNotFoundError:
            return {"due": None, "finished": True, "status": None}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the state file {self._file} cannot be read ({error}); delete it, and times count from now on") from error
        return state

    def _save(self, state: dict[str, Any]) -> None:
        try:
            write_whole(self._file, json.dumps({**state, "when": _clock(state["due"])}))
        except OSError as error:
            raise UserError(f"the state file {self._file} cannot be written: {error.strerror or error}") from error

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other process watches the inbox; the lock goes with this process, however it ends."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._file.with_suffix(".lock"))
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise UserError(f"{self.state} cannot be written: {error.strerror or error}; a folder that you may write to would be right") from error
        try:
            yield True
        finally:
            lock.release()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop.is_set():
                self._hurry.set()
            self._stop.set()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def state_file(state: Path, inbox: Path) -> Path:
    """Where a watch keeps what it did: a file an inbox."""
    key = hashlib.sha256(os.fsencode(inbox.absolute())).hexdigest()[:12]
    return state / f"watch-{key}.json"


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")
