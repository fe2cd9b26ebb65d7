"""Who may do what: each row of interface.md's HTTP table, for each kind of visitor; and that no
secret reaches who is not a viewer, on any path.
"""

from __future__ import annotations

import base64
import itertools
import json
import logging
import os
import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from conftest import TOKEN, Answer, House, run_larm, wait_until, write_config
from receivers import Phone, channels, monitor

import larm
from larm import HOUR, SECOND

PASSWORD = "Åtta: hemliga ord"
FAR, HERE = "203.0.113.9", "127.0.0.1"
GUARD = f'password = "{PASSWORD}"\n'
JOB = monitor(interval="1d", token=TOKEN, notify=["phone"], note="A-note-for-viewers")


def basic(password: str, user: str = "me") -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def bearer(password: str) -> str:
    return f"Bearer {password.encode().decode('latin-1')}"


VIEWER = {"AUTHORIZATION": basic(PASSWORD)}
ROWS = {  # of the HTTP table, and the buttons of the pages: who may
    "GET /": "public",
    "GET /monitor/job": "public",
    "GET /badge/job.svg": "public",
    "GET /badge/all.svg": "public",
    "GET /metrics": "viewers",
    "GET /login": "viewers",
    "GET /api/v1/summary": "public",
    "GET /api/v1/monitors": "public",
    "GET /api/v1/monitors/job": "public",
    "GET /api/v1/monitors/job/heartbeats": "public",
    "GET /api/v1/events": "public",
    "POST /api/v1/monitors/job/pause": "viewers",
    "POST /api/v1/monitors/job/resume": "viewers",
    "POST /api/v1/channels/phone/test": "viewers",
    "POST /monitor/job/pause": "viewers",
    "POST /monitor/job/resume": "viewers",
    "POST /monitor/job/ping": "viewers",
    "POST /monitor/job/test": "viewers",
    "GET /health": "anyone",
    f"POST /api/heartbeat/{TOKEN}": "anyone",
}
POSTS = [row for row, whom in ROWS.items() if row.startswith("POST") and whom == "viewers"]
EACH_ROW = pytest.mark.parametrize("row", ROWS)
SETUPS = {
    "closed": GUARD,
    "public": f"{GUARD}public = true\n",
    "local": 'url = "http://nas.lan:5276"\n',
    "local and public": "public = true\n",
    "below a path": f'{GUARD}url = "https://home.example/larm"\n',
    "embedded": f'{GUARD}embed = ["https://home.lan", "http://[::1]:8123"]\n',
}


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, House]]:
    """A Larm of each way to set access up, with a channel that answers."""
    toml = channels(Phone("access")).replace("access =", "phone =")
    built = {name: House(tmp_path_factory.mktemp("larm"), f"{text}{toml}{JOB}")
             for name, text in SETUPS.items()}
    yield built
    for one in built.values():
        one.stop()


visitors = itertools.count(1)


def stranger() -> str:
    """An address that nobody has asked from, so that no guess counts against another."""
    number = next(visitors)
    return f"198.{18 + number // 60_000}.{number // 250 % 240}.{number % 250}"


def visit(house: House, row: str, peer: str, **headers: str) -> Answer:
    """What a row answers. A test of channels, of which there is one at a time, has its turn."""
    method, _, path = row.partition(" ")

    def answer() -> Answer | None:
        found = house.ask(path, method, b"", peer, **headers)
        return None if found.status == 503 and path.endswith("/test") else found

    found: Answer = wait_until(answer)
    return found


def is_refused(answer: Answer, row: str, status: int) -> bool:
    """Whether it is that refusal, worded as the API or as a page does."""
    kind = {401: "unauthorized", 403: "forbidden", 429: "rate_limited"}[status]
    if row.split()[1].startswith("/api/"):
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.json["error"]["type"] == kind
        assert answer.json["error"]["message"]
    else:
        assert answer.headers["Content-Type"].startswith("text/html")
    asks = 'Basic realm="Larm", charset="UTF-8"' if status == 401 else None
    assert answer.headers.get("Www-Authenticate") == asks  # as Bottle spells it
    return answer.status == status


@dataclass(frozen=True)
class Visitor:
    """`refused`: the status where a row is not for them; 0: all are."""

    setup: str
    refused: int
    peer: str = FAR
    headers: dict[str, str] = field(default_factory=dict)
    posts: bool = True  # whether a POST is let in where a GET is


PROXIED = {"X_FORWARDED_FOR": FAR}
CROSS_SITE = {"ORIGIN": "https://evil.example"}
VISITORS = {
    "viewer": Visitor("closed", 0, headers=VIEWER),
    "viewer, through a proxy": Visitor("closed", 0, HERE, PROXIED | VIEWER),
    "viewer, in public": Visitor("public", 0, headers={"AUTHORIZATION": bearer(PASSWORD)}),
    "viewer, in a frame": Visitor("embedded", 0, headers=VIEWER | {"SEC_FETCH_DEST": "iframe"}),
    "viewer, on another site's page": Visitor("closed", 0, FAR, VIEWER | CROSS_SITE, False),
    "nobody": Visitor("closed", 401),
    "nobody, on this machine": Visitor("closed", 401, HERE),
    "nobody, who guesses": Visitor("closed", 401, "", {"AUTHORIZATION": basic("wrong")}),
    "nobody, in public": Visitor("public", 401),
    "nobody, in public, who guesses": Visitor("public", 401, "", {"AUTHORIZATION": bearer("no")}),
    "this machine": Visitor("local", 0, HERE),
    "this machine, on another site's page": Visitor("local", 0, HERE, CROSS_SITE, False),
    "this machine, in public": Visitor("local and public", 0, HERE),
    "another machine": Visitor("local", 403),
    "another machine, in public": Visitor("local and public", 403),
    "another machine, through a proxy": Visitor("local", 403, HERE, PROXIED),
    "another site's name for this machine": Visitor("local", 403, HERE, {"HOST": "evil.example"}),
}


@pytest.mark.parametrize("who", VISITORS)
def test_each_row_of_the_table_lets_in_who_may_and_refuses_everyone_else(houses, who):
    one = VISITORS[who]
    house = houses[one.setup]
    answered, expected = {}, {}
    for row, whom in ROWS.items():
        shown = whom == "anyone" or (whom == "public" and "public" in one.setup)
        refused = 0 if shown else one.refused
        if row in POSTS and not one.posts:
            refused = 403
        answer = visit(house, row, one.peer or stranger(), **one.headers)
        expected[row] = refused or "let in"
        answered[row] = "let in" if answer.status in (200, 303) else answer.status
        assert not refused or is_refused(answer, row, refused)
    assert answered == expected


def test_who_is_refused_has_done_nothing(house):
    phone = Phone()
    rooms = house(GUARD + channels(phone) + JOB)
    for row in POSTS:
        for headers in ({}, {"AUTHORIZATION": basic("no")}, VIEWER | CROSS_SITE):
            assert visit(rooms, row, stranger(), **headers).status in (401, 403)
    answer = rooms.ask("/api/v1/monitors/job", **VIEWER).json["data"]
    assert (answer["state"], answer["last_heartbeat_at"], phone.tries) == ("pending", None, 0)


def test_every_link_and_button_of_the_pages_is_in_the_table(houses):
    pages = [houses[setup].ask(path, **VIEWER).body.decode() for path in ("/", "/monitor/job")
             for setup in ("local", "local and public")]
    pages.append(houses["public"].ask("/", peer=FAR).body.decode())
    links = {f"GET {link}" for page in pages for link in re.findall(r'href="(/[^"]*)"', page)}
    links |= {f"POST {link}" for page in pages
              for link in re.findall(r'method="post" action="(/[^"]*)"', page)}
    assert len(links) >= 6
    assert links <= ROWS.keys()


@EACH_ROW
def test_everything_is_below_the_path_of_url_too(houses, row):
    method, _, path = row.partition(" ")
    house, below = houses["below a path"], f"{method} /larm{path}"
    assert visit(house, below, FAR, **VIEWER).status in (200, 303)
    answer = visit(house, below, stranger())
    assert answer.status == (200 if ROWS[row] == "anyone" else 401)


def test_login_asks_for_the_password_and_leads_to_the_dashboard(houses):
    for setup, to in (("public", "/"), ("closed", "/"), ("below a path", "/larm/")):
        answer = houses[setup].ask(f"{to[:-1]}/login", **VIEWER)
        assert (answer.status, answer.headers["Location"]) == (303, to)
        assert is_refused(houses[setup].ask(f"{to[:-1]}/login", peer=FAR), "GET /login", 401)
    answer = houses["local and public"].ask("/login", peer=FAR)
    assert is_refused(answer, "GET /login", 403)  # there is no password to ask for
    assert b"password = " in answer.body


def test_where_public_is_set_the_pages_show_a_way_to_sign_in(houses):
    for path in ("/", "/monitor/job"):
        assert b'href="/login"' in houses["public"].ask(path, peer=FAR).body
        assert b'href="/login"' not in houses["public"].ask(path, peer=FAR, **VIEWER).body


# Each way to be a viewer, and each to be none


@pytest.mark.parametrize("given", [
    basic(PASSWORD), basic(PASSWORD, ""), basic(PASSWORD, "Åsa"), bearer(PASSWORD),
    f"bearer   {bearer(PASSWORD)[7:]}  ", f"basic {basic(PASSWORD)[6:]}",
])
def test_who_gives_the_password_is_a_viewer(houses, given):
    assert houses["closed"].ask("/metrics", peer=FAR, AUTHORIZATION=given).status == 200


@pytest.mark.parametrize("given", [
    "", "Basic", "Bearer", "Basic ", "Bearer ", "Basic %%%", "Basic YQ", "Basic å", "Digest x",
    "Basic " + base64.b64encode(PASSWORD.encode()).decode(), "Bearer " + basic(PASSWORD)[6:],
    PASSWORD.encode().decode("latin-1"), "Basic " + "A" * 9999, basic(""), basic(PASSWORD + "x"),
    basic(PASSWORD[:-1]), basic("", PASSWORD), basic(PASSWORD.upper()), bearer(PASSWORD + "\xa0"),
    bearer("None"),
])
def test_who_does_not_is_none(houses, given):
    answer = houses["closed"].ask("/metrics", peer=stranger(), AUTHORIZATION=given)
    assert is_refused(answer, "GET /metrics", 401)
    answer = houses["local"].ask("/metrics", peer=FAR, AUTHORIZATION=given)
    assert is_refused(answer, "GET /metrics", 403)  # no password opens where none is set


@pytest.mark.parametrize("password", ["voilà", "x" * 500, ":", "a:b:c", '"', "\u0085", "密码"])
def test_a_password_may_hold_any_letter(house, password):
    rooms = house(f"password = {json.dumps(password)}\n{channels(Phone())}{JOB}")
    for given in (basic(password), bearer(password)):
        assert rooms.ask("/metrics", peer=FAR, AUTHORIZATION=given).status == 200
        assert rooms.ask("/metrics", peer=FAR, AUTHORIZATION=given[:-4]).status == 401


OWN_NAMES = ["localhost", "LOCALHOST:5276", "127.5.6.7:80", "[::1]", "[::1]:5276", "nas.lan",
             "[::FFFF:127.0.0.1]", "NAS.lan:80", "localhost:"]
OTHER_NAMES = ["evil.example:5276", "localhost.evil.example", "nas.lan.evil.example", "[::1",
               "192.168.1.5", "[::2]:5276", "evil.example#localhost", "127.0.0.1.evil.example",
               "[", "[]", "localhost.", "xn--localhost", "0", "0.0.0.0", "127.1", ""]
FORWARDED = ["X_FORWARDED_FOR", "X_FORWARDED_HOST", "X_FORWARDED_PROTO", "FORWARDED", "X_REAL_IP",
             "VIA", "X_CLIENT_IP", "TRUE_CLIENT_IP", "X_ORIGINAL_FORWARDED_FOR",
             "X_CLUSTER_CLIENT_IP", "CF_CONNECTING_IP"]


def test_without_a_password_this_machine_goes_by_its_own_names_and_addresses(houses):
    """So that DNS rebinding opens nothing, nor a proxy that nobody thought of."""
    house = houses["local"]
    names = [*OWN_NAMES, *OTHER_NAMES]
    assert [host for host in names if house.ask("/", HOST=host).status == 200] == OWN_NAMES
    peers = ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"]
    others = ["::2", "10.0.0.1", "::ffff:203.0.113.9", "1270.0.0.1", "127.0.0.1.5", ""]
    assert {one for one in peers + others if house.ask("/", peer=one).status == 200} == set(peers)
    values = itertools.product(FORWARDED, ("127.0.0.1", ""))
    assert {house.ask("/", **{name: value}).status for name, value in values} == {403}


# Other sites' pages

FOREIGN = [
    {"ORIGIN": "null"}, {"ORIGIN": ""}, {"ORIGIN": "http://127.0.0.1:1"}, {"ORIGIN": "http://["},
    {"ORIGIN": "evil.example"}, {"ORIGIN": "https://home.example.evil.example"},
    {"SEC_FETCH_SITE": "cross-site"}, {"SEC_FETCH_SITE": "same-site"}, {"SEC_FETCH_SITE": ""},
    {"SEC_FETCH_SITE": "cross-site", "ORIGIN": "https://home.example"},
    {"ORIGIN": "null", "HOST": ""},
]
OWN = [
    {}, {"ORIGIN": "https://home.example"}, {"ORIGIN": "https://HOME.example", "HOST": "10.0.0.1"},
    {"ORIGIN": "http://10.0.0.1:80", "HOST": "10.0.0.1:80"}, {"SEC_FETCH_SITE": "none"},
    {"SEC_FETCH_SITE": "same-origin", "ORIGIN": "null"},
]


def test_a_post_is_taken_from_larms_own_page_and_from_programs_only(houses):
    for row in POSTS:
        for headers in FOREIGN:
            answer = visit(houses["below a path"], row, FAR, **VIEWER, **headers)
            assert is_refused(answer, row, 403), headers
            assert b"another site" in answer.body
        for headers in OWN if "/test" not in row else ():
            assert visit(houses["below a path"], row, FAR, **VIEWER, **headers).status in (200, 303)


# Guessing


def statuses(house: House, path: str, guesses: list[str], peer: str = FAR, **headers: str
             ) -> list[int]:
    return [house.ask(path, peer=peer, AUTHORIZATION=one, **headers).status for one in guesses]


@pytest.mark.parametrize("row", ["GET /metrics", "GET /login", "GET /api/v1/monitors", "GET /"])
def test_ten_wrong_passwords_a_minute_are_429_the_right_one_too_until_the_minute_is_over(
        house, row):
    rooms = house(GUARD + channels(Phone()) + JOB)
    path, wrong = row[4:], [basic("no"), "Basic YQ", "Basic", "Basic %%%", "Bearer "] * 2
    assert statuses(rooms, path, wrong) == [401] * 10
    answer = rooms.ask(path, peer=FAR, **VIEWER)
    assert is_refused(answer, row, 429)
    assert answer.headers["Retry-After"] == "60"
    assert rooms.ask(path, peer="203.0.113.10", **VIEWER).status in (200, 303)
    assert rooms.ask(f"/api/heartbeat/{TOKEN}", peer=FAR, AUTHORIZATION=basic("no")).status == 200
    rooms.clock.advance(61 * SECOND)
    assert rooms.ask(path, peer=FAR, **VIEWER).status in (200, 303)


def test_no_password_given_is_no_wrong_password(houses):
    peer = stranger()
    assert {houses["closed"].ask("/", peer=peer).status for _ in range(20)} == {401}
    assert houses["closed"].ask("/", peer=peer, **VIEWER).status == 200


def test_in_public_who_guesses_sees_what_everyone_sees_and_is_counted(house):
    rooms = house(f"public = true\n{GUARD}{channels(Phone())}{JOB}")
    assert statuses(rooms, "/", [basic("no")] * 12) == [200] * 12
    assert rooms.ask("/login", peer=FAR, **VIEWER).status == 429
    assert b"/api/heartbeat" not in rooms.ask("/", peer=FAR, **VIEWER).body


def test_saving_larm_toml_forgives_no_guess(house):
    rooms = house(GUARD + channels(Phone()) + JOB)
    assert statuses(rooms, "/", [basic("no")] * 10) == [401] * 10
    for text in (rooms.text + monitor("new"), rooms.text.replace(PASSWORD, "another one")):
        rooms.save(text)
        assert statuses(rooms, "/", [basic(PASSWORD), basic("another one")]) == [429, 429]


@pytest.mark.parametrize(("proxies", "peer"), [
    ("", FAR),  # who is no proxy may write what they like
    ("proxies = []\n", HERE), ('proxies = ["10.0.0.0/8"]\n', HERE),
])
def test_a_forged_x_forwarded_for_does_not_evade(house, proxies, peer):
    rooms = house(proxies + GUARD + channels(Phone()) + JOB)
    found = [rooms.ask("/", peer=peer, AUTHORIZATION=basic("no"), X_FORWARDED_FOR=f"192.0.2.{n}")
             for n in range(11)]
    assert [one.status for one in found] == [401] * 10 + [429]


@pytest.mark.parametrize(("proxies", "peer", "behind"), [
    ("", "127.0.0.1", "{}, 198.51.100.4"), ("", "::1", "{}, 198.51.100.4"),
    ('proxies = ["10.0.0.0/8"]\n', "10.1.2.3", "{}, 198.51.100.4, 10.0.0.7"),
])
def test_behind_a_proxy_the_address_that_it_saw_is_counted_and_no_other(
        house, proxies, peer, behind):
    rooms = house(proxies + GUARD + channels(Phone()) + JOB)
    found = [rooms.ask("/", peer=peer, AUTHORIZATION=basic("no"),
                       X_FORWARDED_FOR=behind.format(f"192.0.2.{n}")) for n in range(11)]
    assert [one.status for one in found] == [401] * 10 + [429]
    others = behind.replace("198.51.100.4", "198.51.100.5").format("192.0.2.1")
    assert rooms.ask("/", peer=peer, X_FORWARDED_FOR=others, **VIEWER).status == 200


def test_ipv6_counts_by_64_and_ipv4_by_address_however_it_is_written(house):
    rooms = house(GUARD + channels(Phone()) + JOB)
    for peer, same, other in (
        ("2001:db8:1:2::{:x}", "2001:db8:1:2:ffff::1", "2001:db8:1:3::1"),
        ("::ffff:192.0.2.7", "192.0.2.7", "::ffff:192.0.2.8"),  # as nginx on [::] says it
    ):
        guesses = [{"X_FORWARDED_FOR": peer.format(number), "AUTHORIZATION": basic("no")}
                   for number in range(10)]
        assert [rooms.ask("/", **guess).status for guess in guesses] == [401] * 10
        assert rooms.ask("/", X_FORWARDED_FOR=other, **VIEWER).status == 200, other
        assert rooms.ask("/", X_FORWARDED_FOR=same, **VIEWER).status == 429, same


def test_guesses_from_long_addresses_take_little_memory(house):
    rooms = house(GUARD + channels(Phone()) + JOB)
    tracemalloc.start()
    try:
        for number in range(300):
            rooms.ask("/metrics", AUTHORIZATION="Bearer x",
                      X_FORWARDED_FOR=f"{number:04}{'x' * 60_000}")
        assert tracemalloc.get_traced_memory()[0] < 3_000_000
    finally:
        tracemalloc.stop()


# An empty password


def test_an_empty_password_lets_nobody_in(house, tmp_path, monkeypatch):
    """Not in `check`, not at the start, not at a reload."""
    text = 'password = "${LARM_TEST_PASSWORD}"\n' + channels(Phone()) + JOB
    monkeypatch.setenv("LARM_TEST_PASSWORD", PASSWORD)
    rooms = house(text)
    monkeypatch.setenv("LARM_TEST_PASSWORD", "")
    rooms.save(text + monitor("new"))
    assert rooms.ask("/api/v1/monitors", peer=FAR).status == 401
    assert rooms.ask("/api/v1/monitors", peer=FAR, AUTHORIZATION=basic("")).status == 401
    found = rooms.ask("/", **VIEWER)
    assert b"LARM_TEST_PASSWORD" in found.body
    assert b"/monitor/new" not in found.body

    other = tmp_path / "other"
    other.mkdir()
    for password in ("${LARM_TEST_PASSWORD}", "${file:empty}", "", "${LARM_TEST_UNSET}"):
        (other / "empty").write_text("\n")
        write_config(other, f'password = "{password}"\n' + monitor("job"))
        with pytest.raises(larm.ConfigError, match="password"):
            larm.load(other / "larm.toml", os.environ)
    for verb in ("check", "serve"):
        ended = run_larm(other, verb)
        assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
        assert "password" in ended.stderr


# What every answer says to browsers


def policies(answer: Answer) -> dict[str, str]:
    policy: str = answer.headers["Content-Security-Policy"]
    return dict(one.split(" ", 1) for one in policy.split("; "))


@EACH_ROW
def test_no_answer_is_kept_framed_sniffed_or_told_of_to_other_sites(houses, row):
    if row.endswith(TOKEN):
        return  # a ping says nothing
    for setup, headers in itertools.product(("closed", "embedded"), (VIEWER, {})):
        answer = visit(houses[setup], row, stranger(), **headers)
        found = policies(answer)
        framed_by = "'none'" if setup == "closed" else "https://home.lan http://[::1]:8123"
        assert found["frame-ancestors"] == framed_by
        assert "X-Frame-Options" not in answer.headers  # it would forbid what embed allows
        assert (found["default-src"], found["base-uri"]) == ("'none'", "'none'")
        assert "unsafe" not in str(found)
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("Access-Control-")]


@pytest.mark.parametrize("path", ["/nothing", "/api/v1/nothing", "/%ff", "/monitor/%00"])
def test_what_is_not_there_says_the_same_to_browsers(houses, path):
    for method in ("GET", "POST", "FOO"):
        answer = houses["embedded"].ask(path, method)
        assert policies(answer)["frame-ancestors"].startswith("https://home.lan")
        assert answer.headers["Cache-Control"] == "no-store"


# Secrets

NEVER = ["a-password-of-the-channel", "a-path-of-the-channel", "a-token-of-the-watchdog", PASSWORD,
         PASSWORD.encode().decode("latin-1")]
FOR_VIEWERS = [TOKEN, "A-note-for-viewers", "What-the-job-has-printed", "An-agent-of-the-job",
               "a-run-of-the-job", "phone", "/api/heartbeat/", "192.0.2.77", "a-mistyped-set",
               "unkn", "no-such-action", "larm.toml", "error occurred"]


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, House]]:
    """Larms in which all that may be told has happened."""
    channel = "json://someone:a-password-of-the-channel@127.0.0.1:9/a-path-of-the-channel"
    watchdog = '[watchdog]\nping = "http://127.0.0.1:9/api/heartbeat/a-token-of-the-watchdog"\n'
    toml = channels(phone=channel) + JOB + monitor("made", "1d") + watchdog
    built = {}
    for setup in ("closed", "public", "local", "local and public"):
        one = House(tmp_path_factory.mktemp("larm"), SETUPS[setup].replace("nas.lan", "localhost")
                    + toml)
        built[setup] = one
        one.tokens["job"] = TOKEN
        sent = {"USER_AGENT": "An-agent-of-the-job", "X_FORWARDED_FOR": "192.0.2.77"}
        one.ping("job")
        one.ping("job", "fail", "What-the-job-has-printed", "a-run-of-the-job", **sent)
        one.ping("job", "no-such-action")
        one.ask("/api/heartbeat/unknown-token-of-a-typo", peer="192.0.2.77")
        for _ in range(3):
            one.watch(5 * SECOND)
            one.deliver()
        visit(one, "POST /monitor/job/test", HERE, **VIEWER)
        visit(one, "POST /api/v1/channels/phone/test", HERE, **VIEWER)
        one.save(one.text + "a-mistyped-set = 1\n")
    yield built
    for one in built.values():
        one.stop()


def everything(house: House, peer: str, headers: dict[str, str]) -> dict[str, str]:
    """Each answer whole, head and body, by what was asked: every path of the table for every
    monitor, what is not there, what can't be asked, and what the pages ask for again.
    """
    paths = {row.split()[1].replace("job", key) for row in ROWS for key in ("job", "made", "no")}
    paths |= {f"{path}?limit=-1&before=1&q=a" for path in paths}
    paths |= {"/nothing", "/api/nothing", "/api/v1/%ff", "/..%2flarm.toml", "/monitor/job?before=9"}
    found = {}
    for path, method in itertools.product(sorted(paths), ("GET", "HEAD", "POST", "OPTIONS", "FOO")):
        for more in ({}, {"X_LARM_REFRESH": "1"}) if method == "GET" else ({},):
            if "heartbeat/" in path:
                continue  # it says the same to all (law 1)
            answer = house.ask(path, method, b"", peer or stranger(), **headers, **more)
            found[f"{method} {path} {more}"] = f"{answer.headers}\n{answer.body.decode()}"
    return found


def made_token(house: House) -> str:
    answer = house.ask("/api/v1/monitors/made", **VIEWER)
    return str(answer.json["data"]["ping_url"]).rpartition("/")[2]


def told(answers: dict[str, str], secret: str) -> list[str]:
    return [name for name, text in answers.items() if secret in text]


@pytest.mark.parametrize(("setup", "headers"), [
    ("closed", {}), ("closed", {"AUTHORIZATION": basic("wrong")}), ("public", {}),
    ("public", {"AUTHORIZATION": basic("wrong")}), ("local", {}), ("local and public", {}),
], ids=str)
def test_no_secret_reaches_who_is_not_a_viewer(eventful, setup, headers):
    answers = everything(eventful[setup], "" if headers else FAR, headers)
    assert len(answers) > 200
    found = {secret: told(answers, secret) for secret in (*NEVER, *FOR_VIEWERS)}
    if setup.startswith("local"):  # who is refused is told how to set a password
        found["larm.toml"] = [one for one in found["larm.toml"] if "add" not in answers[one]]
    refusals = ("Give the password that is set in larm.toml", )
    found["larm.toml"] = [one for one in found["larm.toml"]
                          if not any(text in answers[one] for text in refusals)]
    assert {secret: where for secret, where in found.items() if where} == {}
    assert told(answers, made_token(eventful[setup])) == []


def test_a_channels_url_and_the_password_reach_not_even_viewers(eventful):
    for setup, headers in (("closed", VIEWER), ("local", {})):
        answers = everything(eventful[setup], HERE, headers)
        assert [secret for secret in NEVER if told(answers, secret)] == []


def test_viewers_find_what_others_do_not(eventful):
    """So that the tests above look for the right words."""
    answers = everything(eventful["closed"], FAR, VIEWER)
    assert [secret for secret in FOR_VIEWERS if not told(answers, secret)] == []
    assert told(answers, made_token(eventful["closed"]))


def test_in_public_the_api_leaves_out_what_is_for_viewers(eventful):
    def both(path: str) -> tuple[list[dict], list[dict]]:
        """What a stranger and what a viewer gets."""
        answers = (eventful["public"].ask(f"/api/v1/{path}", peer=FAR, **given).json["data"]
                   for given in ({}, VIEWER))
        return tuple(one if isinstance(one, list) else [one] for one in answers)

    theirs, ours = both("monitors/job")
    assert (ours[0]["channels"], ours[0]["note"]) == (["phone"], "A-note-for-viewers")
    assert theirs == [ours[0] | {"channels": [], "note": None, "ping_url": None}]
    theirs, ours = both("monitors/job/heartbeats")
    assert ours[0]["from"] == "192.0.2.77"
    assert theirs == [one | dict.fromkeys(("from", "user_agent", "rid", "body")) for one in ours]
    theirs, ours = both("events")
    assert ours[0]["deliveries"]
    assert theirs == [one | {"deliveries": []} for one in ours]
    theirs, ours = both("summary")
    assert theirs == ours


def test_no_secret_is_in_the_log(eventful, caplog):
    caplog.set_level(logging.INFO)  # as `serve` has it
    house = eventful["closed"]
    everything(house, "", {"AUTHORIZATION": basic("wrong")})
    house.ping("job")
    house.clock.advance(HOUR)
    house.ping("job", "fail", "What-the-job-has-printed")
    house.watch(10 * SECOND)
    house.deliver()
    house.save(house.text.replace("a-mistyped-set = 1\n", "x = 2\n"))
    assert caplog.text
    secrets = (*NEVER, TOKEN, "What-the-job-has-printed", "A-note-for-viewers", "/api/heartbeat/")
    assert [secret for secret in secrets if secret in caplog.text] == []
