"""Exercise 55: continuous batching.

A decode step reads all weights to write one token, and hardly takes longer for eight texts at once.
But texts begin and end at different times. A static batch waits for its longest, and pads what is
shorter. Here the batch is chosen anew in each step: who has ended leaves, and who waits takes the
place. All tokens of a step stand in one row, since norms, projections and the feed-forward treat
each token by itself; only attention looks at each text apart, with its own cache:

    x: (n_tokens, d_model), n_tokens = Σ n_i          n_i tokens of request i, no padding
    steps = the longest request's, not the sum        where all of them fit into a batch

A long prompt would hold up everybody, so it is read in chunks, with what is left of a step's
tokens after each running request has had one.

Source: Yu et al. 2022, "Orca", section 3 (iteration-level scheduling, selective batching),
    https://www.usenix.org/conference/osdi22/presentation/yu; Agrawal et al. 2024, "Sarathi-Serve",
    section 4 (chunked prefills, stall-free batching), https://arxiv.org/abs/2403.02310
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ex40_rope import rope_frequencies
from ex43_kv_cache import KVCache, attend_with_cache
from ex44_llama import Llama


@dataclass(frozen=True)
class Request:
    """A text to be continued. (This one is written for you.)

    prompt:         (n_prompt,) int64, at least one token, each from 0 to vocab_size − 1
    max_new_tokens: how many tokens may follow, at least 1
    """

    prompt: Tensor
    max_new_tokens: int


class Scheduler:
    """Who gets how many tokens in each step. It knows lengths only, no model and no text.

    busy: whether anybody runs or waits
    """

    def __init__(self, max_batch: int, max_tokens: int) -> None:
        """Let at most max_batch requests run at once, with at most max_tokens tokens a step.

        max_batch is at least 1, and max_tokens at least max_batch, else ValueError: somebody who
        runs would get nothing.
        """
        raise NotImplementedError("exercise 55 is not written yet")

    @property
    def busy(self) -> bool:
        raise NotImplementedError("exercise 55 is not written yet")

    def admit(self, n_prompt: int) -> int:
        """Let a request with n_prompt tokens wait for its turn; its number, never given before.

        An n_prompt below 1 raises ValueError: there is nothing to continue.
        """
        raise NotImplementedError("exercise 55 is not written yet")

    def step(self) -> dict[int, int]:
        """Tell how many tokens of each running request are computed now, by its number.

        Free places go to those who wait, first come, first served, and whoever has a place keeps it
        up to `finish`. Each running request gets one token: the next of its prompt, or the one it
        wrote last. What is left of max_tokens goes to prompts that are longer, the earliest first,
        to each as much as it can use. With nobody running the answer is empty.
        """
        raise NotImplementedError("exercise 55 is not written yet")

    def finish(self, number: int) -> None:
        """End a request that runs or waits; its place is free in the next step.

        A number that neither runs nor waits raises ValueError, with the number.
        """
        raise NotImplementedError("exercise 55 is not written yet")


class Engine:
    """Requests come at any time, and all of them are continued together, a step at a time.

    busy: whether anybody runs or waits
    """

    def __init__(
        self, model: Llama, max_batch: int, max_tokens: int, eos: int | None = None
    ) -> None:
        """Serve a model, with a Scheduler's limits. A text ends before the token eos, if given."""
        raise NotImplementedError("exercise 55 is not written yet")

    @property
    def busy(self) -> bool:
        raise NotImplementedError("exercise 55 is not written yet")

    def admit(self, request: Request) -> int:
        """Let a request wait for its turn; its number, never given before.

        A prompt that isn't (n_prompt,) int64, is empty, or has an id outside of the vocabulary, and
        a max_new_tokens below 1, raise ValueError, and the others go on as if nothing had been: one
        bad request must not end everybody's step. The prompt may change afterwards.
        """
        raise NotImplementedError("exercise 55 is not written yet")

    def step(self) -> tuple[dict[int, int], list[int]]:
        """Compute one step of the scheduler for everybody who runs, and choose likeliest tokens.

        returns: the new token of each request that got one, by number; and the numbers of those
                 that ended. A request gets one in the step that reads the end of its prompt, and
                 in each one after that. It ends with its max_new_tokens-th token, or where eos
                 would be the next, which isn't given; and it is forgotten.

        It costs one pass through the model: each weight of a layer is multiplied once, with just
        the tokens that the scheduler tells, and the head only with those that a new token follows.
        No gradient is recorded. Who waits or has ended holds no keys and values. With nobody
        running nothing is computed.
        """
        raise NotImplementedError("exercise 55 is not written yet")


def run(
    model: Llama,
    requests: list[Request],
    max_batch: int,
    max_tokens: int,
    eos: int | None = None,
) -> list[Tensor]:
    """Continue all requests, by one Engine that gets them in this order.

    returns: for each request in its place what follows its prompt, (n_new,) int64, n_new from 0 to
             its max_new_tokens: what exercise 44's generate gives for it alone, up to eos
    """
    raise NotImplementedError("exercise 55 is not written yet")
