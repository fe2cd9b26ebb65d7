"""The README's examples for jobs: each by its own program, and against a real Larm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Process, launch

SECTION = (ROOT / "README.md").read_text().split("## Examples for jobs\n")[1].split("\n## ")[0]
EXAMPLES: dict[str, str] = {}  # by the first word of the paragraph before it; of a second, "... 2"
for prose, block in re.findall(r"(?ms)(.*?)^```\w+\n(.*?)^```\n", SECTION):
    words = re.findall(r"\w+", prose.strip().split("\n\n")[-1])
    EXAMPLES[words[0].lower() if words else f"{list(EXAMPLES)[-1]} 2"] = block
PING_URL = "http://nas.lan:5276/api/heartbeat/TOKEN"
NAMES = ("crontab", "systemd", "shell", "docker", "python", "restic", "borg")
STUBS = ("backup.sh", "docker", "restic", "borg")
RUN = [f"{name}-{run}" for name in NAMES for run in (1, 2, 3)]


@pytest.fixture(scope="module")
def larm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    toml = "".join(
        f'[monitors.{one}]\ninterval = "1d"\ntoken = "the-token-of-{one}"\n' for one in RUN
    )
    process = launch(tmp_path_factory.mktemp("larm"), toml)
    yield process
    process.kill()


class Job:
    """An example with a ping URL of a real Larm, and stubs of what it calls."""

    def __init__(self, larm: Process, folder: Path, name: str, run: int) -> None:
        self.larm, self.folder, self.key = larm, folder, f"{name}-{run}"
        self.url = f"{larm.url}/api/heartbeat/the-token-of-{self.key}"
        self.text = EXAMPLES[name].replace(PING_URL, self.url).replace("/usr/local/bin/", "")
        self.environ = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        self.stub("exit 0")

    def stub(self, script: str) -> None:
        for name in STUBS:
            (self.folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (self.folder / name).chmod(0o755)

    def sh(self, script: str, **environ: str) -> int:
        return subprocess.run(
            ["sh", "-c", script], cwd=self.folder, env={**self.environ, **environ}, timeout=30,
            check=False,
        ).returncode

    def signals(self) -> list[tuple[str, int | None]]:
        return [(row["signal"], row["exit_status"]) for row in self.rows()]

    def rows(self) -> list[dict[str, object]]:
        return self.larm.rows(
            "SELECT h.* FROM heartbeats h JOIN monitors m ON m.id = h.monitor_id WHERE m.key = ? "
            "ORDER BY h.id", self.key
        )  # fmt: skip


@pytest.fixture
def job(larm, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed here")
    return lambda name, run=1: Job(larm, tmp_path, name, run)


def test_every_example_is_checked_here():
    assert sorted(EXAMPLES) == sorted([*NAMES, "systemd 2"])
    assert len(re.findall("(?m)^```.", SECTION)) == len(EXAMPLES)
    assert SECTION.count(PING_URL) >= len(NAMES)


@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
@pytest.mark.parametrize("name", ["shell", "docker", "restic", "borg"])
def test_a_shell_takes_it(name, shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here")
    subprocess.run([shell, "-n"], input=EXAMPLES[name], text=True, check=True, timeout=10)


@pytest.mark.parametrize(("status", "signal"), [(0, "success"), (3, "fail")])
def test_the_crontab_reports_the_start_and_the_exit_status(job, status, signal):
    one = job("crontab", 1 + status // 3)
    one.stub(f"exit {status}")
    setting, line = one.text.splitlines()
    name, _, value = setting.partition("=")
    minute, hour, *days, command = line.split(None, 5)
    assert (minute, hour, days) == ("0", "3", ["*", "*", "*"])
    assert "%" not in command, "cron takes it for the end of the line"
    one.sh(command, **{name: value})
    assert one.signals() == [("start", None), (signal, status)]


def test_systemd_takes_the_service_and_the_timer(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed here")
    service = EXAMPLES["systemd"].replace("/usr/local/bin/backup.sh", shutil.which("true") or "")
    (tmp_path / "backup.service").write_text(service)
    (tmp_path / "backup.timer").write_text(EXAMPLES["systemd 2"])
    found = subprocess.run(
        ["systemd-analyze", "verify", "./backup.service", "./backup.timer"],
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
    )
    if "Failed to initialize manager" in found.stderr:
        pytest.skip(f"systemd-analyze can't verify here: {found.stderr}")
    assert "backup" not in found.stderr
    assert found.returncode == 0


@pytest.mark.parametrize(
    ("result", "end"), [("success", ("success", 0)), ("exit-code", ("fail", 1)),
                        ("signal", ("fail", 1)), ("timeout", ("fail", 1))],
)  # fmt: skip
def test_the_service_reports_the_start_and_the_result(job, result, end):
    one = job("systemd", {"success": 1, "exit-code": 2}.get(result, 3))
    settings = [line.split("=", 1) for line in one.text.splitlines() if "=" in line]
    unit = {name: value.removeprefix("-") for name, value in settings}
    name, value = unit["Environment"].split("=", 1)
    for command in ("ExecStartPre", "ExecStopPost"):  # systemd: $$ is a $
        script = unit[command].replace("${LARM}", "$LARM").replace("$$", "$")
        one.sh(script.replace("'test", "'set -f; test"), **{name: value, "SERVICE_RESULT": result})
    assert end in one.signals()


@pytest.mark.parametrize(("status", "signal"), [(0, "success"), (3, "fail")])
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_script_reports_its_exit_status(job, shell, status, signal):
    one = job("shell", 1 + status // 3)
    one.stub(f"exit {status}")
    (one.folder / "job").write_text(one.text)
    assert one.sh(f"{shell} ./job") == status
    assert one.signals()[:2] == [("start", None), (signal, status)]


def test_the_script_reports_that_it_was_killed(job):
    one = job("shell", 3)
    one.stub("echo runs; sleep 1")
    (one.folder / "job").write_text(one.text)
    running = subprocess.Popen(
        ["sh", "./job"], cwd=one.folder, env=one.environ, stdout=subprocess.PIPE
    )
    assert running.stdout is not None
    assert running.stdout.readline() == b"runs\n"
    running.send_signal(signal.SIGTERM)
    assert running.wait(15) == 143
    running.stdout.close()
    assert one.signals() == [("start", None), ("fail", 143)]


def test_the_script_runs_its_job_without_larm(job):
    one = job("shell")
    one.stub("echo ran > ran")
    script = one.text.replace(f":{one.larm.port}/", ":9/").replace("--retry 5", "")
    (one.folder / "job").write_text(script)
    assert one.sh("sh ./job") == 0
    assert (one.folder / "ran").exists()


def test_docker_pings_after_a_success_only(job):
    one = job("docker")
    one.stub("exit 1")
    assert one.sh(one.text) == 1
    assert one.signals() == []
    one.stub("exit 0")
    assert one.sh(one.text) == 0
    assert one.signals() == [("success", None)]


def test_python_reports_a_success(job):
    one = job("python")
    subprocess.run([sys.executable, "-c", one.text], check=True, timeout=30)
    assert one.signals() == [("start", None), ("success", 0)]


def test_python_reports_a_failure_with_its_traceback(job):
    one = job("python", 2)
    script = one.text.replace('print("here goes the job")', "1 / 0")
    ended = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, timeout=30,
                           check=False)
    assert ended.returncode == 1
    assert one.signals() == [("start", None), ("fail", None)]
    assert "ZeroDivisionError: division by zero" in str(one.rows()[-1]["body"])


def test_python_runs_its_job_without_larm(job):
    one = job("python", 3)
    script = one.text.replace(f":{one.larm.port}/", ":9/")
    ran = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True,
                         timeout=30)
    assert ran.stdout == b"here goes the job\n"


def test_restic_sends_its_status_and_the_end_of_its_output(job):
    one = job("restic")
    one.stub('echo "$*"; head -c 20000 /dev/zero | tr "\\0" x; echo; echo the end; exit 3')
    one.sh(one.text)
    [row] = one.rows()
    assert (row["signal"], row["exit_status"]) == ("fail", 3)
    assert str(row["body"]).endswith("x\nthe end")
    assert len(str(row["body"])) == 10_000


def test_restic_that_did_well_is_a_success(job):
    one = job("restic", 2)
    one.stub('echo "$*"')
    one.sh(one.text)
    [row] = one.rows()
    assert (row["signal"], row["exit_status"]) == ("success", 0)
    assert row["body"] == "backup /home\nforget --keep-daily 7 --prune"


@pytest.mark.parametrize(("status", "end"), [(0, ("success", 0)), (1, ("success", 0)),
                                             (2, ("fail", 2))])  # fmt: skip
def test_a_warning_of_borg_is_no_failure(job, status, end):
    one = job("borg", 1 + status)
    one.stub(f'echo "$*"; exit {status}')
    one.sh(one.text)
    assert one.signals() == [end]
    assert one.rows()[0]["body"] == "create --stats /mnt/backup::{now} /home"
