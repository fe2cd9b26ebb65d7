"""The job wrapper as a user has it: real jobs, real signals, a real terminal, a real Larm."""

import atexit
import contextlib
import os
import py_compile
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import ROOT, TOKEN, free_port, wait_until, write_config

import larm

SOURCE = str(ROOT / "larm.py")
COMPILED = tempfile.mkdtemp()  # for it is started some seventy times
atexit.register(shutil.rmtree, COMPILED)
LARM = [sys.executable, str(py_compile.compile(SOURCE, f"{COMPILED}/larm.pyc", doraise=True))]
BARE = [sys.executable, "-I", "-S"]  # nothing but Python: no package is found
JOB = f'[monitors.job]\ninterval = "1d"\ntoken = "{TOKEN}"\n'
AWAY = f"http://127.0.0.1:{free_port()}/api/heartbeat/{TOKEN}"
LONG = "trap : USR1; echo up; while :; do sleep 0.05; done"  # a job that says when it is ready
WITHIN = 20  # seconds that anything here may take


def fast(change="", **constants):
    """larm.py with shorter times than users have, or with another change made to it."""
    constants = {"TRY_AGAIN_AFTER": (0.05, 0.05)} | constants
    code = f"import sys; sys.path.insert(0, {COMPILED!r}); import larm, os, threading; {change}\n" \
           f"vars(larm).update({constants!r}); sys.exit(larm.main(sys.argv[1:]))"
    return [sys.executable, "-c", code]


class Receiver:
    """A real HTTP server that keeps what it gets. `answers`: the statuses of the next answers, or
    "hang"; 200 after that.
    """

    def __init__(self, answers, headers):
        self.answers = list(answers)
        self.got = []  # (path, query, body) of each request, in the order in which they came
        self.at = []  # time.monotonic() of each
        self.agents = set()
        self.closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                parts = urlsplit(self.path)
                receiver.got.append((parts.path, parse_qs(parts.query), body))
                receiver.at.append(time.monotonic())
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
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.address}/api/heartbeat/{TOKEN}"

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


@pytest.fixture(autouse=True)
def signals(monkeypatch):
    """What is started here heeds signals, however the suite was started; LARM_URL is not set."""
    numbers = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    monkeypatch.delenv("LARM_URL", raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module", autouse=True)
def unhurried():
    """Runs with the times that users have, nothing shortened; the other tests go on meanwhile."""
    unwell, hanging, well = Receiver([503, 503], ()), Receiver(["hang"] * 6, ()), Receiver((), ())
    jobs = {
        "quiet": (well, "sleep 300 & exit 1"),
        "noisy": (well, "while echo x; do sleep 0.2; done & exit 2"),
        "waiting": (unwell, "exit 0"),
        "hurried": (hanging, "echo $$; exit 3"),
    }
    started, ended = [], {}

    def follow(name, receiver, job):
        began = time.monotonic()
        process = subprocess.Popen(
            [*LARM, "run", "--url", receiver.url, *shell(job)], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )
        started.append(process)
        if name == "hurried":
            pid = int(process.stdout.readline())
            wait_until(lambda: gone(pid))
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
        process.wait()
        ended[name] = process.returncode, time.monotonic() - began, process.stderr.read()
        process.stdout.close()
        process.stderr.close()

    threads = [threading.Thread(target=follow, args=(name, *job)) for name, job in jobs.items()]
    for thread in threads:
        thread.start()
    yield threads, ended, unwell, well
    for process in started:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(WITHIN)
    for receiver in (unwell, hanging, well):
        receiver.close()


@pytest.fixture
def popen(tmp_path):
    """popen(*words): a `larm.py run` in its own session, with pipes; killed at the test's end."""
    started = []

    def build(*words, program=LARM, **more):
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        more = {"stdin": subprocess.DEVNULL, "start_new_session": True} | pipes | more
        started.append(subprocess.Popen([*program, "run", *words], cwd=tmp_path, **more))
        return started[-1]

    yield build
    for process in started:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(WITHIN)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def run(folder, *words, program=LARM, before=(), input=b"", **environ):
    """`larm.py [before] run words` to its end: exit code, stdout and stderr in bytes."""
    return subprocess.run(
        [*program, *before, "run", *words], cwd=folder, env={**os.environ, **environ},
        input=input, capture_output=True, timeout=WITHIN, check=False,
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
    assert TOKEN not in lines[0]


# What Larm is told


def test_start_comes_first_then_the_exit_status_with_a_rid_of_this_run(receiver, tmp_path):
    for _ in range(2):
        result = run(tmp_path, "--url", receiver.url, *shell("echo out; exit 3"))
        assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"")
    assert receiver.actions == ["start", "3"] * 2
    first, second, other, _ = (query["rid"][0] for _, query, _ in receiver.got)
    assert first == second != other
    assert re.fullmatch(r"[0-9a-f]{16}", first)
    assert receiver.agents == {f"larm.py run/{larm.__version__}"}


def test_stdout_and_stderr_are_sent_in_the_order_in_which_they_came(receiver, tmp_path):
    job = python("import os, time\nfor n in range(6):\n"
                 "    os.write(1 + n % 2, b'%d' % n); time.sleep(0.05)")
    result = run(tmp_path, "--url", receiver.url, *job)
    assert (result.stdout, result.stderr) == (b"024", b"135")
    assert receiver.body == b"012345"


def test_the_last_10000_bytes_are_sent(receiver, tmp_path):
    job = python("import os\nfor n in range(100_000): os.write(1, b'%06d\\n' % n)")
    result = run(tmp_path, "--url", receiver.url, *job)
    expected = b"".join(b"%06d\n" % n for n in range(100_000))
    assert result.stdout == expected
    assert receiver.body == expected[-10_000:]


@pytest.mark.parametrize(("command", "status", "why"), [
    ("no-such-command", 127, "No such file or directory"), ("./notes", 126, "Permission denied"),
])
def test_a_command_that_cant_be_started_is_a_failure(command, status, why, receiver, tmp_path):
    (tmp_path / "notes").write_text("no program")
    result = run(tmp_path, "--url", receiver.url, command, "-x")
    assert result.returncode == status
    only_complaint(result, f"{command}: {why}")
    assert receiver.actions == ["start", str(status)]
    assert receiver.body == result.stderr


def test_a_script_without_a_first_line_runs_as_in_a_shell(receiver, tmp_path):
    (tmp_path / "job").write_text('echo "$0 $1"\n')
    (tmp_path / "job").chmod(0o755)
    result = run(tmp_path, "--url", receiver.url, "./job", "a b")
    assert (result.returncode, result.stdout) == (0, b"./job a b\n")


# What to run and what to report to


@pytest.mark.parametrize(("words", "key", "command"), [
    (["job", "true", "-c", "x"], "job", ["true", "-c", "x"]),
    (["job", "--", "true"], "job", ["true"]),
    (["Job", "--", "true"], "Job", ["true"]),  # said plainly: the job runs, and the typo is told
    (["--", "job", "true"], None, ["job", "true"]),
    (["rsync", "-a", "x", "y"], "rsync", ["rsync", "-a", "x", "y"]),
    (["./job", "-x"], "./job", ["./job", "-x"]),
    (["job"], "job", []), (["job", "--"], "job", []), (["--"], None, []), ([], None, []),
])
def test_the_first_word_is_a_key_where_larm_toml_has_that_monitor(words, key, command, tmp_path):
    path = write_config(tmp_path, JOB)
    assert larm.split_words(words, None, path) == (None, key, command)
    assert larm.split_words(words, "URL", path) == ("URL", None, words[words[:1] == ["--"]:])


def test_where_larm_url_is_set_all_the_words_are_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("LARM_URL", "URL")
    path = write_config(tmp_path, JOB)
    for words in (["job", "true"], ["echo", "job", "--", "x"]):
        assert larm.split_words(words, None, path) == ("URL", None, words)
    assert larm.split_words(["job", "--", "true"], None, path) == (None, "job", ["true"])


@pytest.mark.parametrize(("text", "known"), [
    ('[monitors]\njob = {interval = "1d"}\n', True), ('monitors.job.interval = "1d"\n', True),
    (JOB + 'note = "half', True),  # somebody edits it: the job runs all the same
    ('[monitors.other]\nname = "job"\n', False), ('monitors = "job"\n', False), ("", False),
    ("[monitors.jobs]\nnot = toml = at all", False), (None, False),
])
def test_a_larm_toml_of_any_shape_and_state_tells_keys_from_commands(text, known, tmp_path):
    path = tmp_path / "larm.toml" if text is None else write_config(tmp_path, text)
    assert larm.split_words(["job", "x"], None, path)[2] == (["x"] if known else ["job", "x"])


def test_a_command_runs_whose_larm_url_is_lost(tmp_path):
    write_config(tmp_path, JOB)
    for words in (["printf", "%s.", "-a", "x"], ["--", "printf", "%s.", "-a", "x"]):
        result = run(tmp_path, *words, LARM_URL="")
        assert (result.returncode, result.stdout) == (0, b"-a.x.")
        only_complaint(result, "LARM_URL" if words[0] == "--" else 'no monitor "printf"')


def test_the_job_runs_where_larm_toml_cant_be_read(tmp_path):
    (tmp_path / "bad.toml").write_text("not = toml = at all")
    for path in (tmp_path / "bad.toml", tmp_path):
        result = run(tmp_path, "job", "--", "echo", "ran", before=("-c", str(path)))
        assert (result.returncode, result.stdout) == (0, b"ran\n")
        only_complaint(result, str(path))


def test_the_job_runs_in_a_folder_that_is_gone(tmp_path):
    line = f"mkdir gone && cd gone && rmdir ../gone && {shlex.join(LARM)} run echo ran"
    result = subprocess.run(shell(line), cwd=tmp_path, capture_output=True, timeout=WITHIN,
                            check=False)
    assert (result.returncode, result.stdout) == (0, b"ran\n")
    only_complaint(result, "not reported")


@pytest.mark.parametrize("ending", ["", "/", "?x=1", "/?x=1", "//#x", "\n"])
def test_what_follows_the_token_in_a_url_is_left_out(ending):
    url = f"https://nas.lan/larm/api/heartbeat/{TOKEN}"
    assert larm.find_ping_url(url + ending, None, Path()) == url


@pytest.mark.parametrize(("url", "key", "file", "complaint"), [
    ("nas.lan", None, "larm.toml", "must look like http://"),
    ("", None, "larm.toml", "must look like http://"),
    (f"http://x y/{TOKEN}", None, "larm.toml", "must look like http://"),
    (f"ftp://nas.lan/{TOKEN}", None, "larm.toml", "must look like http://"),
    (f"http://me:{TOKEN}@nas.lan/x", None, "larm.toml", "must look like http://"),
    (None, None, "larm.toml", "name a monitor"),
    (None, "Job", "larm.toml", 'no monitor "Job"; did you mean job?'),
    (None, "new", "larm.toml", "larm.db: no such file; start Larm once"),
    (None, "job", "other.toml", "other.toml: no such file"),
    (None, "env", "larm.toml", "monitors.env.token: ${JOB_TOKEN} is not set"),
])
def test_a_mistake_is_named(url, key, file, complaint, tmp_path):
    write_config(tmp_path, JOB + '[monitors.new]\ninterval = "1d"\n'
                                 '[monitors.env]\ninterval = "1d"\ntoken = "${JOB_TOKEN}"\n')
    with pytest.raises(larm.Unreported, match=re.escape(complaint)) as error:
        larm.find_ping_url(url, key, tmp_path / file)
    assert TOKEN not in str(error.value)


def test_mistakes_elsewhere_in_the_file_keep_no_ping_away(receiver, tmp_path):
    text = JOB.replace('interval = "1d"', 'schedule = "0 3 * * *"').replace(TOKEN, "${JOB_TOKEN}")
    write_config(tmp_path, f'keep = "x"\nschedul = 1\nurl = "{receiver.address}"\n{text}'
                           '[channels]\nphone = "${UNSET}"\n[monitors.other]\ninterval = "soon"\n')
    result = run(tmp_path, "job", "true", program=[*BARE, LARM[1]], JOB_TOKEN=TOKEN)
    assert (result.returncode, result.stderr) == (0, b"")
    assert receiver.actions == ["start", "0"]


def test_the_file_beside_larm_py_serves_where_there_is_none_here(receiver, tmp_path):
    write_config(tmp_path, f'url = "{receiver.address}"\n{JOB}')
    copied = shutil.copy(SOURCE, tmp_path)
    (tmp_path / "home").mkdir()
    result = run(tmp_path / "home", "job", "true", program=[sys.executable, copied])
    assert (result.returncode, result.stderr) == (0, b"")
    assert receiver.actions == ["start", "0"]


def test_the_options_of_the_job_reach_it_unchanged(receiver, tmp_path):
    words = ["-c", "x", "--json", "--url", "y", "--help", "--version", "--", "-h", "--c", ""]
    job = python("import sys; print(sys.argv[1:])")
    result = run(tmp_path, "--url", receiver.url, *job, *words)
    assert result.stdout.decode() == f"{words}\n"


@pytest.mark.parametrize("words", [["job", "--"], ["--nonsense", "true"]])
def test_without_a_command_it_is_unusable(words, tmp_path):
    result = run(tmp_path, *words)
    assert result.returncode == 2
    assert re.fullmatch(rb"larm\.py.*; see larm\.py.*--help\n", result.stderr)


# A Larm that can't be reached


def test_a_larm_that_cant_be_reached_is_one_line_and_no_failure(tmp_path):
    result = run(tmp_path, "--url", AWAY, *shell("echo ran; exit 7"), program=fast())
    assert (result.returncode, result.stdout) == (7, b"ran\n")
    only_complaint(result, "start and end not reported: Connection refused")


def test_each_ping_is_tried_three_times(receivers, tmp_path):
    receiver = receivers(500, 503, 200, 404, 302, 200)
    result = run(tmp_path, "--url", receiver.url, "true", program=fast())
    assert (result.returncode, result.stderr) == (0, b"")
    assert receiver.actions == ["start"] * 3 + ["0"] * 3
    receiver = receivers(500, 500, 500)
    result = run(tmp_path, "--url", receiver.url, "true", program=fast())
    assert result.returncode == 0
    only_complaint(result, "start not reported: HTTP status 500")
    assert receiver.actions == ["start"] * 3 + ["0"]


def test_retry_after_is_heeded_up_to_a_limit(receivers, tmp_path):
    receiver = receivers(503, 503, headers=[("Retry-After", "3600")])
    program = fast(TRY_AGAIN_AFTER=(60, 60), TRY_WITHIN=0.3)
    result = run(tmp_path, "--url", receiver.url, "true", program=program)
    assert (result.returncode, result.stderr) == (0, b"")
    assert receiver.actions == ["start"] * 3 + ["0"]
    assert receiver.at[2] - receiver.at[0] >= 0.6


def test_a_larm_that_hangs_holds_up_neither_job_nor_exit_for_long(receivers, popen):
    receiver = receivers(*["hang"] * 6)
    job = shell("echo ran; read go; exit 4")
    program = fast(TRY_WITHIN=0.1)
    process = popen("--url", receiver.url, *job, program=program, stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"ran\n"
    wait_until(lambda: receiver.actions == ["start"])
    _, complaint = process.communicate(b"\n", WITHIN)
    assert process.returncode == 4
    assert complaint == b"larm.py run: start and end not reported: no answer within 0.1 s\n"


def test_reporting_has_an_end_whatever_happens(receivers, tmp_path):
    receiver = receivers(*["hang"] * 6)
    program = fast(TRY_WITHIN=60, REPORT_WITHIN=0.3)
    result = run(tmp_path, "--url", receiver.url, *shell("exit 4"), program=program)
    assert result.returncode == 4
    only_complaint(result, "not reported: Larm has not answered in time")


# The job comes first


def limited(name, number):
    """Starts a command with that limit set."""
    code = f"import os, resource, sys; resource.setrlimit({name}, ({number}, {number})); " \
           "os.execv(sys.argv[1], sys.argv[1:])"
    return [*BARE, "-c", code]


@pytest.mark.parametrize("change", [
    "threading.Thread.start = lambda _: exec('raise RuntimeError(\"no thread\")')",
    "os.posix_spawnp = lambda *_, **__: exec('raise OSError(11, \"no process\")')",
])
def test_what_cant_be_watched_runs_as_it_would_without_larm(change, tmp_path):
    job = ["grep", "-ahs", "-e", "^Sig[BI]", "-e", "LARM_URL", "/proc/self/status",
           "/proc/self/environ", "/no/such"]
    alone = subprocess.run(job, capture_output=True, timeout=WITHIN, check=False)
    result = run(tmp_path, *job, program=fast(change), LARM_URL=AWAY)
    assert (result.returncode, result.stdout) == (2, alone.stdout)
    only_complaint(result, "not reported: no ")


def test_what_cant_be_watched_and_is_not_found_has_the_status_127(tmp_path):
    program = fast("os.pipe = lambda: exec('raise OSError(24, \"no file\")')")
    result = run(tmp_path, "no-such-command", program=program, LARM_URL=AWAY)
    assert result.returncode == 127
    complaint, why = result.stderr.splitlines()
    assert complaint == b"larm.py run: not reported: no file"
    assert b"no-such-command" in why


@pytest.mark.parametrize("files", [5, 6, 8])
def test_with_hardly_a_file_to_open_the_job_runs(files, receiver, tmp_path):
    program = [*limited("resource.RLIMIT_NOFILE", files), *BARE, LARM[1]]
    result = run(tmp_path, "--url", receiver.url, *shell("echo ran; exit 7"), program=program)
    assert (result.returncode, result.stdout) == (7, b"ran\n")
    if receiver.actions != ["start", "7"]:
        only_complaint(result, "not reported: Too many open files")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("processes", [1, 3, 4])
def test_with_hardly_a_process_to_start_the_job_runs(processes, receiver):
    for bare in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        if all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(bare).parents):
            break
    if not os.path.exists(bare):
        pytest.skip("needs a Python that everybody may run")
    user = 61_000 + os.getpid() % 1_000 * 4 + processes  # of whom no other process runs
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        copied = shutil.copy(SOURCE, folder)
        job = ["-S", copied, "run", "--url", receiver.url, *shell("echo ran; exit 7")]
        code = limited("resource.RLIMIT_NPROC", processes)[-1]
        result = subprocess.run(
            [bare, "-c", code, bare, *job], user=user, group=user, extra_groups=[], cwd=folder,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=WITHIN, check=False,
        )
    assert (result.returncode, result.stdout) == (7, b"ran\n")
    if processes == 4:  # Larm's own, its two threads and the job
        assert (result.stderr, receiver.actions) == (b"", ["start", "7"])
    else:
        only_complaint(result, "not reported: ")


# Streams


def test_every_byte_passes_unchanged(receiver, tmp_path):
    data = bytes(range(256))
    job = python("import os, sys; os.write(1, sys.stdin.buffer.read()); "
                 "os.write(2, bytes(range(256))[::-1])")
    result = run(tmp_path, "--url", receiver.url, *job, input=data)
    assert (result.stdout, result.stderr) == (data, data[::-1])


def test_output_comes_as_it_is_printed(receiver, popen):
    process = popen("--url", receiver.url, *shell("printf 10%%; read x; printf 20%%"),
                    stdin=subprocess.PIPE)
    assert os.read(process.stdout.fileno(), 100) == b"10%"
    assert process.communicate(b"go on\n", WITHIN) == (b"20%", b"")
    assert process.returncode == 0


def test_a_file_for_both_streams_keeps_their_order(receiver, popen, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        text = "for n in 1 2 3 4 5 6 7 8 9; do echo out $n; echo err $n >&2; done"
        popen("--url", receiver.url, *shell(text), stdout=log, stderr=log).wait(WITHIN)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == [f"{name} {n}" for n in range(1, 10) for name in ("out", "err")]


def test_other_open_files_are_the_jobs_too(receiver, popen):
    read, write = os.pipe()
    job = python(f"import os; os.write({write}, b'hi')")
    assert popen("--url", receiver.url, *job, pass_fds=[write]).wait(WITHIN) == 0
    os.close(write)
    with open(read, "rb") as pipe:
        assert pipe.read() == b"hi"


def test_a_reader_that_has_had_enough_ends_the_job_as_ever(receiver, popen):
    process = popen("--url", receiver.url, "yes")
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(WITHIN) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    assert receiver.actions == ["start", "141"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cant_be_written_is_a_failure(receiver, popen):
    with open("/dev/full", "wb") as full:
        process = popen("--url", receiver.url, "echo", "precious", stdout=full)
        assert process.wait(WITHIN) == 1
    assert b"could not be written: No space left" in process.stderr.read()
    assert (receiver.actions, receiver.body[:9]) == (["start", "1"], b"precious\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(closed, receiver, tmp_path):
    words = [*LARM, "run", "--url", receiver.url, *shell("echo out; exit 6")]
    result = subprocess.run(shell(f"{shlex.join(words)} {closed}"), cwd=tmp_path, timeout=WITHIN,
                            capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (6, b"")
    assert (receiver.actions, receiver.body) == (["start", "6"], b"out\n")


@pytest.mark.parametrize("blocking", [True, False])
def test_a_slow_reader_gets_everything(blocking, receiver, popen):
    read, write = os.pipe()
    os.set_blocking(write, blocking)
    process = popen("--url", receiver.url, *python("print('x' * 300_000)"), stdout=write)
    os.close(write)
    got = 0
    while part := os.read(read, 20_000):
        got += len(part)
        time.sleep(0.04)
    os.close(read)
    assert got == 300_001
    assert process.wait(WITHIN) == 0


def test_a_child_that_prints_a_little_later_is_still_heard(receiver, tmp_path):
    result = run(tmp_path, "--url", receiver.url, *shell("(sleep 0.2; echo late) & echo early"))
    assert result.stdout == receiver.body == b"early\nlate\n"


def test_a_child_that_prints_without_end_does_not_hold_up_the_exit(receiver, popen):
    process = popen("--url", receiver.url, *shell("yes &"), program=fast(CHATTER=0.2))
    end = time.monotonic() + WITHIN
    while os.read(process.stdout.fileno(), 8_000) and time.monotonic() < end:
        time.sleep(0.005)  # so that there is always something to pass on
    assert process.wait(WITHIN) == 0
    assert time.monotonic() < end
    assert receiver.actions == ["start", "0"]


def test_what_the_job_printed_is_passed_on_however_long_the_reader_takes(receiver, terminals):
    job = python("print('x' * 60_000 + '.')")
    terminal = terminals("--url", receiver.url, *job, program=fast(CHATTER=0.05))
    time.sleep(0.3)
    while b"rc=" not in terminal.printed:
        terminal.printed += os.read(terminal.ours, 4_000)
        time.sleep(0.03)
    assert terminal.printed.startswith(b"x" * 60_000 + b".\r\nrc=")


def test_a_reader_that_is_stuck_does_not_hold_up_a_job_that_is_killed(receiver, popen):
    process = popen("--url", receiver.url, "yes", program=fast(CHATTER=0.1, HURRY=0.2))
    wait_until(lambda: select.select([process.stdout], [], [], 0)[0])
    process.send_signal(signal.SIGTERM)
    assert process.wait(WITHIN) == 143
    assert receiver.actions == ["start", "143"]


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_to_the_job_which_dies_of_it(number, receiver, popen):
    process = popen("--url", receiver.url, *shell("echo up; exec sleep 60"))
    assert process.stdout.readline() == b"up\n"
    wait_until(lambda: receiver.actions == ["start"])  # told while the job runs
    process.send_signal(number)
    assert process.wait(WITHIN) == 128 + number
    assert process.stderr.read() == b""
    assert receiver.actions == ["start", str(128 + number)]


def test_a_job_may_end_in_its_own_way_at_a_signal(receiver, popen):
    process = popen("--url", receiver.url, *shell(f"trap 'echo bye; exit 9' TERM; {LONG}"))
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=WITHIN) == (b"bye\n", b"")
    assert process.returncode == 9
    assert (receiver.actions, receiver.body) == (["start", "9"], b"up\nbye\n")


def test_a_signal_that_is_ignored_stays_ignored(receiver, tmp_path):
    job = python("import os, signal, time\nprint(signal.getsignal(1) == signal.SIG_IGN)\n"
                 "signal.signal(1, lambda *_: print('heard'))\n"
                 "os.kill(os.getppid(), 1); time.sleep(0.2)")
    line = f"trap '' HUP; {shlex.join([*LARM, 'run', '--url', receiver.url, *job])}"
    result = subprocess.run(shell(line), capture_output=True, cwd=tmp_path, timeout=WITHIN,
                            check=False)
    assert (result.returncode, result.stdout) == (0, b"True\n")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_the_job_has_no_signal_blocked_or_ignored(receiver, tmp_path):
    status = run(tmp_path, "--url", receiver.url, "grep", "^Sig[BI]", "/proc/self/status").stdout
    bits = {line.split()[0]: int(line.split()[1], 16) for line in status.splitlines()}
    assert bits[b"SigBlk:"] == 0
    assert bits[b"SigIgn:"] & 0x7FFF_FFFF == 0  # above are those that the C library keeps


# Secrets


def test_neither_the_job_nor_the_process_list_has_the_token(receivers, tmp_path):
    by_url, by_key = receivers(), receivers()
    write_config(tmp_path, f'url = "{by_key.address}"\n{JOB}')
    for words in (["--"], ["job", "--"]):  # a KEY that is named wins over LARM_URL
        job = shell("ps -eo args; env")
        result = run(tmp_path, *words, *job, LARM_URL=by_url.url, OTHER="kept")
        assert b" run " in result.stdout
        assert b"OTHER=kept\n" in result.stdout
        assert TOKEN.encode() not in result.stdout
    assert by_url.actions == by_key.actions == ["start", "0"]


# Terminals


class Terminal:
    """A terminal with `larm.py run` as its foreground job, as a shell would start it."""

    def __init__(self, folder, *words, redirect="", size=(30, 100), program=LARM):
        self.printed = b""
        line = f"{shlex.join([*program, 'run', *words])} {redirect}; echo rc=$?."
        self.ours, theirs = os.openpty()
        termios.tcsetwinsize(self.ours, size)
        own = "import fcntl, os, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" \
              "os.execvp('sh', ['sh', '-c', sys.argv[1]])"  # pty.fork() may lock up beside threads
        self.popen = subprocess.Popen(
            [*BARE, "-c", own, f"trap : INT; {line}"], cwd=folder,
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )
        os.close(theirs)

    def read_until(self, pattern):
        end = time.monotonic() + WITHIN
        while not (found := re.search(pattern, self.printed)):
            assert time.monotonic() < end, self.printed
            if select.select([self.ours], [], [], 0.1)[0]:
                self.printed += os.read(self.ours, 65_536)
        return found

    def exit_code(self):
        return int(self.read_until(rb"rc=(\d+)\.\r\n")[1])

    def close(self):
        with contextlib.suppress(OSError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        os.close(self.ours)
        self.popen.wait(WITHIN)


@pytest.fixture
def terminals(tmp_path):
    built = []

    def build(*words, **more):
        built.append(Terminal(tmp_path, *words, **more))
        return built[-1]

    yield build
    for one in built:
        one.close()


def test_only_what_is_a_terminal_is_one_for_the_job_and_of_its_size(receiver, terminals, tmp_path):
    job = python("import os\nos.write(1, b'%r|' % [os.isatty(n) for n in range(3)])\n"
                 "print(os.get_terminal_size(1 if os.isatty(1) else 2))")
    terminal = terminals("--url", receiver.url, *job)
    terminal.read_until(rb"\[True, True, True\]\|os.terminal_size\(columns=100, lines=30\)")
    terminals("--url", receiver.url, *job, redirect="2>err").read_until(rb"\[True, True, False\]")
    terminal = terminals("--url", receiver.url, *job, redirect=">out")
    assert terminal.exit_code() == 0
    assert (tmp_path / "out").read_bytes().startswith(b"[True, False, True]|")


def test_a_terminal_gets_the_bytes_that_it_would_get_without(receiver, terminals):
    job = python("print('10%', end='\\r'); print('20%\\033[0m\\tdone'); print('x' * 300_000)")
    terminal = terminals("--url", receiver.url, *job)
    assert terminal.exit_code() == 0
    expected = b"10%\r20%\033[0m\tdone\r\n" + b"x" * 300_000 + b"\r\nrc=0.\r\n"
    assert terminal.printed == expected
    assert receiver.body == b"x" * 9_999 + b"\n"


def test_ctrl_c_is_not_passed_on_for_the_job_has_had_it(receiver, terminals, tmp_path):
    job = python("import os, signal, time\nos.setpgid(0, 0)\n"  # but this one has not
                 "signal.signal(2, lambda *_: print('heard'))\n"
                 "print('ready', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\n")
    terminal = terminals("--url", receiver.url, *job)
    terminal.read_until(b"ready")
    os.write(terminal.ours, b"\x03")
    terminal.read_until(rb"\^C")
    time.sleep(0.2)
    (tmp_path / "go").touch()
    assert terminal.exit_code() == 0
    assert b"heard" not in terminal.printed
    assert receiver.actions == ["start", "0"]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="can't tell who sent a signal")
@pytest.mark.parametrize("typed", [True, False])
def test_on_a_terminal_a_job_dies_of_ctrl_c_and_of_a_sigint_by_another(typed, receiver, terminals):
    terminal = terminals("--url", receiver.url, *shell("echo run=$PPID.; exec sleep 60"))
    wrapper = int(terminal.read_until(rb"run=(\d+)\.\r\n")[1])
    os.write(terminal.ours, b"\x03") if typed else os.kill(wrapper, signal.SIGINT)
    assert terminal.exit_code() == 130
    assert b"Traceback" not in terminal.printed
    assert receiver.actions == ["start", "130"]


def test_a_job_reads_from_the_terminal_and_learns_of_its_new_size(receiver, terminals):
    job = python("import os, signal\nsignal.pthread_sigmask(0, [28])\n"
                 "print('hello', input('name?'), os.getppid(), '.', flush=True)\n"
                 "while os.get_terminal_size(1).lines == 30: signal.sigtimedwait([28], 60)\n"
                 "print(os.get_terminal_size(1), flush=True)")
    terminal = terminals("--url", receiver.url, *job)
    terminal.read_until(rb"name\?")
    os.write(terminal.ours, b"world\n")
    wrapper = int(terminal.read_until(rb"hello world (\d+) \.")[1])
    os.kill(wrapper, signal.SIGSTOP)  # the job is told first, when the size is not there yet
    termios.tcsetwinsize(terminal.ours, (50, 132))
    time.sleep(0.1)
    os.kill(wrapper, signal.SIGCONT)
    terminal.read_until(b"columns=132, lines=50")
    assert terminal.exit_code() == 0


# The real Larm


def heartbeats(process, key):
    return process.get(f"/api/v1/monitors/{key}/heartbeats").json["data"][::-1]


def test_larm_records_a_run_by_nothing_but_python(start, tmp_path):
    process = start('[monitors.job]\ninterval = "1d"\n[monitors.other]\ninterval = "1d"\n')
    probe = subprocess.run([*BARE, "-c", "import bottle"], capture_output=True, timeout=WITHIN,
                           check=False)
    assert b"ModuleNotFoundError" in probe.stderr
    result = run(tmp_path, "job", *shell("echo all well; exit 2"), program=[*BARE, LARM[1]])
    assert (result.returncode, result.stdout, result.stderr) == (2, b"all well\n", b"")
    first, last = heartbeats(process, "job")
    assert (first["signal"], last["signal"], last["exit_status"]) == ("start", "fail", 2)
    assert (last["body"], last["rid"]) == ("all well\n", first["rid"])
    other = process.get("/api/v1/monitors/other").json["data"]
    copied = shutil.copy(SOURCE, tmp_path / "copied.py")
    result = run(tmp_path, "--url", other["ping_url"], "true", program=[*BARE, copied])
    assert (result.returncode, result.stderr) == (0, b"")
    assert [beat["signal"] for beat in heartbeats(process, "other")] == ["start", "success"]


def test_a_restart_of_larm_is_waited_for(start, popen):
    process = start(JOB)
    process.stop()
    patient = fast(TRY_AGAIN_AFTER=(0.3,) * 100)  # however long a busy machine takes to start Larm
    running = popen("job", "--", "echo", "ran", program=patient)
    assert running.stdout.readline() == b"ran\n"
    process = start(JOB, port=process.port)
    assert running.wait(40) == 0
    assert running.stderr.read() == b""
    assert [beat["signal"] for beat in heartbeats(process, "job")] == ["start", "success"]


# The times, as they are


def test_the_times_that_users_have(unhurried):
    threads, ended, unwell, well = unhurried
    for thread in threads:
        thread.join(WITHIN)
    status, seconds, said = ended["quiet"]  # a child that holds the output holds no exit,
    assert (status, said) == (1, b"")
    assert 1 <= seconds < 4.5
    status, seconds, said = ended["noisy"]  # nor does one that prints on
    assert (status, said) == (2, b"")
    assert 5 <= seconds < 8.5
    status, seconds, said = ended["hurried"]  # from the signal on
    assert (status, said.count(b"\n"), b"not reported" in said) == (3, 1, True)
    assert 1.9 <= seconds < 4.5
    assert ended["waiting"][0] == 0
    first, second, third, _ = unwell.at
    assert 1 <= second - first < 4
    assert 5 <= third - second < 8
    assert sorted(well.actions) == ["1", "2", "start", "start"]
    assert 2 * (3 * larm.TRY_WITHIN + sum(larm.TRY_AGAIN_AFTER)) <= larm.REPORT_WITHIN <= 75
