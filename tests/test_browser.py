"""The pages in a real browser: Chromium, driven by Playwright, on a real server."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Process, free_port, launch, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt install chromium")

PATIENCE = 45_000  # milliseconds: a loaded machine is slow, not wrong
REFRESH = "document.dispatchEvent(new Event('visibilitychange'))"
JOBS = '[channels]\nnowhere = "json://127.0.0.1:9/"\n' + "".join(
    f'[monitors.job-{n}]\nname = "Job {n}"\ninterval = "1d"\ntoken = "a-token-for-job-{n:04}"\n'
    for n in range(20)
)


@pytest.fixture(scope="module")
def larm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = launch(tmp_path_factory.mktemp("larm"), JOBS)
    for number in range(1, 20):
        process.get(f"/api/heartbeat/a-token-for-job-{number:04}", "POST", b"\x1b[1mdone\x1b[0m")
    process.get("/api/heartbeat/a-token-for-job-0019/fail", "POST", b"disk full")
    yield process
    process.kill()


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
    """visit(url, **options): a new window at that page; it must not complain to its console."""
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
    assert [text for text in complaints if "ERR_CONNECTION" not in text] == []


def expect(found: Any) -> Any:
    return sync_api.expect(found)


@pytest.fixture(autouse=True, scope="module")
def patience() -> None:
    sync_api.expect.set_options(timeout=PATIENCE)


def test_the_dashboard_is_one_request(larm, visit):
    page = visit("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(larm.url)
    page.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith("data:")] == [f"{larm.url}/"]


@pytest.mark.parametrize("scripts", [True, False])
def test_a_click_pauses_and_another_resumes(larm, visit, scripts):
    page = visit(f"{larm.url}/monitor/job-1", java_script_enabled=scripts)
    page.get_by_label("for").select_option("for 1 hour")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".answer.paused")).to_contain_text("Paused since")
    assert page.url == f"{larm.url}/monitor/job-1"
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".answer.up")).to_contain_text("Up. Last heartbeat")


def test_a_click_tests_the_channels(larm, visit):
    page = visit(f"{larm.url}/monitor/job-2")
    page.get_by_role("button", name="Send a test alert").click()
    expect(page.locator("main")).to_contain_text("nowhere: test not sent")


def test_output_expands_and_stays_so_when_the_page_refreshes(larm, visit):
    page = visit(f"{larm.url}/monitor/job-19")
    page.get_by_text("1 line").first.click()
    output = page.locator("#runs-title ~ table pre").first
    expect(output).to_be_visible()
    expect(output).to_have_text("disk full")
    larm.get("/api/heartbeat/a-token-for-job-0019/log", "POST", b"one more line")
    page.evaluate(REFRESH)
    expect(page.locator("#runs-title ~ table tbody tr")).to_have_count(3)
    expect(page.get_by_text("disk full", exact=True)).to_be_visible()


def test_typing_filters_and_the_address_remembers_it(larm, visit):
    page = visit(larm.url)
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(20)
    page.get_by_label("Filter").press_sequentially("job 1")
    expect(rows).to_have_count(11)
    expect(page.get_by_label("Filter")).to_be_focused()
    assert page.url.endswith("?q=job%201")
    page.reload()
    expect(rows).to_have_count(11)
    page.get_by_label("Filter").fill("")
    expect(rows).to_have_count(20)


def test_the_filter_works_without_a_script(larm, visit):
    page = visit(larm.url, java_script_enabled=False)
    page.get_by_label("Filter").fill("job 19")
    page.get_by_label("Filter").press("Enter")
    expect(page.locator("tbody tr")).to_have_count(1)


def test_a_refresh_keeps_focus_and_scroll(larm, visit):
    page = visit(larm.url)
    link = page.locator("tbody").get_by_role("link", name="Job 12", exact=True)
    link.focus()
    page.evaluate("scrollTo(0, 400)")
    before = page.evaluate("scrollY")
    page.evaluate("document.querySelector('h1').textContent = 'something old'")
    page.evaluate(REFRESH)
    expect(page.locator("h1")).to_have_text("Job 19 is down")
    expect(link).to_be_focused()
    assert page.evaluate("scrollY") == before > 0


def test_the_page_refreshes_itself_every_15_s(larm, visit):
    page = visit("about:blank")
    page.clock.install()
    page.goto(larm.url)
    for text in ("old", "older"):
        page.evaluate(f"document.querySelector('h1').textContent = '{text}'")
        page.clock.fast_forward(14_000)
        expect(page.locator("h1")).to_have_text(text)
        page.clock.fast_forward(2_000)
        expect(page.locator("h1")).to_have_text("Job 19 is down")


def test_a_page_that_loses_the_server_says_so_until_it_is_back(visit, tmp_path):
    larm = launch(tmp_path, JOBS)
    try:
        page = visit(larm.url)
        stale = page.get_by_role("status")
        expect(stale).to_be_hidden()
        larm.kill()
        page.evaluate(REFRESH)
        expect(stale).to_contain_text("Larm does not answer")
        expect(page.locator("tbody tr")).to_have_count(20)
        larm = launch(tmp_path, JOBS, larm.port)
        page.evaluate(REFRESH)
        expect(stale).to_be_hidden()
    finally:
        larm.kill()


def test_the_public_sees_states_and_no_buttons(visit, tmp_path):
    larm = launch(tmp_path, 'public = true\npassword = "a password"\n' + JOBS)
    try:
        larm.ping("a-token-for-job-0003")
        page = visit(larm.url)
        page.locator("tbody").get_by_role("link", name="Job 3", exact=True).click()
        expect(page.locator("h1")).to_have_text("Job 3")
        expect(page.get_by_role("button")).to_have_count(0)
        assert "a-token-for" not in page.content()
    finally:
        larm.kill()


NGINX_CONFIG = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  server {{
    listen 127.0.0.1:{port};
    location /larm/ {{ proxy_pass http://127.0.0.1:{larm}{path}; }}
  }}
}}
"""


@pytest.mark.skipif(not NGINX, reason="there is no nginx: apt install nginx-light")
@pytest.mark.parametrize("path", ["", "/"], ids=["passes the path on", "strips it"])
def test_behind_a_proxy_every_link_and_button_keeps_its_path(visit, tmp_path, path):
    port = free_port()
    toml = f'url = "http://127.0.0.1:{port}/larm"\npassword = "a password"\n'
    larm = launch(tmp_path, toml + JOBS)
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX_CONFIG.format(folder=tmp_path, port=port, larm=larm.port, path=path))
    nginx = subprocess.Popen([str(NGINX), "-c", str(config), "-p", str(tmp_path)],
                             stderr=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "nginx.pid").exists)
        url = f"http://127.0.0.1:{port}/larm/"
        page = visit(url, http_credentials={"username": "me", "password": "a password"})
        page.locator("tbody").get_by_role("link", name="Job 4", exact=True).click()
        page.get_by_role("button", name="Pause").click()
        expect(page.locator(".answer.paused")).to_be_visible()
        assert page.url == f"{url}monitor/job-4"
        page.get_by_role("link", name="Larm", exact=True).click()
        expect(page.locator("#m-job-4")).to_contain_text("paused")
        assert page.url == url
    finally:
        nginx.terminate()
        nginx.wait(30)
        larm.kill()


@pytest.mark.parametrize("path", ["/", "/monitor/job-0", "/monitor/job-19"])
def test_the_narrowest_screen_needs_no_sideways_scrolling(larm, visit, path):
    page = visit(larm.url + path, viewport={"width": 320, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_the_keyboard_reaches_everything_and_shows_where_it_is(larm, visit):
    page = visit(f"{larm.url}/monitor/job-3")
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert {"Larm", "Pause", "Send a test alert", "crontab", "Python"} <= set(reached)


def axe() -> Path:
    """axe-core, as the package axe-playwright-python brings it."""
    package = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    return Path(package.__file__).parent / "axe.min.js"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_violation(larm, visit, width, scheme):
    page = visit(larm.url, viewport={"width": width, "height": 900}, color_scheme=scheme,
                 bypass_csp=True)
    for path in ("/", "/monitor/job-0", "/monitor/job-19"):
        page.goto(larm.url + path)
        page.add_script_tag(path=axe())
        found = page.evaluate("axe.run()")["violations"]
        assert [(one["id"], [node["html"][:200] for node in one["nodes"][:3]])
                for one in found] == [], path
