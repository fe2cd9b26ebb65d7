"""The dashboard: who sees it, what it shows, and what it never shows to those who may not."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    TOKEN,
    Answer,
    House,
    Process,
    launch,
)

import larm as program

PASSWORD = "Åtta hemliga ord"
JOBS = f"""
[channels]
phone = "json://127.0.0.1:9/a-secret-of-the-channel"
[monitors.job]
name = "<script>alert('job')</script> & \\"co\\""
interval = "1d"
token = "{TOKEN}"
note = "A note that is not for everybody"
[monitors.made]
interval = "1d"
"""
SECRETS = (TOKEN, "a-secret-of-the-channel", "/api/heartbeat/", "A note that is not", "Ping URL")


@contextlib.contextmanager
def running(folder: Path, toml: str) -> Iterator[Process]:
    """A Larm for all tests of this file."""
    larm = launch(folder, toml + JOBS)
    try:
        yield larm
        assert "Traceback" not in larm.log
        assert " ERROR " not in larm.log
    finally:
        larm.kill()


@pytest.fixture(scope="module")
def larm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Without a password."""
    with running(tmp_path_factory.mktemp("open"), 'url = "http://nas.lan:5276"\n') as process:
        yield process


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """With a password, below a prefix."""
    toml = f'url = "https://home.example/larm"\npassword = "{PASSWORD}"\n'
    with running(tmp_path_factory.mktemp("guarded"), toml) as process:
        yield process


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    toml = f'public = true\npassword = "{PASSWORD}"\n'
    with running(tmp_path_factory.mktemp("public"), toml) as process:
        yield process


def basic(password: str, user: str = "me") -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def bearer(password: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {password.encode().decode('latin-1')}"}


def text(answer: Answer) -> str:
    return answer.body.decode()


def hidden(answer: Answer) -> bool:
    """Whether nothing of what only viewers see is in the answer."""
    return not any(secret in text(answer) for secret in (*SECRETS, "made"))


def with_host(larm: Process, host: str | None) -> int:
    client = http.client.HTTPConnection("127.0.0.1", larm.port, timeout=15)
    with contextlib.closing(client):
        client.putrequest("GET", "/", skip_host=True)
        if host is not None:
            client.putheader("Host", host)
        client.endheaders()
        return client.getresponse().status


# Without a password: who comes straight from this machine


def test_this_machine_sees_the_dashboard(larm):
    answer = larm.get("/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=UTF-8")
    assert f"http://nas.lan:5276/api/heartbeat/{TOKEN}" in text(answer)


@pytest.mark.parametrize("host", ["localhost", "localhost:5276", "127.0.0.1", "127.1.2.3:80",
                                  "[::1]:5276", "LOCALHOST", "nas.lan", "nas.lan:5276", "NAS.lan"])
def test_its_own_names_are_this_machine(larm, host):
    assert with_host(larm, host) == 200


@pytest.mark.parametrize("host", [
    "evil.example", "localhost.evil.example", "evil.localhost.example", "127.0.0.1.evil.example",
    "nas.lan.evil.example", "evil.example#localhost", "192.168.1.5", "10.127.0.0.1", "[::2]", "[",
    "", None,
])  # fmt: skip
def test_another_name_is_not_this_machine(larm, host):
    assert with_host(larm, host) == 403


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via",
                                    "X-Forwarded-Host", "X-Forwarded-Proto", "x-forwarded-for",
                                    "X-Forwarded-Port", "X-Forwarded-Server",
                                    "CF-Connecting-IP"])
@pytest.mark.parametrize("value", ["127.0.0.1", ""])
def test_what_was_forwarded_does_not_come_from_this_machine(larm, header, value):
    answer = larm.get("/", headers={header: value})
    assert answer.status == 403
    assert hidden(answer)


def test_who_is_refused_is_told_how_to_set_a_password(larm):
    answer = larm.get("/", headers={"X-Forwarded-For": "203.0.113.9"})
    assert 'password = "' in text(answer).replace("&quot;", '"')
    assert "larm.toml" in text(answer)


def test_a_password_that_is_not_set_opens_nothing(larm):
    for given in (basic(""), basic("None"), bearer("")):
        assert larm.get("/", headers={"X-Real-IP": "203.0.113.9", **given}).status == 403


# With a password: who gives it


@pytest.mark.parametrize("given", [basic(PASSWORD), basic(PASSWORD, ""), basic(PASSWORD, "Åsa"),
                                   bearer(PASSWORD)])
def test_the_password_opens_the_dashboard(guarded, given):
    answer = guarded.get("/", headers=given)
    assert answer.status == 200
    assert f"https://home.example/larm/api/heartbeat/{TOKEN}" in text(answer)


def test_the_password_opens_it_through_a_proxy_too(guarded):
    headers = {"X-Forwarded-For": "203.0.113.9", "Host": "home.example", **basic(PASSWORD)}
    assert guarded.get("/", headers=headers).status == 200


OTHERS = [
    {}, basic("wrong"), basic(""), basic(PASSWORD + "x"), basic(PASSWORD[:-1]), basic("", PASSWORD),
    bearer("wrong"), bearer(""), {"Authorization": "Basic"}, {"Authorization": "Basic %%%"},
    {"Authorization": "Basic å"}, {"Authorization": "Digest x"}, {"Authorization": ""},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_everything_else_is_asked_for_it(guarded, number):
    answer = guarded.get("/", headers={"X-Forwarded-For": f"192.0.2.{number}", **OTHERS[number]})
    headers = {name.lower(): value for name, value in answer.headers.items()}
    assert answer.status == 401
    assert headers["www-authenticate"].startswith("Basic realm=")
    assert hidden(answer)


def test_this_machine_is_asked_for_it_too(guarded):
    assert guarded.get("/").status == 401


def test_ten_wrong_passwords_are_429_even_with_the_right_one(guarded):
    guess = {"X-Forwarded-For": "198.51.100.1"}
    statuses = [guarded.get("/", headers={**guess, **basic(f"no-{n}")}).status for n in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    assert guarded.get("/", headers={**guess, **basic(PASSWORD)}).status == 429


def test_one_addresss_guesses_shut_out_no_other_address(guarded):
    for number in range(11):
        guarded.get("/", headers={"X-Forwarded-For": "198.51.100.2", **bearer(f"no-{number}")})
    other = {"X-Forwarded-For": "198.51.100.3", **basic(PASSWORD)}
    assert guarded.get("/", headers=other).status == 200


def test_an_address_that_the_client_made_up_does_not_count(guarded):
    """Of X-Forwarded-For only the last address is the proxy's own word."""
    guesses = [{"X-Forwarded-For": f"192.0.2.{n}, 198.51.100.4", **basic("no")} for n in range(11)]
    assert [guarded.get("/", headers=guess).status for guess in guesses][-1] == 429


def test_no_password_given_is_no_wrong_password(guarded):
    asked = {"X-Forwarded-For": "198.51.100.5"}
    assert {guarded.get("/", headers=asked).status for _ in range(20)} == {401}


def test_guesses_do_not_stop_heartbeats(guarded):
    guess = {"X-Forwarded-For": "198.51.100.6", **basic("no")}
    assert [guarded.get("/", headers=guess).status for _ in range(11)][-1] == 429
    answer = guarded.get(f"/api/heartbeat/{TOKEN}", headers=guess)
    assert (answer.status, answer.json) == (200, {"status": "ok"})


# Public: states for everybody, secrets for viewers


def test_in_public_everybody_sees_states(public):
    answer = public.get("/", headers={"X-Forwarded-For": "203.0.113.9"})
    assert answer.status == 200
    assert "pending" in text(answer)
    assert "made" in text(answer)


@pytest.mark.parametrize("given", [{}, basic("wrong"), bearer("")])
@pytest.mark.parametrize("path", ["/", "/monitor/job", "/monitor/made"])
def test_in_public_only_viewers_see_secrets(public, given, path):
    answer = public.get(path, headers={"X-Forwarded-For": "203.0.113.9", **given})
    [made] = public.rows("SELECT made_token FROM monitors WHERE key = 'made'")
    assert answer.status == 200
    assert [one for one in (*SECRETS, made["made_token"]) if one in text(answer)] == []


def test_in_public_viewers_see_ping_urls(public):
    assert f"/api/heartbeat/{TOKEN}" in text(public.get("/", headers=basic(PASSWORD)))


# The page


def test_html_in_a_name_is_escaped(larm):
    page = text(larm.get("/"))
    assert "<script>alert(" not in page
    assert "&lt;script&gt;alert(" in page


def test_html_in_what_a_client_sends_is_escaped(larm):
    page = text(larm.get("/%3Cscript%3E/<script>", headers={"User-Agent": "<script>"}))
    assert "<script" not in page


def test_a_channels_url_is_not_even_shown_to_viewers(larm):
    assert "a-secret-of-the-channel" not in text(larm.get("/"))


@pytest.mark.parametrize(("path", "status", "host"), [("/", 200, "localhost"), ("/", 403, "evil"),
                                                      ("/no-such-page", 404, "localhost")])
def test_a_page_loads_nothing_and_tells_nobody(larm, path, status, host):
    answer = larm.get(path, headers={"Host": host})
    policy = answer.headers["Content-Security-Policy"]
    assert answer.status == status
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["Referrer-Policy"] == "same-origin"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/monitor/job"])
@pytest.mark.parametrize("kind", ["style", "script"])
def test_the_pages_own_style_and_script_are_allowed_by_its_policy(larm, kind, path):
    answer = larm.get(path)
    [found] = re.findall(rf"<{kind}>(.*?)</{kind}>", text(answer), re.DOTALL)
    wanted = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
    assert f"{kind}-src 'sha256-{wanted}'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"<[^>]* (style|on\w+)=", text(answer).replace(found, ""))


def test_a_heartbeat_shows_on_the_page(larm):
    larm.ping()
    assert re.search(r'<td class="up">up', text(larm.get("/")))


def test_the_head_is_the_page_without_its_body(larm):
    answer = larm.get("/", "HEAD")
    assert (answer.status, answer.body) == (200, b"")


# A path in `url`


def test_the_dashboard_is_below_the_path_of_url(guarded):
    for path in ("/larm/", "/larm"):
        assert guarded.get(path, headers=basic(PASSWORD)).status == 200


def test_heartbeats_are_below_the_path_of_url(guarded):
    for token in (TOKEN, "nobody-ever-made-this-token"):
        answer = guarded.get(f"/larm/api/heartbeat/{token}/log")
        assert (answer.status, answer.json) == (200, {"status": "ok"})
    assert guarded.rows("SELECT * FROM heartbeats WHERE signal = 'log'")


def test_health_is_below_the_path_of_url(guarded):
    assert guarded.get("/larm/health").json == {"status": "ok"}


def test_what_only_begins_like_the_path_of_url_is_not_below_it(guarded):
    assert guarded.get("/larmed/", headers=basic(PASSWORD)).status == 404


# What is not there


@pytest.mark.parametrize("path", ["/no-such-page", "/api", "/api/heartbeat", "/monitor/no-such-key",
                                  "/..%2f..%2fetc/passwd", "/%00", "/%ff%fe", "/" + "a" * 9_000])
def test_an_unknown_path_is_404(larm, path):
    assert larm.get(path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "FOO"])
@pytest.mark.parametrize("path", ["/", "/health", "/monitor/job"])
def test_another_method_is_405(larm, path, method):
    assert larm.get(path, method, b"x").status == 405


# /health


@pytest.mark.parametrize("headers", [{}, {"Host": "evil.example"}, {"X-Forwarded-For": "1.2.3.4"},
                                     basic("wrong")])
def test_anyone_may_ask_for_health(larm, guarded, headers):
    for one in (larm, guarded):
        answer = one.get("/health", headers=headers)
        assert (answer.status, answer.json) == (200, {"status": "ok"})
        assert answer.headers["Content-Type"] == "application/json"


@pytest.fixture
def rooms(house) -> House:
    return house('[monitors.job]\ninterval = "1d"\n')


@pytest.fixture
def web(rooms) -> program.Web:
    web = program.Web(rooms.store, rooms.clock, rooms.intake, rooms.watcher, rooms.notifier)
    web.use(rooms.config)
    return web


def test_health_is_503_with_the_reason_while_the_database_cannot_be_written(rooms, web):
    rooms.store.write(lambda db: db.execute("PRAGMA query_only = ON"))
    with pytest.raises(program.Unrecordable):
        rooms.ping("job")
    status, body = ask(web, "/health")
    assert status == "503 Service Unavailable"
    assert b"readonly database" in body


def test_health_is_503_with_the_reason_while_the_watcher_stalls(rooms, web):
    assert ask(web, "/health") == ("200 OK", b'{"status": "ok"}')
    rooms.clock.advance(11_000)
    status, body = ask(web, "/health")
    assert status == "503 Service Unavailable"
    assert b"the watcher is stalled" in body


def ask(web: program.Web, path: str) -> tuple[str, bytes]:
    """(status, body) of a request that comes from far away."""
    given: list[str] = []
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "larm",
        "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "203.0.113.9",
        "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(), "wsgi.url_scheme": "http",
    }  # fmt: skip
    body = b"".join(web(environ, lambda status, *_: given.append(status)))
    return given[0], body
