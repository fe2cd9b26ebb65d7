"""The command line as a user has it: a real larm.py, its output, its exit code."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from conftest import ROOT, TOKEN, free_port, run_larm, wait_until, write_config

import larm

JOB = '[monitors.job]\ninterval = "1d"\n'
TWO = f'[monitors.job]\nname = "The job"\ninterval = "1d"\ntoken = "{TOKEN}"\n' \
      '[monitors.other]\ninterval = "1h"\n'
COLOUR = "\033["
NOT_RUNNING = "Larm is not running: nobody watches\n"


def refusal(result, exit_code):
    """The one line on stderr of a run that ends with that exit code and prints nothing else."""
    assert (result.returncode, result.stdout) == (exit_code, "")
    assert re.fullmatch(r"[^\n]+\n", result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def on_a_terminal(folder, *arguments, until=None, **environ):
    """What larm.py prints on a terminal, to its end or until it has printed something."""
    environ = {"TERM": "xterm"} | environ
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "larm.py"), *arguments], cwd=folder, env=inherited | environ,
        stdin=theirs, stdout=theirs, stderr=theirs,
    )
    os.close(theirs)
    limit = threading.Timer(30, process.kill)
    limit.start()
    printed = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while (until is None or until not in printed) and (part := os.read(ours, 65_536)):
            printed += part
    if until:
        process.terminate()
    process.wait(15)
    limit.cancel()
    os.close(ours)
    return printed.decode().replace("\r\n", "\n")


def table(printed):
    """The status table's lines, as lists of cells."""
    return [re.split(r"  +", line) for line in printed.splitlines()]


# check


def test_check_sums_up_a_right_file(tmp_path):
    write_config(tmp_path, '[channels]\nphone = "json://127.0.0.1"\n' + TWO)
    result = run_larm(tmp_path, "check")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        f"{tmp_path}/larm.toml: fine: 2 monitors, 1 channel, dashboard http://127.0.0.1:5276/\n"
    )


def test_check_prints_each_mistake_on_a_line(tmp_path):
    write_config(tmp_path, 'keep = "x"\npublic = 5\n[channels]\nphone = "json://"\n' + JOB)
    result = run_larm(tmp_path, "check")
    assert result.returncode == 1
    printed = (result.stdout + result.stderr).splitlines()
    assert all(line.startswith(f"{tmp_path}/larm.toml: ") for line in printed)
    settings = [line.split(": ")[1] for line in printed]
    assert sorted(settings) == ["channels.phone", "keep", "public"]


@pytest.mark.parametrize("verb", ["serve", "status", "test"])
def test_no_verb_works_with_mistakes(verb, tmp_path):
    write_config(tmp_path, f'keep = "x"\n{JOB}')
    assert "larm.toml: keep: " in refusal(run_larm(tmp_path, verb), 1)


def test_a_syntax_error_is_a_mistake(tmp_path):
    write_config(tmp_path, JOB + "note = what\n")
    assert "line 3" in refusal(run_larm(tmp_path, "check"), 1)


def test_check_creates_nothing(tmp_path):
    write_config(tmp_path, JOB)
    run_larm(tmp_path, "check")
    assert os.listdir(tmp_path) == ["larm.toml"]


# Files


@pytest.mark.parametrize("verb", [[], ["serve"], ["check"], ["status"], ["test"]])
def test_a_file_that_is_named_and_missing_is_unusable(verb, tmp_path):
    line = refusal(run_larm(tmp_path, "-c", "nowhere.toml", *verb), 2)
    assert line.startswith(f"{tmp_path}/nowhere.toml: no such file")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verb", ["check", "status", "test"])
def test_only_serve_writes_a_starter(verb, tmp_path):
    assert "larm.toml: no such file" in refusal(run_larm(tmp_path, verb), 2)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_no_configuration(tmp_path):
    assert "Is a directory" in refusal(run_larm(tmp_path, "-c", ".", "check"), 2)


@pytest.mark.parametrize("arguments", [
    ["-c", "other.toml", "check"], ["check", "-c", "other.toml"], ["--config=other.toml", "check"],
])
def test_the_file_may_be_named_before_or_after_the_verb(arguments, tmp_path):
    (tmp_path / "other.toml").write_text(JOB)
    assert run_larm(tmp_path, *arguments).stdout.startswith(f"{tmp_path}/other.toml: fine")


# status


def test_status_before_the_first_start_shows_every_monitor_pending(tmp_path):
    write_config(tmp_path, TWO)
    result = run_larm(tmp_path, "status")
    assert (result.returncode, result.stderr) == (0, NOT_RUNNING)
    heading, job, other = table(result.stdout)
    assert heading == ["MONITOR", "STATE", "SINCE", "LAST HEARTBEAT", "NEXT DUE", "PING URL"]
    assert (job[:2], other[:2]) == (["job", "pending"], ["other", "pending"])
    assert job[-1] == f"http://127.0.0.1:5276/api/heartbeat/{TOKEN}"
    assert not (tmp_path / "larm.db").exists()


def test_status_shows_what_is_in_the_database_while_larm_runs_and_after(start, tmp_path):
    process = start(TWO)
    process.ping()
    running = run_larm(tmp_path, "status")
    process.stop()
    for result in (running, run_larm(tmp_path, "status")):
        _, job, other = table(result.stdout)
        assert (job[:2], other[:2]) == (["job", "up"], ["other", "pending"])
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/api/heartbeat/[\w-]{16,}", other[-1])


def test_status_in_json_is_a_list_of_monitors(start, tmp_path):
    process = start(TWO)
    process.ping()
    result = run_larm(tmp_path, "status", "--json")
    assert result.returncode == 0
    job, other = json.loads(result.stdout)["data"]
    assert set(job) == set(other) == {
        "id", "name", "check_type", "enabled", "state", "since", "running", "interval_seconds",
        "schedule", "timezone", "grace_seconds", "last_heartbeat_at", "last_duration_ms",
        "expected_at", "deadline_at", "uptime", "channels", "note", "ping_url",
    }
    assert (job["id"], job["name"], job["state"]) == ("job", "The job", "up")
    assert (job["interval_seconds"], job["grace_seconds"]) == (86_400, 3_600)
    assert job["ping_url"] == f"{process.url}/api/heartbeat/{TOKEN}"
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    for name in ("since", "last_heartbeat_at", "expected_at", "deadline_at"):
        assert re.fullmatch(moment, job[name])
    assert (other["state"], other["expected_at"], other["deadline_at"]) == ("pending", None, None)


def test_status_in_json_before_the_first_start_knows_no_made_token(tmp_path):
    write_config(tmp_path, JOB)
    [job] = json.loads(run_larm(tmp_path, "status", "--json").stdout)["data"]
    assert (job["state"], job["ping_url"], job["last_heartbeat_at"]) == ("pending", None, None)


def test_status_of_some_monitors_shows_only_those(tmp_path):
    write_config(tmp_path, TWO)
    assert [line[0] for line in table(run_larm(tmp_path, "status", "other").stdout)] == [
        "MONITOR", "other",
    ]
    both = json.loads(run_larm(tmp_path, "status", "--json", "other", "job").stdout)["data"]
    assert {monitor["id"] for monitor in both} == {"job", "other"}


def test_status_of_an_unknown_monitor_is_unusable(tmp_path):
    write_config(tmp_path, TWO)
    line = refusal(run_larm(tmp_path, "status", "job", "ohter"), 2)
    assert '"ohter"; did you mean other?' in line


def test_a_paused_monitor_is_shown_as_paused(tmp_path):
    write_config(tmp_path, JOB + "enabled = false\n")
    assert table(run_larm(tmp_path, "status").stdout)[1][:2] == ["job", "paused"]


def test_status_shows_times_in_the_files_timezone(start, tmp_path):
    process = start(f'timezone = "Asia/Kolkata"\n{TWO}')
    process.ping()
    job, _ = json.loads(run_larm(tmp_path, "status", "--json").stdout)["data"]
    moment = datetime.fromisoformat(job["expected_at"]).astimezone(ZoneInfo("Asia/Kolkata"))
    assert f"{moment:%Y-%m-%d %H:%M:%S}" in run_larm(tmp_path, "status", TZ="UTC").stdout


def test_status_of_a_database_that_is_none_is_bad_news(tmp_path):
    write_config(tmp_path, JOB)
    (tmp_path / "larm.db").write_text("this is not a database" * 100)
    assert refusal(run_larm(tmp_path, "status"), 1).startswith(f"{tmp_path}/larm.db: ")


def test_status_in_a_pipe_has_no_colour(tmp_path):
    write_config(tmp_path, JOB)
    assert COLOUR not in run_larm(tmp_path, "status", TERM="xterm").stdout


def test_status_on_a_terminal_shows_the_state_in_colour(tmp_path):
    write_config(tmp_path, JOB)
    printed = on_a_terminal(tmp_path, "status")
    assert re.search(r"\033\[\d+mpending *\033\[0m", printed)
    plain = run_larm(tmp_path, "status").stdout
    assert re.sub(r"\033\[\d+m", "", printed) == NOT_RUNNING + plain


def test_NO_COLOR_is_respected_on_a_terminal(tmp_path):
    write_config(tmp_path, JOB)
    printed = on_a_terminal(tmp_path, "status", NO_COLOR="1")
    assert "pending" in printed
    assert COLOUR not in printed


def test_status_imports_nothing_heavy(tmp_path):
    write_config(tmp_path, '[channels]\nphone = "json://127.0.0.1"\n' + JOB)
    result = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "larm.py"), "status"], cwd=tmp_path,
        capture_output=True, text=True, timeout=60, check=True,
    )
    imported = set(re.findall(r"\| +(\w+)$", result.stderr, re.MULTILINE))
    assert "sqlite3" in imported
    assert imported & {"apprise", "bottle", "waitress", "requests", "cronsim"} == set()


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["table", "json"])
def test_status_works_where_the_terminal_is_not_utf_8(arguments, tmp_path):
    write_config(tmp_path, JOB + 'name = "Säkerhet ✓"\n')
    result = run_larm(tmp_path, "status", *arguments, PYTHONIOENCODING="latin-1:strict")
    assert (result.returncode, result.stderr) == (0, NOT_RUNNING)


def test_a_reader_that_has_had_enough_is_no_error(tmp_path):
    write_config(tmp_path, TWO)
    ours, theirs = os.pipe()
    os.close(ours)
    result = subprocess.run(
        [sys.executable, str(ROOT / "larm.py"), "status"], cwd=tmp_path, stdout=theirs,
        stderr=subprocess.PIPE, timeout=60, check=False,
    )
    os.close(theirs)
    assert result.stderr == NOT_RUNNING.encode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_is_full_is_one_line(tmp_path):
    write_config(tmp_path, TWO)
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, str(ROOT / "larm.py"), "status"], cwd=tmp_path, stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )
    assert result.returncode != 0
    said = result.stderr.removeprefix(NOT_RUNNING)
    assert re.fullmatch(r"[^\n]*No space left on device[^\n]*\n", said), result.stderr


# test


def test_a_test_alert_reaches_its_channel(webhook, tmp_path):
    write_config(tmp_path, f'[channels]\nphone = "{webhook.url}"\n{JOB}')
    result = run_larm(tmp_path, "test", "phone")
    assert (result.returncode, result.stdout, result.stderr) == (0, "phone: sent\n", "")
    [alert] = webhook.alerts
    assert "test" in alert["title"].lower()


def test_a_test_alert_that_is_refused_says_why_and_shows_no_secret(webhook, tmp_path):
    webhook.answer = 500
    url = f"json://user:hunter2-pass@127.0.0.1:{webhook.port}/secret-path"
    write_config(tmp_path, f'[channels]\nphone = "{url}"\n{JOB}')
    result = run_larm(tmp_path, "test", "phone")
    assert result.returncode == 1
    assert re.fullmatch(r"phone: not sent: [^\n]*500[^\n]*\n", result.stdout)
    assert webhook.refused == 1
    for secret in ("hunter2", "secret-path", "json://user"):
        assert secret not in result.stdout + result.stderr


def test_a_test_alert_that_nobody_receives_shows_no_secret(tmp_path):
    url = f"json://user:hunter2-pass@127.0.0.1:{free_port()}/secret-path"
    write_config(tmp_path, f'[channels]\nphone = "{url}"\n{JOB}')
    result = run_larm(tmp_path, "test")
    assert result.returncode == 1
    assert re.fullmatch(r"phone: not sent: [^\n]+\n", result.stdout)
    for secret in ("hunter2", "secret-path"):
        assert secret not in result.stdout + result.stderr


def test_without_a_name_every_channel_is_tested_on_a_line_of_its_own(webhooks, tmp_path):
    works, refuses = webhooks(), webhooks()
    refuses.answer = 403
    channels = f'[channels]\nmail = "{refuses.url}"\nphone = "{works.url}"\n'
    write_config(tmp_path, channels + JOB)
    result = run_larm(tmp_path, "test")
    assert result.returncode == 1
    assert [line.split(":")[:2] for line in result.stdout.splitlines()] == [
        ["mail", " not sent"], ["phone", " sent"],
    ]
    assert len(works.alerts) == 1


def test_only_the_named_channel_is_tested(webhooks, tmp_path):
    named, other = webhooks(), webhooks()
    write_config(tmp_path, f'[channels]\na = "{named.url}"\nb = "{other.url}"\n{JOB}')
    assert run_larm(tmp_path, "test", "a").stdout == "a: sent\n"
    assert (len(named.alerts), len(other.alerts)) == (1, 0)


def test_an_unknown_channel_is_unusable_and_nothing_is_sent(webhook, tmp_path):
    write_config(tmp_path, f'[channels]\nphone = "{webhook.url}"\n{JOB}')
    line = refusal(run_larm(tmp_path, "test", "phone", "phne"), 2)
    assert '"phne"; did you mean phone?' in line
    assert webhook.alerts == []


# What there is


def test_version_is_one_line(tmp_path):
    result = run_larm(tmp_path, "--version")
    assert (result.returncode, result.stdout) == (0, f"Larm {larm.__version__}\n")


@pytest.mark.parametrize("verb", ["serve", "check", "status", "test", "pause", "resume"])
def test_help_names_the_verb(verb, tmp_path):
    result = run_larm(tmp_path, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(rf"^ +{verb}\b", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("arguments", [
    ["no-such-verb"], ["--no-such-option"], ["status", "--jsn"], ["check", "too-much"], ["-c"],
    ["-c", ""], ["serve", "-c", "nowhere"], ["status", "nö\tsuch"], ["test", "a\nb"],
], ids=" ".join)
def test_unusable_arguments_are_one_line(arguments, tmp_path):
    write_config(tmp_path, JOB)
    refusal(run_larm(tmp_path, *arguments), 2)


def test_an_unknown_verb_is_named_with_those_there_are(tmp_path):
    line = refusal(run_larm(tmp_path, "stauts"), 2)
    assert "'stauts'" in line
    assert "status" in line.replace("stauts", "")


# serve


def test_the_first_run_writes_a_starter_says_so_and_runs_it(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "larm.py")], cwd=tmp_path, stderr=stderr,
            stdin=subprocess.DEVNULL,
        )
    try:
        wait_until(lambda: process.poll() is not None or "dashboard " in log.read_text())
        process.terminate()
        code = process.wait(15)
    finally:
        process.kill()
    assert "wrote larm.toml" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert len(larm.load(tmp_path / "larm.toml", {}, larm.accepts).monitors) == 1
    if "can't be used" in log.read_text():
        pytest.skip(f"another program has the starter's port 5276: {log.read_text()}")
    assert code == 0


def test_a_larm_toml_that_is_there_is_left_as_it_is(start, tmp_path):
    start(TWO)
    assert (tmp_path / "larm.toml").read_text().endswith(TWO)


def test_a_start_is_logged_with_what_is_in_use(start, tmp_path):
    process = start('[channels]\nphone = "json://127.0.0.1:9/secret-path"\n' + TWO)
    process.stop()
    for part in (larm.__version__, f"{tmp_path}/larm.toml", f"{tmp_path}/larm.db",
                 f"{process.url}/", "2 monitors", "1 channel"):
        assert part in process.log
    assert "secret-path" not in process.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(number, start):
    process = start(TWO)
    assert process.stop(number) == 0
    assert "Traceback" not in process.log


def test_a_log_file_holds_no_ping_url(start):
    process = start(TWO)
    process.stop()
    assert TOKEN not in process.log
    assert "curl" not in process.log


def test_a_terminal_is_told_how_to_ping_what_was_never_pinged(tmp_path):
    port = free_port()
    write_config(tmp_path, f'listen = "127.0.0.1:{port}"\n{TWO}')
    url = f"http://127.0.0.1:{port}/api/heartbeat/{TOKEN}"
    command = f"curl -fsS -m 10 --retry 5 --retry-connrefused -o /dev/null {url}"
    assert command in on_a_terminal(tmp_path, until=command.encode())


def test_a_port_that_is_taken_is_one_line(start, tmp_path):
    taken = start(TWO)
    folder = tmp_path / "second"
    folder.mkdir()
    write_config(folder, f'listen = "127.0.0.1:{taken.port}"\n{TWO}')
    line = refusal(run_larm(folder), 1)
    assert f"listen: 127.0.0.1:{taken.port} can't be used: Address already in use" in line


@pytest.mark.parametrize("database", [".", "nowhere/larm.db", "larm.toml", "nul\\u0000"])
def test_a_database_that_cannot_be_is_one_line(database, tmp_path):
    text = f'listen = "127.0.0.1:{free_port()}"\ndatabase = "{database}"\n{JOB}'
    write_config(tmp_path, text)
    refusal(run_larm(tmp_path), 1)
    assert (tmp_path / "larm.toml").read_text() == text


def test_status_needs_no_variable_of_the_channels(tmp_path):
    text = '[channels]\nphone = "ntfy://${NOT_SET}"\n[monitors.job]\ninterval = 60\n'
    write_config(tmp_path, text)
    assert run_larm(tmp_path, "status").returncode == 0
    assert run_larm(tmp_path, "check").returncode == 1


def test_what_nobody_has_thought_of_is_a_line_too(monkeypatch, capsys, caplog):
    def serve(_: object) -> int:
        thread = threading.Thread(target=lambda: [][0], name="broken")
        thread.start()
        thread.join()
        raise KeyError("surprise")

    monkeypatch.setattr(larm, "serve", serve)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards
    assert larm.main([]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "larm.py failed: KeyError: 'surprise'; please report it"
    )
    assert "a thread failed" in caplog.text


# add


def test_add_appends_a_monitor_and_prints_the_line_for_its_job(tmp_path):
    path = write_config(tmp_path, "# mine\n" + JOB.rstrip())
    before = path.read_bytes()
    result = run_larm(tmp_path, "add", "report", "0", "3", "*", "*", "0")
    assert result.returncode == 0, result.stderr
    assert path.read_bytes().startswith(before)
    assert "larm.py run report -- COMMAND" in result.stdout
    assert run_larm(tmp_path, "add", "backup", "1d").returncode == 0
    listed = json.loads(run_larm(tmp_path, "status", "--json").stdout)["data"]
    assert [one["id"] for one in listed] == ["job", "report", "backup"]
    assert listed[1]["schedule"] == "0 3 * * 0"
    assert listed[2]["interval_seconds"] == 86_400


def test_add_keeps_the_files_own_line_ends(tmp_path):
    path = write_config(tmp_path, "")
    path.write_bytes(JOB.replace("\n", "\r\n").encode())
    assert run_larm(tmp_path, "add", "backup", "1d").returncode == 0
    assert b"\r\n[monitors.backup]\r\ninterval = " in path.read_bytes()
    assert b"\n" not in path.read_bytes().replace(b"\r\n", b"")


@pytest.mark.parametrize("words", [["job", "1d"], ["Bad Key", "1d"], ["new", "5 parsecs"],
                                   ["new", "0 3 31 2 *"], ["a.b", "1d"]])
def test_add_changes_nothing_where_that_would_be_a_mistake(tmp_path, words):
    path = write_config(tmp_path, JOB)
    result = run_larm(tmp_path, "add", *words)
    assert result.returncode in (1, 2)
    assert result.stderr.endswith("nothing was added\n")
    assert "Traceback" not in result.stderr
    assert path.read_text() == JOB


def test_two_adds_at_once_both_count(tmp_path):
    write_config(tmp_path, JOB)
    command = [sys.executable, str(ROOT / "larm.py"), "add"]
    adds = [subprocess.Popen([*command, f"job-{number}", "1d"], cwd=tmp_path,
                             stdout=subprocess.DEVNULL) for number in range(4)]
    assert [one.wait(60) for one in adds] == [0] * 4
    listed = json.loads(run_larm(tmp_path, "status", "--json").stdout)["data"]
    assert sorted(one["id"] for one in listed) == ["job", "job-0", "job-1", "job-2", "job-3"]
