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
        # solution
        if not 1 <= max_batch <= max_tokens:
            raise ValueError(f"1 ≤ max_batch ≤ max_tokens wanted, got {max_batch} and {max_tokens}")
        self.max_batch, self.max_tokens = max_batch, max_tokens
        # Of each request, in the order of their coming: prompt tokens that aren't read yet.
        self.waiting: dict[int, int] = {}
        self.running: dict[int, int] = {}
        self.next_number = 0

    @property
    def busy(self) -> bool:
        # solution
        return bool(self.waiting or self.running)

    def admit(self, n_prompt: int) -> int:
        """Let a request with n_prompt tokens wait for its turn; its number, never given before.

        An n_prompt below 1 raises ValueError: there is nothing to continue.
        """
        # solution
        if n_prompt < 1:
            raise ValueError(f"a prompt has at least 1 token, got {n_prompt}")
        number, self.next_number = self.next_number, self.next_number + 1
        self.waiting[number] = n_prompt
        return number

    def step(self) -> dict[int, int]:
        """Tell how many tokens of each running request are computed now, by its number.

        Free places go to those who wait, first come, first served, and whoever has a place keeps it
        up to `finish`. Each running request gets one token: the next of its prompt, or the one it
        wrote last. What is left of max_tokens goes to prompts that are longer, the earliest first,
        to each as much as it can use. With nobody running the answer is empty.
        """
        # solution
        while self.waiting and len(self.running) < self.max_batch:
            number = next(iter(self.waiting))
            self.running[number] = self.waiting.pop(number)
        spare, shares = self.max_tokens - len(self.running), {}
        for number, left in self.running.items():
            more = min(spare, max(left - 1, 0))
            spare -= more
            shares[number] = 1 + more
            self.running[number] = max(left - 1 - more, 0)
        return shares

    def finish(self, number: int) -> None:
        """End a request that runs or waits; its place is free in the next step.

        A number that neither runs nor waits raises ValueError, with the number.
        """
        # solution
        for requests in (self.running, self.waiting):
            if number in requests:
                del requests[number]
                return
        raise ValueError(f"request {number} neither runs nor waits")


@dataclass
class _Sequence:
    """A request on its way: its prompt and what it has written, and what its layers remember."""

    ids: list[int]
    end: int  # how long it may get
    caches: list[KVCache] | None = None  # None while it waits

    @property
    def n_read(self) -> int:
        return self.caches[0].length


def _new_caches(model: Llama, max_len: int) -> list[KVCache]:
    config, weight = model.config, model.token_embd.weight
    room = (1, config.n_kv_heads, max_len, config.head_dim)
    return [KVCache(*room, weight.dtype, weight.device) for _ in model.blk]


def _forward(model: Llama, running: list[_Sequence], shares: list[int]) -> Tensor:
    """Let everybody's next tokens pass the model in one row.

    returns: (n, vocab_size), scores after the last token of those who are read to their end by it
    """
    config = model.config
    device = model.token_embd.weight.device
    chunks = [s.ids[s.n_read : s.n_read + n] for s, n in zip(running, shares, strict=True)]
    frequencies = rope_frequencies(config.head_dim, config.rope_theta).to(device)
    row = [token for chunk in chunks for token in chunk]
    x = model.token_embd(torch.tensor(row, device=device))  # (n_tokens, d_model)
    for layer, block in enumerate(model.blk):
        h = block.attn_norm(x)
        q, k, v = block.attn_q(h), block.attn_k(h), block.attn_v(h)
        # (n_tokens, n · head_dim) -> (1, n, n_tokens, head_dim), and then each request's part
        q, k, v = (y.unflatten(-1, (-1, config.head_dim)).transpose(0, 1)[None] for y in (q, k, v))
        parts = zip(running, *(y.split(shares, dim=2) for y in (q, k, v)), strict=True)
        heads = [attend_with_cache(*qkv, s.caches[layer], frequencies) for s, *qkv in parts]
        x = x + block.attn_output(torch.cat(heads, dim=2)[0].transpose(0, 1).flatten(1))

        h = block.ffn_norm(x)
        x = x + block.ffn_down(F.silu(block.ffn_gate(h)) * block.ffn_up(h))

    ends = torch.tensor(shares).cumsum(0) - 1
    wanted = [e for e, s in zip(ends.tolist(), running, strict=True) if s.n_read == len(s.ids)]
    head = model.token_embd if config.tied else model.output
    return F.linear(model.output_norm(x[wanted]), head.weight)


class Engine:
    """Requests come at any time, and all of them are continued together, a step at a time.

    busy: whether anybody runs or waits
    """

    def __init__(
        self, model: Llama, max_batch: int, max_tokens: int, eos: int | None = None
    ) -> None:
        """Serve a model, with a Scheduler's limits. A text ends before the token eos, if given."""
        # solution
        self.model, self.eos = model, eos
        self.scheduler = Scheduler(max_batch, max_tokens)
        self.sequences: dict[int, _Sequence] = {}

    @property
    def busy(self) -> bool:
        # solution
        return self.scheduler.busy

    def admit(self, request: Request) -> int:
        """Let a request wait for its turn; its number, never given before.

        A prompt that isn't (n_prompt,) int64, is empty, or has an id outside of the vocabulary, and
        a max_new_tokens below 1, raise ValueError, and the others go on as if nothing had been: one
        bad request must not end everybody's step. The prompt may change afterwards.
        """
        # solution
        prompt, n_new = request.prompt, request.max_new_tokens
        if prompt.dim() != 1 or prompt.dtype != torch.int64 or len(prompt) == 0:
            raise ValueError(f"a prompt is (n_prompt,) int64, got {prompt.shape}, {prompt.dtype}")
        if prompt.min() < 0 or prompt.max() >= self.model.config.vocab_size:
            raise ValueError(f"the prompt has ids from {prompt.min()} to {prompt.max()}")
        if n_new < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {n_new}")
        number = self.scheduler.admit(len(prompt))
        self.sequences[number] = _Sequence(prompt.tolist(), len(prompt) + n_new)
        return number

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
        # solution
        shares = self.scheduler.step()
        if not shares:
            return {}, []
        running = {number: self.sequences[number] for number in shares}
        for sequence in running.values():
            if sequence.caches is None:
                sequence.caches = _new_caches(self.model, sequence.end - 1)  # the last isn't read
        with torch.inference_mode():
            scores = _forward(self.model, list(running.values()), list(shares.values()))

        likeliest = iter(scores.argmax(dim=-1).tolist())
        new, ended = {}, []
        for number, sequence in running.items():
            if sequence.n_read < len(sequence.ids):
                continue
            token = next(likeliest)
            if token != self.eos:
                new[number] = token
                sequence.ids.append(token)
            if token == self.eos or len(sequence.ids) == sequence.end:
                ended.append(number)
                self.scheduler.finish(number)
                del self.sequences[number]
        return new, ended


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
    # solution
    engine = Engine(model, max_batch, max_tokens, eos)
    texts: dict[int, list[int]] = {engine.admit(request): [] for request in requests}
    while engine.busy:
        new, _ = engine.step()
        for number, token in new.items():
            texts[number].append(token)
    return [torch.tensor(text, dtype=torch.int64) for text in texts.values()]
