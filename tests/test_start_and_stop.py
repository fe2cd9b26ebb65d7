"""How a Larm starts, stops and dies, and what the command line says beside it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    TOKEN,
    Process,
    Webhook,
    free_port,
    launch,
    run_larm,
    wait_until,
    write_config,
)

DAILY = f'[monitors.job]\ninterval = "1d"\ntoken = "{TOKEN}"\n'
SHORT = f'[monitors.job]\ninterval = 1\ngrace = 1\ntoken = "{TOKEN}"\n'
CHANNEL = '[channels]\nphone = "{}"\n'
STOP_WITHIN = 5  # seconds


# Stopping


def connected_to(larm: Process, webhook: Webhook) -> bool:
    """Whether the process has a connection to that port, in the kernel's words."""
    target = f"0100007F:{webhook.port:04X} 01"
    return target in Path(f"/proc/{larm.popen.pid}/net/tcp").read_text()


def not_running_since(line: str) -> float:
    """What `status` says on stderr, in seconds since the epoch."""
    assert "not running" in line
    [since] = re.findall(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[+-]\d\d:\d\d)?", line)
    return datetime.fromisoformat(since).timestamp()


def stop_well(larm: Process, number: int) -> None:
    """Send the signal; what a stop leaves behind is as it has to be."""
    signalled_at = time.time()
    assert larm.stop(number) == 0
    assert time.time() - signalled_at < STOP_WITHIN
    assert not list(larm.folder.glob("larm.db-*"))  # the WAL is closed
    said = run_larm(larm.folder, "status").stderr
    assert signalled_at - 1 <= not_running_since(said) <= time.time()
    assert "Traceback" not in larm.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_well_and_a_second_one_does_no_harm(start, number):
    larm = start(DAILY)
    larm.ping()
    larm.popen.send_signal(signal.SIGTERM)
    stop_well(larm, number)


def test_a_signal_stops_it_well_whatever_hangs(start, webhook):
    """A channel hangs, and clients hold connections; new ones are refused at once."""
    webhook.answer = "hang"
    larm = start(CHANNEL.format(webhook.url) + DAILY)
    larm.ping(action="/fail")
    with contextlib.ExitStack() as clients:
        for sent in (b"", b"GET / HT", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx",
                     b"GET /health HTTP/1.1\r\n\r\n"):  # fmt: skip
            client = clients.enter_context(
                socket.create_connection(("127.0.0.1", larm.port), timeout=10)
            )
            client.sendall(sent)
        client.recv(1_000)  # answered, and kept open
        wait_until(lambda: connected_to(larm, webhook))
        larm.popen.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", larm.port), timeout=5)
        stop_well(larm, signal.SIGTERM)


def test_a_SIGTERM_at_any_early_moment_ends_it(tmp_path):
    started = []
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_config(folder, f'listen = "127.0.0.1:{free_port()}"\n{DAILY}')
        popen = subprocess.Popen([sys.executable, str(ROOT / "larm.py")], cwd=folder,
                                 stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)  # fmt: skip
        after = random.uniform(0, 0.5) if number else 0.2
        time.sleep(after)
        popen.send_signal(signal.SIGTERM)
        started.append((popen, after))
    for popen, after in started:
        said = popen.communicate(timeout=15)[1].decode()
        assert popen.returncode in (0, -signal.SIGTERM), after
        assert "Traceback" not in said, after


def heeds_sigterm(pid: int) -> bool:
    """Whether it has a handler for it: process 1 of a container is deaf to it until then."""
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_SIGTERM_ends_it_as_process_1_though_it_came_before_the_file_was_read(tmp_path):
    """As in a container: there a signal that has no handler yet is lost."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, timeout=30, check=False).returncode:
        pytest.skip("no process can be process 1 here")
    os.mkfifo(tmp_path / "larm.toml")  # whoever reads it waits
    popen = subprocess.Popen([*unshare, sys.executable, str(ROOT / "larm.py")], cwd=tmp_path,
                             stderr=subprocess.PIPE)  # fmt: skip
    try:
        children = Path(f"/proc/{popen.pid}/task/{popen.pid}/children")
        child = int(wait_until(lambda: children.read_text().split())[0])
        wait_until(lambda: b"larm.py" in Path(f"/proc/{child}/cmdline").read_bytes())
        wait_until(lambda: heeds_sigterm(child))
        os.kill(child, signal.SIGTERM)
        text = f'listen = "127.0.0.1:{free_port()}"\n{DAILY}'.encode()
        end = time.monotonic() + STOP_WITHIN
        while popen.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):  # nobody reads it
                pipe = os.open(tmp_path / "larm.toml", os.O_WRONLY | os.O_NONBLOCK)
                os.write(pipe, text)
                os.close(pipe)
            time.sleep(0.05)
        assert popen.poll() == 0
        said = popen.communicate()[1].decode()
    finally:
        popen.kill()
    assert "Traceback" not in said


def test_the_suite_sets_its_own_signals_where_it_was_started_with_an_ampersand():
    code = "import signal, conftest; print(signal.getsignal(signal.SIGINT))"
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, code],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert "default_int_handler" in done.stdout


KILLED_THREAD = """
import ctypes, larm, threading, time

def kill():
    time.sleep(2)
    [thread] = [one for one in threading.enumerate() if one.name == {name!r}]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))

threading.Thread(target=kill, daemon=True).start()
raise SystemExit(larm.main(["serve"]))
"""


@pytest.mark.parametrize("name", ["watcher", "writer", "server"])
def test_a_thread_that_has_ended_ends_larm_with_a_message_and_status_1(tmp_path, name):
    """Whoever started it starts it anew; one that goes on without it is of no use."""
    larm = launch(tmp_path, DAILY, code=KILLED_THREAD.format(name=name))
    try:
        end = time.monotonic() + 20
        while larm.popen.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):
                larm.ping()  # or the writer has nothing to wake it
            time.sleep(0.1)
        assert larm.popen.poll() == 1, larm.log
        assert f"the {name} thread ended" in larm.log
    finally:
        larm.kill()


BROKEN_TICK = """
import larm, time
began, tick = time.monotonic(), larm.Larm.tick

def broken(self, planned):
    if 1 < time.monotonic() - began < 2.5:
        raise ValueError("its own fault")
    return tick(self, planned)

larm.Larm.tick = broken
raise SystemExit(larm.main(["serve"]))
"""


def test_a_tick_that_fails_ends_nothing_and_is_logged_once(tmp_path, webhook):
    toml = CHANNEL.format(webhook.url) + SHORT
    larm = launch(tmp_path, toml, code=BROKEN_TICK)
    try:
        larm.ping()
        wait_until(lambda: "its own fault" in larm.log)
        wait_until(lambda: webhook.titles() == ["DOWN: job"])
        assert larm.log.count("its own fault") == 1
        assert "Traceback" not in larm.log
    finally:
        larm.kill()


# What keeps it from starting


def refusal(folder: Path, toml: str, listen: str = "") -> str:
    """The one line on stderr with which it does not start."""
    write_config(folder, f'listen = "{listen or f"127.0.0.1:{free_port()}"}"\n{toml}')
    done = run_larm(folder)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert "Traceback" not in line
    return line


def test_a_port_in_use_is_one_clear_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refusal(tmp_path, DAILY, f"127.0.0.1:{port}")
    assert f"127.0.0.1:{port} can't be used: Address already in use" in line


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid", "[2001:db8::1]"])
def test_an_address_that_is_not_here_is_one_clear_line_and_leaves_the_wal_closed(tmp_path, host):
    assert f"{host.strip('[]')}" in refusal(tmp_path, DAILY, f"{host}:5276")
    assert not list(tmp_path.glob("larm.db-*"))


def newer(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA application_id = 0x4C41524D")
        db.execute("PRAGMA user_version = 999")


def another(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE monitors (id INTEGER)")


@pytest.mark.parametrize(("made", "says"), [
    (lambda path: path.mkdir(), "can't be used as the database: Is a directory"),
    (newer, "newer Larm"),
    (another, "another program"),
    (lambda path: path.write_text("my diary\n" * 1_000), "not a database"),
], ids=["a folder", "newer", "another program's", "a diary"])  # fmt: skip
def test_what_can_not_be_its_database_is_one_clear_line(tmp_path, made, says):
    made(tmp_path / "larm.db")
    line = refusal(tmp_path, DAILY)
    assert "larm.db: " in line
    assert says in line


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A folder that can't be written, not even by root."""
    folder = tmp_path / "unwritable"
    folder.mkdir(mode=0o500)
    if os.geteuid() != 0:
        yield folder
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        pytest.skip(f"root can write everywhere here: no read-only tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], timeout=30, check=True)


def test_a_database_folder_that_is_not_there_or_not_writable_is_one_line(tmp_path, unwritable):
    line = refusal(tmp_path, f'database = "{unwritable}/larm.db"\n' + DAILY)
    assert re.search("unwritable/larm.db.*(Read-only file system|Permission denied)", line)
    line = refusal(tmp_path, 'database = "nowhere/larm.db"\n' + DAILY)
    assert re.search("nowhere/larm.db.*No such file or directory", line)


def test_a_second_larm_is_one_clear_line_and_one_that_was_killed_is_none(start):
    larm = start(DAILY)
    line = refusal(larm.folder, DAILY)
    assert f"another Larm (process {larm.popen.pid}) is running" in line
    assert larm.ping().status == 200
    larm.kill()
    assert start(DAILY, port=larm.port).ping().status == 200


# The command line beside it


def test_status_says_on_stderr_when_larm_is_not_running_and_since_when(start):
    larm = start(DAILY)
    larm.ping()
    running = run_larm(larm.folder, "status")
    assert (running.returncode, running.stderr) == (0, "")
    assert re.search(r"^job +up ", running.stdout, re.M)
    killed_at = time.time()
    larm.kill()
    off = run_larm(larm.folder, "status")
    assert off.returncode == 0
    assert off.stdout.splitlines()[0].split() == running.stdout.splitlines()[0].split()
    assert re.search(r"^job +up ", off.stdout, re.M)
    assert abs(not_running_since(off.stderr) - killed_at) < 3


def test_status_shows_no_made_up_url_where_a_tokens_variable_is_not_set(start):
    text = '[monitors.job]\ninterval = "1d"\ntoken = "${JOB_TOKEN}"\n'
    larm = start(text, JOB_TOKEN=TOKEN)
    larm.ping()
    known = run_larm(larm.folder, "status", JOB_TOKEN=TOKEN)
    assert f"{larm.url}/api/heartbeat/{TOKEN}" in known.stdout
    unknown = run_larm(larm.folder, "status")
    assert "heartbeat/" not in unknown.stdout
    assert re.search(r"^job +up ", unknown.stdout, re.M)
    assert "not set" in unknown.stdout


def test_every_verb_takes_larm_toml_from_here_else_from_beside_larm_py(tmp_path):
    program, here, elsewhere = (tmp_path / name for name in ("program", "here", "elsewhere"))
    for folder in (program, here, elsewhere):
        folder.mkdir()
    shutil.copy(ROOT / "larm.py", program)
    write_config(program, '[monitors.beside]\ninterval = "1d"\n')
    write_config(here, '[monitors.here]\ninterval = "1d"\n')

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(program / "larm.py"), *arguments], cwd=folder,
                              capture_output=True, text=True, timeout=60, check=False)  # fmt: skip

    for folder, known, unknown in ((here, "here", "beside"), (elsewhere, "beside", "here")):
        assert run(folder, "pause", known).returncode == 1, "Larm has not run with it yet"
        assert run(folder, "resume", unknown).returncode == 2, "it is not in that file"
        table = run(folder, "status")
        assert known in table.stdout
        assert unknown not in table.stdout
    assert run(elsewhere, "check").returncode == 0
    assert run(elsewhere, "add", "added", "1h").returncode == 0
    assert "[monitors.added]" in (program / "larm.toml").read_text()
    assert run(elsewhere, "test", "nobody").returncode == 2
    assert list(elsewhere.iterdir()) == []
