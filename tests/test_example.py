"""The example names every setting and is right; the repository holds what it says it holds."""

import dataclasses
import re
import subprocess
import tomllib

import pytest
from conftest import ROOT

import larm

EXAMPLE = ROOT / "larm.toml.example"
# A setting, or a table's heading, that a "# " keeps out of force.
COMMENTED = re.compile(r"^# (?=[a-z_]+ += |\[[a-z.-]+\]$)", re.MULTILINE)
ENVIRONMENT = {
    "LARM_PASSWORD": "a password",
    "NTFY_TOPIC": "a-topic",
    "MAIL_PASSWORD": "a-mail-password",
    "BACKUP_TOKEN": "a-token-of-16-and-more",
    "WATCHDOG_TOKEN": "another-token",
}

# The dataclasses' fields, as larm.toml calls them.
TOP = {field.name for field in dataclasses.fields(larm.Config)} - {"path", "zone_trouble"}
TOP |= {"defaults"}
MONITOR = {field.name for field in dataclasses.fields(larm.Monitor)} - {"key"} | {"timezone"}
WATCHDOG = {field.name for field in dataclasses.fields(larm.Watchdog)}


def uncommented():
    return COMMENTED.sub("", EXAMPLE.read_text())


@pytest.fixture
def everything(tmp_path):
    path = tmp_path / "larm.toml"
    path.write_text(uncommented())
    return path


def test_the_example_is_valid_as_it_stands():
    assert set(larm.load(EXAMPLE, {}, larm.accepts).monitors) == {"router", "nightly-backup"}


def test_the_example_is_valid_with_every_commented_setting_in_force(everything):
    config = larm.load(everything, ENVIRONMENT, larm.accepts)
    assert config.password == "a password"
    assert config.channels["phone"] == ("ntfys://ntfy.sh/a-topic",)
    assert config.monitors["nightly-backup"].token == "a-token-of-16-and-more"
    assert config.monitors["sunday-report"].schedule.expression == "0 3 * * 0"
    assert config.watchdog.ping.endswith("/another-token")


def test_the_example_needs_only_the_environment_that_it_names(everything):
    with pytest.raises(larm.ConfigError) as caught:
        larm.load(everything, {})
    assert set(re.findall(r"\$\{(\w+)\}", str(caught.value))) == set(ENVIRONMENT)


def test_the_example_names_every_setting_at_the_top():
    assert set(tomllib.loads(uncommented())) == TOP


def test_the_example_names_every_setting_of_a_monitor():
    monitors = tomllib.loads(uncommented())["monitors"].values()
    assert set().union(*monitors) == MONITOR


def test_the_example_names_every_setting_of_the_watchdog():
    assert set(tomllib.loads(uncommented())["watchdog"]) == WATCHDOG


def test_what_the_example_sets_at_the_top_are_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    (tmp_path / "larm.toml").write_text('[monitors.job]\ninterval = "1d"\n')
    default = larm.load(tmp_path / "larm.toml", {})
    example = larm.load(EXAMPLE, {})
    for name in TOP - {"defaults", "monitors", "database"}:
        assert getattr(example, name) == getattr(default, name), name
    assert example.database.name == default.database.name


def test_no_defaults_in_force_hide_those_of_larm():
    assert "defaults" not in tomllib.loads(EXAMPLE.read_text())


@pytest.mark.parametrize(("name", "said", "default"), [
    ("name", "the id", "job"), ("grace", "a tenth of it, at most 1h", larm.HOUR),
    ("token", "made by Larm", None), ("notify", "every channel", ("a",)), ("remind", "never", None),
    ("quiet", "[]", ()), ("max_runtime", "any time", None), ("depends_on", "[]", ()),
    ("enabled", "true", True), ("note", "none", ""),
])  # fmt: skip
def test_the_default_that_a_comment_names_is_larms(name, said, default, tmp_path):
    own = re.search(rf"^# {name} = (?:.|\n +#)+Default(?:.|\n +#)+", EXAMPLE.read_text(), re.M)
    assert f"Default: {said}" in own[0]
    text = '[channels]\na = "json://a"\n[monitors.job]\ninterval = "1d"\n'
    (tmp_path / "larm.toml").write_text(text)
    assert getattr(larm.load(tmp_path / "larm.toml", {}).monitors["job"], name) == default


def test_every_setting_of_the_example_has_its_comment_beside_it():
    explained = re.findall(r"^(?:# )?([a-z_]+) += .*\S  +# \w", EXAMPLE.read_text(), re.MULTILINE)
    settings = TOP - {"channels", "defaults", "monitors", "watchdog"} | MONITOR | WATCHDOG
    assert set(explained) - {"mail"} == settings


def test_its_header_names_the_packages_that_the_tests_install():
    header = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / "larm.py").read_text(), re.M | re.S)
    metadata = tomllib.loads(re.sub(r"^# ?", "", header[1], flags=re.MULTILINE))
    assert metadata["requires-python"] == ">=3.11"
    first_block = (ROOT / "tests" / "requirements.txt").read_text().partition("\n\n")[0]
    wanted = [line for line in first_block.splitlines() if not line.startswith("#")]
    assert metadata["dependencies"] == wanted


def test_the_repository_holds_only_what_it_says():
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip(f"no git repository here: {listing.stderr.strip()}")
    names = {path.partition("/")[0] for path in listing.stdout.splitlines()}
    allowed = {"larm.py", "larm.toml.example", "tests", "README.md", "LICENSE"}
    assert {name for name in names if not name.startswith(".")} <= allowed
