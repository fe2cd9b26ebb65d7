"""Python before 3.11: a sentence instead of a traceback, and under `run` the job all the same."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

VERSIONS = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
OLD = [path for minor in (8, 9, 10) for path in sorted(VERSIONS.glob(f"3.{minor}.*/bin/python3"))]
SENTENCE = "larm.py needs Python 3.11 or newer, and this is 3."
MONITORS = '[monitors.backup]\ninterval = "1d"\n[ monitors . "printf" ]\ninterval = 60\n'


def run(python, folder, *arguments, **environ):
    return subprocess.run(
        [str(python), str(ROOT / "larm.py"), *arguments], cwd=folder, capture_output=True,
        text=True, check=False, env={**os.environ, **environ},
    )  # fmt: skip


def test_the_file_parses_on_python_3_8():
    ast.parse((ROOT / "larm.py").read_text(), feature_version=(3, 8))


@pytest.fixture(params=OLD[:1] + OLD[-1:], ids=lambda path: path.parent.parent.name)
def python(request):
    return request.param


def test_an_old_python_is_told_so(python, tmp_path):
    for arguments in ([], ["check"], ["-c", "x.toml", "status"], ["--version"], ["run"], ["-c"]):
        done = run(python, tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(SENTENCE)
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [
    ["run", "--", "printf", "%s", "ran"],
    ["run", "backup", "--", "printf", "%s", "ran"],
    ["run", "backup", "printf", "%s", "ran"],
    ["run", "printf", "printf", "%s", "ran"],
    ["run", "--url", "http://nas/x", "printf", "%s", "ran"],
    ["run", "--url=http://nas/x", "--", "printf", "%s", "ran"],
    ["-c", "larm.toml", "run", "backup", "printf", "%s", "ran"],
    ["run", "-c", "larm.toml", "backup", "printf", "%s", "ran"],
    ["run", "env", "printf", "%s", "ran"],  # no monitor has that name: it is the job
])  # fmt: skip
def test_an_old_python_runs_the_job_all_the_same(words, python, tmp_path):
    (tmp_path / "larm.toml").write_text(MONITORS)
    done = run(python, tmp_path, *words)
    assert (done.returncode, done.stdout) == (0, "ran")
    assert done.stderr.startswith(SENTENCE)
    assert done.stderr.endswith("; the job runs, but Larm hears nothing of it\n")


def test_with_LARM_URL_all_is_the_job(python, tmp_path):
    (tmp_path / "larm.toml").write_text(MONITORS)
    done = run(python, tmp_path, "run", "printf", "%s", "ran", LARM_URL="http://nas/x")
    assert done.stdout == "ran"


@pytest.mark.parametrize(("words", "exit_code"), [
    (["sh", "-c", "exit 7"], 7), (["/no/such"], 127), (["/etc/passwd"], 126),
])  # fmt: skip
def test_an_old_python_exits_as_the_job_does(words, exit_code, python, tmp_path):
    done = run(python, tmp_path, "run", "--", *words)
    assert done.returncode == exit_code
    assert "Traceback" not in done.stderr


def test_the_job_gets_the_signals_that_python_ignores(python, tmp_path):
    """A job in a pipe that closes early ends, as it would without Larm."""
    done = run(python, tmp_path, "run", "--", "sh", "-c", "kill -PIPE $$; echo survived")
    assert (done.returncode, done.stdout) == (-13, "")


def test_nothing_is_wrong_with_this_python():
    assert sys.version_info >= (3, 11)
