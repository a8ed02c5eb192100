"""Sessions that arrive in an inbox: found once they are whole, processed once, whatever dies on the way.

Every sub-folder of the inbox is a session. What it is called and when it came does not matter: a session is known by
its content, so one that is copied again or renamed is not processed again, and one that gets a further micrograph is
a new one. The `Ledger` remembers what became of each. Nothing is ever written into the inbox.

A monitor goes through an inbox like this::

    ledger = Ledger(state / "ledger")
    look = look_into(inbox, ledger, settle_seconds=60)
    ...  # tell a person of look.news
    look.told(ledger)
    for session in look.ready:
        if ledger.claim(session):
            try:
                ...
            except UserError as error:
                ledger.failed(session, str(error))
            else:
                ledger.done(session, {"grains": 1234})
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graincast.errors import UserError
from graincast.store.imageset import whole_file

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from graincast.config import Monitoring

logger = logging.getLogger(__name__)

FORMAT = 1
LOCK_SECONDS = 60.0
"""Longest wait for another process that writes into the ledger, which takes it milliseconds."""

LONGEST_NAME = 120
"""Characters of a session's name; folders, tags and artifacts are named after it."""

PARTIAL = re.compile(
    r".*\.(part|partial|filepart|tmp|temp|crdownload|download|opdownload|!ut|aria2)|\.~tmp~|\.goutputstream-.*|\.rsync-partial|"
    r"\..+\.[a-z0-9]{2,5}\.[a-z0-9]{6}",  # rsync's `.image.tif.Xy12Za`
    re.IGNORECASE,
)
"""Names under which browsers, rsync, WinSCP and GNOME write files before they are whole."""

CLUTTER = re.compile(r"\..*|thumbs\.db|ehthumbs\.db|desktop\.ini|@eadir|lost\+found|\$recycle\.bin|system volume information|__macosx", re.IGNORECASE)
"""Names that operating systems leave behind; they belong to no session."""

State = Literal["open", "claimed", "done", "failed", "set aside"]
FINAL: tuple[State, ...] = ("done", "set aside")


@dataclass(frozen=True)
class Session:
    """A whole folder of micrographs in the inbox.

    Attributes
    ----------
    name : str
        The folder's name; printable, one component, safe to name other things after.
    folder : Path
        Where it lies; read it, never write to it.
    digest : str
        SHA-256 of the names and bytes of its files, 64 hexadecimal digits (`session_digest`).
    """

    name: str
    folder: Path
    digest: str


@dataclass(frozen=True)
class Look:
    """What a look into the inbox found.

    Attributes
    ----------
    inbox : Path
        Where it looked, absolute.
    ready : list of Session
        To be processed, the longest waiting first.
    waiting : dict of str to str
        Name of a folder that is not whole yet, and why one thinks so.
    refused : dict of str to str
        Name of what can be no session as it is, and what would be right.
    set_aside : dict of str to str
        Name of a session that failed too often, and the last reason.
    news : dict of str to str
        Those of `refused` and `set_aside` that nobody was told of, after an earlier look or by who called
        `Ledger.failed`: what to raise an alert about. They are news again the next time, until `told`.
    """

    inbox: Path
    ready: list[Session] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    set_aside: dict[str, str] = field(default_factory=dict)
    news: dict[str, str] = field(default_factory=dict)

    def told(self, ledger: Ledger) -> None:
        """Remember that a person was told of the news; called afterwards, so that a crash in between tells twice, not never."""
        ledger.remember_told(self.inbox, self.news)


# ------------------------------------------------------------------------------------------------------ the ledger

_held: dict[Path, BaseFileLock] = {}
"""The claims of this process, by their lock files: any `Ledger` and any thread of it may finish them."""


class Ledger:
    """What became of every session, on disk; any number of monitors may share one.

    Parameters
    ----------
    folder : Path
        Made if absent. It holds a JSON file a session (``<digest>.json``), replaced as a whole and synced, so that a
        crash leaves the state before or after, and lock files.
    attempts : int
        Failures after which a session is set aside.
    crashes : int
        Processes that may die over a session, without a word, before it is set aside; a session that exhausts the
        memory would otherwise kill every monitor for ever.

    Raises
    ------
    UserError
        If the folder cannot be made or written.

    Notes
    -----
    A claim is a lock that the operating system holds for the process (flock) and gives back whenever it ends, by
    kill -9 or a power cut, too. So a claim is never stale and no process id is compared. The locks work between
    computers only where their common file system has flock (NFSv4 has). A process that ends in order (Ctrl-C, an
    exception) gives its claims back itself, and that counts as no death.
    """

    def __init__(self, folder: Path | str, attempts: int = 3, crashes: int = 10) -> None:
        self.folder, self.attempts, self.crashes = Path(folder).absolute(), attempts, crashes
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def open(cls, state: Path | str, config: Monitoring) -> Ledger:
        """The ledger that everything with the same state folder (``.graincast/monitoring`` of a checkout) shares."""
        return cls(Path(state) / "ledger", config.attempts, config.crashes)

    def claim(self, session: Session) -> bool:
        """Take a session for this process, until `done`, `failed` or `release`, or the process ends.

        Returns
        -------
        bool
            False where another thread or process has it, or it is done or set aside.
        """
        with self._exclusive():
            record = self._read(session.digest)
            if record["state"] in FINAL or not self._hold(session.digest):
                return False
            _note_death(record)
            if sum(claim["ended"] == "died" for claim in record["claims"]) >= self.crashes:
                reason = f"processing it ended {self.crashes} times without a word (killed, out of memory, power); the monitor's log says when"
                self._write({**record, "name": session.name, "state": "set aside", "reason": reason, "told": False})
                self._let_go(session.digest)
                logger.error("session '%s' is set aside: %s", session.name, reason)
                return False
            record["claims"].append({"when": _now(), "process": os.getpid(), "ended": None})
            self._write({**record, "name": session.name, "state": "claimed", "reason": None})
        atexit.register(self._release_at_exit, session, os.getpid())
        return True

    def done(self, session: Session, result: Mapping[str, Any] | None = None) -> bool:
        """Note that a claimed session is processed.

        Parameters
        ----------
        result : Mapping, optional
            What to remember of it, JSON-able.

        Returns
        -------
        bool
            False where the folder's content is no longer what was claimed. Then the session is not done: as it is
            now it is another one, which the next look finds.
        """
        try:
            unchanged = session_digest(session.folder) == session.digest
        except (OSError, UserError):  # gone or no longer readable, which is a change, too
            unchanged = False
        if unchanged:
            self._finish(session, "done", "done", result=dict(result or {}))
        else:
            reason = "its files changed while they were processed"
            self._finish(session, "open", reason, reason=reason)
            logger.warning("session '%s': %s; it is processed again as it is now", session.name, reason)
        return unchanged

    def failed(self, session: Session, reason: str) -> bool:
        """Note that processing a claimed session failed, in a sentence.

        Returns
        -------
        bool
            Whether the session has now failed too often and is set aside, of which the caller tells a person.
        """
        with self._exclusive():
            failures = self._read(session.digest)["failures"] + 1
        set_aside = failures >= self.attempts
        self._finish(session, "set aside" if set_aside else "failed", f"failed: {reason}", failures=failures, reason=reason, told=set_aside)
        return set_aside

    def release(self, session: Session, reason: str) -> None:
        """Give a claimed session back without counting it as a failure: a store was down, the monitor was told to stop."""
        self._finish(session, "open", f"released: {reason}", reason=reason)

    def retry(self, name: str) -> int:
        """Have sessions of this name or digest that are done, failed or were set aside processed again; how many there were."""
        with self._exclusive():
            again = [r for r in self.records() if name in (r["name"], r["digest"]) and r["state"] in ("failed", *FINAL)]
            for record in again:
                claims = [claim | ({"ended": "died, before a retry"} if claim["ended"] == "died" else {}) for claim in record["claims"]]
                self._write({**record, "state": "open", "failures": 0, "result": None, "claims": claims})
        return len(again)

    def records(self) -> list[dict[str, Any]]:
        """Every session ever claimed, oldest first: ``digest, name, state, failures, reason, result, claims``.

        ``state`` is ``claimed`` for one that is being processed, and for one whose process died until it is claimed
        again. ``claims`` has a row a claim: ``when``, ``process``, ``ended``.

        Raises
        ------
        UserError
            If a record is damaged.
        """
        records = [self._read(file.stem) for file in self.folder.glob("*.json") if re.fullmatch("[0-9a-f]{64}", file.stem)]
        return sorted(records, key=lambda record: (record["claims"][0]["when"] if record["claims"] else "", record["digest"]))

    def record(self, digest: str) -> dict[str, Any]:
        """What is known of one session, as in `records`; one never claimed is ``open``."""
        return self._read(digest)

    def in_progress(self, digest: str) -> bool:
        """Whether a living process has claimed the session."""
        with self._exclusive():
            if self._lock_file(digest) in _held:
                return True
            if not self._lock_file(digest).exists():
                return False
            free = self._hold(digest)
            if free:
                self._let_go(digest)
            return not free

    def _release_at_exit(self, session: Session, process: int) -> None:
        """A process that was told to stop did not die over its session."""
        if os.getpid() == process and self._lock_file(session.digest) in _held:  # not a fork of it
            self.release(session, "the monitor was stopped")

    def _finish(self, session: Session, state: State, ended: str, **changes: Any) -> None:
        with self._exclusive():
            if self._lock_file(session.digest) not in _held:
                raise RuntimeError(f"session '{session.name}' is not claimed by this process")
            record = self._read(session.digest)
            record["claims"][-1] |= {"ended": ended, "when_ended": _now()}
            self._write({**record, "state": state, **changes})
            self._let_go(session.digest)

    def _read(self, digest: str) -> dict[str, Any]:
        file = self.folder / f"{digest}.json"
        try:
            record = json.loads(file.read_text())
            if record["digest"] != digest or record["format"] != FORMAT or not isinstance(record["claims"], list):
                raise ValueError("not the record of this session")
        except FileNotFoundError:
            return {"format": FORMAT, "digest": digest, "name": None, "state": "open", "failures": 0, "reason": None, "result": None, "claims": []}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the record {file} cannot be read ({error}); delete it, and its session is processed again") from error
        return record

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._writable():
            write_whole(self.folder / f"{record['digest']}.json", json.dumps(record, indent=1, allow_nan=False))

    def _lock_file(self, digest: str) -> Path:
        return self.folder / f"{digest}.lock"

    def _hold(self, digest: str) -> bool:
        """Take the session's lock for this process; False where it has it already or another one does."""
        from filelock import FileLock, Timeout

        file = self._lock_file(digest)
        if file in _held:
            return False
        lock = FileLock(file, thread_local=False)
        try:
            with self._writable():
                lock.acquire(blocking=False)
        except Timeout:
            return False
        _held[file] = lock
        return True

    def _let_go(self, digest: str) -> None:
        _held.pop(self._lock_file(digest)).release()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Nobody else reads and writes records meanwhile."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / "ledger.lock", timeout=LOCK_SECONDS)
        try:
            with self._writable():
                lock.acquire()
        except Timeout:
            raise UserError(f"the ledger {self.folder} has been locked for {LOCK_SECONDS:.0f} s; a monitor hangs, "
                            "end it and start it again") from None
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        from filelock import Timeout

        try:
            yield
        except Timeout:  # an OSError, but no fault of the folder's
            raise
        except OSError as error:
            raise UserError(f"the ledger {self.folder} cannot be written: {error.strerror or error}; a folder that you may write to, "
                            "with space on the disk, would be right") from error

    # what earlier looks saw, so that old sessions need not be read again

    def recall(self) -> dict[str, dict[str, Any]]:
        """What looks have remembered, by the folder's path: ``signature``, ``since``, ``digest``, ``told``."""
        try:
            memory = json.loads((self.folder / "looks.json").read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("what earlier looks saw is lost (%s); every session is read again", error)
            return {}
        return memory if isinstance(memory, dict) else {}

    def remember(self, inbox: Path, seen: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace what is remembered of an inbox's folders."""
        with self._exclusive():
            before = self.recall()
            others = {path: entry for path, entry in before.items() if Path(path).parent != inbox}
            if (after := {**others, **seen}) != before:
                self._write_looks(after)

    def remember_told(self, inbox: Path, news: Mapping[str, str]) -> None:
        """Remember of which sentences, by the names of an inbox's folders, a person was told."""
        with self._exclusive():
            memory = self.recall()
            told = {_key(inbox, name): {**memory.get(_key(inbox, name), {}), "told": sentence} for name, sentence in news.items()}
            if told:
                self._write_looks({**memory, **told})

    def _write_looks(self, memory: Mapping[str, Mapping[str, Any]]) -> None:
        with self._writable():
            write_whole(self.folder / "looks.json", json.dumps(memory, indent=1))


def _note_death(record: dict[str, Any]) -> None:
    """Called by who got the lock: whoever had the claim before is dead if it did not end it."""
    if record["claims"] and record["claims"][-1]["ended"] is None:
        record["claims"][-1]["ended"] = "died"
        logger.warning("session '%s' is taken over: process %s died over it", record["name"], record["claims"][-1]["process"])


# ------------------------------------------------------------------------------------------------------- the inbox


def look_into(inbox: Path | str, ledger: Ledger, settle_seconds: float = 60.0) -> Look:
    """Look for sessions in an inbox.

    Parameters
    ----------
    inbox : Path
        Each of its sub-folders is a session, files in deeper folders included. Hidden folders and what operating
        systems leave behind are passed over.
    ledger : Ledger
        Knows what has been processed, and what earlier looks saw.
    settle_seconds : float
        A session is whole when nothing in it has changed for so long, s, and none of its files bears a name such as
        ``a.tif.part``.

    Returns
    -------
    Look

    Raises
    ------
    UserError
        If the inbox is no folder or cannot be read.

    Notes
    -----
    "Has not changed" is told in two ways, of which one suffices: the newest change time of its files and folders is
    old enough, and the files were the same before and after they were read; or this process's clock says that the
    first look that saw it like this was long enough ago, which also holds where a file server's clock is wrong or a
    file is dated into the future. A copy that stalls for longer passes for whole; it becomes another session, and is
    processed again, when it goes on. Links and devices are never followed or opened; they count with their name and
    target.
    """
    inbox = Path(inbox).absolute()
    entries = _entries(inbox)
    memory, seen, found, digests = ledger.recall(), dict[str, dict[str, Any]](), Look(inbox), dict[str, str]()
    told = set[str]()
    for entry in entries:
        before = memory.get(str(inbox / entry), {})
        try:
            view = _View.of(inbox, entry, before, settle_seconds)
        except UserError as error:
            found.refused[_printable(entry)] = str(error)
            seen[_key(inbox, entry)] = {}
            continue
        seen[_key(inbox, entry)] = view.memory
        if view.unsettled:
            found.waiting[entry] = view.unsettled
            continue
        if _sort_in(Session(entry, inbox / entry, view.digest), ledger, found, digests):
            told.add(entry)
    for path, entry_memory in seen.items():
        name = Path(path).name
        sentence = found.refused.get(name) or found.set_aside.get(name)
        known = name in told or memory.get(path, {}).get("told") == sentence
        if sentence and not known:
            found.news[name] = sentence
        entry_memory["told"] = sentence if known else None
    found.ready.sort(key=lambda session: (seen[_key(inbox, session.name)]["since"], session.name))
    ledger.remember(inbox, seen)
    return found


def _sort_in(session: Session, ledger: Ledger, found: Look, digests: dict[str, str]) -> bool:
    """Put a whole session where it belongs, by what the ledger says of its content; whether a person knows of that."""
    if session.digest in digests:
        found.waiting[session.name] = f"it holds the same files as '{digests[session.digest]}', which are processed once"
        return True
    digests[session.digest] = session.name
    try:
        record = ledger.record(session.digest)
        if record["state"] == "set aside":
            found.set_aside[session.name] = f"set aside: {record['reason']}"
        elif record["state"] not in FINAL and not ledger.in_progress(session.digest):
            found.ready.append(session)
    except UserError as error:
        found.refused[session.name] = str(error)
        return False
    return bool(record.get("told"))


def _entries(inbox: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(inbox) if not CLUTTER.fullmatch(name))
    except NotADirectoryError:
        raise UserError(f"monitoring.inbox: '{inbox}' is no folder; the folder that holds a folder for each session would be right") from None
    except FileNotFoundError:
        raise UserError(f"monitoring.inbox: '{inbox}' does not exist; an existing folder would be right") from None
    except OSError as error:
        raise UserError(f"monitoring.inbox: '{inbox}' cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class _View:
    """One sub-folder as it is now."""

    digest: str
    unsettled: str
    memory: dict[str, Any]

    @classmethod
    def of(cls, inbox: Path, name: str, before: Mapping[str, Any], settle_seconds: float) -> _View:
        """A UserError says why it can be no session."""
        folder, now = inbox / name, time.time()
        _check_name(name)
        _check_kind(folder)
        with _readable(folder):
            files, newest = _scan(folder)
            signature = hashlib.sha256(json.dumps(files).encode()).hexdigest()
            known = before.get("signature") == signature
            since = min(before["since"], now) if known else now
            memory: dict[str, Any] = {"signature": signature, "since": since, "digest": before.get("digest") if known else None}
            if unsettled := _unsettled(name, files, quiet=max(now - since, now - newest), settle_seconds=settle_seconds):
                return cls("", unsettled, memory)
            if memory["digest"] is None:
                memory["digest"] = session_digest(folder)
                if _scan(folder)[0] != files:
                    return cls("", "it is being written", memory | {"since": now, "signature": None, "digest": None})
        return cls(memory["digest"], "", memory)


def _unsettled(name: str, files: list[list[Any]], quiet: float, settle_seconds: float) -> str:
    """Why a folder is not whole yet; empty where it is. `quiet`: seconds since its last change."""
    partial = next((part for part in (name, *(part for path, *_ in files for part in path.split("/"))) if PARTIAL.fullmatch(part)), None)
    if partial:
        return f"'{_printable(partial)}' is a name of files that are still being copied; when the copy was given up, delete it"
    if not files:
        return "it is empty"
    if quiet < settle_seconds:
        return f"it changed less than {settle_seconds:g} s ago"
    return ""


def _check_name(name: str) -> None:
    if not name.isprintable() or name != name.strip() or name[0] in "-~" or re.search(r'[\\/:*?"<>|]', name) or ".." in name:
        raise UserError(f"{_printable(name)} cannot name a session; letters, digits, spaces, '_', '-' and '.' would be right, so rename the folder")
    if len(name) > LONGEST_NAME:
        raise UserError(f"{name[:40]}... has {len(name)} characters; a folder's name of at most {LONGEST_NAME} would be right")


def _check_kind(folder: Path) -> None:
    with _readable(folder):
        mode = folder.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise UserError(f"{folder.name} is a link, which is not followed; a copy of the folder would be right")
    if not stat.S_ISDIR(mode):
        raise UserError(f"{folder.name} lies loose in the inbox; a folder for each session would be right")


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{folder.name} was taken away while it was read") from None
    except OSError as error:
        place = os.path.relpath(error.filename, folder) if isinstance(error.filename, str) and os.path.isabs(error.filename) else error.filename
        inside = f", {_printable(str(place))}," if place and place != "." else ""
        raise UserError(f"{folder.name}{inside} cannot be read: {error.strerror}; let the monitor's user read it") from error


# ------------------------------------------------------------------------------------------------ what lies in a folder


def session_digest(folder: Path | str) -> str:
    """SHA-256 of a folder's content, 64 hexadecimal digits.

    Parameters
    ----------
    folder : Path
        A folder; the relative names and the bytes of its files count, at any depth. Hidden files and what operating
        systems leave behind (``Thumbs.db``) do not count; of links and devices the name and the target do.

    Raises
    ------
    OSError
        If something in it cannot be read.
    UserError
        If a file is replaced while it is read.
    """
    listing = []
    for path, name, directory, status in _walk(Path(folder)):
        if CLUTTER.fullmatch(name):
            continue
        if stat.S_ISREG(status.st_mode):
            content = _file_digest(name, directory, status)
        elif stat.S_ISLNK(status.st_mode):
            content = "link to " + os.fsencode(os.readlink(name, dir_fd=directory)).decode("latin-1")
        else:
            content = "neither file nor folder"
        listing.append((path, content))
    return hashlib.sha256(json.dumps(sorted(listing)).encode()).hexdigest()


def _file_digest(name: str, directory: int, expected: os.stat_result) -> str:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != (expected.st_dev, expected.st_ino):
            raise UserError(f"{_printable(name)} was replaced while it was read")
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _scan(folder: Path) -> tuple[list[list[Any]], float]:
    """Every file's path, inode, size and times, and partial ones' paths; and when anything was changed last, s since the epoch."""
    files, newest = [], folder.lstat().st_ctime
    for path, name, _, status in _walk(folder):
        newest = max(newest, status.st_ctime, status.st_mtime)
        if PARTIAL.fullmatch(name) or not CLUTTER.fullmatch(name):
            files.append([path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return sorted(files), newest


def _walk(folder: Path) -> Iterator[tuple[str, str, int, os.stat_result]]:
    """Path, name, open folder and status of all in a folder but the folders it goes into; no link is followed, by no race either.

    Paths are relative, with "/", each byte a character (latin-1), so that names in no encoding have one, too.
    """

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files, directory in os.fwalk(folder, follow_symlinks=False, onerror=refuse):
        relative = os.fsencode(os.path.relpath(place, folder)).decode("latin-1")
        links = {name for name in folders if stat.S_ISLNK(os.lstat(name, dir_fd=directory).st_mode)}
        clutter = {name for name in folders if CLUTTER.fullmatch(name)}
        folders[:] = sorted({*folders} - links - clutter)
        for name in {*files, *links, *clutter}:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            encoded = os.fsencode(name).decode("latin-1")
            yield encoded if relative == "." else f"{relative}/{encoded}", name, directory, status


# ---------------------------------------------------------------------------------------------------------- helpers


def write_whole(file: Path, text: str) -> None:
    """Replace a text file so that a crash leaves the old or the new one whole."""
    with whole_file(file) as partial:
        partial.write_text(text)


def _key(inbox: Path, name: str) -> str:
    return str(inbox / _printable(name))


def _printable(name: str) -> str:
    """A name as it may stand in a sentence or a log: no line breaks, no control characters, no bytes without meaning."""
    return name if name.isprintable() else name.encode("unicode_escape", "surrogatepass").decode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
