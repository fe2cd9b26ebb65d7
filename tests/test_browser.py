"""The pages in a real browser: Chromium, driven by Playwright, on a real server."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Process, free_port, launch, wait_until, write_config
from demo import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt install chromium")

PATIENCE = 30_000  # milliseconds: a loaded machine is slow, not wrong
REFRESH = "document.dispatchEvent(new Event('visibilitychange'))"
COUNT = 20
JOBS = '[channels]\nnowhere = "json://127.0.0.1:9/"\n' + "".join(
    f'[monitors.job-{n}]\nname = "Job {n}"\ninterval = "1d"\ntoken = "a-token-for-job-{n:04}"\n'
    for n in range(COUNT)
)


def ping(larm: Process, number: int, action: str = "", body: bytes = b"") -> None:
    answer = larm.get(f"/api/heartbeat/a-token-for-job-{number:04}{action}", "POST", body)
    assert answer.status == 200


@pytest.fixture(scope="module")
def larm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = launch(tmp_path_factory.mktemp("larm"), JOBS)
    for number in range(1, COUNT):
        ping(process, number, "", b"\x1b[1mdone\x1b[0m")
    ping(process, 19, "/fail", b"disk full")
    yield process
    process.kill()


@pytest.fixture(scope="module")
def demo() -> Iterator[Process]:
    """12 monitors, one of each state, with 90 days of history."""
    with serving() as process:
        yield process


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=120_000
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """visit(url, **options): a new window at that page; it must not complain to its console, but
    of what the server refused.
    """
    contexts, complaints = [], []

    def open_page(url: str, **options: Any) -> Any:
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in complaints if not re.search("ERR_CONNECTION|status of 40", text)] == []


def expect(found: Any) -> Any:
    return sync_api.expect(found)


@pytest.fixture(autouse=True, scope="module")
def patience() -> None:
    sync_api.expect.set_options(timeout=PATIENCE)


def link_to(page: Any, name: str) -> Any:
    return page.locator(".rows").get_by_role("link", name=name, exact=True)


def rows(page: Any) -> Any:
    return page.locator(".rows tbody th")


# What a click does


def test_the_dashboard_is_one_request(larm, visit):
    page = visit("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(larm.url)
    page.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith("data:")] == [f"{larm.url}/"]


@pytest.mark.parametrize("scripts", [True, False])
def test_a_click_pauses_another_resumes_and_a_third_pings(larm, visit, scripts):
    page = visit(f"{larm.url}/monitor/job-1", java_script_enabled=scripts)
    page.get_by_label("for").select_option("for 1 hour")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".answer.paused")).to_contain_text("Paused since")
    assert page.url == f"{larm.url}/monitor/job-1"
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".answer.up")).to_contain_text("Up since")
    page.get_by_role("button", name="Ping now").click()
    expect(page.locator(".answer.up")).to_be_visible()
    assert page.url == f"{larm.url}/monitor/job-1"


def test_a_click_tests_the_channels(larm, visit):
    page = visit(f"{larm.url}/monitor/job-2")
    page.get_by_role("button", name="Send a test alert to nowhere").click()
    page.wait_for_load_state()

    def told() -> bool:
        page.evaluate(REFRESH)
        return "not sent" in page.inner_text("main")

    wait_until(told, PATIENCE / 1000)


def test_the_ping_url_is_copied_by_a_click_and_without_scripts_selected(larm, visit):
    url = f"{larm.url}/api/heartbeat/a-token-for-job-0003"
    page = visit(f"{larm.url}/monitor/job-3", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == url
    page = visit(f"{larm.url}/monitor/job-3", java_script_enabled=False)
    expect(page.get_by_role("button", name="Copy")).to_be_hidden()
    code = page.locator("code").first
    expect(code).to_have_text(url)
    code.click()
    assert code.evaluate("one => getComputedStyle(one).userSelect") == "all"


@pytest.mark.parametrize("scripts", [True, False])
def test_the_filter_is_in_the_address_and_stays(larm, visit, scripts):
    page = visit(larm.url, java_script_enabled=scripts)
    expect(rows(page)).to_have_count(COUNT)
    page.get_by_label("Filter").fill("job 1")
    page.get_by_label("Filter").press("Enter")
    expect(rows(page)).to_have_count(11)
    assert "q=job" in page.url
    page.reload()
    expect(rows(page)).to_have_count(11)
    expect(page.get_by_label("Filter")).to_have_value("job 1")
    if scripts:
        page.evaluate(REFRESH)
        page.wait_for_timeout(100)
        expect(rows(page)).to_have_count(11)


# The refresh


def test_a_refresh_keeps_what_is_open_chosen_and_focused_and_where_one_is(larm, visit):
    page = visit(f"{larm.url}/monitor/job-5", viewport={"width": 1280, "height": 500})
    output = page.locator("details", has_text="done")
    output.locator("summary").click()
    expect(output.locator("pre")).to_be_visible()
    page.get_by_label("for").select_option("for 1 day")
    output.locator("summary").focus()
    before = page.evaluate("scrollTo(0, 500), scrollY")
    ping(larm, 5, "/start")
    page.evaluate(REFRESH)
    expect(page.locator(".runs tbody tr")).to_have_count(2)
    expect(output.locator("pre")).to_be_visible()
    expect(output.locator("summary")).to_be_focused()
    assert page.get_by_label("for").input_value() == "1d"
    assert abs(page.evaluate("scrollY") - before) < 200 < before
    ping(larm, 5, "/fail", b"one more")
    page.evaluate(REFRESH)
    expect(page.locator(".answer.down")).to_be_visible()
    expect(output.locator("pre")).to_be_visible()
    assert page.locator("details[open]").count() == 1
    ping(larm, 5)


def test_a_refresh_keeps_the_focus_of_a_row_that_moves(larm, visit):
    page = visit(larm.url)
    link = link_to(page, "Job 12")
    link.focus()
    page.evaluate("scrollTo(0, 300)")
    names = rows(page).all_inner_texts()
    ping(larm, 12, "/fail")
    page.evaluate(REFRESH)
    expect(page.locator(".rows tr.down", has_text="Job 12")).to_be_visible()
    assert rows(page).all_inner_texts().index("Job 12") < names.index("Job 12")
    expect(link).to_be_focused()
    assert page.evaluate("scrollY") > 0


def test_a_page_refreshes_itself_every_15_s_by_what_has_changed_only(larm, visit):
    page = visit("about:blank")
    page.clock.install()
    page.goto(f"{larm.url}/monitor/job-7")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.fast_forward(14_000)
    page.wait_for_timeout(100)
    assert asked == []
    for status, seconds in ((200, 2), (304, 15)):
        with page.expect_response(page.url) as found:
            page.clock.fast_forward(1000 * seconds)
        assert found.value.status == status
        assert found.value.request.headers["x-larm-refresh"] == "1"
        assert len(found.value.text() if status == 200 else "") < 9_000
        page.wait_for_timeout(100)
    ping(larm, 7, "/fail")
    page.clock.fast_forward(15_000)
    expect(page.locator(".answer.down")).to_be_visible()
    assert page.title() == "Job 7 · Larm"


def test_a_page_that_is_stale_says_the_true_reason_until_it_is_not(visit, tmp_path):
    process = launch(tmp_path, JOBS)
    page = visit(f"{process.url}/monitor/job-1")
    stale = page.get_by_role("status")
    expect(stale).to_be_hidden()

    def save(text: str) -> None:
        write_config(tmp_path, f'listen = "127.0.0.1:{process.port}"\n{text}')
        count = process.log.count(" applied: ")
        process.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: process.log.count(" applied: ") > count)
        page.evaluate(REFRESH)

    try:
        save(JOBS.replace("[monitors.job-1]", "[monitors.job-one]"))
        expect(stale).to_contain_text("this page is gone")
        save('password = "a password"\n' + JOBS)
        expect(stale).to_contain_text("you are signed out")
        save(JOBS)
        expect(stale).to_be_hidden()
        process.kill()
        page.evaluate(REFRESH)
        expect(stale).to_contain_text("Larm does not answer")
        expect(page.locator("h1")).to_have_text("Job 1")  # what was known stays to be seen
        process = launch(tmp_path, JOBS, process.port)
        page.evaluate(REFRESH)
        expect(stale).to_be_hidden()
    finally:
        process.kill()


# In public, behind a proxy, in a frame


def test_the_public_sees_states_and_no_buttons_and_can_sign_in(visit, tmp_path):
    process = launch(tmp_path, 'public = true\npassword = "a password"\n' + JOBS)
    try:
        ping(process, 3)
        page = visit(process.url)
        link_to(page, "Job 3").click()
        expect(page.locator("h1")).to_have_text("Job 3")
        expect(page.get_by_role("button")).to_have_count(0)
        assert "a-token-for" not in page.content()
        page = visit(process.url, http_credentials={"username": "me", "password": "a password"})
        page.get_by_role("link", name="Sign in").click()
        page.wait_for_url(f"{process.url}/")
        expect(page.get_by_role("link", name="Sign in")).to_have_count(0)
        link_to(page, "Job 3").click()
        page.get_by_role("button", name="Pause").click()
        expect(page.locator(".answer.paused")).to_be_visible()
    finally:
        process.kill()


SERVER = """server {{
    listen 127.0.0.1:{port};
    location /larm/ {{ proxy_pass http://127.0.0.1:{larm}{path}; }}
  }}"""
NGINX_CONFIG = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  {servers}
}}
"""


@pytest.mark.skipif(not NGINX, reason="there is no nginx: apt install nginx-light")
def test_behind_a_proxy_every_link_and_button_keeps_its_path(visit, tmp_path):
    """Whether it passes the path on or strips it."""
    ports = {"": free_port(), "/": free_port()}
    toml = f'url = "http://127.0.0.1:{ports[""]}/larm"\npassword = "a password"\n'
    process = launch(tmp_path, toml + JOBS)
    servers = "".join(SERVER.format(port=port, larm=process.port, path=path)
                      for path, port in ports.items())
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX_CONFIG.format(folder=tmp_path, servers=servers))
    nginx = subprocess.Popen([str(NGINX), "-c", str(config), "-p", str(tmp_path)],
                             stderr=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "nginx.pid").exists)
        for number, port in enumerate(ports.values()):
            url = f"http://127.0.0.1:{port}/larm/"
            page = visit(url, http_credentials={"username": "me", "password": "a password"})
            link_to(page, f"Job {number}").click()
            page.get_by_role("button", name="Pause").click()
            expect(page.locator(".answer.paused")).to_be_visible()
            assert page.url == f"{url}monitor/job-{number}"
            page.get_by_role("link", name="Larm", exact=True).click()
            expect(page.locator(".rows")).to_contain_text("paused")
            assert page.url == url
            page.evaluate("document.querySelector('h1').textContent = 'something old'")
            page.evaluate(REFRESH)
            expect(page.locator("h1")).not_to_have_text("something old")
    finally:
        nginx.terminate()
        nginx.wait(30)
        process.kill()


@pytest.fixture
def framing() -> Iterator[Callable[[str], int]]:
    """framing(url): the port of a server whose page shows that URL in a frame."""
    servers: list[ThreadingHTTPServer] = []

    def serve(url: str) -> int:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(f'<iframe src="{url}" width="1000" height="900">'.encode())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1].server_port

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_only_a_page_that_embed_names_shows_larm_in_a_frame(chromium, framing, tmp_path):
    larm_port = free_port()
    port = framing(f"http://127.0.0.1:{larm_port}/monitor/job-1")
    process = launch(tmp_path, f'embed = ["http://localhost:{port}"]\n' + JOBS, larm_port)
    context = chromium.new_context()
    try:
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.goto(f"http://127.0.0.1:{port}/")  # another origin than localhost
        for _ in range(100):
            if refused := [text for text in said if "frame-ancestors" in text]:
                break
            page.wait_for_timeout(100)
        assert refused
        assert "Job 1" not in "".join(frame.content() for frame in page.frames[1:])
        page.goto(f"http://localhost:{port}/")
        frame = page.frame_locator("iframe")
        expect(frame.locator("h1")).to_have_text("Job 1")
        frame.get_by_role("button", name="Pause").click()
        expect(frame.locator(".answer.paused")).to_be_visible()
    finally:
        context.close()
        process.kill()


def test_no_page_of_another_origin_shows_larm_in_a_frame_or_presses_its_buttons(
        chromium, framing, larm):
    context = chromium.new_context()
    try:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{framing(larm.url)}/")
        page.wait_for_load_state()
        assert "Job 1" not in "".join(frame.content() for frame in page.frames[1:])
        page.evaluate(f"""
            document.body.innerHTML = '<form method=post action="{larm.url}/monitor/job-8/pause">';
            document.forms[0].submit()
        """)
        page.wait_for_url(f"{larm.url}/**")
        expect(page.locator("main")).to_contain_text("another site")
        assert larm.get("/api/v1/monitors/job-8").json["data"]["state"] == "up"
    finally:
        context.close()


# How it looks

PAGES = ["/", "/monitor/nightly-backup", "/monitor/offsite-backup", "/monitor/laptop", "/nothing"]


def test_the_narrowest_screen_needs_no_sideways_scrolling(demo, visit):
    page = visit("about:blank", viewport={"width": 320, "height": 640})
    for path in PAGES:
        page.goto(demo.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, path


def test_the_whole_answer_is_on_the_first_screen_and_no_header_wraps(demo, visit):
    page = visit(demo.url, viewport={"width": 1280, "height": 720})
    assert page.locator(".answer").bounding_box()["height"] < 90
    assert rows(page).nth(0).inner_text() == "Offsite backup"
    for text in ("Exit status 1", "lock is held by PID 4121", "restic unlock"):
        box = page.get_by_text(text).first.bounding_box()
        assert box["y"] + box["height"] < 720, text
    heads = page.locator("thead th").evaluate_all("all => all.map(one => one.offsetHeight)")
    assert max(heads) < 45
    lines = """all => all.map(one => {
        const range = document.createRange();
        range.selectNodeContents(one);
        return [...range.getClientRects()].map(line => [line.left, line.right].map(Math.round))
    }).filter(lines => lines.length)"""
    figures = page.locator(".rows td:nth-child(6)").evaluate_all(lines)
    assert len({right for [(_, right)] in figures}) == 1  # they end at one line
    names = page.locator(".rows th a").evaluate_all(lines)
    assert max(map(len, names)) == 2  # one wraps, and hangs
    assert len({left for name in names for left, _ in name}) == 1


def contrast(one: list[int], other: list[int]) -> float:
    """Of two colours, as WCAG 2.2 reckons it."""

    def luminance(colour: list[int]) -> float:
        parts = [value / 255 for value in colour]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_bars_can_be_read_in_light_and_in_dark(demo, visit, scheme):
    page = visit(demo.url, color_scheme=scheme)

    def colour(selector: str, name: str) -> list[int]:
        found = page.locator(selector).first.evaluate(f"one => getComputedStyle(one).{name}")
        return [int(number) for number in re.findall(r"\d+", found)[:3]]

    paper = colour(".rows", "backgroundColor")
    for selector in (".rows path.up", ".rows path.down", ".rows path.unwatched"):
        assert contrast(colour(selector, "stroke"), paper) >= 3, selector  # WCAG 1.4.11


def test_the_keyboard_reaches_everything_and_shows_where_it_is(larm, visit):
    page = visit(f"{larm.url}/monitor/job-9")
    reached = []
    while True:
        page.keyboard.press("Tab")
        text = page.evaluate("document.activeElement.textContent.trim()")
        if len(text) > 100:  # the whole page: there is no more
            break
        reached.append(text)
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert {"Larm", "Copy", "Ping now", "Pause", "Send a test alert to nowhere"} <= set(reached)


def axe() -> Path:
    """axe-core, as the package axe-playwright-python brings it."""
    package = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    return Path(package.__file__).parent / "axe.min.js"


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_no_violation(demo, visit, width, scheme):
    page = visit("about:blank", viewport={"width": width, "height": 900}, color_scheme=scheme,
                 bypass_csp=True)
    for path in ("/", "/monitor/offsite-backup", "/monitor/laptop"):
        page.goto(demo.url + path)
        page.add_script_tag(path=axe())
        found = page.evaluate("axe.run()")["violations"]
        assert [(one["id"], [node["html"][:200] for node in one["nodes"][:3]])
                for one in found] == [], path
