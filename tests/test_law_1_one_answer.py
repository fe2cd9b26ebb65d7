"""Law 1: no call to the heartbeat endpoint can tell a valid token from any other string."""

from __future__ import annotations

import http.client
import itertools
import os
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import Answer, House, Process, launch, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

UNKNOWN = "nobody-ever-made-this-token"
THROTTLED = "this-token-has-been-throttled"
PAUSED = "this-monitor-has-been-paused"
DISABLED = "this-monitor-is-not-enabled"
VALID = [f"a-valid-token-number-{number:03}" for number in range(250)]
MONITORS = {THROTTLED: "throttled", PAUSED: "paused", DISABLED: "disabled"}
MONITORS |= {token: f"valid-{number}" for number, token in enumerate(VALID)}
TOML = "".join(
    f'[monitors.{key}]\ninterval = "1d"\ntoken = "{token}"\nenabled = '
    f"{'false' if key == 'disabled' else 'true'}\n"
    for token, key in MONITORS.items()
)
PLACES = ["/api/heartbeat/", "/ping/", "/api/push/"]
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
    "white space": "%20%0d%09",
    "dots": "../../etc/passwd",
    "slashes": "////",
    "60 kB": "a" * 60_000,
    "60 kB, percent-encoded": "%41" * 20_000,
}
BEHIND = ["/", "/start", "/fail", "/log", "/0", "/1", "/255", "/256", "/-1", "/00", "/nonsense",
          "/start/", "//fail", "/%00", "/%ff", "%0d", "/%20", "/a/b/c/d", "?rid=1",
          "?rid=" + "r" * 9_000, "?%ff=%00&;", "/0?r=%", "?status=down&msg=x", "?status=",
          "?status=%ff&status=up", "?msg=" + "m" * 9_000]
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "FOO", "PROPFIND", "TRACE",
           "M-SEARCH", "CONNECT"]
PREFLIGHT = (b"Origin: https://home.lan\r\nAccess-Control-Request-Method: POST\r\n"
             b"Access-Control-Request-Headers: x-anything\r\n")
NO_MORE = b"Connection: close\r\n"


@dataclass(frozen=True)
class Reply:
    status_line: bytes
    headers: tuple[bytes, ...]  # as they came, Date aside
    body: bytes


@dataclass
class Server(Process):
    """A Larm with plenty of valid tokens, each of which is fresh() once."""

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

    def ask(self, rest: str, method: str = "GET", headers: bytes = b"", body: bytes = b"",
            version: str = "1.1", place: str = PLACES[0]) -> Reply:
        """Call the endpoint with `rest` behind its path."""
        return self.send(
            b"%s %s HTTP/%s\r\nHost: larm\r\n%s%s\r\n%s"
            % (method.encode(), (place + rest).encode(), version.encode(), headers, NO_MORE, body)
        )

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.popen.pid}/fd"))

    def sockets(self) -> int:
        files = Path(f"/proc/{self.popen.pid}/fd")
        return sum(os.readlink(one).startswith("socket:") for one in files.iterdir()
                   if one.exists())  # fmt: skip

    def stored(self, token: str) -> int:
        answer = self.get(f"/api/v1/monitors/{MONITORS[token]}/heartbeats")
        return len(answer.json["data"])


def read_reply(text: bytes) -> Reply:
    head, _, body = text.partition(b"\r\n\r\n")
    status_line, *headers = head.split(b"\r\n")
    dateless = tuple(line for line in headers if not line.lower().startswith(b"date:"))
    return Reply(status_line, dateless, body)


@pytest.fixture(scope="module")
def larm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One process for all. What it leaves behind after all of it is looked at when it ends."""
    folder, temporary = tmp_path_factory.mktemp("larm"), tmp_path_factory.mktemp("temporary")
    process = launch(folder, TOML, TMPDIR=str(temporary))
    server = Server(folder, process.port, process.popen, process.log_file, iter(VALID))
    try:
        server.ping(THROTTLED)
        assert server.get("/api/v1/monitors/paused/pause", "POST", b"").status == 200
        server.get("/")  # so that it has opened what it opens once
        sockets, files = server.sockets(), server.open_files()
        yield server
        wait_until(lambda: server.sockets() <= sockets)
        assert server.open_files() <= files + 20, "readers of the database, and no more"
        assert list(temporary.iterdir()) == []
        assert "Traceback" not in server.log
        assert "heartbeat" not in server.log
        assert " ERROR " not in server.log
        assert len(server.log.splitlines()) <= 4
    finally:
        server.kill()


@pytest.fixture(scope="module")
def the_answer(larm: Server) -> Reply:
    """What an unknown token gets, and therefore everybody."""
    return larm.ask(UNKNOWN)


def same_for_all(larm: Server, ask: Callable[[str], Reply]) -> Reply:
    """The reply that valid, throttled, paused, disabled and unknown tokens have in common."""
    replies = {ask(token) for token in (UNKNOWN, larm.fresh(), THROTTLED, PAUSED, DISABLED)}
    assert len(replies) == 1, replies
    return replies.pop()


def test_the_answer_is_a_small_json_document_for_any_page(the_answer):
    assert the_answer.status_line == b"HTTP/1.1 200 OK"
    assert the_answer.body == b'{"status": "ok"}'
    for header in (b"Content-Type: application/json", b"Access-Control-Allow-Origin: *",
                   b"Access-Control-Allow-Methods: *", b"Access-Control-Allow-Headers: *"):
        assert header in the_answer.headers


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", STRANGE)
def test_what_can_be_no_token_gets_the_answer(larm, the_answer, place, kind):
    assert larm.ask(STRANGE[kind], place=place) == the_answer


def test_a_percent_encoded_valid_token_is_recorded(larm, the_answer):
    token = larm.fresh()
    assert larm.ask("".join(f"%{ord(letter):02x}" for letter in token)) == the_answer
    assert larm.stored(token) == 1


def test_what_is_throttled_gets_the_answer_and_is_not_recorded(larm, the_answer):
    token = larm.fresh()
    assert [larm.ask(token) for _ in range(4)] == [the_answer] * 4
    assert larm.stored(token) == 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_the_answer_and_is_recorded(larm, the_answer, method):
    token = larm.fresh()
    reply = larm.ask(token, method)
    assert (reply.status_line, reply.headers) == (the_answer.status_line, the_answer.headers)
    assert reply.body == (b"" if method == "HEAD" else the_answer.body)
    assert larm.stored(token) == 1
    assert same_for_all(larm, lambda token: larm.ask(token, method)) == reply


def test_a_preflight_gets_the_answer_and_is_no_ping(larm, the_answer):
    token = larm.fresh()
    for rest in (token, f"{token}/fail", THROTTLED, UNKNOWN, PAUSED, ""):
        assert larm.ask(rest, "OPTIONS", PREFLIGHT) == the_answer
    assert larm.stored(token) == 0
    larm.ask(token, "GET", PREFLIGHT)
    assert larm.stored(token) == 1, "a GET is a ping whatever its headers"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rest", BEHIND, ids=lambda rest: rest[:20])
def test_whatever_follows_the_token_gets_the_answer(larm, the_answer, place, rest):
    tokens = (UNKNOWN, THROTTLED, PAUSED, DISABLED, *([larm.fresh()] if place == PLACES[0] else []))
    assert {larm.ask(token + rest, place=place) for token in tokens} == {the_answer}


@pytest.mark.parametrize(
    "headers",
    [b"Authorization: Basic bm86bm8=\r\n", b"Authorization: Bearer " + b"x" * 5_000 + b"\r\n",
     b"X-Forwarded-For: 203.0.113.9\r\n", b"X-Forwarded-For: \xff, ,;\r\n",
     b"Host: evil.example\r\n", b"Accept: text/html\r\n",
     b"Accept-Encoding: gzip\r\n", b"Origin: https://evil.example\r\n", b"If-None-Match: *\r\n",
     b"Range: bytes=0-1\r\n", b"User-Agent: \xff\xfe\r\n", b"Cookie: a=b\r\n",
     b"Content-Type: text/plain; charset=undefined\r\n",
     b"X-HTTP-Method-Override: DELETE\r\n"],
    ids=lambda headers: headers[:25].decode("latin-1"),
)  # fmt: skip
def test_no_header_changes_the_answer(larm, the_answer, headers):
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


@pytest.mark.parametrize(("headers", "body"), [
    (b"Content-Type: no such/type\r\nContent-Length: 25600\r\n", bytes(range(256)) * 100),
    (b"Transfer-Encoding: chunked\r\n", chunked(b"first", b"\xff" * 20_000)),
    (b"Content-Length: 10000000\r\n", b"x" * 10_000_000),
    (b"Transfer-Encoding: chunked\r\n", chunked(*[b"x" * 50_000] * 199)),
], ids=["anything", "chunked", "10 MB", "10 MB with its frames"])  # fmt: skip
def test_a_body_gets_the_answer_and_is_recorded(larm, the_answer, headers, body):
    token = larm.fresh()
    for one in (token, UNKNOWN, THROTTLED, PAUSED):
        assert larm.ask(one, "POST", headers, body) == the_answer
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
     b"GET http://larm/api/heartbeat/%s HTTP/1.1", b"GET http://[/api/heartbeat/%s HTTP/1.1",
     b"get /api/heartbeat/%s HTTP/1.1"],
)  # fmt: skip
def test_what_is_hardly_http_gets_one_answer(larm, line):
    same_for_all(larm, lambda token: larm.send(line % token.encode() + b"\r\n" + NO_MORE + b"\r\n"))


def abort(connection: socket.socket) -> None:
    """Reset the connection when it is closed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("sent", [b"GET /api/heart", b"GET /api/heartbeat/%s HTTP/1.1\r\nHo",
                                  b"POST /api/heartbeat/%s HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"])
def test_an_aborted_request_is_not_recorded(larm, the_answer, sent):
    token = larm.fresh()
    with larm.connect() as connection:
        connection.sendall(sent % token.encode() if b"%s" in sent else sent)
        abort(connection)
    assert larm.ask(UNKNOWN) == the_answer
    assert larm.stored(token) == 0


def test_a_client_that_does_not_wait_for_the_answer_does_no_harm(larm, the_answer):
    for token in (larm.fresh(), UNKNOWN):
        with larm.connect() as connection:
            connection.sendall(b"GET /api/heartbeat/%s HTTP/1.1\r\n\r\n" % token.encode())
            abort(connection)
    assert larm.ask(UNKNOWN) == the_answer


plain = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=100)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PLACES), plain, st.binary(max_size=200))
def test_every_path_gets_the_answer(larm, the_answer, place, letters, coded):
    assert larm.ask(letters + quote(coded), place=place) == the_answer


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["/", "?", "/?rid=", "/start?rid=", "/fail", "/log?", "/1?", "?status="]),
       plain, st.binary(max_size=100))
def test_everything_behind_a_known_token_gets_the_answer(larm, the_answer, first, letters, coded):
    assert larm.ask(THROTTLED + first + letters + quote(coded)) == the_answer


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


# While nothing can be written


class All:
    """Everybody asks at once: what was answered, and to whom."""

    def __init__(self, asks: dict[str, Callable[[], object]]) -> None:
        self.answers: dict[str, object] = {}
        self.threads = [threading.Thread(target=self._ask, args=one) for one in asks.items()]
        for thread in self.threads:
            thread.start()

    def _ask(self, name: str, ask: Callable[[], object]) -> None:
        self.answers[name] = ask()

    def the_answer(self) -> object:
        """The one that all got."""
        for thread in self.threads:
            thread.join(60)
        assert len(self.answers) == len(self.threads), "somebody was not answered"
        first = next(iter(self.answers.values()))
        assert all(answer == first for answer in self.answers.values()), self.answers
        return first


def everybody(here: House) -> dict[str, Callable[[], Answer]]:
    """A call of each kind."""
    paths = {token: f"/api/heartbeat/{token}" for token in (UNKNOWN, THROTTLED, PAUSED, DISABLED)}
    paths |= {action: f"/api/heartbeat/{VALID[number]}{action}" for number, action in
              enumerate(["", "/start", "/fail", "/3", "/log", "/no-such-action"])}
    paths |= {"nothing": "/ping/", "not a token": "/api/heartbeat/%00%ff",
              "an unknown push": f"/api/push/{UNKNOWN}?status=down",
              "a push": f"/api/push/{VALID[9]}?status=down"}
    asks: dict[str, Callable[[], Answer]] = {
        name: lambda path=path: here.ask(path) for name, path in paths.items()  # type: ignore[misc]
    }
    asks["a preflight"] = lambda: here.ask(paths[""], "OPTIONS",
                                           Access_Control_Request_Method="POST")  # fmt: skip
    asks["a body"] = lambda: here.ask(paths[UNKNOWN], "POST", b"x" * 20_000)
    return asks


@pytest.fixture
def here(house) -> House:
    built: House = house(TOML)
    built.ask(f"/api/heartbeat/{THROTTLED}")
    built.pause("paused")
    return built


def test_while_the_disk_hangs_everybody_waits_and_gets_the_same(here):
    with here.hanging_disk():
        time.sleep(1.1)  # what takes so long hangs
        asked = All(everybody(here))
        time.sleep(0.5)
        assert asked.answers == {}
    answer = asked.the_answer()
    assert isinstance(answer, Answer)
    assert answer.status == 200


def test_while_the_disk_is_full_and_when_it_is_not_any_more_everybody_gets_the_same(here):
    fine = All(everybody(here)).the_answer()
    assert isinstance(fine, Answer)
    assert fine.status == 200
    with here.full_disk():
        here.ping("valid-20", "fail", status=503)
        full = All(everybody(here)).the_answer()
        assert isinstance(full, Answer)
        assert full.status == 503
        assert full.headers["Retry-After"].isdigit()
        assert full.headers["Access-Control-Allow-Origin"] == "*"
    statuses = []
    tokens = itertools.cycle([UNKNOWN, "known", THROTTLED, "known"])
    fresh = iter(VALID[30:])
    end = time.monotonic() + 5
    while statuses[-8:] != [200] * 8 and time.monotonic() < end:
        token = next(tokens)
        token = next(fresh) if token == "known" else token
        statuses.append(here.ask(f"/api/heartbeat/{token}").status)
        time.sleep(0.02)
    assert statuses[-1] == 200
    assert statuses == sorted(statuses, reverse=True), "one was told before another"
    assert All(everybody(here)).the_answer() == fine


def test_while_another_program_holds_the_database_everybody_waits_and_gets_the_same(
    larm, the_answer
):
    """For 9 s: who has waited for 8 is told 503, and who came later 200 when it is over."""

    def ask_all() -> All:
        rests = (UNKNOWN, larm.fresh(), THROTTLED, PAUSED, "", f"{THROTTLED}/nonsense")
        return All({rest: lambda rest=rest: larm.ask(rest) for rest in rests})

    with closing(sqlite3.connect(larm.folder / "larm.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        known = larm.fresh()
        first = All({"known": lambda: larm.ask(known)})
        time.sleep(0.5)
        early = ask_all()
        assert larm.get("/health").status in (200, 503), "the pages answer meanwhile"
        time.sleep(5)
        late = ask_all()
        assert first.answers == early.answers == {}
        refused = early.the_answer()
        assert isinstance(refused, Reply)
        assert refused.status_line == b"HTTP/1.1 503 Service Unavailable"
        assert any(header.startswith(b"Retry-After: ") for header in refused.headers)
        assert {*the_answer.headers} - {*refused.headers} == {b"Content-Length: 16"}
        assert first.the_answer() == refused
        assert late.answers == {}
        other.execute("ROLLBACK")
    assert late.the_answer() == the_answer
