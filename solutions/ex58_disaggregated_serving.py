"""Exercise 58: disaggregated serving.

To read a prompt is one large call that keeps a processor busy; to write is many small ones that
wait for memory. On one machine each long prompt makes all texts that are being written wait. So
some ranks only read (prefill) and others only write (decode). What a prompt left in the cache is
sent from one to the other, once:

    bytes of a request = 2 · n_layers · n_kv_heads · head_dim · n_prompt · bytes of a number

    TTFT   time to the first token: the queue, the prefill; the transfer is not in it
    TPOT   time per output token: one round over the requests that a decode rank has in flight

Source: Zhong et al. 2024, "DistServe", sections 3 and 4, https://arxiv.org/abs/2401.09670; Patel
    et al. 2024, "Splitwise", section IV, https://arxiv.org/abs/2311.18677
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ex43_kv_cache import KVCache
from ex44_llama import Llama

Request = tuple[Tensor, int]  # a prompt, (n_prompt,) int64, and n_new, how many tokens to write


def send_cache(caches: Sequence[KVCache], to: int) -> dist.Work:
    """Send the keys and values of all layers to another rank, in one message, without waiting.

    caches:  one for each layer, equally long; the memory of each is cache.keys and cache.values,
             (batch, n_kv_heads, max_len, head_dim), of which the first `length` tokens are used
    to:      the rank that receives, as dist.get_rank() numbers it
    returns: the handle; who sends keeps it until its wait() is over

    The message is (n_layers, 2, batch, n_kv_heads, length, head_dim): for each layer keys, then
    values, of the tokens that are there, in the dtype of the caches. They are copied, so the
    caches may take other tokens at once.
    """
    # solution
    length = caches[0].length
    layers = [
        torch.stack((cache.keys[:, :, :length], cache.values[:, :, :length])) for cache in caches
    ]
    return dist.isend(torch.stack(layers), to)


def receive_cache(model: Llama, length: int, max_len: int, source: int) -> list[KVCache]:
    """Wait for the message of a `send_cache` with one sequence, and fill caches from it.

    model:   tells the sizes, and by its weights the dtype and the device
    length:  how many tokens come
    max_len: how many tokens the caches have room for, at least length
    source:  the rank that sends
    returns: one cache for each layer, with `length` tokens
    """
    # solution
    config, weight = model.config, model.token_embd.weight
    sizes = (config.n_kv_heads, length, config.head_dim)
    message = torch.empty(config.n_layers, 2, 1, *sizes, dtype=weight.dtype, device=weight.device)
    dist.recv(message, source)
    caches = _new_caches(model, max_len)
    for cache, (k, v) in zip(caches, message, strict=True):
        cache.append(k, v)
    return caches


def prefill_worker(model: Llama, requests: Sequence[Request], receivers: Sequence[int]) -> None:
    """Read prompts in turn, and send each one's first token and cache to the rank that goes on.

    requests:  this rank's, in the order in which they are read
    receivers: for each request the rank that decodes it

    Each request makes two messages, in this order: the token that follows the prompt (the
    likeliest), as (1,) int64, and the cache of all tokens of the prompt. No send waits for its
    receiver before all prompts are read; at the end all are waited for. Each prompt passes
    through the layers once, in one call, and only its last token is scored. No gradient is
    recorded. A rank that is gone raises RuntimeError, whose message gives its number.
    """
    # solution
    sends = []
    with torch.inference_mode():
        for (prompt, _), to in zip(requests, receivers, strict=True):
            caches = _new_caches(model, len(prompt))
            first = model(prompt[None], caches, last_only=True)[0, -1].argmax(-1, keepdim=True)
            with _naming(to):
                sends += [(to, dist.isend(first, to)), (to, send_cache(caches, to))]
    for to, send in sends:
        with _naming(to):
            send.wait()


def decode_worker(
    model: Llama, requests: Sequence[Request], senders: Sequence[int], n_slots: int
) -> list[Tensor]:
    """Receive requests whose prompts others have read, and write their texts a token each in turn.

    requests: this rank's, in the order in which they are received
    senders:  for each request the rank that prefills it, and sends what `prefill_worker` does
    n_slots:  the most requests in flight, at least 1
    returns:  for each request its prompt and the n_new tokens after it, (n_prompt + n_new,) int64,
              each the likeliest, as in a run in one process

    In a round each request in flight gets one more token. Whoever has all of its tokens leaves
    after the round, and a slot that is free is given to the next request before the next round,
    if need be by waiting for it. A request that wants one token is done when it arrives. No
    more than n_slots + 1 requests have caches here at any time. The tokens of a prompt, and the
    last one of a text, don't pass through the layers here. No gradient is recorded. A rank that
    is gone before it has sent a request raises RuntimeError, whose message gives its number.
    """
    # solution
    texts = [prompt for prompt, _ in requests]
    lengths = [len(prompt) + n_new for prompt, n_new in requests]
    coming = deque(range(len(requests)))
    in_flight: list[tuple[int, list[KVCache]]] = []
    with torch.inference_mode():
        while coming or in_flight:
            while coming and len(in_flight) < n_slots:
                i = coming.popleft()
                prompt, source = requests[i][0], senders[i]
                first = torch.empty(1, dtype=torch.int64, device=prompt.device)
                with _naming(source):
                    dist.recv(first, source)
                    # The last token of the text needs no place.
                    caches = receive_cache(model, len(prompt), lengths[i] - 1, source)
                texts[i] = torch.cat((prompt, first))
                if len(texts[i]) < lengths[i]:
                    in_flight.append((i, caches))
            for i, caches in in_flight:
                # The cache ends before the newest token: that one goes in next.
                logits = model(texts[i][None, -1:], caches, last_only=True)[0, -1]
                texts[i] = torch.cat((texts[i], logits.argmax(-1, keepdim=True)))
            in_flight = [(i, caches) for i, caches in in_flight if len(texts[i]) < lengths[i]]
    return texts


def serve(
    model: Llama,
    requests: Sequence[Request],
    n_prefill: int,
    n_slots: int = 4,
    group: dist.ProcessGroup | None = None,
) -> dict[int, Tensor]:
    """Answer requests on several ranks; called on each of them with the same arguments.

    model:     the whole model, the same on every rank
    n_prefill: how many ranks of the group prefill, its first ones; all others decode
    n_slots:   the most requests in flight on a decode rank
    group:     the ranks that serve; None stands for all ranks
    returns:   on a decode rank the texts that it wrote, by the number of the request: prompt and
               n_new tokens; on a prefill rank {}

    Request i is read by prefill rank i mod n_prefill, and written by decode rank i mod n_decode,
    each counted among their kind. All take their requests in the order of their numbers. A rank
    that is gone: see the workers.

    ValueError on every rank, before anything is sent: n_prefill that leaves no rank to prefill or
    none to decode, with both numbers; n_slots below 1; a request with an empty prompt or with
    n_new below 1, with its number.
    """
    # solution
    ranks = dist.get_process_group_ranks(group)
    if not 1 <= n_prefill < len(ranks):
        raise ValueError(f"of {len(ranks)} ranks some prefill and some decode, got {n_prefill=}")
    if n_slots < 1:
        raise ValueError(f"n_slots must be at least 1, got {n_slots}")
    for i, (prompt, n_new) in enumerate(requests):
        if len(prompt) < 1 or n_new < 1:
            raise ValueError(f"request {i} has {len(prompt)} tokens and wants {n_new}: both ≥ 1")

    n_decode, numbers = len(ranks) - n_prefill, range(len(requests))
    senders = [ranks[i % n_prefill] for i in numbers]
    receivers = [ranks[n_prefill + i % n_decode] for i in numbers]
    me = dist.get_rank()
    mine = [i for i in numbers if me in (senders[i], receivers[i])]
    own = [requests[i] for i in mine]
    if me in ranks[:n_prefill]:
        prefill_worker(model, own, [receivers[i] for i in mine])
        return {}
    texts = decode_worker(model, own, [senders[i] for i in mine], n_slots)
    return dict(zip(mine, texts, strict=True))


def _new_caches(model: Llama, max_len: int) -> list[KVCache]:
    config, weight = model.config, model.token_embd.weight
    room = (1, config.n_kv_heads, max_len, config.head_dim)
    return [KVCache(*room, weight.dtype, weight.device) for _ in model.blk]


@contextmanager
def _naming(rank: int) -> Iterator[None]:
    """Say which rank is gone, where the connection only tells a port."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"rank {rank} is gone: {error}") from error
