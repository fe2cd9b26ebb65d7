"""Law 1: no call to the heartbeat endpoint can tell a valid token from any other string."""

from __future__ import annotations

import http.client
import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import Process, launch, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

UNKNOWN = "nobody-ever-made-this-token"
THROTTLED = "this-token-has-been-throttled"
DISABLED = "this-monitor-is-not-enabled"
VALID = [f"a-valid-token-number-{number:03}" for number in range(300)]
MONITORS = [("throttled", THROTTLED, "true"), ("disabled", DISABLED, "false")]
MONITORS += [(f"valid-{number}", token, "true") for number, token in enumerate(VALID)]
TOML = "".join(
    f'[monitors.{key}]\ninterval = "1d"\ntoken = "{token}"\nenabled = {enabled}\n'
    for key, token, enabled in MONITORS
)
STRANGE = {
    "empty": "",
    "too short": "x",
    "not a token's letters": "$-+!*'(),;:@&=~",
    "percent-encoded": "%61%2Fb%20c%3Fd%23e%25",
    "NUL": "%00",
    "a valid token and NUL": VALID[0] + "%00",
    "invalid UTF-8": "%ff%fe%80",
    "an overlong slash": "%c0%af",
    "line ends": "%0d%0aSet-Cookie:%20a=b",
    "dots": "../../etc/passwd",
    "two slashes": "//",
    "60 kB": "a" * 60_000,
    "60 kB, percent-encoded": "%41" * 20_000,
}
BEHIND = ["/", "/start", "/fail", "/log", "/0", "/1", "/255", "/256", "/-1", "/00", "/nonsense",
          "/start/", "//", "/%00", "/%ff", "?rid=1", "?rid=" + "r" * 9_000, "?%ff=%00&;", "/0?r=%"]
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "FOO", "PROPFIND", "TRACE",
           "M-SEARCH", "CONNECT"]
NO_MORE = b"Connection: close\r\n"


@dataclass(frozen=True)
class Reply:
    status_line: bytes
    headers: tuple[bytes, ...]  # as they came, Date aside
    body: bytes


@dataclass
class Server(Process):
    """A Larm with plenty of valid tokens, each of which is fresh() once."""

    temporary: Path
    tokens: Iterator[str]

    def fresh(self) -> str:
        return next(self.tokens)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=15)

    def send(self, request: bytes) -> Reply:
        """What comes back before the server closes the connection."""
        with self.connect() as connection:
            connection.sendall(request)
            return read_reply(connection.makefile("rb").read())

    def ask(self, rest: str | bytes, method: str = "GET", headers: bytes = b"",
            body: bytes = b"", version: str = "1.1") -> Reply:
        """Call the endpoint with `rest` behind its path."""
        path = rest if isinstance(rest, bytes) else rest.encode()
        return self.send(
            b"%s /api/heartbeat/%s HTTP/%s\r\nHost: larm\r\n%s%s\r\n%s"
            % (method.encode(), path, version.encode(), headers, NO_MORE, body)
        )

    def open_files(self) -> list[str]:
        files = Path(f"/proc/{self.popen.pid}/fd")
        return sorted(os.readlink(one) for one in files.iterdir() if one.exists())

    def sockets(self) -> list[str]:
        return [one for one in self.open_files() if one.startswith("socket:")]

    def stored(self, token: str) -> int:
        key = next(key for key, own, _ in MONITORS if own == token)
        [row] = self.rows(
            "SELECT COUNT(*) AS n FROM heartbeats h JOIN monitors m ON m.id = monitor_id "
            "WHERE key = ?", key
        )  # fmt: skip
        return int(row["n"])


def read_reply(text: bytes) -> Reply:
    head, _, body = text.partition(b"\r\n\r\n")
    status_line, *headers = head.split(b"\r\n")
    dateless = tuple(line for line in headers if not line.lower().startswith(b"date:"))
    return Reply(status_line, dateless, body)


@pytest.fixture(scope="module")
def larm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, temporary = tmp_path_factory.mktemp("larm"), tmp_path_factory.mktemp("temporary")
    process = launch(folder, TOML, TMPDIR=str(temporary))
    server = Server(
        folder, process.port, process.popen, process.log_file, temporary, iter(VALID)
    )
    server.ping(THROTTLED)
    yield server
    server.kill()


@pytest.fixture(scope="module", autouse=True)
def files_before(larm: Server) -> list[str]:
    larm.get("/")  # so that it has opened what it opens once
    wait_until(lambda: len(larm.sockets()) == 1)
    return larm.open_files()


@pytest.fixture(scope="module")
def the_answer(larm: Server) -> Reply:
    """What an unknown token gets, and therefore everybody."""
    return larm.ask(UNKNOWN)


def same_for_all(larm: Server, ask: Callable[[str], Reply]) -> Reply:
    """The reply that valid, throttled, disabled and unknown tokens have in common."""
    replies = {ask(token) for token in (UNKNOWN, larm.fresh(), THROTTLED, DISABLED)}
    assert len(replies) == 1, replies
    return replies.pop()


def test_the_answer_is_a_small_json_document(the_answer):
    assert the_answer.status_line == b"HTTP/1.1 200 OK"
    assert the_answer.body == b'{"status": "ok"}'
    assert b"Content-Type: application/json" in the_answer.headers


def test_a_valid_token_is_recorded_and_gets_the_answer(larm, the_answer):
    token = larm.fresh()
    assert larm.ask(token) == the_answer
    assert larm.stored(token) == 1


def test_a_throttled_token_is_not_recorded_and_gets_the_answer(larm, the_answer):
    assert [larm.ask(THROTTLED) for _ in range(3)] == [the_answer] * 3
    assert larm.stored(THROTTLED) == 1


def test_a_disabled_monitors_token_gets_the_answer(larm, the_answer):
    assert [larm.ask(DISABLED) for _ in range(3)] == [the_answer] * 3


@pytest.mark.parametrize("kind", STRANGE)
def test_what_can_be_no_token_gets_the_answer(larm, the_answer, kind):
    assert larm.ask(STRANGE[kind]) == the_answer


def test_a_percent_encoded_valid_token_is_recorded(larm, the_answer):
    token = larm.fresh()
    assert larm.ask("".join(f"%{ord(letter):02x}" for letter in token)) == the_answer
    assert larm.stored(token) == 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_the_answer(larm, the_answer, method):
    reply = same_for_all(larm, lambda token: larm.ask(token, method))
    assert (reply.status_line, reply.headers) == (the_answer.status_line, the_answer.headers)
    assert reply.body == (b"" if method == "HEAD" else the_answer.body)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_recorded(larm, method):
    token = larm.fresh()
    larm.ask(token, method)
    assert larm.stored(token) == 1


@pytest.mark.parametrize("rest", BEHIND, ids=lambda rest: rest[:20])
def test_whatever_follows_the_token_gets_the_answer(larm, the_answer, rest):
    assert same_for_all(larm, lambda token: larm.ask(token + rest)) == the_answer


@pytest.mark.parametrize(
    "headers",
    [b"Authorization: Basic bm86bm8=\r\n", b"Authorization: Bearer " + b"x" * 5_000 + b"\r\n",
     b"X-Forwarded-For: 203.0.113.9\r\n", b"Host: evil.example\r\n", b"Accept: text/html\r\n",
     b"Accept-Encoding: gzip\r\n", b"Origin: https://evil.example\r\n", b"If-None-Match: *\r\n",
     b"Range: bytes=0-1\r\n", b"User-Agent: \xff\xfe\r\n", b"Cookie: a=b\r\n",
     b"X-HTTP-Method-Override: DELETE\r\n"],
    ids=lambda headers: headers[:25].decode("latin-1"),
)  # fmt: skip
def test_no_header_is_looked_at(larm, the_answer, headers):
    assert same_for_all(larm, lambda token: larm.ask(token, headers=headers)) == the_answer


def test_http_1_0_gets_one_answer(larm, the_answer):
    reply = same_for_all(larm, lambda token: larm.ask(token, version="1.0"))
    assert (reply.status_line.split()[1], reply.body) == (b"200", the_answer.body)


def test_kept_connections_get_one_answer(larm, the_answer):
    with closing(http.client.HTTPConnection("127.0.0.1", larm.port, timeout=15)) as client:
        replies = set()
        for token in (larm.fresh(), UNKNOWN, THROTTLED, DISABLED, "%00", larm.fresh()):
            client.request("GET", f"/api/heartbeat/{token}")
            reply = client.getresponse()
            headers = [line for line in reply.getheaders() if line[0] != "Date"]
            replies.add((reply.status, tuple(headers), reply.read()))
    [(status, _, body)] = replies
    assert (status, body) == (200, the_answer.body)


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_body_of_any_content_gets_the_answer(larm, the_answer, method):
    body = bytes(range(256)) * 100
    headers = b"Content-Type: no such/type\r\nContent-Length: %d\r\n" % len(body)
    assert same_for_all(larm, lambda token: larm.ask(token, method, headers, body)) == the_answer


def test_a_chunked_body_gets_the_answer(larm, the_answer):
    headers, body = b"Transfer-Encoding: chunked\r\n", chunked(b"first", b"\xff" * 20_000)
    assert same_for_all(larm, lambda token: larm.ask(token, "POST", headers, body)) == the_answer


def test_a_body_of_10_000_000_bytes_gets_the_answer(larm, the_answer):
    headers, body = b"Content-Length: 10000000\r\n", b"x" * 10_000_000
    assert same_for_all(larm, lambda token: larm.ask(token, "POST", headers, body)) == the_answer


def test_a_chunked_body_of_10_000_000_bytes_with_its_frames_gets_the_answer(larm, the_answer):
    headers, body = b"Transfer-Encoding: chunked\r\n", chunked(*[b"x" * 50_000] * 199)
    token = larm.fresh()
    assert larm.ask(token, "POST", headers, body) == the_answer
    assert larm.stored(token) == 1


def test_a_body_of_10_000_001_bytes_gets_413(larm):
    headers = b"Content-Length: 10000001\r\n"
    reply = same_for_all(larm, lambda token: larm.ask(token, "POST", headers))
    assert reply.status_line.split()[1] == b"413"


def test_a_client_that_waits_to_continue_gets_the_answer(larm, the_answer):
    def ask(token: str) -> Reply:
        with larm.connect() as connection:
            connection.sendall(
                b"POST /api/heartbeat/%s HTTP/1.1\r\nHost: larm\r\nContent-Length: 4\r\n"
                b"Expect: 100-continue\r\n%s\r\n" % (token.encode(), NO_MORE)
            )
            answer = connection.makefile("rb")
            assert answer.readline() == b"HTTP/1.1 100 Continue\r\n"
            while answer.readline() != b"\r\n":
                pass
            connection.sendall(b"body")
            return read_reply(answer.read())

    assert same_for_all(larm, ask) == the_answer


def test_pipelined_requests_get_an_answer_each(larm, the_answer):
    tokens = [larm.fresh(), UNKNOWN, larm.fresh(), THROTTLED, DISABLED]
    requests = [b"GET /api/heartbeat/%s HTTP/1.1\r\nHost: larm\r\n" % token.encode()
                for token in tokens]
    with larm.connect() as connection:
        connection.sendall(b"\r\n".join(requests) + NO_MORE + b"\r\n")
        replies = connection.makefile("rb").read().split(b"HTTP/1.1 ")[1:]
    kept, last = {read_reply(reply) for reply in replies[:-1]}, read_reply(replies[-1])
    assert len(replies) == len(tokens)
    assert [reply.body for reply in (*kept, last)] == [the_answer.body] * 2
    assert last.headers == the_answer.headers
    assert larm.stored(tokens[0]) == larm.stored(tokens[2]) == 1


@pytest.mark.parametrize(
    "line",
    [b"GET /api/heartbeat/%s\xff HTTP/1.1", b"GET /api/heartbeat/%s\x00 HTTP/1.1",
     b"GET /api/heartbeat/%s a HTTP/1.1", b"GET /api/heartbeat/%s HTTP/7", b"GET /api/heartbeat/%s",
     b"GET http://[/api/heartbeat/%s HTTP/1.1", b"get /api/heartbeat/%s HTTP/1.1"],
)  # fmt: skip
def test_what_is_hardly_http_gets_one_answer(larm, line):
    same_for_all(larm, lambda token: larm.send(line % token.encode() + b"\r\n" + NO_MORE + b"\r\n"))


@pytest.mark.parametrize("sent", [b"GET /api/heart", b"GET /api/heartbeat/%s HTTP/1.1\r\nHo",
                                  b"POST /api/heartbeat/%s HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"])
def test_an_aborted_request_is_not_recorded(larm, the_answer, sent):
    token = larm.fresh()
    with larm.connect() as connection:
        connection.sendall(sent % token.encode() if b"%s" in sent else sent)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert larm.ask(UNKNOWN) == the_answer
    assert larm.stored(token) == 0


def test_a_client_that_does_not_wait_for_the_answer_does_no_harm(larm, the_answer):
    for token in (larm.fresh(), UNKNOWN):
        with larm.connect() as connection:
            connection.sendall(b"GET /api/heartbeat/%s HTTP/1.1\r\n\r\n" % token.encode())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert larm.ask(UNKNOWN) == the_answer


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_every_percent_encoded_path_gets_the_answer(larm, the_answer, path):
    assert larm.ask(quote(path)) == the_answer


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=200))
def test_every_path_of_plain_letters_gets_the_answer(larm, the_answer, path):
    assert larm.ask(path) == the_answer


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["/", "?", "/?rid=", "/start?rid=", "/fail", "/log?", "/1?"]),
       st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=100),
       st.binary(max_size=100))
def test_everything_behind_a_known_token_gets_the_answer(larm, the_answer, first, plain, coded):
    assert larm.ask(THROTTLED + first + plain + quote(coded)) == the_answer


def test_many_at_once_get_one_answer(larm, the_answer):
    tokens = list(itertools.chain.from_iterable((larm.fresh(), UNKNOWN) for _ in range(40)))
    connections = [larm.connect() for _ in tokens]
    for connection, token in zip(connections, tokens, strict=True):
        connection.sendall(b"GET /api/heartbeat/%s HTTP/1.1\r\nHost: larm\r\n%s\r\n"
                           % (token.encode(), NO_MORE))
    replies = []
    for connection in connections:
        with connection:
            replies.append(read_reply(connection.makefile("rb").read()))
    assert set(replies) == {the_answer}


# After all of it


def test_then_no_file_or_connection_is_left_open(larm, files_before):
    wait_until(lambda: len(larm.sockets()) == 1)  # the one that listens
    assert larm.open_files() == files_before


def test_then_no_temporary_file_is_left(larm):
    assert list(larm.temporary.iterdir()) == []


def test_then_the_log_has_no_traceback_and_no_line_for_a_ping(larm):
    assert "Traceback" not in larm.log
    assert "heartbeat" not in larm.log
    assert [line for line in larm.log.splitlines() if " ERROR " in line] == []
    assert len(larm.log.splitlines()) <= 4
