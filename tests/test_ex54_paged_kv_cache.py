"""Specs for exercise 54: a paged cache of keys and values."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.nn.functional.scaled_dot_product_attention"]

N_KV_HEADS, HEAD_DIM = 2, 3


def tokens(rng, n, dtype=torch.float64, head_dim=HEAD_DIM):
    """Keys and values of n tokens."""
    shape = (N_KV_HEADS, n, head_dim)
    return tuple(torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))


# --- run on the code under test ------------------------------------------------------------------


def allocate(ex, n_blocks, steps):
    """A fresh allocator's answers: blocks by the order in which they were first seen."""
    allocator, taken, answers = ex.BlockAllocator(n_blocks), [], []
    for step, *which in steps:
        block = taken[which[0]] if which else None
        try:
            if step == "allocate":
                taken.append(allocator.allocate())
                others = [b for b in taken[:-1] if allocator.n_owners(b) and b == taken[-1]]
                answers.append("given out twice" if others and len(others) > 1 else "block")
            else:
                getattr(allocator, step)(block)
                answers.append(allocator.n_owners(block))
        except (ValueError, MemoryError) as error:
            answers.append(type(error).__name__)
        answers.append(allocator.n_free)
    return answers, taken


def use(ex, n_blocks, block_size, steps, dtype=torch.float64):
    """A cache after some steps: what each sequence holds, and what it costs."""
    cache = ex.PagedKVCache(n_blocks, block_size, N_KV_HEADS, HEAD_DIM, dtype)
    free, address, numbers = cache.allocator.n_free, cache.keys.data_ptr(), []
    refused = []
    for step, *rest in steps:
        if step == "add":
            numbers.append(cache.add())
        elif step == "fork":
            numbers.append(cache.fork(numbers[rest[0]]))
        elif step == "append":
            try:
                cache.append(numbers[rest[0]], *rest[1:])
            except MemoryError:
                refused.append((len(refused), [cache.lengths[n] for n in cache.lengths]))
        elif step == "remove":
            cache.remove(numbers[rest[0]])
    held = {i: cache.gather(n) for i, n in enumerate(numbers) if n in cache.tables}
    return {
        "held": held,
        "lengths": {i: cache.lengths[n] for i, n in enumerate(numbers) if n in cache.lengths},
        "blocks": free - cache.allocator.n_free,
        "refused": refused,
        "moved": cache.keys.data_ptr() != address,
        "again": len(set(numbers)) < len(numbers),
    }


def tables_over_time(ex, n_blocks, block_size, several):
    """The table of one sequence after each append, and whether old tokens stay where they are."""
    cache = ex.PagedKVCache(n_blocks, block_size, N_KV_HEADS, HEAD_DIM, torch.float64)
    number, tables, seen, stays = cache.add(), [], [], True
    for k, v in several:
        cache.append(number, k, v)
        table = list(cache.tables[number])
        tables.append(len(table))
        stays = stays and table[: len(seen)] == seen
        seen = table
    slots = [
        cache.keys[seen[t // block_size], :, t % block_size] for t in range(cache.lengths[number])
    ]
    return tables, stays, torch.stack(slots, dim=1)


def attend(ex, q, keys, values, tables, lengths):
    return ex.paged_attention(q, keys, values, tables, lengths)


def attend_and_differentiate(ex, q, keys, values, tables, lengths, grad):
    q.requires_grad_()
    attend(ex, q, keys, values, tables, lengths).backward(grad)
    return q.grad


def attend_in_turn(ex, *calls):
    return [attend(ex, *call) for call in calls]


def written_and_read(ex, block_size, prompts, q):
    """Sequences of several lengths are written token by token, in turn, and then attended to."""
    n_blocks = sum(math.ceil(k.shape[1] / block_size) for k, _ in prompts)
    cache = ex.PagedKVCache(n_blocks, block_size, N_KV_HEADS, HEAD_DIM, torch.float64)
    numbers = [cache.add() for _ in prompts]
    for t in range(max(k.shape[1] for k, _ in prompts)):
        for number, (k, v) in zip(numbers, prompts, strict=True):
            if t < k.shape[1]:
                cache.append(number, k[:, t : t + 1], v[:, t : t + 1])
    most = max(len(cache.tables[n]) for n in numbers)
    tables = [cache.tables[n] + [0] * (most - len(cache.tables[n])) for n in numbers]
    lengths = torch.tensor([cache.lengths[n] for n in numbers])
    return ex.paged_attention(q, cache.keys, cache.values, torch.tensor(tables), lengths)


# --- the allocator -------------------------------------------------------------------------------


def test_gives_each_block_once_and_complains_when_there_is_none(attempt):
    answers, taken = attempt(allocate, 3, [("allocate",)] * 4)

    assert_close(answers, ["block", 2, "block", 1, "block", 0, "MemoryError", 0])
    assert_close(sorted(taken), [0, 1, 2])


def test_a_block_is_free_after_its_last_owner(attempt):
    steps = [("allocate",), ("share", 0), ("share", 0), ("free", 0), ("free", 0), ("free", 0)]

    answers, taken = attempt(allocate, 1, [*steps, ("allocate",)])

    assert_close(answers, [*["block", 0], 2, 0, 3, 0, 2, 0, 1, 0, 0, 1, *["block", 0]])
    assert_close(taken, [0, 0])


@pytest.mark.parametrize("step", ["free", "share"])
def test_refuses_a_block_that_nobody_has(attempt, step):
    steps = [("allocate",), ("free", 0), (step, 0), ("allocate",), ("allocate",), ("allocate",)]

    answers, _ = attempt(allocate, 2, steps)

    assert_close(answers[2:6], [0, 2, "ValueError", 2])
    assert_close(answers[6:], ["block", 1, "block", 0, "MemoryError", 0])


# --- the cache -----------------------------------------------------------------------------------


def by_lists(block_size, steps):
    """What each sequence holds, from plain concatenation."""
    held = []
    for step, *rest in steps:
        if step == "add":
            held.append([torch.zeros(N_KV_HEADS, 0, HEAD_DIM).double()] * 2)
        elif step == "fork":
            held.append(held[rest[0]])
        elif step == "append":
            held[rest[0]] = [torch.cat(x, dim=1) for x in zip(held[rest[0]], rest[1:], strict=True)]
        else:
            held[rest[0]] = None
    held = {i: tuple(x) for i, x in enumerate(held) if x is not None}
    return {"held": held, "lengths": {i: k.shape[1] for i, (k, _) in held.items()}}


@settings(max_examples=40)
@given(
    block_size=st.integers(1, 4),
    wishes=st.lists(
        st.tuples(st.sampled_from("+aaaafr"), st.integers(0, 3), st.integers(0, 6)), max_size=12
    ),
    seed=st.integers(0, 999),
)
def test_holds_what_was_appended_to_each_sequence(attempt, block_size, wishes, seed):
    rng = torch.Generator().manual_seed(seed)
    steps, alive = [("add",)], [0]
    for kind, which, n in wishes:
        if kind == "+" or not alive:
            steps.append(("add",))
            alive.append(sum(step in ("add", "fork") for step, *_ in steps) - 1)
            continue
        sequence = alive[which % len(alive)]
        if kind == "a":
            steps.append(("append", sequence, *tokens(rng, n)))
        elif kind == "f":
            steps.append(("fork", sequence))
            alive.append(sum(step in ("add", "fork") for step, *_ in steps) - 1)
        else:
            steps.append(("remove", sequence))
            alive.remove(sequence)

    out = attempt(use, 60, block_size, steps)

    expected = by_lists(block_size, steps)
    assert_close({name: out[name] for name in expected}, expected)
    most = sum(math.ceil(length / block_size) for length in expected["lengths"].values())
    assert out["blocks"] <= most, f"{out['blocks']} blocks are in use where {most} are enough"
    assert not out["moved"] and not out["again"], "memory or numbers are taken anew"


def test_takes_a_block_when_it_is_needed_and_moves_no_token(attempt, rng):
    several = [tokens(rng, n) for n in (1, 3, 0, 1, 4, 7)]  # 1, 4, 4, 5, 9, 16 tokens

    sizes, stays, slots = attempt(tables_over_time, 9, 4, several)

    assert_close(sizes, [1, 1, 1, 2, 3, 4])
    assert stays, "a block of earlier tokens is another one than before"
    assert_close(slots, torch.cat([k for k, _ in several], dim=1))


def test_forks_share_their_blocks_and_copy_the_last_one_to_write(attempt, rng):
    prompt, one, two, three = tokens(rng, 6), tokens(rng, 1), tokens(rng, 1), tokens(rng, 3)
    steps = [("add",), ("append", 0, *prompt), ("fork", 0), ("fork", 0)]
    steps.append(("append", 1, *tokens(rng, 0)))

    shared = attempt(use, 9, 4, steps)
    first = attempt(use, 9, 4, [*steps, ("append", 1, *one)])
    all_three = [("append", 1, *one), ("append", 0, *two), ("append", 2, *three)]
    last = attempt(use, 9, 4, [*steps, *all_three])

    # 6 tokens: two blocks. The first writer copies one, the second too; the third has it alone, and
    # its 9 tokens need one more.
    assert_close([x["blocks"] for x in (shared, first, last)], [2, 3, 5])
    assert_close(last["held"], by_lists(4, [*steps, *all_three])["held"])


def test_a_full_last_block_is_shared_and_not_copied(attempt, rng):
    steps = [("add",), ("append", 0, *tokens(rng, 4)), ("fork", 0), ("append", 1, *tokens(rng, 1))]

    out = attempt(use, 9, 4, steps)

    assert_close(out["blocks"], 2)
    assert_close(out["held"], by_lists(4, steps)["held"])


def test_blocks_of_a_removed_sequence_serve_others_and_shared_ones_stay(attempt, rng):
    steps = [("add",), ("append", 0, *tokens(rng, 7)), ("fork", 0), ("remove", 0), ("add",)]
    steps += [
        ("append", 2, *tokens(rng, 8)),
        ("remove", 1),
        ("add",),
        ("append", 3, *tokens(rng, 5)),
    ]

    out = attempt(use, 4, 4, steps)

    assert_close(out["held"], by_lists(4, steps)["held"])
    assert_close([out["blocks"], out["refused"]], [4, []])


@pytest.mark.parametrize("n_new", [6, 9])
def test_refuses_what_has_no_room_and_leaves_all_as_it_was(attempt, rng, n_new):
    steps = [("add",), ("append", 0, *tokens(rng, 3)), ("fork", 0), ("append", 1, *tokens(rng, 1))]
    too_long, fits = ("append", 0, *tokens(rng, n_new)), ("append", 1, *tokens(rng, 3))

    out = attempt(use, 5, 2, [*steps, too_long, fits])

    assert_close(out["refused"], [(0, [3, 4])])
    assert_close([out["blocks"], out["held"]], [5, by_lists(2, [*steps, fits])["held"]])


def test_counts_the_copy_of_a_shared_block_where_there_is_no_room(attempt, rng):
    steps = [("add",), ("append", 0, *tokens(rng, 3)), ("fork", 0)]

    out = attempt(use, 3, 2, [*steps, ("append", 1, *tokens(rng, 2))])

    assert_close(out["refused"], [(0, [3, 3])])
    assert_close([out["blocks"], out["held"]], [2, by_lists(2, steps)["held"]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_its_dtype(attempt, rng, dtype):
    steps = [("add",), ("append", 0, *tokens(rng, 5, dtype))]

    out = attempt(use, 3, 2, steps, dtype)

    assert_close(out["held"], {0: steps[1][2:]})


# --- attention -----------------------------------------------------------------------------------


def paged(
    rng, lengths, block_size, n_heads=4, rest=math.nan, dtype=torch.float64, head_dim=HEAD_DIM
):
    """Sequences in blocks in a random order, with `rest` in all that is nobody's; and in a row."""
    needed = [math.ceil(n / block_size) for n in lengths]
    n_blocks = sum(needed) + 2
    order = torch.randperm(n_blocks, generator=rng).tolist()
    shape = (n_blocks, N_KV_HEADS, block_size, head_dim)
    keys, values = (torch.full(shape, rest, dtype=dtype) for _ in range(2))
    tables = torch.randint(n_blocks, (len(lengths), max(needed) + 1), generator=rng)
    rows = []
    for i, n in enumerate(lengths):
        k, v = tokens(rng, n, dtype, head_dim)
        for j in range(needed[i]):
            tables[i, j] = block = order.pop()
            part = slice(j * block_size, min((j + 1) * block_size, n))
            keys[block, :, : part.stop - part.start] = k[:, part]
            values[block, :, : part.stop - part.start] = v[:, part]
        rows.append((k, v))
    shape = (len(lengths), n_heads, head_dim)
    q = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    return (q, keys, values, tables, torch.tensor(lengths)), rows


def in_rows(q, rows):
    """Each sequence by itself, by torch's own attention on contiguous keys."""
    each = [
        F.scaled_dot_product_attention(query[None, :, None], k[None], v[None], enable_gqa=True)
        for query, (k, v) in zip(q, rows, strict=True)
    ]
    return torch.stack([x[0, :, 0] for x in each])


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("n_heads", [2, 6])
@pytest.mark.parametrize("rest", [math.nan, math.inf, 1e9, -1e9])
def test_looks_at_each_sequences_own_tokens_wherever_they_lie(
    attempt, rng, block_size, n_heads, rest
):
    call, rows = paged(rng, [5, 1, 8, 3, 4], block_size, n_heads, rest)

    out = attempt(attend, *call)

    assert_close(out, in_rows(call[0], rows))


def test_scores_may_be_very_low(attempt, rng):
    (q, keys, values, tables, lengths), rows = paged(rng, [3, 6], 4, rest=1e6)
    q = q.abs() * 1e6
    keys = torch.where(keys == 1e6, keys, -keys.abs())
    rows = [(-k.abs(), v) for k, v in rows]

    out = attempt(attend, q, keys, values, tables, lengths)

    assert_close(out, in_rows(q, rows))


def test_keeps_nothing_from_one_call_to_the_next(attempt, rng):
    several = [
        paged(rng, [2, 5], 2),
        paged(rng, [7], 4, head_dim=8),
        paged(rng, [3, 9, 1], 2, dtype=torch.float32, head_dim=5),
        paged(rng, [3, 9, 1], 2),
    ]

    out = attempt(attend_in_turn, *(call for call, _ in several))

    assert_close(out, [in_rows(call[0], rows) for call, rows in several])


def test_takes_a_q_of_any_layout_and_tables_of_any(attempt, rng):
    (q, keys, values, tables, lengths), rows = paged(rng, [5, 2, 6], 2)
    q, tables = q.mT.contiguous().mT, tables.T.contiguous().T

    out = attempt(attend, q, keys, values, tables, lengths)

    assert_close(out, in_rows(q, rows))


def test_what_is_nobodys_gets_into_no_gradient(attempt, rng):
    call, rows = paged(rng, [5, 1, 6], 4)
    grad = torch.randn(3, 4, HEAD_DIM, generator=rng, dtype=torch.float64)

    out = attempt(attend_and_differentiate, *call, grad)

    q = call[0].clone().requires_grad_()
    in_rows(q, rows).backward(grad)
    assert_close(out, q.grad)


def test_refuses_heads_that_cannot_share_keys_evenly(attempt, rng):
    call, _ = paged(rng, [3, 2], 2, n_heads=3)

    with pytest.raises(ValueError):
        attempt(attend, *call)


@pytest.mark.parametrize("block_size", [2, 16])
def test_sequences_that_grow_in_turn_give_what_contiguous_ones_give(attempt, rng, block_size):
    prompts = [tokens(rng, n) for n in (7, 1, 4)]
    q = torch.randn(3, 4, HEAD_DIM, generator=rng, dtype=torch.float64)

    out = attempt(written_and_read, block_size, prompts, q)

    assert_close(out, in_rows(q, prompts))
