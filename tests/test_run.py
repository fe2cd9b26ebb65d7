"""The job wrapper as a user has it: real jobs, real signals, a real terminal, a real Larm."""

import contextlib
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import ROOT, TOKEN, free_port, wait_until, write_config

import larm

LARM = str(ROOT / "larm.py")
JOB = f'[monitors.job]\ninterval = "1d"\ntoken = "{TOKEN}"\n'
LONG = "trap : USR1; echo up; while :; do sleep 0.05; done"  # a job that says when it is ready


class Receiver:
    """A real HTTP server that keeps what it gets. `answers`: the statuses of the next answers, or
    "hang"; 200 after that.
    """

    def __init__(self, answers=(), headers=()):
        self.answers = list(answers)
        self.got = []  # (path, query, body) of each request, in the order in which they came
        self.agents = set()
        self.closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                parts = urlsplit(self.path)
                receiver.got.append((parts.path, parse_qs(parts.query), body))
                receiver.agents.add(self.headers["User-Agent"])
                answer = receiver.answers.pop(0) if receiver.answers else 200
                if answer == "hang":
                    receiver.closing.wait(60)
                    return
                self.send_response(answer)
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_):
                pass

        receiver = self
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/api/heartbeat/{TOKEN}"

    @property
    def actions(self):
        return [path.removeprefix(f"/api/heartbeat/{TOKEN}/") for path, _, _ in self.got]

    @property
    def body(self):
        """What the last request brought."""
        return self.got[-1][2]

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receivers():
    built = []

    def build(*answers, headers=()):
        built.append(Receiver(answers, headers))
        return built[-1]

    yield build
    for one in built:
        one.close()


@pytest.fixture
def receiver(receivers):
    return receivers()


@pytest.fixture
def popen(tmp_path):
    """popen(*words): a `larm.py run` in its own session, with pipes; killed at the test's end."""
    started = []

    def build(*words, **more):
        program = more.pop("program", [sys.executable, LARM])
        more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE, "start_new_session": True} | more
        started.append(subprocess.Popen([*program, "run", *words], cwd=tmp_path, **more))
        return started[-1]

    yield build
    for process in started:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def run(folder, *words, python=(sys.executable,), before=(), **environ):
    """`larm.py [before] run words` to its end: exit code, stdout and stderr in bytes."""
    return subprocess.run(
        [*python, LARM, *before, "run", *words], cwd=folder, env={**os.environ, **environ},
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
    )


def shell(text):
    return ("sh", "-c", text)


def python(text):
    return (sys.executable, "-c", text)


def only_complaint(result, text):
    """Larm's one line, all that there is on stderr."""
    lines = result.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("larm.py run: "), lines
    assert text in lines[0], lines


# What Larm is told


def test_start_comes_first_then_the_exit_status_with_the_same_rid(receiver, tmp_path):
    result = run(tmp_path, "--url", receiver.url, *shell("echo out; exit 3"))
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"")
    assert receiver.actions == ["start", "3"]
    rids = [query["rid"] for _, query, _ in receiver.got]
    assert rids[0] == rids[1]
    assert re.fullmatch(r"[0-9a-f]{16}", rids[0][0])
    assert receiver.agents == {f"larm.py run/{larm.__version__}"}


def test_each_run_has_a_rid_of_its_own(receiver, tmp_path):
    for _ in range(2):
        run(tmp_path, "--url", receiver.url, "true")
    rids = {query["rid"][0] for _, query, _ in receiver.got}
    assert (len(receiver.got), len(rids)) == (4, 2)


def test_stdout_and_stderr_are_sent_in_the_order_in_which_they_came(receiver, tmp_path):
    job = python("import os, time\nfor n in range(6):\n"
                 "    os.write(1 + n % 2, b'%d' % n); time.sleep(0.1)")
    result = run(tmp_path, "--url", receiver.url, *job)
    assert (result.stdout, result.stderr) == (b"024", b"135")
    assert receiver.body == b"012345"


def test_the_last_10000_bytes_are_sent(receiver, tmp_path):
    job = python("import os\nfor n in range(300_000): os.write(1, b'%06d\\n' % n)")
    result = run(tmp_path, "--url", receiver.url, *job)
    expected = b"".join(b"%06d\n" % n for n in range(300_000))
    assert result.stdout == expected
    assert receiver.body == expected[-10_000:]


def test_a_command_that_is_not_found_is_a_failure_with_127(receiver, tmp_path):
    result = run(tmp_path, "--url", receiver.url, "no-such-command", "-x")
    assert result.returncode == 127
    only_complaint(result, "no-such-command: No such file or directory")
    assert receiver.actions == ["start", "127"]
    assert b"no-such-command: No such file" in receiver.body


def test_a_command_that_is_not_executable_is_a_failure_with_126(receiver, tmp_path):
    (tmp_path / "notes").write_text("no program")
    result = run(tmp_path, "--url", receiver.url, "./notes")
    assert result.returncode == 126
    only_complaint(result, "./notes: Permission denied")
    assert receiver.actions == ["start", "126"]
    assert b"Permission denied" in receiver.body


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_job_killed_by_a_signal_is_a_failure_with_128_and_its_number(number, receiver, tmp_path):
    result = run(tmp_path, "--url", receiver.url, *shell(f"kill -{int(number)} $$"))
    assert result.returncode == 128 + number
    assert receiver.actions == ["start", str(128 + number)]


def test_the_start_is_told_while_the_job_runs(receiver, popen):
    process = popen("--url", receiver.url, *shell(LONG))
    wait_until(lambda: receiver.actions == ["start"])
    assert process.poll() is None


# What to run and what to report to


def destination(*words):
    """The ping URL that `larm.py run words` finds in this process's folder and environment."""
    arguments = larm.parse_arguments(["run", *words])
    return larm.find_ping_url(arguments, larm.split_words(arguments.words, bool(arguments.url))[0])


@pytest.mark.parametrize("separator", [(), ("--",)])
def test_the_options_of_the_job_reach_it_unchanged(separator, receiver, tmp_path):
    words = ["-c", "x", "--json", "--url", "y", "--help", "--version", "--", "-h", "--c", ""]
    job = python("import sys; print(sys.argv[1:])")
    result = run(tmp_path, "--url", receiver.url, *separator, *job, *words)
    assert result.stdout.decode() == f"{words}\n"


def test_larm_url_gives_the_ping_url_and_all_the_words_are_the_command(receiver, tmp_path):
    result = run(tmp_path, "echo", "job", "--", "x", LARM_URL=receiver.url)
    assert (result.returncode, result.stdout) == (0, b"job -- x\n")
    assert receiver.actions == ["start", "0"]


@pytest.mark.parametrize("ending", ["", "/", "?x=1", "/?x=1", "//#x", "\n"])
def test_what_follows_the_token_in_a_url_is_left_out(ending):
    url = f"https://nas.lan/larm/api/heartbeat/{TOKEN}"
    assert destination("--url", url + ending, "true") == url


def test_key_and_two_dashes_win_over_larm_url(receivers, tmp_path):
    url, other = receivers(), receivers()
    address = other.url.removesuffix(f"/api/heartbeat/{TOKEN}")
    write_config(tmp_path, f'url = "{address}"\n{JOB}')
    assert run(tmp_path, "job", "--", "true", LARM_URL=url.url).returncode == 0
    assert (url.actions, other.actions) == ([], ["start", "0"])


@pytest.mark.parametrize("words", [["job", "true", "-c", "x"], ["job", "--", "true"]])
def test_key_is_looked_up_in_larm_toml(words, receiver, tmp_path):
    address = receiver.url.removesuffix(f"/api/heartbeat/{TOKEN}")
    write_config(tmp_path, f'url = "{address}"\n{JOB}')
    run(tmp_path, *words)
    assert receiver.actions == ["start", "0"]


def test_a_token_from_the_environment_is_put_in(receiver, tmp_path):
    address = receiver.url.removesuffix(f"/api/heartbeat/{TOKEN}")
    text = JOB.replace(TOKEN, "${JOB_TOKEN}")
    write_config(tmp_path, f'url = "{address}"\n{text}')
    run(tmp_path, "job", "--", "true", JOB_TOKEN=TOKEN)
    assert receiver.actions == ["start", "0"]
    result = run(tmp_path, "job", "--", "echo", "ran")
    assert (result.returncode, result.stdout) == (0, b"ran\n")
    only_complaint(result, "monitors.job.token: ${JOB_TOKEN} is not set")


def test_mistakes_elsewhere_in_the_file_keep_no_ping_away(receiver, tmp_path):
    address = receiver.url.removesuffix(f"/api/heartbeat/{TOKEN}")
    write_config(tmp_path, f'keep = "x"\nschedul = 1\nurl = "{address}"\n{JOB}'
                           '[channels]\nphone = "${UNSET}"\n[monitors.other]\ninterval = "soon"\n')
    result = run(tmp_path, "job", "--", "true")
    assert (result.returncode, result.stderr) == (0, b"")
    assert receiver.actions == ["start", "0"]


def test_the_file_beside_larm_py_serves_where_there_is_none_here(receiver, tmp_path):
    address = receiver.url.removesuffix(f"/api/heartbeat/{TOKEN}")
    write_config(tmp_path, f'url = "{address}"\n{JOB}')
    shutil.copy(LARM, tmp_path)
    (tmp_path / "home").mkdir()
    command = [sys.executable, str(tmp_path / "larm.py"), "run", "job", "--", "true"]
    result = subprocess.run(command, cwd=tmp_path / "home", capture_output=True, check=True)
    assert result.stderr == b""
    assert receiver.actions == ["start", "0"]


def test_a_mistake_is_said_and_the_job_runs(tmp_path):
    write_config(tmp_path, JOB)
    result = run(tmp_path, "jobb", "--", "echo", "ran")
    assert (result.returncode, result.stdout) == (0, b"ran\n")
    only_complaint(result, 'no monitor "jobb"; did you mean job?')


def test_a_command_runs_whose_larm_url_is_missing(tmp_path):
    result = run(tmp_path, "/bin/echo", "ran", LARM_URL="")
    assert (result.returncode, result.stdout) == (0, b"ran\n")
    only_complaint(result, "name a monitor")


@pytest.mark.parametrize(("words", "complaint"), [
    (["--url", "nas.lan", "true"], "--url: must look like http://"),
    (["--url", f"http://x y/{TOKEN}", "true"], "--url: must look like http://"),
    (["--url", f"ftp://nas.lan/{TOKEN}", "true"], "--url: must look like http://"),
    (["--url", f"http://me:{TOKEN}@nas.lan/x", "true"], "--url: must look like http://"),
    (["--", "true"], "name a monitor"),
    (["./job", "-x"], "name a monitor"),
    (["Job", "--", "true"], 'no monitor "Job"; did you mean job?'),
    (["new", "--", "true"], "larm.db: no such file; start Larm once"),
    (["-c", "other.toml", "job", "true"], "other.toml: no such file"),
])
def test_a_mistake_is_named(words, complaint, tmp_path, monkeypatch):
    write_config(tmp_path, JOB + '[monitors.new]\ninterval = "1d"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LARM_URL", raising=False)
    with pytest.raises(larm.Unreported, match=re.escape(complaint)) as error:
        destination(*words)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("text", [None, "not = toml = at all"])
def test_the_job_runs_where_larm_toml_cant_be_read(text, tmp_path):
    path = tmp_path / "there.toml"
    if text:
        path.write_text(text)
    result = run(tmp_path, "job", "--", "echo", "ran", before=("-c", str(path)))
    assert (result.returncode, result.stdout) == (0, b"ran\n")
    only_complaint(result, str(path))


@pytest.mark.parametrize("words", [[], ["job"], ["--"], ["job", "--"], ["--url", "http://x/"],
                                   ["--nonsense", "true"]])
def test_without_a_command_it_is_unusable(words, monkeypatch):
    monkeypatch.delenv("LARM_URL", raising=False)
    with pytest.raises(larm.UserError, match=r"^larm\.py.*; see larm\.py.*--help$") as error:
        larm.run(larm.parse_arguments(["run", *words]))
    assert error.value.exit_code == 2


# A Larm that can't be reached


def test_a_larm_that_cant_be_reached_is_one_line_and_no_failure():
    url = f"http://127.0.0.1:{free_port()}/api/heartbeat/{TOKEN}"
    process = subprocess.run(
        [*fast(), "run", "--url", url, *shell("echo ran; exit 7")], capture_output=True, check=False
    )
    assert (process.returncode, process.stdout) == (7, b"ran\n")
    only_complaint(process, "start and end not reported: Connection refused")
    assert TOKEN.encode() not in process.stderr


def fast(**constants):
    """Python and larm.py, with shorter pauses than users have."""
    constants = {"TRY_AGAIN_AFTER": (0.05, 0.05)} | constants
    code = f"import sys, larm; vars(larm).update({constants!r}); sys.exit(larm.main(sys.argv[1:]))"
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]


def test_each_ping_is_tried_three_times(receivers):
    receiver = receivers(500, 503, 200, 404, 302, 200)
    result = subprocess.run([*fast(), "run", "--url", receiver.url, "true"], capture_output=True,
                            check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert receiver.actions == ["start"] * 3 + ["0"] * 3


def test_a_ping_that_failed_three_times_is_given_up(receivers):
    receiver = receivers(500, 500, 500)
    result = subprocess.run([*fast(), "run", "--url", receiver.url, "true"], capture_output=True,
                            check=False)
    assert result.returncode == 0
    only_complaint(result, "start not reported: HTTP status 500")
    assert receiver.actions == ["start"] * 3 + ["0"]


def test_retry_after_is_heeded_up_to_a_limit(receivers):
    receiver = receivers(503, 503, headers=[("Retry-After", "3600")])
    began = time.monotonic()
    run = [*fast(TRY_AGAIN_AFTER=(60, 60), LONGEST_PAUSE=0.3), "run"]
    result = subprocess.run([*run, "--url", receiver.url, "true"], capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert receiver.actions == ["start"] * 3 + ["0"]
    assert 0.6 <= time.monotonic() - began < 60


def test_a_larm_that_hangs_holds_up_neither_job_nor_exit_for_long(receivers):
    receiver = receivers(*["hang"] * 6)
    result = subprocess.run([*fast(TRY_WITHIN=0.2), "run", "--url", receiver.url, "echo", "ran"],
                            capture_output=True, check=False)
    assert (result.returncode, result.stdout) == (0, b"ran\n")
    only_complaint(result, "start and end not reported: no answer within 0.2 s")


def test_a_larm_that_hangs_does_not_keep_the_job_from_its_work(receivers, popen):
    receiver = receivers(*["hang"] * 6)
    process = popen("--url", receiver.url, *shell(LONG))
    assert process.stdout.readline() == b"up\n"
    wait_until(lambda: receiver.actions == ["start"])


def test_reporting_has_an_end_whatever_happens(receivers):
    receiver = receivers(*["hang"] * 6)
    run = [*fast(TRY_WITHIN=60, REPORT_WITHIN=0.3), "run"]
    result = subprocess.run([*run, "--url", receiver.url, *shell("exit 4")], capture_output=True,
                            check=False)
    assert result.returncode == 4
    only_complaint(result, "not reported: Larm has not answered in time")


def test_a_signal_after_the_end_cuts_the_reporting_short(receivers, popen):
    receiver = receivers(*["hang"] * 6)
    job = shell("echo $$; exit 5")
    process = popen("--url", receiver.url, *job, program=fast(TRY_WITHIN=60, HURRY=0.2))
    pid = int(process.stdout.readline())
    wait_until(lambda: gone(pid))
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 5
    assert b"not reported" in process.stderr.read()


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# Streams


def test_every_byte_passes_unchanged(receiver, tmp_path):
    job = python("import os; os.write(1, bytes(range(256))); os.write(2, bytes(range(256))[::-1])")
    result = run(tmp_path, "--url", receiver.url, *job)
    assert (result.stdout, result.stderr) == (bytes(range(256)), bytes(range(256))[::-1])


def test_output_comes_as_it_is_printed(receiver, popen):
    process = popen("--url", receiver.url, *shell("printf 10%%; read x; printf 20%%"),
                    stdin=subprocess.PIPE)
    assert os.read(process.stdout.fileno(), 100) == b"10%"
    process.stdin.write(b"go on\n")
    process.stdin.close()
    assert process.stdout.read() == b"20%"
    assert process.wait(15) == 0


def test_a_file_for_both_streams_keeps_their_order(receiver, popen, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        text = "for n in 1 2 3 4 5 6 7 8 9; do echo out $n; echo err $n >&2; done"
        popen("--url", receiver.url, *shell(text), stdout=log, stderr=log).wait(15)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == [f"{name} {n}" for n in range(1, 10) for name in ("out", "err")]


def test_stdin_is_the_jobs(receiver):
    result = subprocess.run([sys.executable, LARM, "run", "--url", receiver.url, "cat"],
                            input=bytes(range(256)) * 1000, capture_output=True, check=True)
    assert result.stdout == bytes(range(256)) * 1000


def test_other_open_files_are_the_jobs_too(receiver):
    read, write = os.pipe()
    job = python(f"import os; os.write({write}, b'hi')")
    command = [sys.executable, LARM, "run", "--url", receiver.url, *job]
    subprocess.run(command, pass_fds=[write], check=True)
    os.close(write)
    with open(read, "rb") as pipe:
        assert pipe.read() == b"hi"


def test_a_reader_that_has_had_enough_ends_the_job_as_ever(receiver, popen):
    process = popen("--url", receiver.url, "yes")
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(15) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    assert receiver.actions == ["start", "141"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cant_be_written_is_a_failure(receiver, popen):
    with open("/dev/full", "wb") as full:
        process = popen("--url", receiver.url, "echo", "precious", stdout=full)
        assert process.wait(15) == 1
    assert b"could not be written: No space left" in process.stderr.read()
    assert receiver.actions == ["start", "1"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(closed, receiver, tmp_path):
    words = [sys.executable, LARM, "run", "--url", receiver.url, *shell("echo out; exit 6")]
    result = subprocess.run(shell(f"{shlex.join(words)} {closed}"), cwd=tmp_path,
                            capture_output=True, check=False)
    assert result.returncode == 6
    assert result.stderr == b""
    assert (receiver.actions, receiver.body) == (["start", "6"], b"out\n")


def test_a_stream_that_does_not_block_gets_everything(receiver, popen):
    read, write = os.pipe()
    os.set_blocking(write, False)
    process = popen("--url", receiver.url, *python("print('x' * 1_000_000)"), stdout=write)
    os.close(write)
    with open(read, "rb") as pipe:
        assert len(pipe.read()) == 1_000_001
    assert process.wait(15) == 0


def test_a_child_that_keeps_the_output_open_does_not_hold_up_the_exit(receiver, popen):
    process = popen("--url", receiver.url, *shell("sleep 300 & echo started"))
    assert process.wait(15) == 0
    assert process.stdout.read1() == b"started\n"
    assert receiver.actions == ["start", "0"]


def test_a_child_that_goes_on_printing_does_not_hold_up_the_exit(receiver, tmp_path):
    words = ["run", "--url", receiver.url, *shell("yes & echo $!")]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.run([*fast(CHATTER=0.2), *words], stdout=out, timeout=15, check=False)
    assert process.returncode == 0
    assert receiver.actions == ["start", "0"]


def test_a_child_that_prints_a_little_later_is_still_heard(receiver, tmp_path):
    result = run(tmp_path, "--url", receiver.url, *shell("(sleep 0.2; echo late) & echo early"))
    assert result.stdout == b"early\nlate\n"
    assert receiver.body == b"early\nlate\n"


def test_a_slow_reader_gets_everything(receiver, popen):
    process = popen("--url", receiver.url, *python("print('x' * 300_000)"))
    got = b""
    while part := os.read(process.stdout.fileno(), 10_000):
        got += part
        time.sleep(0.01)
    assert len(got) == 300_001
    assert process.wait(15) == 0


def test_a_reader_that_is_stuck_does_not_hold_up_a_job_that_is_killed(receiver, popen):
    process = popen("--url", receiver.url, "yes", program=fast(CHATTER=0.1, HURRY=0.2))
    wait_until(lambda: select.select([process.stdout], [], [], 0)[0])
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 143
    assert receiver.actions == ["start", "143"]


def test_a_script_without_a_first_line_runs_as_in_a_shell(receiver, tmp_path):
    (tmp_path / "job").write_text('echo "$0 $1"\n')
    (tmp_path / "job").chmod(0o755)
    result = run(tmp_path, "--url", receiver.url, "./job", "a b")
    assert (result.returncode, result.stdout) == (0, b"./job a b\n")


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_to_the_job_which_dies_of_it(number, receiver, popen):
    process = popen("--url", receiver.url, *python("import time, signal\nsignal.signal(2, signal."
                                                   "SIG_DFL)\nprint(flush=True); time.sleep(60)"))
    process.stdout.readline()
    process.send_signal(number)
    assert process.wait(15) == 128 + number
    assert process.stderr.read() == b""
    assert receiver.actions == ["start", str(128 + number)]


def test_a_job_may_end_in_its_own_way_at_a_signal(receiver, popen):
    process = popen("--url", receiver.url, *shell(f"trap 'echo bye; exit 9' TERM; {LONG}"))
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == b"bye\n"
    assert process.wait(15) == 9
    assert (receiver.actions, receiver.body) == (["start", "9"], b"up\nbye\n")


def test_a_signal_that_is_ignored_stays_ignored(receiver):
    words = [sys.executable, LARM, "run", "--url", receiver.url, *shell("kill -HUP $$; echo alive")]
    result = subprocess.run(shell(f"trap '' HUP; {shlex.join(words)}"), capture_output=True,
                            check=False)
    assert (result.returncode, result.stdout) == (0, b"alive\n")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_the_job_has_no_signal_blocked_or_ignored(receiver, tmp_path):
    status = run(tmp_path, "--url", receiver.url, "grep", "^Sig[BI]", "/proc/self/status").stdout
    bits = {line.split()[0]: int(line.split()[1], 16) for line in status.splitlines()}
    assert bits[b"SigBlk:"] == 0
    assert bits[b"SigIgn:"] & 0x7FFF_FFFF == 0  # above are those that the C library keeps


# Secrets


def test_the_jobs_environment_does_not_have_larm_url(receiver, tmp_path):
    result = run(tmp_path, "--", "env", LARM_URL=receiver.url, OTHER="kept")
    assert b"OTHER=kept\n" in result.stdout
    assert TOKEN.encode() not in result.stdout
    assert receiver.actions == ["start", "0"]


def test_no_process_list_shows_the_token_of_larm_url_or_larm_toml(receiver, tmp_path):
    address = receiver.url.removesuffix(f"/api/heartbeat/{TOKEN}")
    write_config(tmp_path, f'url = "{address}"\n{JOB}')
    for words, environ in ([["--"], {"LARM_URL": receiver.url}], [["job", "--"], {}]):
        result = run(tmp_path, *words, "ps", "-eo", "args", **environ)
        assert b" run " in result.stdout
        assert TOKEN.encode() not in result.stdout


# Terminals


class Terminal:
    """A terminal with `larm.py run` as its foreground job, as a shell would start it."""

    def __init__(self, folder, *words, redirect="", size=(30, 100)):
        self.printed = b""
        line = f"{shlex.join([sys.executable, LARM, 'run', *words])} {redirect}; echo rc=$?."
        self.ours, theirs = os.openpty()
        termios.tcsetwinsize(self.ours, size)
        own = "import fcntl, os, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" \
              "os.execvp('sh', ['sh', '-c', sys.argv[1]])"  # pty.fork() may lock up beside threads
        self.popen = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", own, f"trap : INT; {line}"], cwd=folder,
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )
        os.close(theirs)

    def read_until(self, text):
        end = time.monotonic() + 20
        while text not in self.printed:
            assert time.monotonic() < end, self.printed
            if select.select([self.ours], [], [], 0.1)[0]:
                self.printed += os.read(self.ours, 65_536)
        return self.printed

    def exit_code(self):
        self.read_until(b"rc=")
        while not (found := re.search(rb"rc=(\d+)\.\r\n", self.printed)):
            self.printed += os.read(self.ours, 65_536)
        return int(found[1])

    def close(self):
        with contextlib.suppress(OSError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        os.close(self.ours)
        self.popen.wait()


@pytest.fixture
def terminals(tmp_path):
    built = []

    def build(*words, **more):
        built.append(Terminal(tmp_path, *words, **more))
        return built[-1]

    yield build
    for one in built:
        one.close()


def test_on_a_terminal_the_job_sees_one_of_its_size(receiver, terminals):
    job = python("import os, sys\nprint([os.isatty(n) for n in range(3)], "
                 "os.get_terminal_size(1), '|')")
    printed = terminals("--url", receiver.url, *job).read_until(b"|")
    assert b"[True, True, True] os.terminal_size(columns=100, lines=30)" in printed


def test_only_what_is_a_terminal_is_one_for_the_job(receiver, terminals, tmp_path):
    job = python("import os\nos.write(1, b'%r|' % [os.isatty(n) for n in range(3)])")
    terminals("--url", receiver.url, *job, redirect="2>err").read_until(b"[True, True, False]|")
    terminal = terminals("--url", receiver.url, *job, redirect=">out")
    assert terminal.exit_code() == 0
    assert (tmp_path / "out").read_bytes() == b"[True, False, True]|"


def test_a_terminal_gets_the_bytes_that_it_would_get_without(receiver, terminals):
    job = python("print('10%', end='\\r'); print('20%\\033[0m\\tdone'); print('end')")
    terminal = terminals("--url", receiver.url, *job)
    assert terminal.exit_code() == 0
    assert terminal.printed == b"10%\r20%\033[0m\tdone\r\nend\r\nrc=0.\r\n"
    assert receiver.body == b"10%\r20%\033[0m\tdone\nend\n"


def test_all_output_reaches_the_terminal(receiver, terminals):
    terminal = terminals("--url", receiver.url, *python("print('x' * 500_000)"))
    assert terminal.exit_code() == 0
    assert terminal.printed.count(b"x") == 500_000


def test_ctrl_c_reaches_the_job_once_and_larm_hears_of_it(receiver, terminals):
    job = python("import signal, time, sys\ncount = []\n"
                 "signal.signal(2, lambda *_: count.append(1))\n"
                 "print('ready', flush=True)\nwhile not count: time.sleep(0.01)\n"
                 "time.sleep(0.5)\nprint(len(count), 'times')\nsys.exit(3)")
    terminal = terminals("--url", receiver.url, *job)
    terminal.read_until(b"ready")
    os.write(terminal.ours, b"\x03")
    assert terminal.exit_code() == 3
    assert b"1 times" in terminal.printed
    assert receiver.actions == ["start", "3"]


def test_a_job_dies_of_ctrl_c_as_it_would_without(receiver, terminals):
    terminal = terminals("--url", receiver.url, *shell("echo ready; exec sleep 60"))
    terminal.read_until(b"ready")
    os.write(terminal.ours, b"\x03")
    assert terminal.exit_code() == 130
    assert b"Traceback" not in terminal.printed
    assert receiver.actions == ["start", "130"]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="can't tell who sent a signal")
def test_on_a_terminal_a_sigint_from_another_process_reaches_the_job_too(receiver, terminals):
    terminal = terminals("--url", receiver.url, *shell("echo run=$PPID.; exec sleep 60"))
    wrapper = int(re.search(rb"run=(\d+)\.", terminal.read_until(b".\r\n"))[1])
    os.kill(wrapper, signal.SIGINT)
    assert terminal.exit_code() == 130
    assert receiver.actions == ["start", "130"]


def test_a_job_learns_of_a_new_size(receiver, terminals):
    job = python("import os, signal, time\nsize = os.get_terminal_size(1)\n"
                 "print('ready', flush=True)\n"
                 "while os.get_terminal_size(1) == size: signal.sigtimedwait([28], 5)\n"
                 "print(os.get_terminal_size(1), '|', flush=True)")
    job = (*job[:2], "import signal; signal.pthread_sigmask(0, [28])\n" + job[2])
    terminal = terminals("--url", receiver.url, *job)
    terminal.read_until(b"ready")
    termios.tcsetwinsize(terminal.ours, (50, 132))
    assert b"columns=132, lines=50" in terminal.read_until(b"|")


def test_a_job_reads_from_the_terminal(receiver, terminals):
    terminal = terminals("--url", receiver.url, *shell("echo name?; read name; echo hello $name."))
    terminal.read_until(b"name?")
    os.write(terminal.ours, b"world\n")
    terminal.read_until(b"hello world.")
    assert terminal.exit_code() == 0


# The real Larm


def signals(process):
    return [row["signal"] for row in process.rows("SELECT signal FROM heartbeats ORDER BY id")]


def test_larm_records_a_run_under_its_made_token(start, tmp_path):
    process = start('[monitors.job]\ninterval = "1d"\n')
    result = run(tmp_path, "job", "--", *shell("echo all well; exit 2"))
    assert (result.returncode, result.stdout, result.stderr) == (2, b"all well\n", b"")
    rows = process.rows("SELECT signal, exit_status, body, rid FROM heartbeats ORDER BY id")
    assert [(row["signal"], row["exit_status"]) for row in rows] == [("start", None), ("fail", 2)]
    assert rows[1]["body"] == "all well\n"
    assert rows[0]["rid"] == rows[1]["rid"]
    (monitor,) = process.get("/api/v1/monitors").json["data"]
    assert monitor["state"] == "down"


def test_a_restart_of_larm_is_waited_for(start, popen):
    process = start(JOB)
    process.stop()
    patient = fast(TRY_AGAIN_AFTER=(0.5,) * 100)  # however long a busy machine takes to start Larm
    running = popen("job", "--", "echo", "ran", program=patient)
    assert running.stdout.readline() == b"ran\n"
    process = start(JOB, port=process.port)
    assert running.wait(40) == 0
    assert running.stderr.read() == b""
    assert signals(process) == ["start", "success"]


# Nothing but Python


def test_it_needs_no_package(start, tmp_path):
    process = start('[monitors.job]\ninterval = "1d"\n[monitors.other]\ninterval = "1d"\n')
    bare = (sys.executable, "-I", "-S")
    probe = subprocess.run([*bare, "-c", "import bottle"], capture_output=True, check=False)
    assert b"ModuleNotFoundError" in probe.stderr
    result = run(tmp_path, "job", "--", "echo", "ran", python=bare)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"ran\n", b"")
    url = process.get("/api/v1/monitors/other").json["data"]["ping_url"]
    shutil.copy(LARM, tmp_path / "copied.py")
    command = [*bare, str(tmp_path / "copied.py"), "run", "--url", url, "true"]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""
    assert signals(process) == ["start", "success"] * 2


def test_a_schedule_elsewhere_needs_no_cronsim(receiver, tmp_path):
    address = receiver.url.removesuffix(f"/api/heartbeat/{TOKEN}")
    text = JOB.replace('interval = "1d"', 'schedule = "0 3 * * *"')
    write_config(tmp_path, f'url = "{address}"\n{text}')
    result = run(tmp_path, "job", "--", "true", python=(sys.executable, "-I", "-S"))
    assert (result.returncode, result.stderr) == (0, b"")
    assert receiver.actions == ["start", "0"]
