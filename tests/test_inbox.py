"""The inbox, its ledger, the watch, alerts and the drift history: what dies, comes twice or is not whole yet."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from graincast.config import Monitoring, load_config
from graincast.errors import Unavailable, UserError
from graincast.monitor import inbox as inbox_module
from graincast.monitor.alerts import alert
from graincast.monitor.drift import Drift
from graincast.monitor.history import draw_history, history, record
from graincast.monitor.inbox import Ledger, Session, look_into, session_digest
from graincast.monitor.schedule import Times, Watch, state_file

ROOT = Path(__file__).parents[1]


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state" / "ledger")


def deliver(inbox: Path, name: str = "monday", **files: bytes) -> Path:
    """A session's folder; a keyword a file, `__` for a slash and `_` for a dot."""
    for file, content in (files or {"a_tif": name.encode()}).items():
        path = inbox / name / file.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return inbox / name


def only(inbox: Path, ledger: Ledger) -> Session:
    (session,) = look_into(inbox, ledger, 0).ready
    return session


def python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A process of its own; `code` finds the arguments in `sys.argv`."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come to that in time")


# a session is its content


def test_digest_is_of_names_and_bytes_alone(inbox: Path) -> None:
    first = deliver(inbox, "one", a_tif=b"1", deep__b_tif=b"2")
    same = deliver(inbox, "two", deep__b_tif=b"2", a_tif=b"1")
    (same / "Thumbs.db").write_bytes(b"clutter")
    (same / ".DS_Store").write_bytes(b"clutter")
    os.utime(same / "a.tif", (0, 0))
    assert session_digest(first) == session_digest(same)
    others = [deliver(inbox, "3", a_tif=b"2", deep__b_tif=b"1"), deliver(inbox, "4", a_tif=b"1", b_tif=b"2"),
              deliver(inbox, "5", a_tif=b"1", deep__b_tif=b"2", c_tif=b""), deliver(inbox, "6", a_tif=b"12", deep__b_tif=b"")]
    assert len({session_digest(folder) for folder in (first, *others)}) == 5


def test_renamed_and_copied_sessions_are_not_processed_again(inbox: Path, ledger: Ledger) -> None:
    deliver(inbox)
    session = only(inbox, ledger)
    assert ledger.claim(session)
    assert ledger.done(session, {"grains": 7})
    assert look_into(inbox, ledger, 0).ready == []
    session.folder.rename(inbox / "tuesday")
    deliver(inbox, "copy", a_tif=b"monday")
    assert look_into(inbox, ledger, 0).ready == []
    assert ledger.records()[0] | {"claims": None} == {"format": 1, "digest": session.digest, "name": "monday", "state": "done", "failures": 0,
                                                      "reason": None, "result": {"grains": 7}, "claims": None}
    (inbox / "tuesday" / "b.tif").write_bytes(b"one more")
    assert only(inbox, ledger).name == "tuesday"


def test_two_folders_of_one_content_are_one_session(inbox: Path, ledger: Ledger) -> None:
    deliver(inbox, "a", x_tif=b"1")
    deliver(inbox, "b", x_tif=b"1")
    found = look_into(inbox, ledger, 0)
    assert [session.name for session in found.ready] == ["a"]
    assert "same files as 'a'" in found.waiting["b"]


def test_longest_waiting_session_comes_first(inbox: Path, ledger: Ledger) -> None:
    for name in ("zebra", "yak", "ant"):
        deliver(inbox, name)
        look_into(inbox, ledger, 0)
    assert [session.name for session in look_into(inbox, ledger, 0).ready] == ["zebra", "yak", "ant"]


def test_old_sessions_are_not_read_again(inbox: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(inbox, "a")
    deliver(inbox, "b")
    read: list[str] = []
    monkeypatch.setattr(inbox_module, "session_digest", lambda folder: read.append(folder.name) or session_digest(folder))
    assert [len(look_into(inbox, ledger, 0).ready) for _ in range(3)] == [2, 2, 2]
    (inbox / "b" / "a.tif").write_bytes(b"!")
    assert len(look_into(inbox, ledger, 0).ready) == 2
    assert read == ["a", "b", "b"]


# half-copied


def test_session_being_copied_is_left_until_whole(inbox: Path, ledger: Ledger) -> None:
    code = """
        import sys, time
        for i in range(8):
            with open(f"{sys.argv[1]}/{i}.tif", "wb") as file:
                for _ in range(4):
                    file.write(b"x" * 1000); file.flush(); time.sleep(0.03)
    """
    (inbox / "session").mkdir()
    with python(code, inbox / "session") as copying:
        while copying.poll() is None:
            assert look_into(inbox, ledger, 0.4).ready == []
    until(lambda: look_into(inbox, ledger, 0.4).ready)
    assert only(inbox, ledger).digest == session_digest(inbox / "session")
    assert {file.stat().st_size for file in (inbox / "session").iterdir()} == {4000}


@pytest.mark.parametrize("name", ["b.tif.part", "b.tif.filepart", ".b.tif.xY12zA", "b.crdownload", "b.TMP", ".goutputstream-ABC", "deep.part/b.tif",
                                  ".rsync-partial/b.tif"])
def test_partial_names_hold_a_session_back(name: str, inbox: Path, ledger: Ledger) -> None:
    partial = deliver(inbox) / name
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(b"half")
    found = look_into(inbox, ledger, 0)
    assert found.ready == []
    assert "still being copied" in found.waiting["monday"]
    partial.unlink()
    if partial.parent.name != "monday":
        partial.parent.rmdir()
    assert only(inbox, ledger).name == "monday"


def test_preserved_dates_do_not_make_a_fresh_copy_old(inbox: Path, ledger: Ledger) -> None:
    os.utime(deliver(inbox) / "a.tif", (1e9, 1e9))
    os.utime(inbox / "monday", (1e9, 1e9))
    assert look_into(inbox, ledger, 60).ready == []


def test_dates_in_the_future_do_not_hold_a_session_back_for_ever(inbox: Path, ledger: Ledger) -> None:
    os.utime(deliver(inbox) / "a.tif", (4e9, 4e9))
    assert look_into(inbox, ledger, 0.3).ready == []
    time.sleep(0.35)
    assert only(inbox, ledger).name == "monday"
    assert look_into(inbox, ledger, 0.3).ready


def test_file_written_while_it_is_read(inbox: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(inbox)

    def digest(folder: Path) -> str:
        value = session_digest(folder)
        (folder / "a.tif").write_bytes(b"more than before")
        return value

    with monkeypatch.context() as patch:
        patch.setattr(inbox_module, "session_digest", digest)
        found = look_into(inbox, ledger, 0)
    assert (found.ready, found.waiting) == ([], {"monday": "it is being written"})
    assert only(inbox, ledger).digest == session_digest(inbox / "monday")


def test_session_that_changes_while_it_is_processed_is_not_done(inbox: Path, ledger: Ledger) -> None:
    deliver(inbox)
    before = only(inbox, ledger)
    assert ledger.claim(before)
    (inbox / "monday" / "b.tif").write_bytes(b"late")
    assert not ledger.done(before, {})
    after = only(inbox, ledger)
    assert after.digest != before.digest
    assert ledger.claim(after)
    assert ledger.done(after, {})
    (inbox / "monday" / "b.tif").unlink()
    assert only(inbox, ledger) == before
    (inbox / "monday" / "a.tif").unlink()
    assert look_into(inbox, ledger, 0).waiting == {"monday": "it is empty"}


# bad input


def test_what_can_be_no_session_is_told_once_and_the_rest_goes_on(inbox: Path, ledger: Ledger, tmp_path: Path) -> None:
    secret = deliver(tmp_path, "elsewhere")
    (inbox / "link").symlink_to(secret)
    (inbox / "loose.tif").write_bytes(b"1")
    tricks = ["-rf", "a\nb", "a..b", "back\\slash", " space", "name:stream", "right\u202eleft", "x" * 121, "wild*"]
    for name in tricks:
        deliver(inbox, name)
    os.mkdir(os.fsencode(inbox) + b"/\xff\xfe")
    deliver(inbox, "Stahl 316L_(ätzend)-2.1")
    deliver(inbox, ".hidden")
    first = look_into(inbox, ledger, 0)
    assert [session.name for session in first.ready] == ["Stahl 316L_(ätzend)-2.1"]
    assert len(first.news) == len(tricks) + 3
    assert all((name + sentence).isprintable() and "would be right" in sentence for name, sentence in first.news.items())
    first.told(ledger)
    found = look_into(inbox, ledger, 0)
    assert len(found.refused) == len(tricks) + 3
    assert found.news == {}
    assert "is a link" in found.refused["link"]
    assert "loose in the inbox" in found.refused["loose.tif"]


def test_untold_news_stay_news(inbox: Path, ledger: Ledger) -> None:
    (inbox / "loose.tif").write_bytes(b"1")
    looks = [look_into(inbox, ledger, 0) for _ in range(3)]  # of which the first two died before they told anybody
    assert [list(look.news) for look in looks] == [["loose.tif"]] * 3
    looks[-1].told(ledger)
    (inbox / "-rf").mkdir()
    look = look_into(inbox, ledger, 0)
    assert (list(look.news), list(look.refused)) == (["-rf"], ["-rf", "loose.tif"])
    look.told(ledger)
    assert [look_into(inbox, ledger, 0).news for _ in range(2)] == [{}, {}]
    (inbox / "loose.tif").unlink()
    look_into(inbox, ledger, 0)
    (inbox / "loose.tif").symlink_to("elsewhere")  # another fault under the same name
    assert list(look_into(inbox, ledger, 0).news) == ["loose.tif"]


def test_links_and_pipes_in_a_session_are_not_followed(inbox: Path, ledger: Ledger, tmp_path: Path) -> None:
    outside = deliver(tmp_path, "outside")
    folder = deliver(inbox)
    (folder / "file.tif").symlink_to(outside / "a.tif")
    (folder / "folder").symlink_to(outside)
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe.tif")
    before = only(inbox, ledger).digest
    (outside / "a.tif").write_bytes(b"changed outside")
    assert session_digest(folder) == before
    (folder / "file.tif").unlink()
    (folder / "file.tif").symlink_to("elsewhere")
    changed = session_digest(folder)
    (folder / "folder").unlink()
    assert len({before, changed, session_digest(folder)}) == 3


def test_unreadable_sessions_are_named_and_the_rest_goes_on(inbox: Path, tmp_path: Path) -> None:
    deliver(inbox, "closed")
    deliver(inbox, "one closed")
    deliver(inbox, "open")
    for path in (inbox / "closed", inbox / "one closed" / "a.tif"):
        path.chmod(0)
    code = """
        import json, os, sys
        from graincast.monitor.inbox import *
        os.chdir(sys.argv[1])  # relative, as the folders above may be the user's alone
        look_into("warm", Ledger("warm-up"), 0)  # imports what it needs while it may
        if os.getuid() == 0:  # who may read everything
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        found = look_into("inbox", Ledger("ledger"), 0)
        print(json.dumps([[s.name for s in found.ready], found.refused]))
    """
    deliver(tmp_path / "warm")
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger").chmod(0o777)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):  # pytest's, for its user alone
        folder.chmod(0o755)
    with python(code, tmp_path) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    ready, refused = json.loads(output)
    assert ready == ["open"]
    assert refused == {"closed": "closed cannot be read: Permission denied; let the monitor's user read it",
                       "one closed": "one closed, a.tif, cannot be read: Permission denied; let the monitor's user read it"}


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("")], ids=["absent", "file"])
def test_inbox_that_is_none(make: Callable[[Path], Any], tmp_path: Path, ledger: Ledger) -> None:
    make(tmp_path / "inbox")
    with pytest.raises(UserError, match=r"monitoring\.inbox: '.*inbox' (does not exist|is no folder)"):
        look_into(tmp_path / "inbox", ledger)


def test_damaged_record_stops_its_session_alone(inbox: Path, ledger: Ledger) -> None:
    deliver(inbox, "a")
    deliver(inbox, "b")
    session = look_into(inbox, ledger, 0).ready[0]
    (ledger.folder / f"{session.digest}.json").write_text('{"digest": ')
    found = look_into(inbox, ledger, 0)
    assert [s.name for s in found.ready] == ["b"]
    assert "delete it" in found.refused["a"]
    (ledger.folder / f"{session.digest}.json").unlink()
    assert len(look_into(inbox, ledger, 0).ready) == 2


def test_ledger_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"ledger .* cannot be written"):
        Ledger(tmp_path / "file" / "ledger")


# once, whoever dies


def test_one_of_many_threads_gets_a_session(inbox: Path, ledger: Ledger) -> None:
    deliver(inbox)
    session, wins = only(inbox, ledger), list[bool]()
    threads = [threading.Thread(target=lambda: wins.append(Ledger(ledger.folder).claim(session))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(wins) == {True: 1, False: 11}
    assert look_into(inbox, ledger, 0).ready == []
    finish = threading.Thread(target=lambda: Ledger(ledger.folder).done(session))
    finish.start()
    finish.join()
    assert ledger.record(session.digest)["state"] == "done"
    with pytest.raises(RuntimeError, match="not claimed"):
        ledger.done(session)


MONITOR = """
    import os, signal, sys, time
    from graincast.monitor import inbox
    folder, state, fatal, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    calls, sync = 0, os.fsync

    def fsync(descriptor):  # one in every write, before the new file stands, and one after
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync
    ledger = inbox.Ledger(state, crashes=1000)
    while sessions := inbox.look_into(folder, ledger, 0).ready:
        for session in sessions:
            if ledger.claim(session):
                time.sleep(pause)
                with open(state + "/processed", "a") as file:
                    file.write(session.name + "\\n")
                ledger.done(session, {"by": os.getpid()})
"""


def test_finders_at_once_share_the_sessions(inbox: Path, ledger: Ledger) -> None:
    names = [f"session {i}" for i in range(12)]
    for name in names:
        deliver(inbox, name)
    finders = [python(MONITOR, inbox, ledger.folder, 0, 0.02) for _ in range(3)]
    errors = [finder.communicate()[1] for finder in finders]
    assert [finder.returncode for finder in finders] == [0] * 3, errors
    assert sorted((ledger.folder / "processed").read_text().splitlines()) == sorted(names)
    assert {record["state"] for record in ledger.records()} == {"done"}
    assert all(len(record["claims"]) == 1 for record in ledger.records())


def test_killed_at_every_write_nothing_is_lost_or_torn(inbox: Path, tmp_path: Path) -> None:
    deliver(inbox)
    died, again = list[int](), list[int]()
    for fatal in range(1, 50):
        ledger = Ledger(tmp_path / f"ledger {fatal}")
        first = python(MONITOR, inbox, ledger.folder, fatal, 0)
        errors = first.communicate()[1]
        done = [r["state"] for r in ledger.records()] == ["done"]  # and no record is damaged
        if first.returncode == 0:
            break
        assert first.returncode == -signal.SIGKILL, errors
        died.append(fatal)
        second = python(MONITOR, inbox, ledger.folder, 0, 0)
        errors = second.communicate()[1]
        assert second.returncode == 0, errors
        assert [r["state"] for r in ledger.records()] == ["done"]
        processed = (ledger.folder / "processed").read_text().split()
        assert len(processed) <= 2
        if len(processed) == 2:
            assert not done
            again.append(fatal)
        assert not any(file.name.endswith(".json") and not file.read_text().endswith("}") for file in ledger.folder.iterdir())
    assert len(died) >= 6
    assert len(again) == 1  # killed between the processing and its record, it is processed again


def test_claim_of_a_killed_process_is_taken_over(inbox: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    deliver(inbox)
    session = only(inbox, ledger)
    code = """
        import sys, time
        from graincast.monitor.inbox import *
        ledger = Ledger(sys.argv[2])
        print(ledger.claim(look_into(sys.argv[1], ledger, 0).ready[0]), flush=True)
        time.sleep(60)
    """
    with python(code, inbox, ledger.folder) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert look_into(inbox, ledger, 0).ready == []
        assert not ledger.claim(session)
        holder.kill()
    assert only(inbox, ledger) == session
    assert ledger.claim(session)
    assert f"process {holder.pid} died over it" in caplog.text
    assert ledger.done(session)
    assert [claim["ended"] for claim in ledger.record(session.digest)["claims"]] == ["died", "done"]


def test_monitor_that_is_interrupted_gives_its_session_back(inbox: Path, ledger: Ledger) -> None:
    deliver(inbox)
    code = """
        import os, sys
        from graincast.monitor.inbox import *
        ledger = Ledger(sys.argv[2])
        session = look_into(sys.argv[1], ledger, 0).ready[0]
        assert ledger.claim(session)
        if os.fork() == 0:
            sys.exit()  # which takes nothing from its parent
        os.wait()
        print(Ledger(sys.argv[2]).record(session.digest)["state"])
        raise KeyboardInterrupt
    """
    with python(code, inbox, ledger.folder) as monitor:
        output, _ = monitor.communicate()
    assert output == "claimed\n"
    left = ledger.record(only(inbox, ledger).digest)
    assert (left["state"], left["failures"], left["claims"][0]["ended"]) == ("open", 0, "released: the monitor was stopped")


def test_session_that_kills_every_monitor_is_set_aside(inbox: Path, tmp_path: Path) -> None:
    deliver(inbox)
    code = """
        import os, signal, sys
        from graincast.monitor.inbox import *
        ledger = Ledger(sys.argv[2], crashes=2)
        for session in look_into(sys.argv[1], ledger, 0).ready:
            if ledger.claim(session):
                os.kill(os.getpid(), signal.SIGKILL)
    """
    codes = []
    for _ in range(3):
        with python(code, inbox, tmp_path / "ledger") as process:
            process.communicate()
        codes.append(process.returncode)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    ledger = Ledger(tmp_path / "ledger", crashes=2)
    found = look_into(inbox, ledger, 0)
    assert found.set_aside == found.news
    assert "ended 2 times without a word" in found.news["monday"]
    found.told(ledger)
    assert look_into(inbox, ledger, 0).news == {}
    assert ledger.retry("monday") == 1
    assert ledger.claim(only(inbox, ledger))


def test_failing_session_is_set_aside_with_its_reason(inbox: Path, tmp_path: Path) -> None:
    deliver(inbox, "bad")
    deliver(inbox, "good")
    ledger, outcomes = Ledger(tmp_path / "ledger", attempts=3), []
    for attempt in range(3):
        bad = next(session for session in look_into(inbox, ledger, 0).ready if session.name == "bad")
        assert ledger.claim(bad)
        ledger.release(bad, "the tracking store is down")  # which is not the session's fault
        assert ledger.claim(bad)
        outcomes.append(ledger.failed(bad, f"no grains ({attempt})"))
    assert outcomes == [False, False, True]
    found = look_into(inbox, ledger, 0)
    assert [session.name for session in found.ready] == ["good"]
    assert found.set_aside == {"bad": "set aside: no grains (2)"}
    assert found.news == {}  # who called `failed` tells of it
    assert not ledger.claim(bad)
    assert ledger.retry("nothing of that name") == 0
    assert ledger.retry("bad") == 1
    assert ledger.record(bad.digest)["failures"] == 0
    assert len(look_into(inbox, ledger, 0).ready) == 2


def test_locked_ledger_is_a_sentence(inbox: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "LOCK_SECONDS", 0.2)
    code = """
        import sys, time
        from filelock import FileLock
        with FileLock(sys.argv[1]):
            print("locked", flush=True)
            time.sleep(60)
    """
    with python(code, ledger.folder / "ledger.lock") as hung:
        assert hung.stdout is not None
        hung.stdout.readline()
        with pytest.raises(UserError, match="has been locked for"):
            ledger.claim(Session("a", inbox / "a", "0" * 64))
        hung.kill()


# when


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


CRONS: dict[str, Callable[[datetime], bool]] = {
    "0 6 * * 1-5": lambda t: (t.minute, t.hour) == (0, 6) and t.weekday() < 5,
    "*/20 8-9 * * *": lambda t: t.minute in (0, 20, 40) and t.hour in (8, 9),
    "30 12 1 * *": lambda t: (t.minute, t.hour, t.day) == (30, 12, 1),
    "@daily": lambda t: (t.minute, t.hour) == (0, 0),
}


@pytest.mark.parametrize("cron", CRONS)
@pytest.mark.parametrize("start", ["2026-02-27T05:59:59", "2026-01-01T12:30:00", "2026-06-05T08:20:01"])
def test_times_are_those_of_a_search_minute_by_minute(cron: str, start: str, berlin: None) -> None:
    moments = [datetime.fromisoformat(start).replace(second=0) + timedelta(minutes=i) for i in range(-60000, 60000)]
    due = [moment.timestamp() for moment in moments if CRONS[cron](moment)]
    times, now = Times(cron, 0), at(start)
    assert times.next(now) == min(moment for moment in due if moment > now)
    last = max(moment for moment in due if moment <= now)
    assert times.latest(now - 40 * 86400, now) == last
    assert times.latest(last - 1, now) == last
    assert times.latest(last, now) is None


def test_summer_time_neither_loses_nor_repeats(berlin: None) -> None:
    times = Times("30 2 * * *", 0)
    for begin, end, days in (("2026-03-27T12:00+01:00", "2026-03-31T12:00+02:00", 4), ("2026-10-23T12:00+02:00", "2026-10-27T12:00+01:00", 4)):
        now, taken, runs = at(begin), at(begin), list[float]()
        while now < at(end):  # a watch that asks every ten minutes
            if (due := times.latest(taken, now)) is not None:
                assert due <= now
                runs.append(due)
                taken = due
            assert times.next(taken) > now
            now += 600
        assert len(runs) == days
        gaps = [later - earlier for earlier, later in pairwise(runs)]
        assert all(23 * 3600 <= gap <= 25 * 3600 for gap in gaps)
    assert Times("*/15 * * * *", 0).next(at("2026-10-25T02:10+01:00")) == at("2026-10-25T03:00+01:00")  # in the hour that comes twice


def test_every_so_many_seconds() -> None:
    times = Times(None, 60)
    assert (times.next(1000), times.latest(1000, 1059), times.latest(1000, 1060), times.latest(1000, 5000)) == (1060, None, 1060, 5000)


@pytest.mark.parametrize("cron", ["0 6 * *", "61 * * * *", "0 0 30 2 *", "soon", "* * * * * *", ""])
def test_cron_that_is_none(cron: str) -> None:
    with pytest.raises(UserError, match=r"monitoring\.cron: .* would be right"):
        Times(cron, 60)


# the watch


def alerts_of(state: Path) -> list[dict[str, Any]]:
    file = state / "alerts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


WATCH = """
    import logging, sys
    from pathlib import Path
    from graincast.config import Monitoring
    from graincast.monitor.schedule import Watch
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    inbox, state, settings, *command = sys.argv[1:]
    Watch(Path(inbox), Monitoring.model_validate_json(settings), command, Path(state), Path.cwd()).run()
"""
JOB = """
    import os, sys, time
    with open(sys.argv[1], "a") as log:
        print("start", file=log, flush=True)
        try:
            time.sleep(float(sys.argv[2]))
        except KeyboardInterrupt:
            print("interrupted", file=log, flush=True)
            raise
        print("end", file=log, flush=True)
"""


class Bench:
    """An inbox with a session in it, and a watch over it whose pipeline writes into a log."""

    def __init__(self, folder: Path) -> None:
        self.inbox, self.state, self.log = folder / "inbox", folder / "state", folder / "log"
        self.inbox.mkdir()
        deliver(self.inbox)
        self.job = [sys.executable, "-c", textwrap.dedent(JOB), str(self.log)]

    def watch(self, seconds: float = 0.0, **settings: Any) -> subprocess.Popen[str]:
        options = Monitoring(settle_seconds=0, **settings).model_dump_json()
        return python(WATCH, self.inbox, self.state, options, *self.job, seconds)

    def lines(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def kept(self) -> dict[str, Any]:
        file = state_file(self.state, self.inbox)
        return json.loads(file.read_text()) if file.exists() else {}

    def keep(self, due: float, finished: bool = True) -> None:
        self.state.mkdir(exist_ok=True)
        state_file(self.state, self.inbox).write_text(json.dumps({"due": due, "finished": finished, "status": 0}))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def stop(process: subprocess.Popen[str], how: int = signal.SIGTERM) -> str:
    process.send_signal(how)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    return errors


def test_missed_times_are_caught_up_once(bench: Bench) -> None:
    now = time.time()
    bench.keep(due=now - 5.5 * 86400)
    cron = "0 0 * * *" if datetime.now().hour != 23 else "0 12 * * *"  # not due while this runs
    first = bench.watch(cron=cron)
    until(lambda: bench.lines() == ["start", "end"] and bench.kept()["finished"])
    time.sleep(0.5)
    assert "was missed, it is made now" in stop(first)
    assert 0 <= now - bench.kept()["due"] <= 86400
    again = bench.watch(cron=cron)
    time.sleep(1.5)
    stop(again, signal.SIGINT)
    assert bench.lines() == ["start", "end"]


def test_first_start_with_cron_waits_for_its_time(bench: Bench) -> None:
    process = bench.watch(cron="0 0 * * *" if datetime.now().hour != 23 else "0 12 * * *")
    until(bench.kept)
    time.sleep(0.5)
    stop(process)
    assert bench.lines() == []
    assert bench.kept()["finished"]


def test_runs_every_so_many_seconds_and_only_for_something_new(bench: Bench) -> None:
    process = bench.watch(every_seconds=1)
    until(lambda: bench.lines().count("end") >= 2)
    ledger = Ledger.open(bench.state, Monitoring())
    session = only(bench.inbox, ledger)
    assert ledger.claim(session)
    ledger.done(session)
    time.sleep(1.2)
    runs, due = len(bench.lines()), bench.kept()["due"]
    until(lambda: bench.kept()["due"] > due + 1.5)
    assert len(bench.lines()) == runs
    assert "0 sessions ready" in stop(process)


def test_run_that_was_cut_off_by_a_kill_is_made_again(bench: Bench) -> None:
    killed = bench.watch(seconds=1.0, every_seconds=3600)
    until(bench.lines)
    killed.kill()
    killed.communicate()
    assert not bench.kept()["finished"]
    process = bench.watch(every_seconds=3600)
    until(lambda: bench.kept()["finished"])
    assert "the last run was cut off" in stop(process)
    assert bench.lines().count("start") == 2


def test_told_to_stop_it_interrupts_the_run_and_makes_it_again_later(bench: Bench) -> None:
    process = bench.watch(seconds=60, every_seconds=3600)
    until(bench.lines)
    begin = time.monotonic()
    stop(process)
    assert time.monotonic() - begin < 5
    assert bench.lines() == ["start", "interrupted"]
    assert not bench.kept()["finished"]


def test_signal_at_whatever_moment_hangs_nothing() -> None:
    code = """
        import signal, time
        from graincast.monitor import schedule
        signal.signal(signal.SIGALRM, lambda *_: flag.set())
        flag, begin, seen = schedule._Flag(), time.monotonic(), 0
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        while time.monotonic() - begin < 2:
            flag = schedule._Flag()
            while not flag.wait(1e-5):
                pass
            seen += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(seen)
    """
    process = python(code)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert int(output) > 100


def test_second_signal_kills_a_run_that_does_not_end(bench: Bench) -> None:
    bench.job[2] = "import signal\nfor s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n" + bench.job[2]
    process = bench.watch(seconds=60, every_seconds=3600)
    until(bench.lines)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert process.poll() is None
    stop(process)
    assert bench.lines() == ["start"]


def test_one_watch_an_inbox(bench: Bench) -> None:
    first = bench.watch(seconds=60, every_seconds=3600)
    until(bench.lines)
    second = bench.watch()
    assert "UserError" in second.communicate()[1].splitlines()[-1]
    other = Watch(bench.inbox, Monitoring(), ["false"], bench.state, ROOT)
    assert other.once() == 0
    stop(first)
    assert bench.lines() == ["start", "interrupted"]


def test_failed_runs_and_lost_inboxes_are_told_once_and_it_goes_on(bench: Bench) -> None:
    bench.job[2] = "import sys; sys.exit(3)"
    process = bench.watch(every_seconds=1)
    until(lambda: alerts_of(bench.state))
    bench.inbox.rename(bench.inbox.with_name("away"))
    until(lambda: len(alerts_of(bench.state)) == 2)
    time.sleep(2.2)
    bench.inbox.with_name("away").rename(bench.inbox)
    stop(process)
    alerts = alerts_of(bench.state)
    assert [entry["event"] for entry in alerts[:2]] == ["run failed", "inbox unreadable"]
    assert "exit status 3" in alerts[0]["sentence"]
    assert "does not exist" in alerts[1]["sentence"]
    assert len(alerts) <= 3  # that the run fails again once the inbox is back


def test_clock_that_was_set_back_does_not_stop_the_watch(bench: Bench) -> None:
    now = time.time()
    for settings in (Monitoring(every_seconds=60), Monitoring(cron="* * * * *")):
        watch = Watch(bench.inbox, settings, ["true"], bench.state, ROOT)
        bench.keep(due=now + 86400)
        assert watch._due(now) is None
        due = watch._due(now + 61)
        assert due is not None
        assert now < due <= now + 61
        bench.keep(due=now + 86400, finished=False)
        assert watch._due(now) == now  # a run that was cut off is made at once
    bench.keep(due=now + 86400)
    process = bench.watch(every_seconds=1)
    until(lambda: bench.lines().count("end") >= 2)
    assert stop(process).count("the clock was set back") == 1
    assert abs(bench.kept()["due"] - time.time()) < 30


def test_why_a_session_waits_is_in_the_log_once(bench: Bench) -> None:
    (bench.inbox / "monday" / "a.tif").rename(bench.inbox / "monday" / "a.tif.part")
    process = bench.watch(every_seconds=1)
    due = until(bench.kept)["due"]
    until(lambda: bench.kept()["due"] > due + 2.5)
    (bench.inbox / "monday" / "a.tif.part").unlink()
    due = bench.kept()["due"]
    until(lambda: bench.kept()["due"] > due + 2.5)
    waits = [line for line in stop(process).splitlines() if line.startswith("session ")]
    assert [line.partition(": ")[0] for line in waits] == ["session 'monday' waits"] * 2, waits
    assert "'a.tif.part' is a name of files that are still being copied" in waits[0]
    assert waits[1].endswith("it is empty")
    assert bench.lines() == []


def test_damaged_state_is_a_sentence(bench: Bench) -> None:
    bench.keep(0)
    state_file(bench.state, bench.inbox).write_text("{")
    with pytest.raises(UserError, match=r"state file .* cannot be read .* delete it"):
        Watch(bench.inbox, Monitoring(), ["true"], bench.state, ROOT).run()


# the command line


@pytest.fixture
def checkout(tmp_path: Path) -> dict[str, str]:
    """The environment of a checkout whose `zenml` writes down what it was told."""
    (tmp_path / "checkout" / "pipelines").mkdir(parents=True)
    zenml = tmp_path / "bin" / "zenml"
    zenml.parent.mkdir()
    zenml.write_text('#!/bin/sh\necho "$PWD $*" >> "$GRAINCAST_ROOT/told"\nexit ${ZENML_STATUS:-0}\n')
    zenml.chmod(0o755)
    return {**os.environ, "GRAINCAST_ROOT": str(tmp_path / "checkout"), "PATH": f"{zenml.parent}:{os.environ['PATH']}"}


def graincast(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from graincast.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_watch_once_runs_the_pipeline_on_the_inbox(checkout: dict[str, str], inbox: Path) -> None:
    root, config = Path(checkout["GRAINCAST_ROOT"]), str(ROOT / "configs" / "demo.yaml")
    mine = root / "mine.yaml"
    tree = yaml.safe_load(Path(config).read_text())
    tree["parameters"]["config"]["monitoring"] = {"settle_seconds": 0}
    mine.write_text(yaml.safe_dump(tree))
    assert graincast(checkout, "watch", str(inbox), "-c", str(mine), "--once").returncode == 0
    assert not (root / "told").exists()
    deliver(inbox)
    assert graincast(checkout, "watch", str(inbox), "-c", str(mine), "--once").returncode == 0
    place, *words, copy = (root / "told").read_text().split()
    assert (Path(place), words) == (root, ["pipeline", "run", "pipelines.monitoring.monitoring_pipeline", "-c"])
    assert load_config(copy).monitoring.inbox == str(inbox)
    assert load_config(copy).model_copy(update={"monitoring": Monitoring()}) == load_config(config).model_copy(update={"monitoring": Monitoring()})
    assert graincast(checkout | {"ZENML_STATUS": "7"}, "watch", str(inbox), "-c", str(mine), "--once").returncode == 7
    for wrong, sentence in ((["--cron", "soon"], "monitoring.cron"), (["--cron", "@daily", "--every", "5"], "exclude each other")):
        refused = graincast(checkout, "watch", str(inbox), "-c", str(mine), *wrong)
        assert refused.returncode == 2
        assert sentence in refused.stderr
        assert refused.stderr.count("\n") == 1
    refused = graincast(checkout | {"GRAINCAST_ROOT": ""}, "watch", str(inbox))
    assert (refused.returncode, refused.stderr) == (2, "graincast: GRAINCAST_ROOT names no checkout of graincast; `source env.sh` in it first\n")


def test_sessions_shows_the_ledger_and_retries(checkout: dict[str, str], inbox: Path) -> None:
    ledger = Ledger.open(Path(checkout["GRAINCAST_ROOT"]) / ".graincast" / "monitoring", Monitoring(attempts=1))
    deliver(inbox)
    session = only(inbox, ledger)
    assert ledger.claim(session)
    assert ledger.failed(session, "no grains")
    shown = graincast(checkout | {"COLUMNS": "140"}, "sessions").stdout
    assert all(word in shown for word in ("monday", "set aside", "no grains", session.digest[:12]))
    assert graincast(checkout, "sessions", "--retry", "monday").returncode == 0
    assert only(inbox, ledger) == session
    assert "no session 'monday' is done, failed or set aside" in graincast(checkout, "sessions", "--retry", "monday").stderr
    assert ledger.claim(session)
    assert ledger.done(session, {"headline": "refused by its gate: noise"})
    shown = graincast(checkout | {"COLUMNS": "140"}, "sessions").stdout
    assert all(word in shown for word in ("done", "refused by its gate: noise"))
    assert look_into(inbox, ledger, 0).ready == []
    assert graincast(checkout, "sessions", "--retry", "monday").returncode == 0  # a gate was loosened
    assert only(inbox, ledger) == session
    assert "refused by its gate" not in graincast(checkout | {"COLUMNS": "140"}, "sessions").stdout


@pytest.fixture
def zenml(tmp_path: Path) -> dict[str, str]:
    """An environment with ZenML's state of its own: it would write into the checkout's."""
    (tmp_path / ".zen").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ZENML")}
    return {**kept, "GRAINCAST_ROOT": str(ROOT), "ZENML_CONFIG_PATH": str(tmp_path / "zenml"), "ZENML_REPOSITORY_PATH": str(tmp_path),
            "ZENML_ANALYTICS_OPT_IN": "false"}


@pytest.mark.slow
def test_local_orchestrator_has_no_schedule_and_says_what_to_run(zenml: dict[str, str], inbox: Path) -> None:
    refused = graincast(zenml, "schedule", "--cron", "0 6 * * 1-5", "-c", "configs/demo.yaml", "--inbox", str(inbox))
    assert refused.returncode == 2
    assert f"run `graincast watch {inbox} -c {ROOT}/configs/demo.yaml --cron '0 6 * * 1-5'` instead" in refused.stderr


# alerts and history


def test_alerts_of_many_processes_stay_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "alerts.jsonl").write_bytes(b'{"when": "2026", "event": "old"}\n{"cut short by a cra')
    code = """
        import sys
        from graincast.monitor.alerts import alert
        for i in range(20):
            alert("drift", f"{sys.argv[1]} {i} " + "x" * 9000, {}, sys.argv[2])
    """
    writers = [python(code, number, tmp_path) for number in range(3)]
    for writer in writers:
        writer.communicate()
    with caplog.at_level(logging.WARNING):
        alert("drift", "two\nlines", {"score": float("nan"), "sizes": [1.5]}, tmp_path)
    first, cut_short, *rest = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert cut_short == '{"cut short by a cra'  # which spoils no other line
    found = [json.loads(line) for line in (first, *rest)]
    assert len(found) == 1 + 60 + 1
    assert Counter(entry["sentence"].split()[0] for entry in found[1:-1]) == {"0": 20, "1": 20, "2": 20}
    assert (found[-1]["sentence"], found[-1]["figures"]) == ("two lines", {"score": None, "sizes": [1.5]})
    assert "drift: two lines" in caplog.text


def test_alert_that_cannot_be_written_is_logged_nevertheless(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        alert("drift", "defocus", {}, tmp_path / "file")
    assert "drift: defocus" in caplog.text


def verdict(score: float) -> Drift:
    severity = "none" if score < 1 else "strong"
    return Drift(score > 1, severity, "none" if score < 1 else "look", score > 1, [], f"score {score}",
                 {"columns_score": score, "embedding_score": score / 2, "mmd2": float("nan")})


def test_history_has_a_run_a_session_however_often_it_is_noted(tmp_path: Path) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        assert history().empty
        first = [record("monday", "a" * 64, verdict(score), champion="1", tags={"dvc.session": "f00", "none": None}) for score in (0.5, 0.6)]
        record("tuesday $x$", "b" * 64, verdict(4.0), champion="1")
        record("tuesday $x$", "b" * 64, verdict(0.7), champion="2")
        found = history()
    finally:
        mlflow.set_tracking_uri(before)
    assert first[0] == first[1]
    assert found[["session", "champion", "severity", "drifted", "columns_score"]].to_numpy().tolist() == [
        ["monday", "1", "none", False, 0.6], ["tuesday $x$", "1", "strong", True, 4.0], ["tuesday $x$", "2", "none", False, 0.7]]
    assert found["when"].is_monotonic_increasing
    assert "mmd2" not in found  # which was NaN
    for name in ("history.png", "history.svg"):
        assert draw_history(found, tmp_path / name).stat().st_size > 5000
    text = (tmp_path / "history.svg").read_text()
    assert all(f"<!-- {word}" in text for word in ("monday", "threshold", "model 2", "strong drift"))


def test_history_without_a_session_or_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    with pytest.raises(UserError, match="no session has been judged"):
        draw_history(pd.DataFrame({"session": []}), tmp_path / "a.png")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("http://user:s3cret@127.0.0.1:9")
    try:
        with pytest.raises(Unavailable, match=r"the drift history in MLflow http://127\.0\.0\.1:9 does not answer") as down:
            history()
    finally:
        mlflow.set_tracking_uri(before)
    assert "s3cret" not in str(down.value)
