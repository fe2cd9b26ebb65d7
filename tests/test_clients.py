"""The clients that the documentation shows, against a real Larm: each ping is stored."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import requests
from conftest import TOKEN, Process

JOB = f'[monitors.job]\ninterval = "1d"\ntoken = "{TOKEN}"\n'
BODY = "line one\nöre ✓\n"


@pytest.fixture
def larm(start) -> Process:
    return start(JOB)


@pytest.fixture
def url(larm: Process) -> str:
    return f"{larm.url}/api/heartbeat/{TOKEN}"


def stored(larm: Process) -> list[tuple[object, ...]]:
    rows = larm.rows("SELECT signal, method, exit_status, body FROM heartbeats")
    return [tuple(row.values()) for row in rows]


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


def test_curl_is_stored(larm, url):
    assert curl(url) == '{"status": "ok"}'
    assert stored(larm) == [("success", "GET", None, None)]


def test_curl_sends_the_exit_status_and_the_output(larm, url):
    curl("--data-binary", BODY, f"{url}/3")
    assert stored(larm) == [("fail", "POST", 3, BODY)]


def test_curl_sends_what_it_reads_from_a_pipe(larm, url, tmp_path):
    output = tmp_path / "output"
    output.write_text("x" * 2_000_000 + BODY)
    run("sh", "-c", f"cat {output} | curl -fsS -m 10 -T - {url}/log")  # chunked
    [(signal, method, _, body)] = stored(larm)
    assert (signal, method, len(body.encode()), body[-15:]) == ("log", "PUT", 10_000, BODY)


def test_curl_asks_for_the_head(larm, url):
    assert curl("-I", url).startswith("HTTP/1.1 200")
    assert stored(larm) == [("success", "HEAD", None, None)]


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
def test_curl_speaks_any_version_of_http(larm, url, version):
    curl(version, url)
    assert stored(larm) == [("success", "GET", None, None)]


# Python


def test_requests_is_stored(larm, url):
    assert requests.get(url, timeout=10).json() == {"status": "ok"}
    assert stored(larm) == [("success", "GET", None, None)]


def test_a_session_of_requests_is_stored(larm, url):
    with requests.Session() as session:
        session.get(f"{url}/start", timeout=10)
        session.post(f"{url}/0", data=BODY.encode(), timeout=10)
    assert stored(larm) == [("start", "GET", None, None), ("success", "POST", 0, BODY)]


def test_requests_sends_a_generator(larm, url):
    requests.post(url, data=iter([b"one ", b"two"]), timeout=10)  # chunked
    assert stored(larm) == [("success", "POST", None, "one two")]


# Node


def test_nodes_fetch_is_stored(larm, url):
    script = f'const answer = await fetch("{url}"); console.log((await answer.json()).status)'
    assert node(script) == "ok\n"
    assert stored(larm) == [("success", "GET", None, None)]


def test_nodes_fetch_sends_a_body(larm, url):
    node(f'await fetch("{url}/fail", {{method: "POST", body: "line one\\nöre ✓\\n"}})')
    assert stored(larm) == [("fail", "POST", None, BODY)]


# Ruby


def test_rubys_net_http_is_stored(larm, url):
    assert ruby(f'puts Net::HTTP.get(URI("{url}"))') == '{"status": "ok"}\n'
    assert stored(larm) == [("success", "GET", None, None)]


def test_rubys_net_http_sends_a_body(larm, url):
    ruby(f'Net::HTTP.post(URI("{url}/0"), "line one\\nöre ✓\\n")')
    assert stored(larm) == [("success", "POST", 0, BODY)]
