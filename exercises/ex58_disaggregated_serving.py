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
    raise NotImplementedError("exercise 58 is not written yet")


def receive_cache(model: Llama, length: int, max_len: int, source: int) -> list[KVCache]:
    """Wait for the message of a `send_cache` with one sequence, and fill caches from it.

    model:   tells the sizes, and by its weights the dtype and the device
    length:  how many tokens come
    max_len: how many tokens the caches have room for, at least length
    source:  the rank that sends
    returns: one cache for each layer, with `length` tokens
    """
    raise NotImplementedError("exercise 58 is not written yet")


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
    raise NotImplementedError("exercise 58 is not written yet")


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
    raise NotImplementedError("exercise 58 is not written yet")


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
    raise NotImplementedError("exercise 58 is not written yet")
