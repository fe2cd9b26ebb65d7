"""The clients that the documentation shows, against a real Larm: each ping is stored."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import requests
from conftest import Process, launch

KEYS = [f"job-{number:02}" for number in range(30)]
BODY = "line one\nöre ✓\n"


@pytest.fixture(scope="module")
def larm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Iterator[str]]]:
    """A running Larm, and keys of it that nobody has pinged."""
    process = launch(tmp_path_factory.mktemp("larm"), "".join(
        f'[monitors.{key}]\ninterval = "1d"\ntoken = "a-token-for-{key}"\n' for key in KEYS
    ))  # fmt: skip
    yield process, iter(KEYS)
    process.kill()


@dataclass
class Target:
    larm: Process
    key: str

    @property
    def url(self) -> str:
        return f"{self.larm.url}/api/heartbeat/a-token-for-{self.key}"

    def stored(self) -> list[tuple[object, ...]]:
        found = self.larm.get(f"/api/v1/monitors/{self.key}/heartbeats").json["data"]
        return [tuple(one[name] for name in ("signal", "method", "exit_status", "body"))
                for one in found[::-1]]  # fmt: skip


@pytest.fixture
def job(larm) -> Target:
    return Target(larm[0], next(larm[1]))


def run(*command: str) -> str:
    """Run a client to its end; what it printed."""
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed here")
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=30
    ).stdout


def curl(*arguments: str) -> str:
    return run("curl", "-fsS", "-m", "10", "--retry", "5", *arguments)


def node(script: str) -> str:
    return run("node", "--input-type=module", "-e", script)


def ruby(script: str) -> str:
    return run("ruby", "-r", "net/http", "-e", script)


# curl


def test_curl_is_stored(job):
    assert curl(job.url) == '{"status": "ok"}'
    assert job.stored() == [("success", "GET", None, None)]


def test_curl_sends_the_exit_status_and_the_output(job):
    curl("--data-binary", BODY, f"{job.url}/3")
    assert job.stored() == [("fail", "POST", 3, BODY)]


def test_curl_sends_what_it_reads_from_a_pipe(job, tmp_path):
    output = tmp_path / "output"
    output.write_text("x" * 2_000_000 + BODY)
    run("sh", "-c", f"cat {output} | curl -fsS -m 10 -T - {job.url}/log")  # chunked
    [(signal, method, _, body)] = job.stored()
    assert (signal, method, len(body.encode()), body[-15:]) == ("log", "PUT", 10_000, BODY)


def test_curl_asks_for_the_head(job):
    assert curl("-I", job.url).startswith("HTTP/1.1 200")
    assert job.stored() == [("success", "HEAD", None, None)]


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
def test_curl_speaks_any_version_of_http(job, version):
    curl(version, job.url)
    assert job.stored() == [("success", "GET", None, None)]


# Python


def test_requests_is_stored(job):
    assert requests.get(job.url, timeout=10).json() == {"status": "ok"}
    assert job.stored() == [("success", "GET", None, None)]


def test_a_session_of_requests_is_stored(job):
    with requests.Session() as session:
        session.get(f"{job.url}/start", timeout=10)
        session.post(f"{job.url}/0", data=BODY.encode(), timeout=10)
    assert job.stored() == [("start", "GET", None, None), ("success", "POST", 0, BODY)]


def test_requests_sends_a_generator(job):
    requests.post(job.url, data=iter([b"one ", b"two"]), timeout=10)  # chunked
    assert job.stored() == [("success", "POST", None, "one two")]


# Node


def test_nodes_fetch_is_stored(job):
    script = f'const answer = await fetch("{job.url}"); console.log((await answer.json()).status)'
    assert node(script) == "ok\n"
    assert job.stored() == [("success", "GET", None, None)]


def test_nodes_fetch_sends_a_body(job):
    node(f'await fetch("{job.url}/fail", {{method: "POST", body: "line one\\nöre ✓\\n"}})')
    assert job.stored() == [("fail", "POST", None, BODY)]


# Ruby


def test_rubys_net_http_is_stored(job):
    assert ruby(f'puts Net::HTTP.get(URI("{job.url}"))') == '{"status": "ok"}\n'
    assert job.stored() == [("success", "GET", None, None)]


def test_rubys_net_http_sends_a_body(job):
    ruby(f'Net::HTTP.post(URI("{job.url}/0"), "line one\\nöre ✓\\n")')
    assert job.stored() == [("success", "POST", 0, BODY)]
