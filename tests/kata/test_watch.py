"""`kata watch` in a real terminal (a pty): saves, keys, and nothing left behind."""

import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest

from kata.judge.child import Request
from kata.judge.report import Report
from kata.judge.server import WarmServer

STEM = "ex31_scaled_dot_product_attention"
PASSED, UNWRITTEN = r"attention  passed", r"attention  not written yet"


def as_a_terminal_starts_it():
    """Not as one started by `nohup` or by `&`, which is told to ignore these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """A learner's terminal with `kata watch` in it."""

    def __init__(self, project, *args, before=()):
        self.stub = project / "exercises" / f"{STEM}.py"
        self.screen = ""
        self.master, slave = pty.openpty()
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 90, 0, 0))
        command = [*before, sys.executable, "-m", "kata", "watch", *args]
        self.process = subprocess.Popen(
            command,
            cwd=project,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=as_a_terminal_starts_it,
        )
        os.close(slave)

    def type(self, keys):
        os.write(self.master, keys.encode())

    def save(self, text):
        self.stub.write_text(text)

    def wait_for(self, pattern, seconds=60):
        """Read until the screen shows it; what came before is forgotten."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen)):
            assert time.monotonic() < end, f"no {pattern!r} on the screen:\n{self.screen}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.screen += os.read(self.master, 65536).decode(errors="replace")
                self.screen = re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|\].*?\x1b\\)", "", self.screen)
        self.screen = self.screen[found.end() :]

    def children(self):
        """Every process below this one, by its session or by its parents."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
        parents = dict(map(int, line.split()) for line in listed.splitlines()[1:])
        found = {self.process.pid}
        while more := {p for p, parent in parents.items() if parent in found} - found:
            found |= more
        return found

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        os.close(self.master)


@pytest.fixture
def terminal(project):
    opened = Terminal(project, "31")
    opened.wait_for(UNWRITTEN)
    opened.wait_for("q quit")
    yield opened
    opened.close()


SHELL = """
import os, signal, sys, termios
from fcntl import ioctl

def canonical():
    return bool(termios.tcgetattr(0)[3] & termios.ICANON)

ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = os.fork()
if job == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.argv[1], sys.argv[1:])
while True:
    status = os.waitpid(job, os.WUNTRACED)[1]
    if not os.WIFSTOPPED(status):
        os._exit(os.waitstatus_to_exitcode(status))
    os.tcsetpgrp(0, os.getpgrp())
    print("SHELL: stopped,", "lines" if canonical() else "single keys", flush=True)
    word = sys.stdin.readline().strip()
    if word == "fg":
        os.tcsetpgrp(0, job)
    os.kill(job, signal.SIGCONT)
"""


@pytest.fixture
def shell(project):
    """The same below a shell that has job control and leaves the terminal's modes alone."""
    opened = Terminal(project, "31", before=[sys.executable, "-c", SHELL])
    opened.wait_for(UNWRITTEN)
    opened.wait_for("q quit")
    yield opened
    opened.close()


@pytest.fixture
def solution(project):
    return (project / "solutions" / f"{STEM}.py").read_text()


def test_every_save_brings_a_verdict(terminal, solution):
    terminal.save(solution.replace(" / math.sqrt(q.shape[-1])", ""))
    terminal.wait_for("a known mistake: The scores are not divided")
    terminal.save(solution)
    terminal.wait_for(PASSED)
    terminal.save("def scaled_dot_product_attention(:\n")  # an editor's temporary state
    terminal.wait_for("SyntaxError")
    away = shutil.copy(terminal.stub, terminal.stub.with_suffix(".tmp"))
    shutil.move(away, terminal.stub)  # as editors do that save by renaming
    terminal.type("r")
    terminal.wait_for("SyntaxError")


def test_a_save_during_a_run_cancels_it(terminal, solution):
    terminal.save("import time\ntime.sleep(1000)\n")
    terminal.wait_for("judging")
    terminal.save(solution)
    terminal.wait_for(PASSED, seconds=30)


def test_keys(terminal, solution):
    terminal.type("h")
    terminal.wait_for("Hint 1 of 3")
    terminal.type("d")
    terminal.wait_for("has not passed yet")
    terminal.type("p")
    terminal.wait_for("has no picture")
    terminal.type("l")
    terminal.wait_for("Scale")
    terminal.save(solution + "MINE = 1\n")
    terminal.wait_for(PASSED)
    terminal.type("d")
    terminal.wait_for("-MINE = 1")
    terminal.type("n")
    terminal.wait_for("01 softmax  not written yet")
    terminal.type("q")
    assert terminal.process.wait(10) == 0


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(shell, solution):
    for _ in range(2):
        shell.type("\x1a")
        shell.wait_for("SHELL: stopped, lines")
        shell.type("fg\n")
        shell.wait_for(UNWRITTEN)  # drawn once more, where the shell has written
        shell.wait_for("q quit")
        shell.type("h")  # without a newline
        shell.wait_for(r"Hint \d of 3")
    shell.save(solution)
    shell.wait_for(PASSED)
    shell.type("q")
    assert shell.process.wait(10) == 0


def test_after_ctrl_z_and_bg_the_shell_has_the_keys_and_verdicts_still_come(shell, solution):
    shell.type("\x1a")
    shell.wait_for("SHELL: stopped, lines")
    shell.type("bg\n")
    shell.save(solution)
    shell.wait_for(PASSED)
    shell.type("h\n")  # whoever reads this in the background is stopped
    shell.save("")
    shell.wait_for("nothing is defined")
    assert "SHELL" not in shell.screen and "Hint" not in shell.screen


@pytest.mark.parametrize("how", ["key", "ctrl-c", "hang-up"])
def test_quitting_leaves_no_process_behind(terminal, how):
    while len(children := terminal.children()) < 3:  # the server and its spare
        time.sleep(0.05)
    if how == "key":
        terminal.type("q")
    elif how == "ctrl-c":
        terminal.process.send_signal(signal.SIGINT)
    else:
        terminal.process.send_signal(signal.SIGHUP)
    terminal.process.wait(10)
    end = time.monotonic() + 10
    while left := {pid for pid in children if os.path.exists(f"/proc/{pid}")}:
        assert time.monotonic() < end, f"processes {left} are still there"
        time.sleep(0.05)


def test_a_server_that_dies_is_replaced(terminal, solution):
    listed = subprocess.run(["ps", "-eo", "pid,sid,args"], capture_output=True, text=True).stdout
    servers = [line.split()[:2] for line in listed.splitlines() if "kata.judge.server" in line]
    own = terminal.children()
    (server,) = [int(pid) for pid, session in servers if pid == session and int(pid) in own]
    os.kill(server, signal.SIGKILL)
    terminal.wait_for("starting another")
    terminal.save(solution)
    terminal.wait_for(PASSED)


@pytest.fixture
def server(project):
    opened = WarmServer(Request(str(project), STEM))
    yield opened
    opened.close()


def test_what_failed_is_told_before_the_mistake_has_its_name(server, project, solution):
    (project / "exercises" / f"{STEM}.py").write_text(
        solution.replace(" / math.sqrt(q.shape[-1])", "")
    )
    server.run(Request(str(project), STEM))
    reports = []
    while not reports or reports[-1].naming:
        message = server.receive()
        reports += [message] if isinstance(message, Report) else []
    early, last = reports

    assert early.naming and early.count("failed") and not early.mistakes
    assert not last.naming and last.mistakes == ["The scores are not divided by √head_dim."]
    assert [s.name for s in early.specs] == [s.name for s in last.specs]


def test_specs_that_have_changed_are_read_again(server, project):
    job = Request(str(project), STEM)
    assert server.judge(job).total > 1
    job.exercise.spec.write_text("def test_is_new():\n    pass\n")

    assert [spec.name for spec in server.judge(job).specs] == ["test_is_new"]
