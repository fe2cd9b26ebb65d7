"""larm.toml: what each setting means, and that every mistake in it is reported, all at once."""

import contextlib
import json
import os
import re
import socket
import string
import sys
import time
import tomllib
from ipaddress import ip_network
from itertools import pairwise
from urllib.parse import unquote, urlsplit

import pytest
from conftest import START, write_config
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

import larm
from larm import DAY, HOUR, MINUTE

JOB = '[monitors.job]\ninterval = "1d"\n'
TOKEN = "0123456789abcdef"

PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=50)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(toml, accepts=None, **environ): the Config."""
    folder = tmp_path_factory.mktemp("config")

    def load(text, accepts=None, **environ):
        return larm.load(write_config(folder, text), environ, accepts)

    return load


@pytest.fixture(scope="module")
def mistakes(load):
    """mistakes(toml, accepts=None, **environ): its mistakes, without the file that each names."""

    def mistakes(text, accepts=None, **environ):
        with pytest.raises(larm.ConfigError) as caught:
            load(text, accepts, **environ)
        assert str(caught.value) == "\n".join(caught.value.mistakes)
        assert all("/larm.toml: " in line and "\n" not in line for line in caught.value.mistakes)
        return [line.partition("/larm.toml: ")[2] for line in caught.value.mistakes]

    return mistakes


def job(line):
    return f"{JOB}{line}\n"


# What the settings are when they are left out


def test_one_monitor_is_enough(load):
    config = load(JOB)
    assert (config.listen, config.url) == (("127.0.0.1", 5276), "http://127.0.0.1:5276")
    assert config.database == config.path.parent / "larm.db"
    assert (config.keep, config.password, config.public) == (90 * DAY, None, False)
    assert (config.embed, [str(one) for one in config.proxies]) == ((), ["127.0.0.1/32", "::1/128"])
    assert (config.channels, config.watchdog) == ({}, None)


def test_a_monitor_needs_only_its_interval(load):
    assert load(JOB).monitors["job"] == larm.Monitor(
        key="job", name="job", interval=DAY, schedule=None, grace=HOUR, token=None, notify=(),
        remind=None, max_runtime=None, depends_on=(), enabled=True, note="", quiet=(),
    )


@pytest.fixture
def system_zone(monkeypatch):
    """system_zone(TZ): the system's timezone, until the end of the test."""

    def system_zone(name):
        monkeypatch.setenv("TZ", name)
        larm.system_zone.cache_clear()

    yield system_zone
    larm.system_zone.cache_clear()


def test_the_timezone_is_the_systems_unless_it_is_set(load, system_zone):
    system_zone("America/New_York")
    assert str(load(JOB).timezone) == "America/New_York"
    assert str(load('timezone = "Asia/Tokyo"\n' + JOB).timezone) == "Asia/Tokyo"


@PROPERTY
@given(st.integers(1, 366 * 86_400))
def test_the_grace_is_a_tenth_of_the_interval_but_at_most_an_hour(load, seconds):
    grace = load(f"[monitors.job]\ninterval = {seconds}").monitors["job"].grace
    assert grace == min(seconds * 100, HOUR)


def test_a_monitor_notifies_every_channel_unless_it_names_some(load):
    config = load(
        '[channels]\nphone = "json://a"\nmail = "json://b"\n'
        '[monitors.all]\ninterval = 60\n'
        '[monitors.one]\ninterval = 60\nnotify = ["mail"]\n'
        '[monitors.none]\ninterval = 60\nnotify = []\n'
    )
    notified = {key: monitor.notify for key, monitor in config.monitors.items()}
    assert notified == {"all": ("phone", "mail"), "one": ("mail",), "none": ()}


def test_the_watchdog_is_pinged_every_minute_unless_it_is_set(load):
    text = JOB + '[watchdog]\nping = "https://other.example/x"\n'
    assert load(text).watchdog == larm.Watchdog("https://other.example/x", MINUTE)
    assert load(text + 'interval = "5m"').watchdog.interval == 5 * MINUTE


# What they are when they are set


@pytest.mark.parametrize(("listen", "host", "port"), [
    ("192.168.1.2:80", "192.168.1.2", 80),
    ("localhost:5276", "localhost", 5276),
    ("[::1]:5276", "::1", 5276),
    (":65535", "", 65535),
])
def test_listen_is_an_address_and_a_port(listen, host, port, load):
    assert load(f'listen = "{listen}"\n{JOB}').listen == (host, port)


@pytest.mark.parametrize("host", ["", "*", "0.0.0.0", "[::]"])
def test_no_address_and_the_unspecified_ones_are_all_addresses(host, load):
    assert load(f'listen = "{host}:5276"\n{JOB}').listen == ("", 5276)


@pytest.mark.parametrize(("listen", "url"), [
    ("nas.lan:80", "http://nas.lan:80"),
    ("[::1]:5276", "http://[::1]:5276"),
    ("*:5276", f"http://{socket.gethostname()}:5276"),
    (":5276", f"http://{socket.gethostname()}:5276"),
    ("0.0.0.0:5276", f"http://{socket.gethostname()}:5276"),
    ("[::]:5276", f"http://{socket.gethostname()}:5276"),
])
def test_the_url_follows_from_listen(listen, url, load):
    assert load(f'listen = "{listen}"\n{JOB}').url == url


@PROPERTY
@given(st.integers(-70_000, 70_000))
@example(0)
@example(65_535)
@example(65_536)
def test_a_port_is_1_to_65535(load, port):
    def read():
        return load(f'listen = "127.0.0.1:{port}"\n{JOB}').listen[1]

    if 1 <= port <= 65_535:
        assert read() == port
    else:
        with pytest.raises(larm.ConfigError, match='; write "127'):
            read()


@pytest.mark.parametrize(("url", "prefix"), [
    ("https://home.example/larm", "/larm"),
    ("https://home.example/larm/", "/larm"),
    ("https://home.example/a/b", "/a/b"),
    ("http://nas.lan:5276", ""),
    ("http://nas.lan:5276/", ""),
    ("http://[::1]:5276/larm", "/larm"),
])
def test_the_path_of_the_url_is_the_prefix(url, prefix, load):
    config = load(f'url = "{url}"\n{JOB}')
    assert config.prefix == prefix
    assert config.ping_url("TOKEN") == f"{url.rstrip('/')}/api/heartbeat/TOKEN"


@pytest.mark.parametrize("database", ["state/larm.db", "../larm.db", "/var/lib/larm.db"])
def test_the_database_is_relative_to_the_file(database, load):
    config = load(f'database = "{database}"\n{JOB}')
    assert config.database == config.path.parent / database


def test_a_channel_is_a_url_or_a_list_of_them(load):
    config = load('[channels]\none = "json://a"\ntwo = ["json://b", "json://c"]\n' + JOB)
    assert config.channels == {"one": ("json://a",), "two": ("json://b", "json://c")}


def test_a_monitor_is_what_its_table_says(load):
    monitor = load(
        '[channels]\nphone = "json://a"\n[monitors.router]\ninterval = 60\n[monitors.backup]\n'
        'name = "Nightly backup"\ninterval = "1h30m"\ngrace = 0\nnotify = ["phone"]\n'
        f'token = "{TOKEN}"\nremind = "2d"\nmax_runtime = 1.5\ndepends_on = ["router"]\n'
        'enabled = false\nnote = "On nas.\\nSee the log."\nquiet = ["22:00-07:30"]\n'
    ).monitors["backup"]
    assert monitor == larm.Monitor(
        key="backup", name="Nightly backup", interval=90 * MINUTE, schedule=None, grace=0,
        token=TOKEN, notify=("phone",), remind=2 * DAY, max_runtime=1_500,
        depends_on=("router",), enabled=False, note="On nas.\nSee the log.",
        quiet=((22 * HOUR, 7 * HOUR + 30 * MINUTE),),
    )


def test_a_schedule_is_in_the_monitors_timezone_else_in_that_of_the_file(load):
    config = load(
        'timezone = "Asia/Tokyo"\n[monitors.a]\nschedule = "0 3 * * *"\n'
        '[monitors.b]\nschedule = "0 3 * * *"\ntimezone = "UTC"\n'
    )
    schedules = [monitor.schedule for monitor in config.monitors.values()]
    assert [(str(one.zone), one.zone_name) for one in schedules] == [
        ("Asia/Tokyo", "Asia/Tokyo"), ("UTC", "UTC"),
    ]
    assert config.monitors["a"].interval == DAY


@PROPERTY
@given(st.text(string.ascii_letters + string.digits + "_-.! ö", max_size=140))
@example("a" * 9)
@example("a" * 10)
@example("a" * 128)
@example("a" * 129)
@example("a" * 16 + "\n")
@example("123e4567-e89b-12d3-a456-426614174000")  # as Healthchecks makes them
@example("aB3dE6gH9j")  # as Uptime Kuma made them
def test_a_token_is_10_to_128_characters_that_need_no_quoting(load, token):
    line = f"token = {json.dumps(token)}"
    if re.fullmatch(r"[A-Za-z0-9_-]{10,128}", token):
        assert load(job(line)).monitors["job"].token == token
    else:
        with pytest.raises(larm.ConfigError, match=r"monitors\.job\.token: "):
            load(job(line))


@PROPERTY
@given(st.text("abyz0189-_", max_size=65) | st.text(string.printable, max_size=9))
@example("")
@example("a" * 64)
@example("a" * 65)
@example("a\n")
def test_a_key_is_1_to_64_characters(load, key):
    text = f"[monitors.{json.dumps(key)}]\ninterval = 60"
    if re.fullmatch(r"[a-z0-9_-]{1,64}", key) :
        assert list(load(text).monitors) == [key]
    else:
        with pytest.raises(larm.ConfigError, match="a key is 1 to 64 of a-z 0-9 - _"):
            load(text)


def test_ten_thousand_monitors_load(load):
    text = '[defaults]\ndepends_on = ["router"]\n[monitors.router]\ninterval = 60\n'
    text += "".join(f'[monitors.job-{n}]\ninterval = "1d"\n' for n in range(10_000))
    assert len(load(text).monitors) == 10_001


# The environment


def test_a_variable_stands_for_the_environments_value_in_every_secret(load):
    config = load(
        'password = "${A}-${B}"\n'
        '[channels]\none = "json://${A}"\ntwo = ["json://x", "json://${B}"]\n'
        + job('token = "0123456789-${A}"') + '[watchdog]\nping = "http://other/${B}"\n',
        A="value-of-a", B="value-of-b",
    )
    assert config.password == "value-of-a-value-of-b"
    assert config.channels["one"] == ("json://value-of-a",)
    assert config.channels["two"] == ("json://x", "json://value-of-b")
    assert config.monitors["job"].token == "0123456789-value-of-a"
    assert config.watchdog.ping == "http://other/value-of-b"


def test_a_variable_is_replaced_only_once(load):
    assert load('password = "${A}"\n' + JOB, A="${B}", B="x").password == "${B}"


def test_a_variable_stands_for_itself_elsewhere(load):
    assert load(job('note = "${A}"'), A="x").monitors["job"].note == "${A}"


@pytest.mark.parametrize("text", ["$A", "{A}", "$ {A}", "A}", "$$"])
def test_what_is_no_reference_stays(text, load):
    assert load(f'password = "{text}"\n{JOB}', A="x").password == text


@pytest.mark.parametrize("text", ["${}", "${A", "${1}", "${A-B}", "${file:}", "${file:/x"])
def test_a_reference_that_is_neither_form_is_a_mistake(text, mistakes):
    [mistake] = mistakes(f'password = "{text}"\n{JOB}', A="x", B="y")
    assert mistake.startswith("password: ${ begins neither ${NAME} nor ${file:")


HOLDERS = [
    ('password = "%s"\n' + JOB, "password"),
    ('[channels]\nphone = "%s"\n' + JOB, "channels.phone"),
    ('[channels]\nphone = ["json://a", "json://%s"]\n' + JOB, "channels.phone"),
    (JOB + 'token = "%s"', "monitors.job.token"),
    (JOB + '[watchdog]\nping = "http://o/%s"', "watchdog.ping"),
]


@pytest.mark.parametrize(("text", "setting"), HOLDERS)
@pytest.mark.parametrize(("reference", "wrong"), [
    ("${NOWHERE}", "is not set in the environment of this process"),
    ("${EMPTY}", "is empty"),
    ("${file:nowhere}", "can't be read: No such file or directory"),
    ("${file:empty}", "is empty"),
    ("${file:binary}", "is not UTF-8 text"),
])
def test_a_secret_that_is_not_there_or_empty_is_a_mistake(
    reference, wrong, text, setting, mistakes, load
):
    """Law 7: it would let everybody in, or send alerts to nobody."""
    folder = load(JOB).path.parent
    (folder / "empty").write_text("\n")
    (folder / "binary").write_bytes(b"hunter2\xff")
    [mistake] = mistakes(text % reference, EMPTY="")
    assert mistake.startswith(f"{setting}: ")
    assert mistake.endswith(f"{reference} {wrong}")


@pytest.mark.parametrize(("content", "password"), [
    ("pass word", "pass word"), ("pass\n", "pass"), ("pass\r\n", "pass"),
    ("pass\n\n", "pass\n"),
    ("${A}", "${A}"), ("påss\n", "påss"),
])
def test_a_file_is_its_text_without_its_last_line_end(content, password, load, tmp_path):
    (tmp_path / "secret").write_bytes(content.encode())
    assert load(f'password = "${{file:{tmp_path}/secret}}"\n{JOB}', A="x").password == password


def test_a_relative_file_stands_beside_larm_toml(load):
    folder = load(JOB).path.parent
    (folder / "beside").write_text("a-token-in-a-file\n")
    config = load(job('token = "${file:beside}"'))
    assert config.monitors["job"].token == "a-token-in-a-file"


@PROPERTY
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
@example("p@ss")  # it once sent the alert to the host "ss"
@example("a/b?c#d:e%41 f")
def test_a_value_in_a_channels_url_may_hold_any_character(load, value):
    text = '[channels]\nphone = "json://me:${PASSWORD}@host/${PASSWORD}"\n' + JOB
    parts = urlsplit(load(text, PASSWORD=value).channels["phone"][0])
    assert (parts.scheme, parts.hostname, parts.username) == ("json", "host", "me")
    assert (unquote(parts.password), unquote(parts.path)) == (value, f"/{value}")


def test_a_value_that_is_the_whole_url_is_taken_as_it_is(load, tmp_path):
    url = "json://me:p%40ss@host/path?format=text"
    (tmp_path / "url").write_text(url + "\n")
    text = f'[channels]\na = "${{URL}}"\nb = ["json://b", "${{file:{tmp_path}/url}}"]\n{JOB}'
    assert load(text, URL=url).channels == {"a": (url,), "b": ("json://b", url)}


def test_two_values_that_make_up_the_whole_url_are_parts_of_it(load):
    [url] = load('[channels]\na = "json://${A}${B}"\n' + JOB, A="x/", B="y").channels["a"]
    assert url == "json://x%2Fy"


# Quiet hours, frames and proxies


@pytest.mark.parametrize(("line", "quiet"), [
    ("quiet = []", ()),
    ('quiet = ["22:00-07:00"]', ((22 * HOUR, 7 * HOUR),)),
    ('quiet = ["12:00-13:30", "22:15-00:00"]', ((12 * HOUR, 810 * MINUTE), (1335 * MINUTE, 0))),
    ('quiet = ["00:00-07:00", " 0:00 - 7:00 "]', ((0, 7 * HOUR),)),
])
def test_quiet_hours_are_pairs_of_times_of_the_day(line, quiet, load):
    assert load(job(line)).monitors["job"].quiet == quiet
    assert load(f"[defaults]\n{line}\n{JOB}").monitors["job"].quiet == quiet


clock_times = st.integers(0, 1439)


@PROPERTY
@given(st.lists(st.tuples(clock_times, clock_times).filter(lambda pair: pair[0] != pair[1])))
def test_quiet_hours_may_be_any_hours_of_the_day(load, pairs):
    texts = [f"{a // 60:02}:{a % 60:02}-{b // 60:02}:{b % 60:02}" for a, b in pairs]
    quiet = load(job(f"quiet = {json.dumps(texts)}")).monitors["job"].quiet
    assert quiet == tuple(dict.fromkeys((a * MINUTE, b * MINUTE) for a, b in pairs))


@PROPERTY
@given(st.text("0123456789:- ", max_size=12) | st.text(max_size=8))
def test_any_text_is_quiet_hours_or_a_mistake_that_says_how_to_write_them(load, text):
    try:
        [(begin, end)] = load(job(f"quiet = [{toml(text)}]")).monitors["job"].quiet
    except larm.ConfigError as error:
        [mistake] = error.mistakes
        assert 'write "22:00-07:00"' in mistake
    else:
        assert 0 <= begin < DAY
        assert 0 <= end < DAY
        assert begin != end


def test_embed_is_who_may_frame_larms_pages(load):
    text = 'embed = ["https://home.lan", "http://10.0.0.2:8123/", "http://[::1]"]\n' + JOB
    assert load(text).embed == ("https://home.lan", "http://10.0.0.2:8123", "http://[::1]")


def test_proxies_are_addresses_and_networks(load):
    config = load('proxies = ["10.0.0.2", "172.16.0.0/12", "fd00::/8"]\n' + JOB)
    assert config.proxies == tuple(map(ip_network, ["10.0.0.2", "172.16.0.0/12", "fd00::/8"]))
    assert load("proxies = []\n" + JOB).proxies == ()


# Defaults for all monitors


def test_a_monitors_own_setting_wins_over_the_defaults_and_these_over_larms(load):
    monitors = load(
        '[defaults]\ngrace = "5m"\nremind = "1d"\nnote = "all"\nenabled = false\n'
        '[monitors.a]\ninterval = "1d"\n'
        '[monitors.b]\ninterval = "1d"\ngrace = 0\nnote = ""\nenabled = true\n'
    ).monitors
    a, b = monitors["a"], monitors["b"]
    assert (a.grace, a.remind, a.note, a.enabled) == (5 * MINUTE, DAY, "all", False)
    assert (b.grace, b.remind, b.note, b.enabled) == (0, DAY, "", True)


def test_a_default_timezone_is_that_of_every_schedule(load):
    config = load(
        'timezone = "Asia/Tokyo"\n[defaults]\ntimezone = "UTC"\n[monitors.a]\nschedule = "@daily"'
    )
    assert config.monitors["a"].schedule.zone_name == "UTC"
    assert str(config.timezone) == "Asia/Tokyo"


@pytest.mark.parametrize("name", ["name", "token", "interval", "schedule"])
def test_what_a_monitor_must_set_itself_is_no_default(name, mistakes):
    [mistake] = mistakes(f'[defaults]\n{name} = "{TOKEN}"\n{JOB}')
    assert mistake.startswith(f"defaults.{name}: no such setting")


def test_a_mistake_in_the_defaults_is_reported_once(mistakes):
    text = '[defaults]\ngrace = "soon"\nnotify = ["phone"]\ngrase = 1\n'
    text += "".join(f"[monitors.job{n}]\ninterval = 60\n" for n in range(5))
    assert [mistake.partition(": ")[0] for mistake in sorted(mistakes(text))] == [
        "defaults.grace", "defaults.grase", "defaults.notify",
    ]


def test_all_monitors_may_depend_on_one_of_them(load):
    monitors = load(
        '[defaults]\ndepends_on = ["router"]\n[monitors.router]\ninterval = 60\n' + JOB
    ).monitors
    assert monitors["job"].depends_on == ("router",)
    assert monitors["router"].depends_on == ()


# Mistakes: (TOML at the top, what the message names, what it found, what is allowed)

TOP = [
    ('listen = "nas"', "listen", '"nas"', '":5276" for all addresses'),
    ("listen = 5276", "listen", "5276", '"127.0.0.1:5276"'),
    ('url = "nas.lan"', "url", '"nas.lan"', '"http://nas.lan:5276"'),
    ("url = 80", "url", "80", '"http://nas.lan:5276"'),
    ("database = 1", "database", "1", "text in quotes"),
    ('timezone = "Europe/Stokholm"', "timezone", '"Europe/Stokholm"', "mean Europe/Stockholm?"),
    ('timezone = "qqq"', "timezone", '"qqq"', '"UTC"'),
    ("timezone = 2", "timezone", "2", '"Europe/Stockholm"'),
    ('keep = "forever"', "keep", '"forever"', '"2d"'),
    ("keep = 0", "keep", "0", "1 s to "),
    ('public = "yes"', "public", '"yes"', "true or false"),
    ("public = 1", "public", "1", "true or false"),
    ('password = ""', "password", "empty", "text in quotes"),
    ("password = 12345678", "password", "", "text in quotes"),
    ('pasword = "x"', "pasword", "no such setting", "did you mean password?"),
    ("qqq = 1", "qqq", "no such setting", "there is channels, database, defaults, embed, keep,"),
    ('embed = "https://home.lan"', "embed", "found a URL", "a [list]"),
    ('embed = ["https://home.lan/x"]', "embed", "found a URL", "without a path"),
    ('embed = ["home.lan"]', "embed", '"home.lan"', 'write "https://home.lan"'),
    ('embed = ["*"]', "embed", '"*"', 'write "https://home.lan"'),
    ('embed = ["https://a; b"]', "embed", "found a URL", 'write "https://home.lan"'),
    ('proxies = "10.0.0.2"', "proxies", '"10.0.0.2"', "a [list]"),
    ('proxies = ["nginx"]', "proxies", '"nginx"', '"10.0.0.2" or "10.0.0.0/8"'),
    ('proxies = ["10.0.0.1/8"]', "proxies", '"10.0.0.1/8"', '"10.0.0.2" or "10.0.0.0/8"'),
    ('url = "http://me:secret@nas"', "url", "found a URL", '"http://nas.lan:5276"'),
    ("channels = 5", "channels", "5", "a table"),
    ("defaults = []", "defaults", "a list", "a table"),
]

# the same, of a monitor
MONITOR = [
    ('interval = "1 day"', "interval", '"1 day"', 'seconds as a number, or "90s" "15m"'),
    ('interval = "0.5s"', "interval", '"0.5s"', "1 s to 366 d"),
    ("interval = 0.1", "interval", "0.1 ", "1 s to 366 d"),
    ('interval = "367d"', "interval", '"367d"', "1 s to 366 d"),
    ("interval = -60", "interval", "-60", "1 s to 366 d"),
    ("interval = nan", "interval", "NaN", "seconds as a number"),
    ("interval = inf", "interval", "Infinity", "seconds as a number"),
    ("interval = true", "interval", "true", "seconds as a number"),
    ("interval = 2027-01-01", "interval", '"2027-01-01"', "seconds as a number"),
    ('interval = "1d"\nschedule = "@daily"', "interval", "both", "either interval or schedule"),
    ("enabled = true", "interval", "neither", "either interval or schedule"),
    ('schedule = "0 3 * *"', "schedule", '"0 3 * *"', "minute hour day month weekday"),
    ('schedule = "0 3 * * * *"', "schedule", '"0 3 * * * *"', "minute hour day month weekday"),
    ('schedule = "0 25 * * *"', "schedule", '"0 25 * * *"', "hour"),
    ('schedule = "@reboot"', "schedule", '"@reboot"', "minute hour day month weekday"),
    ('schedule = "@dayly"', "schedule", '"@dayly"', "did you mean @daily?"),
    ('interval = "90"', "interval", '"90"', 'seconds as a number, or "90s"'),
    ('schedule = "0 0 30 2 *"', "schedule", '"0 0 30 2 *"', "day"),
    ('schedule = "0 0 31 4,6 *"', "schedule", '"0 0 31 4,6 *"', "day"),
    ("schedule = 3", "schedule", "3", "text in quotes"),
]

# the same, of a monitor that has an interval
OF_JOB = [
    ("name = 5", "name", "5", "text in quotes"),
    ('grace = "soon"', "grace", '"soon"', '"1h30m"'),
    ("grace = -1", "grace", "-1", "0 to 366 d"),
    ("remind = 0", "remind", "0", "1 s to 366 d"),
    ('max_runtime = "2 hours"', "max_runtime", '"2 hours"', '"1h30m"'),
    ('token = "short"', "token", "found 5 characters", "10 to 128 of A-Z a-z 0-9 _ -"),
    ("token = 5", "token", "", "text in quotes"),
    ('notify = "phone"', "notify", '"phone"', "a [list]"),
    ('notify = ["phne"]', "notify", '"phne"', "did you mean phone?"),
    ('notify = ["qqq"]', "notify", '"qqq"', "there is broken, mail, phone"),
    ("notify = [1]", "notify", "1", "text in quotes"),
    ('depends_on = ["ruoter"]', "depends_on", '"ruoter"', "did you mean router?"),
    ("depends_on = true", "depends_on", "true", "a [list]"),
    ('enabled = "no"', "enabled", '"no"', "true or false"),
    ("note = 5", "note", "5", "text in quotes"),
    ('quiet = "22:00-07:00"', "quiet", '"22:00-07:00"', "a [list]"),
    ('quiet = ["22-7"]', "quiet", '"22-7"', 'write "22:00-07:00"'),
    ('quiet = ["22:00-07:60"]', "quiet", '"22:00-07:60"', 'write "22:00-07:00"'),
    ('quiet = ["24:00-07:00"]', "quiet", '"24:00-07:00"', 'write "22:00-07:00"'),
    ('quiet = ["08:00-08:00"]', "quiet", '"08:00-08:00"', 'write "22:00-07:00"'),
    ('timezone = "utc+1"', "timezone", '"utc+1"', '"Europe/Stockholm"'),
    ("graze = 5", "graze", "no such setting", "did you mean grace?"),
]
CHANNELS = [
    ('broken = ""', "broken", "empty", "text in quotes"),
    ("broken = 5", "broken", "", "text in quotes"),
    ("broken = []", "broken", "empty", "text in quotes"),
    ('broken = {url = "x"}', "broken", "", "text in quotes"),
    ('broken = "example.com"', "broken", "is not an Apprise URL", "such as ntfy://"),
    ('broken = "ntfyy://x"', "broken", "knows no service ntfyy://", "apprise/wiki"),
    ('broken = "tgram://x"', "broken", "does not accept this tgram:// URL", "apprise/wiki"),
    ('broken = ["json://a", "json://"]', "broken", "json://", "apprise/wiki"),
]
WATCHDOG = [
    ("", "ping", "is missing", "the URL to ping"),
    ('ping = "ftp://x"', "ping", "", "http:// or https:// URL"),
    ("ping = 5", "ping", "", "text in quotes"),
    ('ping = "http://o/"\ninterval = 0', "interval", "0", "1 s to 366 d"),
    ('ping = "http://o/"\nintervall = 60', "intervall", "no such setting", "mean interval?"),
]
OTHERS = '[channels]\nphone = "json://a"\nmail = "json://b"\n%s\n[monitors.router]\ninterval = 60\n'


def cases():
    """Each mistake alone: (its TOML, the setting, what was found, what is allowed)."""
    for line, name, found, allowed in TOP:
        yield f"{line}\n{JOB}", name, found, allowed
    for line, name, found, allowed in CHANNELS:
        yield OTHERS % line + JOB, f"channels.{name}", found, allowed
    for line, name, found, allowed in MONITOR:
        yield f"[monitors.job]\n{line}", f"monitors.job.{name}", found, allowed
    for line, name, found, allowed in OF_JOB:
        text = OTHERS % 'broken = "json://c"' + job(line)
        yield text, f"monitors.job.{name}", found, allowed
    for line, name, found, allowed in WATCHDOG:
        yield f"{JOB}[watchdog]\n{line}", f"watchdog.{name}", found, allowed


@pytest.mark.parametrize(("text", "setting", "found", "allowed"), list(cases()), ids=str)
def test_a_mistake_names_the_setting_what_was_found_and_what_is_allowed(
    text, setting, found, allowed, mistakes
):
    [mistake] = mistakes(text, larm.accepts)
    assert mistake.startswith(f"{setting}: ")
    assert found in mistake
    assert allowed in mistake


def test_all_mistakes_are_reported_at_once(mistakes):
    top = ["listen", "url", "database", "timezone", "keep", "public", "password"]
    text = "".join(f"{name} = []\n" for name in top)
    text += OTHERS % 'broken = ""' + '[defaults]\ngrace = "x"\n[watchdog]\npin = 1\n'
    text += "".join(f"[monitors.a{n}]\n{line}\n" for n, (line, *_) in enumerate(MONITOR))
    text += "".join(
        f"[monitors.b{n}]\ninterval = 60\n{line}\n" for n, (line, *_) in enumerate(OF_JOB)
    )
    expected = [*top, "channels.broken", "defaults.grace", "watchdog.pin", "watchdog.ping"]
    expected += [f"monitors.a{n}.{name}" for n, (_, name, *_) in enumerate(MONITOR)]
    expected += [f"monitors.b{n}.{name}" for n, (_, name, *_) in enumerate(OF_JOB)]
    found = [mistake.partition(": ")[0] for mistake in mistakes(text, larm.accepts)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(("text", "found"), [
    (job('notify = ["one", "two"]'), ["one", "two"]),
    (job('depends_on = ["one", "two"]'), ["one", "two"]),
    ('[channels]\nphone = ["json://${ONE}/${TWO}", "json://${THREE}"]\n' + JOB,
     ["ONE", "TWO", "THREE"]),
    ('[channels]\nphone = ["one://a", "two://b"]\n' + JOB, ["one://", "two://"]),
    ('[defaults]\ngrase = 1\n', ["no monitors", "defaults.grase"]),
], ids=["notify", "depends_on", "variables", "urls", "defaults"])
def test_two_mistakes_in_one_place_are_both_reported(text, found, mistakes):
    report = "\n".join(mistakes(text, larm.accepts))
    assert [name for name in found if name not in report] == []


@pytest.mark.parametrize("value", [
    "1e308", "-1e308", "1" + "0" * 400, '"' + "9" * 400 + 'w"', "0x" + "f" * 5000,
], ids=["1e308", "-1e308", "10**400", "text", "hexadecimal"])
def test_a_number_beyond_all_numbers_is_a_mistake(value, mistakes):
    [mistake] = mistakes(f"[monitors.job]\ninterval = {value}")
    assert mistake.startswith("monitors.job.interval: ")


def test_a_mistake_is_shown_short_and_on_one_line(mistakes):
    value = json.dumps("line\nline\t" * 1000)
    [mistake] = mistakes(f"timezone = {value}\n{JOB}")
    assert len(mistake) < 200


@pytest.mark.parametrize("text", [
    '"a\\nb" = 1\n' + JOB, '[channels]\n"a\\nb" = 1\n' + JOB, job('"a\\nb" = 1'),
], ids=["at the top", "channels", "a monitor"])
def test_a_wrong_name_is_shown_on_one_line(text, mistakes):
    assert mistakes(text)  # which looks at each line


@pytest.mark.parametrize(("text", "table"), [
    ('watchdog = "x"\n' + JOB, "watchdog"), ("monitors = 5", "monitors"),
    ('[monitors]\njob = "1d"', "monitors.job"),
])
def test_what_must_be_a_table_says_so(text, table, mistakes):
    assert "it must be a table" in mistakes(text)[0]
    assert mistakes(text)[0].startswith(table)


@pytest.mark.parametrize(("text", "says"), [
    ('[monitor.x]\ninterval = "1d"\n' + JOB, "monitor: no such setting; did you mean monitors?"),
    ('[backup]\ninterval = "1d"\n' + JOB,
     "backup: no such setting; a monitor is a table such as [monitors.backup]"),
    ('[channel]\nphone = "json://a"\n' + JOB, "channel: no such setting; did you mean channels?"),
    ('[monitors.a]\ninterval = 60\n[monitors.a.b]\ninterval = "1d"',
     "monitors.a.b: no such setting; a monitor is a table such as [monitors.a-b]"),
])
def test_a_table_that_there_is_not_is_told_what_to_write(text, says, mistakes):
    assert mistakes(text) == [says]


@pytest.mark.parametrize("name", ["embed", "proxies", "password", "timezone"])
@pytest.mark.parametrize("table", ["[watchdog]", "[monitors.job]"])
def test_a_setting_of_the_top_below_a_table_says_where_it_belongs(name, table, mistakes):
    if (name, table) == ("timezone", "[monitors.job]"):
        pytest.skip("a monitor has one, too")
    path = table.strip("[]")
    text = 'interval = "1d"\n' if "job" in path else 'ping = "http://o/"\n'
    other = "" if "job" in path else JOB
    [mistake] = mistakes(f"{other}{table}\n{text}{name} = 1")
    assert mistake == f"{path}.{name}: belongs at the top of the file, above the first [table]"


def test_a_channel_with_a_mistake_is_still_known_to_its_monitors(mistakes):
    assert len(mistakes('[channels]\nphone = ""\n' + job('notify = ["phone"]'))) == 1


NAMES = {
    "": ["listen", "url", "database", "timezone", "keep", "password", "public", "embed",
         "proxies", "channels", "defaults", "watchdog"],
    "defaults": ["grace", "notify", "remind", "max_runtime", "depends_on", "enabled", "note",
                 "timezone", "quiet"],
    "monitors.job": ["name", "interval", "schedule", "timezone", "grace", "token", "notify",
                     "remind", "max_runtime", "depends_on", "enabled", "note", "quiet"],
    "watchdog": ["ping", "interval"],
}


@st.composite
def typos(draw):
    """(table, name, the name with a letter lost, added or swapped with the next)"""
    table = draw(st.sampled_from(list(NAMES)))
    name = draw(st.sampled_from(NAMES[table]))
    at = draw(st.integers(0, len(name) - 2))
    typo = draw(st.sampled_from([
        name[:at] + name[at + 1 :],
        name[:at] + draw(st.sampled_from(string.ascii_lowercase + "_")) + name[at:],
        name[:at] + name[at + 1] + name[at] + name[at + 2 :],
    ]))
    assume(typo not in NAMES[table])
    return table, name, typo


@settings(PROPERTY, max_examples=100)
@given(typos())
def test_a_misspelt_setting_is_told_its_name(mistakes, typo):
    table, name, wrong = typo
    line = f"{wrong} = 1\n"
    text = line + JOB if not table else JOB + ("" if "." in table else f"[{table}]\n") + line
    prefix = f"{table}.{wrong}".lstrip(".")
    assert f"{prefix}: no such setting; did you mean {name}?" in mistakes(text)


def test_without_cronsim_a_schedule_says_how_to_get_it(mistakes, monkeypatch):
    """Also where pip may not install into the system's Python, as on Debian (PEP 668)."""
    monkeypatch.setitem(sys.modules, "cronsim", None)
    [mistake] = mistakes('[monitors.job]\nschedule = "7 4 * * 3"')
    assert mistake.startswith("monitors.job.schedule: needs the package cronsim: pip install ")
    assert "python3 -m venv --system-site-packages .venv" in mistake


values = st.recursive(
    st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.floats(-1e300, 1e300)
    | st.text("abz09 -_:/.*${}é\n", max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=4,
)


def toml(value):
    if isinstance(value, dict):
        inside = ", ".join(f"{json.dumps(name)} = {toml(inner)}" for name, inner in value.items())
        return f"{{{inside}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, str):  # json writes a pair of surrogates, which TOML does not know
        return '"' + "".join(f"\\U{ord(char):08x}" for char in value) + '"'
    return json.dumps(value)


@settings(PROPERTY, max_examples=150)
@given(st.sampled_from([(table, name) for table in NAMES for name in NAMES[table]]), values)
def test_any_value_of_any_setting_is_right_or_a_mistake_of_that_setting(load, place, value):
    table, name = place
    line = f"{name} = {toml(value)}\n"
    if not table:
        text = line + JOB
    elif table == "monitors.job":
        text = ("[monitors.job]\n" if name in ("interval", "schedule") else JOB) + line
    else:
        text = f"{JOB}[{table}]\n{line}"
    found = []
    try:
        load(text)
    except larm.ConfigError as error:
        found = [mistake.partition("/larm.toml: ")[2] for mistake in error.mistakes]
    own = f"{table}.{name}".lstrip(".")
    others = [mistake for mistake in found if not mistake.startswith(own)]
    assert others in ([], ["watchdog.ping: is missing: the URL to ping"])


names = st.sampled_from([name for table in NAMES.values() for name in table]) | st.text(max_size=5)
anything = st.recursive(
    values | st.sampled_from(["1d", "@daily", "0 3 * * 1", "UTC", "a", "json://a", "${A}", 60]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=4),
    max_leaves=5,
)


@st.composite
def files(draw):
    """The values of any larm.toml: tables where they belong, and anything in them."""
    table = st.dictionaries(names, anything, max_size=4)
    file = draw(st.dictionaries(names, anything, max_size=2))
    for name in ("channels", "defaults", "watchdog"):
        if draw(st.booleans()):
            file[name] = draw(table)
    keys = st.sampled_from(["a", "b", "job", "A B"]) | st.text(max_size=3)
    file["monitors"] = draw(st.dictionaries(keys, table | anything, max_size=3))
    return file


def read(load, text):
    """The Config; or None, where there are mistakes, each one line that any terminal shows."""
    try:
        return load(text)
    except larm.ConfigError as mistakes:
        found = mistakes
    assert found.mistakes
    assert all(map(str.isprintable, found.mistakes))
    assert not found.missing
    return None


@settings(PROPERTY, max_examples=60)
@given(files())
def test_any_file_is_a_configuration_or_clean_mistakes(load, file):
    text = "".join(f"{toml(name)} = {toml(value)}\n" for name, value in file.items())
    if config := read(load, text):
        assert config.monitors
        for monitor in config.monitors.values():
            assert monitor.interval >= larm.SECOND
            assert monitor.expectation(START) > START


@settings(PROPERTY, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
       | st.text('abz=[]{}"\'#\n\\.,019: ', max_size=40), st.sampled_from(["", JOB]))
def test_any_text_is_a_configuration_or_clean_mistakes(load, text, before):
    read(load, before + text)


# Monitors among each other


def test_two_monitors_cannot_share_a_token(mistakes):
    [mistake] = mistakes(f'[monitors.other]\ninterval = 60\ntoken = "{TOKEN}"\n'
                         + job(f'token = "{TOKEN}"'))
    assert mistake.startswith("monitors.job.token: ")
    assert "monitors.other" in mistake
    assert TOKEN not in mistake


def chain(*keys):
    """Monitors of which each depends on the next."""
    tables = [f'[monitors.{key}]\ninterval = 60\ndepends_on = ["{parent}"]\n'
              for key, parent in pairwise(keys)]
    return "".join(tables)


def test_a_monitor_cannot_depend_on_itself(mistakes):
    assert mistakes(chain("a", "a")) == ["monitors.a.depends_on: a cycle: it leads back to a"]


@PROPERTY
@given(st.integers(2, 8), st.integers(0, 4))
def test_a_cycle_is_a_mistake_of_each_monitor_in_it(mistakes, length, before):
    keys = [f"before-{n}" for n in range(before)] + [f"in-{n}" for n in range(length)]
    assert mistakes(chain(*keys, "in-0")) == [
        f"monitors.{key}.depends_on: a cycle: it leads back to {key}" for key in keys[before:]
    ]


def test_ancestors_are_what_a_monitor_depends_on_directly_or_not(load):
    monitors = load(chain("a", "b", "c") + chain("d", "b")
                    + "[monitors.c]\ninterval = 60\n").monitors  # fmt: skip
    assert [larm.ancestors(monitors, key) for key in "abcd"] == [
        {"b", "c"}, {"c"}, set(), {"b", "c"},
    ]


def test_two_ways_to_the_same_monitor_are_no_cycle(load):
    text = '[monitors.a]\ninterval = 60\ndepends_on = ["b", "c"]\n[monitors.d]\ninterval = 60\n'
    assert len(load(text + chain("b", "d") + chain("c", "d")).monitors) == 4


def test_a_long_chain_is_no_cycle(load):
    keys = [f"job-{n}" for n in range(1_000)]
    assert len(load(chain(*keys, "end") + "[monitors.end]\ninterval = 60").monitors) == 1_001


# Secrets

# What may hold SECRET, rightly or wrongly. At the top, of a monitor, and in tables of their own.
SECRETS = [
    'password = "SECRET"',
    'password = ["SECRET"]',
    'password = {is = "SECRET"}',
    'password = "SECRET${UNSET}"',
    "password = SECRET",
    'password = "SECRET',
    'password = "SECRET" "SECRET"',
    'password "SECRET"',
    'password = "SECRET"\npassword = "SECRET"',
    'pasword = "SECRET"',
    'channels = "json://u:SECRET@host"',
    'channels = ["json://u:SECRET@host"]',
    'monitors = "json://u:SECRET@host"',
    'watchdog = "https://host/SECRET"',
    "[channels]\nphone = json://u:SECRET@host",
    '[channels]\nphone = "json://u:SECRET@host"',
    '[channels]\nphone = "nosuch://u:SECRET@host"',
    '[channels]\nphone = "tgram://SECRET"',
    '[channels]\nphone = "mailtos://me:SECRET@"',
    '[channels]\nphone = "json://u:SECRET@[host"',
    '[channels]\nphone = "SECRET"',
    '[channels]\nphone = ["json://host", "SECRET", 5]',
    '[channels]\nphone = {url = "json://u:SECRET@host"}',
    '[channels]\nphone = "json://u:SECRET@host/${UNSET}"',
    '[channels]\n"json://u:SECRET@host" = "phone"',
    '[channels]\n"json://u:SECRET@host" = "json://x"\n[defaults]\nnotify = ["phone"]',
    '"json://u:SECRET@host" = "phone"',
    '[monitors."json://u:SECRET@host"]\ninterval = 60',
    '[monitors.a]\ninterval = 60\ntoken = "SECRET"\n[monitors.b]\ninterval = 60\ntoken = "SECRET"',
    '[monitors.a]\ninterval = 60\ntoken = "SECRET!"',
    '[monitors.a]\ninterval = 60\ntoken = ["SECRET"]',
    '[monitors.a]\ninterval = 60\ntokn = "SECRET"',
    '[defaults]\ntoken = "SECRET"',
    '[watchdog]\nping = "https://host/SECRET"\ninterval = 0',
    '[watchdog]\nping = "ftp://host/SECRET"',
    '[watchdog]\nping = "SECRET"',
    '[watchdog]\nping = ["https://host/SECRET"]',
    '[watchdog]\npin = "https://host/SECRET"',
]
SECRETS += [
    f"{heading}{name} = {value}"
    for table, heading in (
        ("", ""), ("monitors.job", "[monitors.a]\n"), ("defaults", "[defaults]\n")
    )
    for name in NAMES[table]
    for value in ('"json://u:SECRET@host"', '["json://u:SECRET@host"]')
]


@pytest.mark.parametrize("text", SECRETS)
def test_no_mistake_shows_a_secret(text, mistakes):
    secret = "Zq7xW3kP9vR2mT5yB8nL"
    broken = f"qqq = 1\n{text.replace('SECRET', secret)}\n[monitors.ok]\ninterval = 60\n"
    report = "\n".join(mistakes(broken, larm.accepts))
    assert secret[:8].lower() not in report.lower()


@pytest.mark.parametrize("text", [
    'password = "${SECRET_OF_TEST}"\n' + JOB,
    '[channels]\nphone = "nosuch://${SECRET_OF_TEST}"\n' + JOB,
    '[channels]\nphone = "${SECRET_OF_TEST}"\n' + JOB,
    job('token = "${SECRET_OF_TEST}!"'),
    JOB + '[watchdog]\nping = "${SECRET_OF_TEST}"',
])
def test_no_mistake_shows_a_variables_value(text, mistakes):
    report = mistakes(f"qqq = 1\n{text}", larm.accepts, SECRET_OF_TEST="hunter2-hunter2")
    assert "hunter2" not in "\n".join(report)


# The file itself


@pytest.fixture
def file(tmp_path):
    return tmp_path / "larm.toml"


def refused(path):
    with pytest.raises(larm.ConfigError) as caught:
        larm.load(path, {})
    [mistake] = caught.value.mistakes
    assert mistake.startswith(f"{path}: ")
    return mistake.removeprefix(f"{path}: "), caught.value.missing


@contextlib.contextmanager
def nobody():
    """As a user who may read only what everyone may: root may read anything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_file_that_is_missing_says_so(file):
    mistake, missing = refused(file)
    assert mistake.startswith("no such file")
    assert missing


def test_a_folder_is_no_file(tmp_path):
    assert refused(tmp_path) == ("can't be read: Is a directory", True)


def test_a_file_that_may_not_be_read_says_so(file):
    file.write_text(JOB)
    file.chmod(0)
    with nobody():
        assert refused(file) == ("can't be read: Permission denied", True)


def test_an_empty_file_lacks_a_monitor(file):
    file.write_text("")
    mistake, missing = refused(file)
    assert mistake.startswith("no monitors: add one, such as [monitors.")
    assert not missing


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + JOB.encode(),
    JOB.replace("\n", "\r\n").encode(),
    b"\xef\xbb\xbf" + JOB.replace("\n", "\r\n").encode(),
    JOB.rstrip().encode(),
], ids=["byte-order mark", "Windows line ends", "both", "no line end at the end"])
def test_a_file_may_come_from_any_editor(content, file):
    file.write_bytes(content)
    assert larm.load(file, {}).monitors["job"].interval == DAY


def test_a_file_that_is_not_utf_8_says_where(file):
    file.write_bytes(JOB.encode() + 'note = "Säkerhet"'.encode("latin-1"))
    assert refused(file) == ("line 3: is not UTF-8; save it as UTF-8", False)


@PROPERTY
@given(st.integers(0, 30), st.integers(0, 30), st.sampled_from([
    'note = "no end', "note", "note = what", "[monitors.job", 'note = "\\q"', "= 1", 'a = "b" c',
    '[monitors.job]', 'interval = "2d"', "interval = 2027-99-99", "\x00",
]))
def test_a_syntax_error_names_its_line(mistakes, before, after, wrong):
    text = "# fine\n" * before + JOB + wrong + "\n" + "# fine\n" * after
    [mistake] = mistakes(text)
    assert re.search(rf"\bline {before + 3}\b", mistake)


@pytest.mark.parametrize("wrong", [
    'note = "no end', "[monitors.other", 'notify = ["phone",', "note =",
])
def test_a_syntax_error_at_the_end_of_the_file_names_its_line(wrong, mistakes):
    [mistake] = mistakes(JOB + wrong)
    assert "line 3" in mistake


@pytest.mark.parametrize(("lines", "number", "advice"), [
    ("enabled = False", 3, "write true or false"),
    ("enabled = yes", 3, "write true or false"),
    ('grace = "1h",', 3, "take away the comma at the end of the line"),
    ('grace = "1h",  # soon', 3, "take away the comma at the end of the line"),
    ('grace = "1h" note = "x"', 3, "write each setting on a line of its own"),
    ("grace = '1h\"", 3, 'a quote is not closed: write name = "..."'),
    ("grace = '1h\"\nnote = \"x\"\n", 3, 'a quote is not closed: write name = "..."'),
    ("grace = \"1h'", 3, 'a quote is not closed: write name = "..."'),
    ("grace = \"1h'\nenabled = true", 3, 'a quote is not closed: write name = "..."'),
    ("grace = 1h", 3, 'text needs quotes, as in name = "..."'),
    ("note = see the log", 3, 'text needs quotes, as in name = "..."'),
    ("grace: 1", 3, "Expected '=' after a key in a key/value pair"),
    ('interval = "2d"', 3, "it stands twice: take one away"),
    ("[monitors.job]", 3, "it stands twice: take one away"),
    ("[monitors.my job]", 3, "Expected ']' at the end of a table declaration"),
])
def test_a_syntax_error_says_what_to_write_instead(lines, number, advice, mistakes):
    assert mistakes(JOB + lines) == [f"line {number}: is not valid TOML: {advice}"]


SECRET = "hunter2-hunter2-hunter2"


@settings(PROPERTY, max_examples=200, phases=[Phase.generate])
@given(st.randoms(use_true_random=False), st.sampled_from([
    f'password = "{SECRET}"\n', f'[channels]\nphone = "json://{SECRET}@host"\n',
    f'[monitors.a]\ninterval = 60\ntoken = "{SECRET}"\n', f'x = {{"{SECRET}" = 1}}\n',
]))
def test_no_slip_of_the_keyboard_shows_a_secret(load, chance, line):
    """A few characters lost, doubled or swapped around the secret: whatever is said of it."""
    text = line + JOB
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(text))
        if text[at].isalnum():
            continue
        text = text[:at] + chance.choice(["", text[at] * 2, "'", '"', "=", "\n"]) + text[at + 1 :]
    try:
        load(text)
    except larm.ConfigError as error:
        report = str(error)
        shown = SECRET in report
        assert not shown or re.search(rf'^\W*{SECRET}\W*(=|\n|$)', text, re.MULTILINE), report


@pytest.mark.parametrize("value", ["[" * 5_000, "1" * 5_000], ids=["lists", "digits"])
def test_what_is_too_much_for_the_toml_parser_is_a_mistake(value, mistakes):
    assert len(mistakes(f"a = {value}")) == 1


# What a job and Larm itself ask of it


def test_a_jobs_address_is_read_whatever_else_is_wrong(tmp_path):
    path = write_config(
        tmp_path,
        'listen = ":99"\nurl = "http://nas/larm/"\nkeep = "x"\nqqq = 1\ndatabase = "d.db"\n'
        '[channels]\na = "${UNSET}"\n[monitors.x]\ntoken = "short"\n'
        '[monitors.job]\nschedule = "no"\ntoken = "${T}"\n',
    )
    address = larm.load_address(path, "job", {"T": TOKEN})
    assert address == larm.Address("http://nas/larm", tmp_path / "d.db", TOKEN)


def test_a_jobs_address_has_no_token_where_larm_made_it(tmp_path):
    address = larm.load_address(write_config(tmp_path, JOB), "job", {})
    assert address == larm.Address("http://127.0.0.1:5276", tmp_path / "larm.db", None)


@pytest.mark.parametrize(("text", "says"), [
    ("listen = 5\n" + JOB, "listen: found 5"),
    (job('token = "${UNSET}"'), "monitors.job.token: ${UNSET} is not set"),
    ("[monitors.jobb]", 'no monitor "job"; did you mean jobb?'),
    ("monitors = 5", 'no monitor "job"; there is none yet'),
    ("[monitors]\njob = 5", 'no monitor "job"'),
    ("monitors", "line 1: is not valid TOML"),
])
def test_a_jobs_address_that_cannot_be_had_says_why(text, says, tmp_path):
    with pytest.raises(larm.ConfigError) as caught:
        larm.load_address(write_config(tmp_path, text), "job", {})
    assert f"larm.toml: {says}" in str(caught.value)


def test_a_configuration_that_alerts_nobody_or_has_no_timezone_is_warned_of(
    load, caplog, system_zone
):
    system_zone("Mars/Olympus")
    larm.warn_of(load(JOB))
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "no channels are configured: nobody will be alerted",
        'times are in UTC and not by TZ or /etc/localtime: "Mars/Olympus" is not a time zone',
    ]
    caplog.clear()
    larm.warn_of(load('timezone = "Asia/Tokyo"\n[channels]\na = "json://a"\n' + JOB))
    assert caplog.records == []


def test_no_representation_shows_a_secret(load):
    config = load(f'password = "{SECRET}"\n[channels]\na = "json://{SECRET}"\n'
                  + job(f'token = "{SECRET}"') + f'[watchdog]\nping = "http://o/{SECRET}"\n')
    assert SECRET not in repr(config)


def test_loading_takes_little_more_than_toml_does(load):
    """Ours is measured in multiples of what tomllib needs for the same file."""
    text = "".join(f'[monitors.job-{n}]\ninterval = "1d"\ngrace = "1h"\ntoken = "token-{n:010}"\n'
                   for n in range(10_000))  # fmt: skip
    began = time.process_time()
    tomllib.loads(text)
    parsing = time.process_time() - began
    began = time.process_time()
    monitors = load(text).monitors
    assert time.process_time() - began < 3 * parsing
    one, other = list(monitors.values())[-2:]
    assert one.notify is other.notify
