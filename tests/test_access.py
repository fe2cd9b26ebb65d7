"""Who may do what: every row of interface.md's HTTP table, for every kind of visitor."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import TOKEN, Answer, Process, ask, launch, open_web, wait_until

import larm as program

PASSWORD = "Åtta: hemliga ord"
FAR = "203.0.113.9"
TOML = f"""
[channels]
phone = "json://someone:a-password-of-the-channel@127.0.0.1:9/a-path-of-the-channel"
[defaults]
notify = ["phone"]
[monitors.job]
name = "Nightly backup"
interval = "1d"
token = "{TOKEN}"
note = "A-note-for-viewers"
[monitors.made]
interval = "1d"
[watchdog]
ping = "http://127.0.0.1:9/api/heartbeat/a-token-of-the-watchdog"
"""


@dataclass(frozen=True)
class Row:
    """A row of the table: who is "viewers", "public" (anyone where public = true) or "anyone"."""

    method: str
    path: str
    who: str

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


ROWS = [
    Row("GET", "/", "public"),
    Row("GET", "/monitor/job", "public"),
    Row("GET", "/badge/job.svg", "public"),
    Row("GET", "/badge/all.svg", "public"),
    Row("GET", "/metrics", "viewers"),
    Row("GET", "/api/v1/monitors", "public"),
    Row("GET", "/api/v1/monitors/job", "public"),
    Row("GET", "/api/v1/monitors/job/heartbeats", "public"),
    Row("GET", "/api/v1/events", "public"),
    Row("POST", "/api/v1/monitors/job/pause", "viewers"),
    Row("POST", "/api/v1/monitors/job/resume", "viewers"),
    Row("POST", "/api/v1/channels/phone/test", "viewers"),
    Row("GET", "/health", "anyone"),
]
EACH_ROW = pytest.mark.parametrize("row", ROWS, ids=str)
GUARDED = [row for row in ROWS if row.who != "anyone"]
EACH_GUARDED_ROW = pytest.mark.parametrize("row", GUARDED, ids=str)
POSTS = [row for row in ROWS if row.method == "POST"]


def basic(password: str, user: str = "me") -> dict[str, str]:
    credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {credentials}"}


def bearer(password: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {password.encode().decode('latin-1')}"}


VIEWERS = [basic(PASSWORD), basic(PASSWORD, ""), basic(PASSWORD, "Åsa"), bearer(PASSWORD),
           {"Authorization": f"bearer   {bearer(PASSWORD)['Authorization'][7:]}  "}]
STRANGERS = [
    {}, {"Authorization": ""}, {"Authorization": "Basic"}, {"Authorization": "Bearer"},
    {"Authorization": "Basic "}, {"Authorization": "Bearer "}, {"Authorization": "Basic %%%"},
    {"Authorization": "Basic YQ"}, {"Authorization": "Basic å"}, {"Authorization": "Digest x"},
    {"Authorization": "Basic " + base64.b64encode(PASSWORD.encode()).decode()},
    {"Authorization": "Bearer " + basic(PASSWORD)["Authorization"][6:]},
    {"Authorization": PASSWORD.encode().decode("latin-1")},
    {"Authorization": "Basic " + "A" * 9999}, basic("wrong"), basic(""), basic(PASSWORD + "x"),
    basic(PASSWORD[:-1]), basic("", PASSWORD), basic(PASSWORD.upper()), bearer("wrong"),
    bearer(PASSWORD + "\xa0"),
]  # fmt: skip


@dataclass
class Larms:
    """One for each way to set access up."""

    closed: Process  # a password, below a prefix
    public: Process  # a password, and public
    local: Process  # no password
    local_public: Process


@pytest.fixture(scope="module")
def larms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Larms]:
    guard = f'password = "{PASSWORD}"\n'
    started: list[Process] = []
    try:
        for text in (f'url = "https://home.example/larm"\n{guard}', f"{guard}public = true\n",
                     'url = "http://nas.lan:5276"\n', "public = true\n"):
            started.append(launch(tmp_path_factory.mktemp("larm"), text + TOML))
            started[-1].ping(TOKEN)
        yield Larms(*started)
        assert not [one.log for one in started if "Traceback" in one.log or " ERROR " in one.log]
    finally:
        for one in started:
            one.kill()


addresses = itertools.count(1)  # a new one for each guess, so that none is refused for the others


def asked(process: Process, row: Row, **headers: str) -> Answer:
    body = b"" if row.method == "POST" else None
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return process.get(row.path, row.method, body, given)


def stranger(given: dict[str, str] | None = None) -> dict[str, str]:
    number = next(addresses)
    return {"X-Forwarded-For": f"198.18.{number // 250}.{number % 250}", **(given or {})}


def refused(answer: Answer, row: Row, status: int, kind: str) -> bool:
    """Whether an answer is that refusal, in the API's shape where it is the API's."""
    if row.path.startswith("/api/"):
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.json["error"]["type"] == kind
        assert answer.json["error"]["message"]
    else:
        assert answer.headers["Content-Type"].startswith("text/html")
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.status == status


def test_the_table_has_every_path_that_larm_answers(house):
    web = open_web(house(TOML))
    rules = {(route.method, route.rule) for route in web._app.routes if route.method != "ANY"}
    for row in ROWS:
        environ = {"REQUEST_METHOD": row.method, "PATH_INFO": row.path}
        route, _ = web._app.router.match(environ)
        rules.discard((route.method, route.rule))
    buttons = ("POST", "/monitor/<key>/<verb:re:pause|resume|test>")  # test_pages.py has these
    assert rules == {buttons}


# Viewers


@EACH_ROW
@pytest.mark.parametrize("number", range(len(VIEWERS)))
def test_who_gives_the_password_is_a_viewer(larms, row, number):
    for process in (larms.closed, larms.public):
        assert asked(process, row, **stranger(VIEWERS[number])).status == 200


@pytest.mark.parametrize("password", ["voilà", "à", "x" * 500, ":", "a:b:c", "…", '"', "\u0085",
                                      "密码"])
@pytest.mark.parametrize("given", [basic, bearer])
def test_a_password_may_hold_any_letter(house, password, given):
    web = open_web(house(f"password = {json.dumps(password)}\n{TOML}"))
    authorization = given(password)["Authorization"]
    assert ask(web, "/metrics", peer=FAR, AUTHORIZATION=authorization).status == 200
    assert ask(web, "/metrics", peer=FAR, AUTHORIZATION=authorization[:-4]).status == 401


@EACH_ROW
def test_without_a_password_this_machine_is_a_viewer(larms, row):
    assert asked(larms.local, row).status == 200
    assert asked(larms.local, row, Authorization="Basic %%%").status == 200


@EACH_ROW
def test_everything_is_below_the_path_of_url_too(larms, row):
    below = Row(row.method, f"/larm{row.path}", row.who)
    assert asked(larms.closed, below, **stranger(basic(PASSWORD))).status == 200
    answer = asked(larms.closed, below, **stranger())
    assert (answer.status, row.who) in ((200, "anyone"), (401, "viewers"), (401, "public"))


def test_ping_urls_have_the_path_of_url(larms):
    [monitor, _] = larms.closed.get("/api/v1/monitors", headers=basic(PASSWORD)).json["data"]
    assert monitor["ping_url"] == f"https://home.example/larm/api/heartbeat/{TOKEN}"


# Everyone else


@EACH_GUARDED_ROW
@pytest.mark.parametrize("number", range(len(STRANGERS)))
def test_who_does_not_give_the_password_is_unauthorized(larms, row, number):
    answer = asked(larms.closed, row, **stranger(STRANGERS[number]))
    assert refused(answer, row, 401, "unauthorized")
    headers = {name.lower(): value for name, value in answer.headers.items()}
    assert headers["www-authenticate"] == 'Basic realm="Larm", charset="UTF-8"'


@EACH_GUARDED_ROW
def test_with_a_password_this_machine_is_asked_for_it_too(larms, row):
    assert refused(asked(larms.closed, row), row, 401, "unauthorized")


FORWARDED = ["X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "X-Real-IP",
             "Via", "X-Client-IP", "True-Client-IP", "X-Original-Forwarded-For",
             "X-Cluster-Client-IP", "CF-Connecting-IP"]


@EACH_GUARDED_ROW
@pytest.mark.parametrize("header", FORWARDED)
def test_without_a_password_what_was_forwarded_is_forbidden(larms, row, header):
    answer = asked(larms.local, row, **{header: "127.0.0.1", **basic("")})
    assert refused(answer, row, 403, "forbidden")


HOSTS = ["evil.example", "evil.example:5276", "localhost.evil.example", "nas.lan.evil.example",
         "192.168.1.5", "[::2]:5276", "evil.example#localhost", "127.0.0.1.evil.example", "[", "[]",
         "localhost.", "xn--localhost", "0", "0.0.0.0", "127.1", "[::1"]  # fmt: skip


@EACH_GUARDED_ROW
@pytest.mark.parametrize("host", HOSTS)
def test_without_a_password_another_sites_name_for_this_machine_is_forbidden(larms, row, host):
    """So that DNS rebinding opens nothing."""
    assert refused(asked(larms.local, row, Host=host), row, 403, "forbidden")


@EACH_GUARDED_ROW
@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:5276", "127.0.0.1", "127.5.6.7:80",
                                  "[::1]", "[::1]:5276", "[::FFFF:127.0.0.1]", "nas.lan",
                                  "NAS.lan:80", "localhost:"])
def test_without_a_password_this_machine_goes_by_its_own_names(larms, row, host):
    assert asked(larms.local, row, Host=host).status == 200


@pytest.fixture
def web(house) -> program.Web:
    return open_web(house(TOML))


@EACH_GUARDED_ROW
@pytest.mark.parametrize("peer", [FAR, "::2", "10.0.0.1", "::ffff:203.0.113.9", "1270.0.0.1", ""])
def test_without_a_password_another_machine_is_forbidden(web, row, peer):
    assert refused(ask(web, row.path, row.method, peer=peer), row, 403, "forbidden")


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_without_a_password_every_loopback_address_is_this_machine(web, peer):
    assert ask(web, "/api/v1/monitors", peer=peer).status == 200


# Public


@EACH_ROW
@pytest.mark.parametrize("given", [{}, basic("wrong"), {"Authorization": "Basic %%%"}], ids=str)
def test_in_public_everyone_may_look_and_change_nothing(larms, row, given):
    answer = asked(larms.public, row, **stranger(given))
    if row.who == "viewers":
        assert refused(answer, row, 401, "unauthorized")
    else:
        assert answer.status == 200


@EACH_ROW
def test_in_public_without_a_password_only_this_machine_changes_anything(larms, row):
    assert asked(larms.local_public, row).status == 200
    answer = asked(larms.local_public, row, **stranger())
    assert answer.status == (403 if row.who == "viewers" else 200)


def test_in_public_the_api_leaves_out_what_is_for_viewers(house):
    rooms = house(f'public = true\npassword = "{PASSWORD}"\n{TOML}')
    rooms.intake.receive(TOKEN, "3", lambda signal, status: program.Ping(
        signal, status, "POST", "192.0.2.1", "curl/8", "a-rid", "output"))
    web = open_web(rooms)

    def both(path: str) -> tuple[Any, Any]:
        """What a stranger and what a viewer gets."""
        given = {"AUTHORIZATION": bearer(PASSWORD)["Authorization"]}
        answers = ask(web, path, peer=FAR), ask(web, path, peer=FAR, **given)
        return tuple(answer.json["data"] for answer in answers)

    theirs, ours = both("/api/v1/monitors/job")
    assert (ours["channels"], ours["note"]) == (["phone"], "A-note-for-viewers")
    assert theirs == ours | {"channels": [], "note": None, "ping_url": None}
    [theirs], [ours] = both("/api/v1/monitors/job/heartbeats")
    assert (ours["from"], ours["body"]) == ("192.0.2.1", "output")
    assert theirs == ours | dict.fromkeys(("from", "user_agent", "rid", "body"))
    [theirs], [ours] = both("/api/v1/events")
    assert len(ours["deliveries"]) == 1
    assert theirs == ours | {"deliveries": []}


# Other sites' pages


CROSS_SITE = [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": ""},
              {"Origin": "http://127.0.0.1:1"}, {"Origin": "http://["}, {"Origin": "evil.example"},
              {"Origin": "https://home.example.evil.example"}, {"Sec-Fetch-Site": "cross-site"},
              {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "anything"},
              {"Sec-Fetch-Site": ""}, {"Sec-Fetch-Site": "cross-site", "Origin": "null"},
              {"Sec-Fetch-Site": "cross-site", "Origin": "https://home.example"}]


@pytest.mark.parametrize("row", POSTS, ids=str)
@pytest.mark.parametrize("headers", CROSS_SITE, ids=str)
def test_what_another_sites_page_posts_is_forbidden(larms, row, headers):
    for process, given in ((larms.closed, basic(PASSWORD)), (larms.public, basic(PASSWORD)),
                           (larms.local, {}), (larms.local_public, {})):
        assert refused(asked(process, row, **headers, **given), row, 403, "forbidden")


@pytest.mark.parametrize("row", POSTS, ids=str)
def test_what_another_sites_page_posts_without_a_host_is_forbidden(house, row):
    web = open_web(house(f'password = "{PASSWORD}"\n{TOML}'))
    given = {"AUTHORIZATION": bearer(PASSWORD)["Authorization"], "HOST": "", "ORIGIN": "null"}
    assert refused(ask(web, row.path, "POST", **given), row, 403, "forbidden")


@pytest.mark.parametrize("row", POSTS, ids=str)
@pytest.mark.parametrize("headers", [
    {"Origin": "https://home.example"}, {"Origin": "https://HOME.example", "Host": "127.0.0.1:1"},
    {"Origin": "http://10.0.0.1:80", "Host": "10.0.0.1:80"}, {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://home.example"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "null"},
], ids=str)
def test_larms_own_page_and_programs_may_post(larms, row, headers):
    assert asked(larms.closed, row, **headers, **basic(PASSWORD)).status == 200


@pytest.mark.parametrize("row", [row for row in ROWS if row.method == "GET"], ids=str)
@pytest.mark.parametrize("headers", CROSS_SITE, ids=str)
def test_a_link_on_another_sites_page_works(larms, row, headers):
    assert asked(larms.local, row, **headers).status == 200


# Guessing


@EACH_GUARDED_ROW
def test_ten_wrong_passwords_a_minute_are_429_on_every_path(house, row):
    rooms = house(f'password = "{PASSWORD}"\n{TOML}')
    web = open_web(rooms)
    wrong = [basic("no"), bearer("no"), {"Authorization": "Basic"}, {"Authorization": "Basic %%%"}]
    guesses = [wrong[number % 4]["Authorization"] for number in range(10)]
    right = basic(PASSWORD)["Authorization"]

    def status(given: str, peer: str = FAR) -> int:
        return ask(web, row.path, row.method, peer=peer, AUTHORIZATION=given).status

    assert [status(given) for given in guesses] == [401] * 10
    answer = ask(web, row.path, row.method, peer=FAR, AUTHORIZATION=right)
    assert refused(answer, row, 429, "rate_limited")
    assert answer.headers["Retry-After"] == "60"
    assert status(right, "203.0.113.10") == 200
    rooms.clock.advance(61_000)
    assert status(right) == 200


def test_guesses_from_many_long_addresses_take_little_memory(house):
    web = open_web(house(f'password = "{PASSWORD}"\n{TOML}'))
    for number in range(1_100):
        ask(web, "/metrics", X_FORWARDED_FOR=f"{number:04}{'x' * 10_000}", AUTHORIZATION="Bearer x")
    assert len(web._access._guesses) == 1_000
    assert max(map(len, web._access._guesses)) == 100


# What every answer says to browsers


@EACH_ROW
def test_no_answer_is_kept_framed_or_told_of_in_a_referrer(larms, row):
    for answer in (asked(larms.closed, row, **basic(PASSWORD)), asked(larms.closed, row)):
        headers = answer.headers
        policy = dict(one.split(" ", 1) for one in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["base-uri"] == "'none'"
        assert "unsafe" not in str(policy)
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] in ("no-referrer", "same-origin")  # to no other site
        assert headers["X-Content-Type-Options"] == "nosniff"


# Secrets


OUTPUT = "What-the-job-has-printed"
AGENT = "An-agent-of-the-job"
NEVER = ["a-password-of-the-channel", "a-path-of-the-channel", "a-token-of-the-watchdog", PASSWORD,
         PASSWORD.encode().decode("latin-1")]
FOR_VIEWERS = [TOKEN, "A-note-for-viewers", OUTPUT, AGENT, "a-run-of-the-job", "phone",
               "/api/heartbeat/"]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    """Larms with output, events and failed deliveries: one closed, two public, one local."""
    guard = f'password = "{PASSWORD}"\n'
    started: list[Process] = []
    try:
        for text in (guard, f"{guard}public = true\n", "public = true\n", ""):
            process = launch(tmp_path_factory.mktemp("eventful"), text + TOML)
            started.append(process)
            process.ping(TOKEN)
            process.get(f"/api/heartbeat/{TOKEN}/fail?rid=a-run-of-the-job", "POST",
                        OUTPUT.encode(), {"User-Agent": AGENT})
        for process in started:
            wait_until(lambda one=process: one.rows("SELECT 1 FROM deliveries WHERE attempts > 0"))
        yield started
    finally:
        for one in started:
            one.kill()


def paths(process: Process) -> list[str]:
    """Every path of the table for every monitor, what pages link to, and what is not there."""
    known = {row.path.replace("job", key) for row in ROWS for key in ("job", "made", "nobody")}
    known |= {f"{path}?limit=-1" for path in known} | {"/nothing", "/api/nothing", "/api/v1/%ff"}
    pages = [process.get(path, headers=given).body.decode()
             for path in ("/", "/monitor/job") for given in (stranger(), basic(PASSWORD))]
    links = {link for page in pages for link in re.findall(r'(?:href|src|action)="(/[^"]*)"', page)}
    return sorted(known | links)


def everything(process: Process, given: dict[str, str]) -> dict[str, str]:
    """Each answer whole, head and body, by what was asked."""
    found = {}
    for path, method in itertools.product(paths(process), METHODS):
        body = b"" if method in ("POST", "PUT") else None
        answer = process.get(path, method, body, stranger(given))
        found[f"{method} {path}"] = f"{answer.headers}\n{answer.body.decode()}"
    return found


def test_no_secret_reaches_who_is_not_a_viewer(eventful):
    for process, given in itertools.product(eventful, ({}, basic("wrong"))):
        [made] = process.rows("SELECT made_token FROM monitors WHERE key = 'made'")
        answers = everything(process, given)
        assert len(answers) > 200
        for secret in (*NEVER, *FOR_VIEWERS, made["made_token"]):
            told = [name for name, text in answers.items() if secret in text]
            assert told == [], secret


def test_a_channels_url_and_the_password_reach_not_even_viewers(eventful):
    for process, given in ((eventful[0], basic(PASSWORD)), (eventful[3], None)):
        for path, method in itertools.product(paths(process), METHODS):
            body = b"" if method in ("POST", "PUT") else None
            answer = process.get(path, method, body, given)
            text = f"{answer.headers}\n{answer.body.decode()}"
            assert [secret for secret in NEVER if secret in text] == [], f"{method} {path}"


def test_viewers_find_what_others_do_not(eventful):
    """So that the tests above look for the right words."""
    answers = "".join(everything(eventful[0], basic(PASSWORD)).values())
    [made] = eventful[0].rows("SELECT made_token FROM monitors WHERE key = 'made'")
    assert [one for one in (*FOR_VIEWERS, made["made_token"]) if one not in answers] == []


def test_no_secret_is_in_the_log(eventful):
    for process in eventful:
        assert process.log
        secrets = (*NEVER, TOKEN, OUTPUT, AGENT, "A-note-for-viewers", "/api/heartbeat/")
        assert [secret for secret in secrets if secret in process.log] == []
