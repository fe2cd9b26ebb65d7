"""The README's commands, settings and examples: each is run, by its own program and against a real
Larm, and each figure of its tables is the program's own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apprise
import pytest
import yaml
from conftest import ROOT, Process, Webhook, free_port, launch, run_larm, wait_until, write_config

import larm

README = (ROOT / "README.md").read_text()
BLOCKS: dict[str, list[str]] = {}  # by language, in the README's order
for language, block in re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", README):
    BLOCKS.setdefault(language, []).append(block)
ROWS = {  # of all tables, by the first cell: the others
    cells[0]: [cell.replace(r"\|", "|") for cell in cells[1:]]
    for line in README.splitlines() if line.startswith("| ")
    for cells in [re.split(r" \| ?", line[2:].removesuffix("|").rstrip() + " ")]
}  # fmt: skip
PING_URL = "http://nas.lan:5276/api/heartbeat/TOKEN"
PING = re.search(r"`PING` stands for `([^`]*)`", README)[1]  # type: ignore[index]
SECRETS = {  # with every character that a URL gives a meaning to
    name: "123456789:AAbbCCddEEffGGhhIIjjKKllMMnnOOppQQr" if name == "TELEGRAM_BOT_TOKEN"
    else "p@ss/w:rd #?%+&" if "PASSWORD" in name else "AbCdEfGhIjKlMnOpQrStUvWxYz0123"
    for name in re.findall(r"\$\{(\w+)\}", README)
}  # fmt: skip
MONITORS = [f"job-{number}" for number in range(60)]  # a fresh one for each test that needs one
PASSWORD = "the password of the readme's tests"


def needs(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed here")


def codes(cell: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`]*)`", cell)


def script(folder: Path, name: str, text: str) -> None:
    """A program in a folder that stands first in PATH."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def sh(folder: Path, text: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(["sh", "-c", text], cwd=folder, text=True, timeout=30, check=False,
                          env={**os.environ, "PATH": path, **environ}, capture_output=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    toml = f'password = "{PASSWORD}"\n[channels]\nphone = "json://127.0.0.1:9/"\n' + "".join(
        f'[monitors.{key}]\ninterval = "1d"\ntoken = "the-token-of-{key}"\n'
        for key in [*MONITORS, "nightly-backup"])
    process = launch(tmp_path_factory.mktemp("larm"), toml)
    yield process
    process.kill()


def ask(server: Process, path: str, method: str = "GET", body: bytes | None = None) -> Any:
    answer = server.get(path, method, body, {"Authorization": f"Bearer {PASSWORD}"})
    assert answer.status == 200, answer
    return answer.json["data"] if path.startswith("/api/") else answer.body.decode()


class Job:
    """One of the README's lines with a ping URL of a real Larm, and a stub of what it calls."""

    def __init__(self, server: Process, folder: Path, key: str) -> None:
        self.server, self.folder, self.key = server, folder, key
        self.url = f"{server.url}/api/heartbeat/the-token-of-{key}"

    def fit(self, text: str) -> str:
        for of, own in (("PING", PING), (PING_URL, self.url), ("nas.lan:5276/", self.host + "/"),
                        ("TOKEN", f"the-token-of-{self.key}"), ("/usr/local/bin/", ""),
                        ("/opt/larm/larm.py", str(ROOT / "larm.py")), ("/run/", f"{self.folder}/")):
            text = text.replace(of, own)
        return re.sub(r"\bURL\b", self.url, text)

    @property
    def host(self) -> str:
        return self.server.url.removeprefix("http://")

    def sh(self, text: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return sh(self.folder, self.fit(text), **environ)

    def signals(self) -> list[tuple[str, int | None]]:
        found = ask(self.server, f"/api/v1/monitors/{self.key}/heartbeats")
        return [(one["signal"], one["exit_status"]) for one in reversed(found)]

    def state(self) -> str:
        return str(ask(self.server, f"/api/v1/monitors/{self.key}")["state"])


@pytest.fixture
def job(server: Process, tmp_path: Path) -> Callable[[str], Job]:
    needs("curl")

    def build(stub: str = "exit 0") -> Job:
        for name in ("backup.sh", "docker", "restic", "borg"):
            script(tmp_path, name, stub)
        return Job(server, tmp_path, MONITORS.pop())

    return build


def test_it_can_be_read_in_little_time():
    assert len(README.splitlines()) <= 300
    assert sum(map(len, BLOCKS.values())) == README.count("\n```\n") == 12, "each is run below"
    assert ".github/dashboard.png" in README
    assert "—" not in README


# Get it and run it


def test_the_first_command_writes_a_file_for_its_owner_only_and_runs_larm(tmp_path, start):
    writing, running = BLOCKS["sh"][0].split("\n)\n")
    sh(tmp_path, writing + "\n)")
    assert (tmp_path / "larm.toml").stat().st_mode & 0o777 == 0o600
    packages = re.search(r"install -q ([a-z ]*[a-z]) &&", running)[1].split()
    header = re.findall(r'^#     "(\w+)', (ROOT / "larm.py").read_text(), re.MULTILINE)
    assert sorted(packages) == sorted(header)
    text = (tmp_path / "larm.toml").read_text()
    process = start(re.sub(r"(?m)^listen .*$", "", text))
    basic = {"Authorization": "Basic " + "eDpjaG9vc2Ugb25l"}  # x:choose one
    assert process.get("/").status == 401
    assert process.get("/", headers=basic).status == 200


def test_the_first_commands_try_a_channel_and_add_monitors(tmp_path, webhook: Webhook):
    text = f'[channels]\nphone = "{webhook.url}"\n[monitors.nightly-backup]\ninterval = "1d"\n'
    write_config(tmp_path, text)
    shutil.copy(ROOT / "larm.py", tmp_path)
    script(tmp_path, ".venv/bin/python", f'exec {sys.executable} "$@"')
    ended = sh(tmp_path, "set -e\n" + BLOCKS["sh"][1])
    assert (ended.returncode, webhook.titles()) == (0, ["Test alert from Larm"]), ended
    found = tomllib.loads((tmp_path / "larm.toml").read_text())["monitors"]
    assert found["router"] == {"interval": "5m"}
    assert found["report"] == {"schedule": "0 4 * * 0"}
    assert "report" in larm.load(tmp_path / "larm.toml", {}).monitors


# Alerts


def test_every_channel_is_one_that_apprise_takes(tmp_path):
    (tmp_path / "mail.password").write_text(SECRETS["GMAIL_APP_PASSWORD"] + "\n")
    path = write_config(tmp_path, BLOCKS["toml"][0] + '[monitors.job]\ninterval = "1d"\n')
    channels = larm.load(path, SECRETS, larm.accepts).channels
    assert len(channels) == 9
    services = {name: apprise.Apprise.instantiate(url) for name, (url,) in channels.items()}
    for name in ("own-ntfy", "gmail", "mail"):
        assert services[name].password == "p@ss/w:rd #?%+&"
    assert services["telegram"].bot_token == SECRETS["TELEGRAM_BOT_TOKEN"]
    assert services["mail"].smtp_host == "smtp.example.com"
    assert services["gmail"].smtp_host == "smtp.gmail.com"
    assert services["house"].accesstoken == SECRETS["HASS_TOKEN"]


def test_the_settings_of_a_monitor_are_in_force(tmp_path):
    text = BLOCKS["toml"][1] + '[monitors.router]\ninterval = "1m"\n'
    config = larm.load(write_config(tmp_path, text), SECRETS)
    monitor = config.monitors["nightly-backup"]
    assert (monitor.depends_on, monitor.remind) == (("router",), larm.DAY)
    assert monitor.quiet == ((22 * larm.HOUR, 7 * larm.HOUR),)
    assert config.watchdog is not None


def test_its_settings_are_those_of_the_example():
    example = (ROOT / "larm.toml.example").read_text()
    used = set(re.findall(r"(?m)^(\w+) +=", BLOCKS["sh"][0] + BLOCKS["toml"][1]))
    used |= set(re.findall(r"`(\w+) = ", README))
    assert used - {"phone"} <= set(re.findall(r"(?m)^(?:# )?(\w+) = ", example))


# How jobs report


def crontab(line: str) -> str:
    """The command of a crontab's line."""
    *times, command = line.split(None, 5)
    assert len(times) == 5
    assert "%" not in command, "cron takes it for the end of the line"
    return command


@pytest.mark.parametrize(("status", "signals"), [(0, [("success", None)]), (3, [])])
def test_the_first_line_reports_success_only_and_prints_nothing(job, status, signals):
    one = job(f"exit {status}")
    ended = one.sh(crontab(BLOCKS["crontab"][0].strip()))
    assert (one.signals(), ended.stdout + ended.stderr) == (signals, "")


@pytest.mark.parametrize("has_url", [True, False])
def test_a_job_under_run_reports_its_start_status_and_output(job, has_url):
    one = job("echo $1; exit 4")
    lines = [line for line in BLOCKS["crontab"][1].splitlines() if line[0] != "#"]
    setting = one.fit(lines[1]).partition("=")
    assert setting[0] == "LARM_URL"
    command = crontab(lines[2] if has_url else lines[0]).replace("python3", sys.executable)
    write_config(one.folder, f'url = "{one.server.url}"\n[monitors.nightly-backup]\n'
                 f'interval = "1d"\ntoken = "the-token-of-{one.key}"\n')
    ended = one.sh(command, **({setting[0]: setting[2]} if has_url else {}))
    assert (ended.returncode, ended.stdout) == (4, "--all\n")
    assert one.signals() == [("start", None), ("fail", 4)]


SHELL = (
    "cron, with start and exit status", "restic", "borg, whose 1 is a warning",
    "a container, or a script in Synology's Task Scheduler", "a machine, or cron itself",
)  # fmt: skip


@pytest.mark.parametrize("status", [0, 1, 3])
@pytest.mark.parametrize("name", SHELL)
def test_a_line_of_shell_reports_how_the_job_ended(job, name, status):
    one = job(f"exit {status}")
    [line] = codes(ROWS[name][0])
    ended = one.sh(crontab(line) if line[0] in "0*" else line)
    said = 0 if status == 1 and name.startswith("borg") else status
    found = one.signals()
    assert ended.stdout + ended.stderr == ""
    if name.startswith("a machine"):
        assert found == [("success", None)]
    else:
        assert found[-1] == ("fail" if said else "success", said)
    assert (found[0] == ("start", None)) == ("start" in name)


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("job_does", ["exit 0", "exit 3", "kill"])
def test_a_script_reports_however_it_ends(job, shell, job_does):
    one = job("echo runs; sleep 5" if job_does == "kill" else job_does)
    [line] = codes(ROWS["shell script, however it ends"][0])
    (one.folder / "job").write_text(f"set -eu\n{one.fit(line)}\nbackup.sh & wait $!\n")
    running = subprocess.Popen([shell, "./job"], cwd=one.folder, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PATH": f"{one.folder}:{os.environ['PATH']}"})
    assert running.stdout is not None
    status = int(job_does[-1]) if job_does != "kill" else 143
    if status == 143:
        assert running.stdout.readline() == "runs\n"
        running.send_signal(signal.SIGTERM)
    assert running.wait(15) == status
    running.stdout.close()
    assert one.signals() == [("start", None), ("fail" if status else "success", status)]


def test_a_script_runs_its_job_without_larm(job):
    one = job("echo ran > ran")
    [line] = codes(ROWS["shell script, however it ends"][0])
    line = one.fit(line).replace(one.host, "127.0.0.1:9").replace("--retry 5", "")
    assert sh(one.folder, f"set -eu\n{line}\nbackup.sh").returncode == 0
    assert (one.folder / "ran").exists()


def unit(name: str) -> dict[str, str]:
    lines = codes(next(row[0] for key, row in ROWS.items() if key.startswith(name)))
    assert lines.pop(0) == "[Service]"
    return dict(line.split("=", 1) for line in lines)


def test_systemd_takes_the_units(tmp_path):
    needs("systemd-analyze")
    true = shutil.which("true") or ""
    (tmp_path / "larm.service").write_text(re.sub("(?m)^ExecStart=.*python ", f"ExecStart={true} ",
                                                  BLOCKS["ini"][0]))
    drop_in = "\n".join(f"{name}={value}" for name, value in unit("any systemd service").items())
    (tmp_path / "backup.service").write_text(  # what a drop-in says comes behind its unit
        f"[Service]\nType=oneshot\nExecStart={true}\n{drop_in.replace('PING', PING)}\n")
    found = subprocess.run(["systemd-analyze", "verify", "./backup.service", "./larm.service"],
                           cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    if "Failed to initialize manager" in found.stderr:
        pytest.skip(f"systemd-analyze can't verify here: {found.stderr}")
    assert not re.search("backup|larm", found.stderr), found.stderr
    assert found.returncode == 0


@pytest.mark.parametrize("result", ["success", "exit-code", "signal", "timeout"])
def test_a_service_reports_its_start_and_its_result(job, result):
    one = job()
    for command in unit("any systemd service").values():  # systemd: $$ is a $
        one.sh(command.removeprefix("-").replace("$$", "$"), SERVICE_RESULT=result)
    end = ("success", 0) if result == "success" else ("fail", 1)
    assert one.signals() == [("start", None), end]


@pytest.mark.parametrize(("phases", "state"), [
    ("job-init job-start backup-start backup-end log-end job-end", "up"),
    ("job-start backup-start backup-abort backup-start backup-end job-end", "down"),
    ("job-start backup-start job-abort", "down"),
])  # fmt: skip
def test_the_hook_of_vzdump_reports_a_backup_and_each_failure(job, phases, state):
    one = job()
    row = next(row for key, row in ROWS.items() if key.startswith("Proxmox"))
    script(one.folder, "hook", one.fit("\n".join(codes(row[0])[1:])))
    for phase in phases.split():
        assert sh(one.folder, f"./hook {phase} snapshot 100").returncode == 0
    assert one.signals()[0] == ("start", None)
    assert one.state() == state


def test_healthchecks_and_uptime_kuma_need_another_host_only(job):
    one = job()
    hook = yaml.safe_load(one.fit(codes(ROWS["borgmatic, in its file"][0])[0]))
    for path in ("", "/start", "/fail", "/log", "/3?rid=a"):
        assert sh(one.folder, f"curl -fsS {hook['healthchecks']['ping_url']}{path}").stdout
    assert one.signals() == [("success", None), ("start", None), ("fail", 3), ("log", None)]
    [url] = re.findall(r"`(http://nas\S*/api/push/\S*)`", README)
    assert sh(one.folder, f"curl -fsS '{one.fit(url)}'").stdout
    assert one.state() == "up"
    assert sh(one.folder, f"curl -fsS '{one.fit(url).replace('=up', '=down')}'").stdout
    assert one.state() == "down"


# Keep it running


def test_the_container_runs_larm_and_its_health_check_finds_it(tmp_path):
    service = yaml.safe_load(BLOCKS["yaml"][0])["services"]["larm"]
    port = free_port()
    write_config(tmp_path, f'listen = "127.0.0.1:{port}"\n[monitors.job]\ninterval = "1d"\n')
    shutil.copy(ROOT / "larm.py", tmp_path)
    # as its first start has left it
    script(tmp_path, ".venv/bin/python", f'exec {sys.executable} "$@"')
    (tmp_path / ".venv/ready").touch()
    assert service["ports"] == ["5276:5276"]
    check = [word.replace("5276", str(port)) for word in service["healthcheck"]["test"][1:]]
    check[0] = sys.executable

    def is_healthy() -> bool:
        return subprocess.run(check, stderr=subprocess.PIPE, check=False).returncode == 0

    assert not is_healthy()
    with subprocess.Popen(service["command"], cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        wait_until(is_healthy)
        process.terminate()  # Larm itself, for `exec` is there
        assert process.wait(15) == 0


def test_nginx_passes_pings_and_pages_on(tmp_path, start):
    needs("nginx")
    process = start('url = "https://home.example/larm"\npassword = "x"\n'
                    '[monitors.job]\ninterval = "1d"\ntoken = "the-token-of-the-job"\n')
    port = free_port()
    location = BLOCKS["nginx"][0].replace("127.0.0.1:5276", f"127.0.0.1:{process.port}")
    paths = "".join(f"{name}_temp_path {tmp_path}/{name}; "
                    for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; {'user root;' if os.getuid() == 0 else ''} events {{}}\n"
        f"http {{ access_log off; {paths} server {{ listen 127.0.0.1:{port};\n{location}}} }}\n")
    log = f"{tmp_path}/error.log"
    nginx = subprocess.Popen(["nginx", "-c", f"{tmp_path}/nginx.conf", "-e", log])
    try:
        through = Process(process.folder, port, process.popen, process.log_file)

        def answers() -> bool:
            try:
                return through.get("/larm/health").status == 200
            except OSError:
                return False

        wait_until(answers)
        body = b"x" * 9_000_000
        assert through.get("/larm/ping/the-token-of-the-job", "POST", body).status == 200
        assert through.get("/larm/").status == 401
        page = through.get("/larm/", headers={"Authorization": "Basic eDp4"})  # x:x
        assert b'href="/larm/monitor/job"' in page.body
    finally:
        nginx.terminate()
        nginx.wait(15)
    assert process.rows("SELECT sender FROM heartbeats") == [{"sender": "127.0.0.1"}]


def test_a_backup_of_a_running_larm_can_be_restored(tmp_path, start):
    needs("sqlite3")
    toml = '[monitors.job]\ninterval = "1d"\ntoken = "the-token-of-the-job"\n'
    process = start(toml)
    process.ping("the-token-of-the-job")
    script(tmp_path / "bin", "sudo", '[ "$1" = -u ] && shift 2; exec "$@"')
    script(tmp_path / "bin", "systemctl", 'echo "$1" >> ../done')
    back_up, restore = BLOCKS["sh"][3].replace("cd /opt/larm", f"cd {tmp_path}").splitlines()
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    assert sh(tmp_path, back_up, PATH=path).returncode == 0
    assert {(tmp_path / name).stat().st_mode & 0o777
            for name in ("backup.db", "backup.toml")} == {0o600}
    process.ping("the-token-of-the-job", "/1")
    process.stop()
    assert sh(tmp_path, restore, PATH=path).returncode == 0
    again = start(toml)
    assert again.get("/api/v1/monitors/job").json["data"]["state"] == "up"


# What Larm promises


def test_the_figures_are_the_programs():
    for figure, sentence in (
        (larm.MESSAGES_AN_HOUR, "At most {} messages an hour about one monitor"),
        (larm.VERDICT_WITHIN // larm.MINUTE, "news of what it depends on, {} min at most"),
        (larm.LITTLE_SPACE // 1_000_000, "less than {} MB of disk"),
        (larm.REPORT_WITHIN, "holds up the exit for {} s at most"),
        (larm.DIGEST_WITHIN // larm.SECOND, "What happens within {} s is one message"),
        (larm.GIVE_UP_AFTER // larm.DAY, "then hourly, for {} days"),
        (larm.GAP // larm.SECOND, "keep the time that they had left, from {} s on"),
        (larm.CLOCK_SET // larm.SECOND, "move with it, from {} s on"),
        (larm.ALIVE_EVERY // larm.SECOND, "counted from the last write, {} s ago at most"),
        (larm.UNRECORDED_FOR // larm.SECOND, "channels are told after {} s"),
        (larm.NEWEST_KEPT, "its newest {} within `keep`"),
        (larm.PRUNED_EVERY, "({} more until they are pruned)"),
        (larm.EVENTS_KEPT, "its newest {} within `keep`"),
        (larm.BODY_LIMIT, "{} bytes are accepted"), (larm.BODY_KEPT, "the last {} are kept"),
        (larm.BODIES_KEPT, "of a monitor's newest {} heartbeats"),
        (larm.CONNECTIONS, "| {}, or what the limit on open files leaves"),
        (larm.HANGING, "one that sends and {} that hang"),
    ):  # fmt: skip
        assert sentence.format(f"{figure:,}") in README
    assert larm.GUESSES == 10
    assert "After ten wrong passwords" in README
    pauses = [pause // larm.SECOND for pause in larm.PAUSES]
    assert pauses == [10, 30, 60, 300, 900, 3600]
    assert "after 10 s, 30 s, 1, 5 and 15 min, then hourly" in README


def test_it_has_as_many_threads_as_it_says(start):
    process = start('[monitors.job]\ninterval = "1d"\n')
    tasks = Path(f"/proc/{process.popen.pid}/task")
    if not tasks.is_dir():
        pytest.skip("this needs Linux's /proc")
    said = int(ROWS["threads"][0].split(";")[0])
    wait_until(lambda: len(list(tasks.iterdir())) >= said)  # it answers before all have begun
    assert len(list(tasks.iterdir())) == said


# Dashboards, commands, API


def test_the_dashboards_read_what_there_is(server):
    def settings(name: str) -> Any:
        return yaml.safe_load(codes(next(row for key, row in ROWS.items() if name in key)[-1])[0])

    def path(url: str) -> str:
        return url.removeprefix("http://nas.lan:5276")

    homepage = settings("Homepage")["widget"]
    counts = ask(server, path(homepage["url"]))
    assert {one["field"]["data"] for one in homepage["mappings"]} <= set(counts)
    [rest] = settings("Home Assistant, a sensor")["rest"]
    assert homepage["headers"] == rest["headers"] == {"Authorization": "Bearer PASSWORD"}
    assert ask(server, path(rest["resource"]))["state"] == "pending"
    assert settings("Home Assistant, a ping")["rest_command"]["larm_ping"]["url"] == PING_URL
    assert settings("Prometheus; ")["scrape_configs"][0]["authorization"]
    metrics = ask(server, "/metrics")
    for expression in codes(ROWS["an alert of Prometheus"][0]):
        assert expression.split("{")[0].split()[0] in metrics or expression.startswith("up{")
    [badge] = re.findall(r"!\[backup\]\((\S+)\)", README)
    assert "<svg" in ask(server, path(badge))


def test_every_path_of_the_api_answers(server):
    for first in [key for key in ROWS if re.match("(POST )?`/", key)]:
        posts = first.startswith("POST")
        for path in codes(first):
            if path == ".../resume":
                path = "/api/v1/monitors/nightly-backup/resume"
            if path.startswith("{"):
                continue
            body = b'{"for": "2h"}' if path.endswith("/pause") else b"{}"
            assert (ask(server, path, "POST", body) if posts else ask(server, path)) is not None
    page = ask(server, "/api/v1/monitors/nightly-backup/heartbeats?limit=100&before=5")
    assert page == []
    refused = server.get("/api/v1/monitors/backup", headers={"Authorization": f"Bearer {PASSWORD}"})
    assert refused.json["error"]["type"] == "not_found"


def test_every_command_is_one(tmp_path):
    write_config(tmp_path, '[monitors.job]\ninterval = "1d"\n')
    named = {word for key in ROWS for one in codes(key) if one.startswith("larm.py ")
             for word in one.split()[1:2]}
    usage = run_larm(tmp_path, "--help").stdout
    assert named == set(re.findall(r"(?m)^    (\w+) ", usage)) - {"serve"}
    for code, *words in ((2, "status", "no-such-job"), (1, "add", "job", "1d"), (2, "run")):
        assert run_larm(tmp_path, *words).returncode == code, words
    assert json.loads(run_larm(tmp_path, "status", "--json").stdout)["data"][0]["id"] == "job"


def test_the_benchmark_runs():
    [path] = re.findall(r"python (tests/bench\S+)`", README)
    bench = ROOT / path
    ended = subprocess.run([sys.executable, str(bench), "--help"], capture_output=True, check=False)
    assert ended.returncode == 0
