"""Specs for exercise 28: batches of data."""

import json
import math
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

WITHOUT = ["torch.utils.data.DistributedSampler", "torch.utils.data.DataLoader"]


def batch_of(ex, data, block_size, batch_size, seed):
    return ex.get_batch(data, block_size, batch_size, torch.Generator().manual_seed(seed))


def starts(ex, n_windows, batch_size, seed, n_batches):
    """Where the windows of many batches begin, (n_batches, batch_size), all from one generator."""
    generator, data = torch.Generator().manual_seed(seed), torch.arange(n_windows + 2)
    batches = [ex.get_batch(data, 2, batch_size, generator) for _ in range(n_batches)]
    return torch.stack([x[:, 0] for x, _ in batches])


def two_batches(ex, data, seed, global_seed):
    """Two, one after the other, and whether the global generator is as before."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(global_seed)
    before = torch.get_rng_state()
    batches = [ex.get_batch(data, 5, 20, generator) for _ in range(2)]
    return {"batches": batches, "untouched": torch.equal(before, torch.get_rng_state())}


def windows(ex, text, block_size):
    """What a for loop gets out of a dataset, which ends in time."""
    dataset = ex.CharDataset(text, block_size)
    items = list(islice(dataset, len(text) + 9))
    x, y = (torch.stack(part) for part in zip(*items, strict=True))
    return {"chars": dataset.chars, "len": len(dataset), "x": x, "y": y}


def window(ex, text, block_size, i):
    return ex.CharDataset(text, block_size)[i]


def sorting(ex, digits):
    return ex.sorting_examples(digits)


def loader_of(ex, n, batch_size, rank=0, world_size=1, seed=0):
    """Of n items: x is its number, y two numbers that follow from it."""
    items = [(torch.tensor(i), torch.tensor([10 * i, -i])) for i in range(n)]
    return ex.ShardedLoader(items, batch_size, rank, world_size, seed)


def read(ex, n, batch_size, world_size, seed, n_batches):
    """The first batches of each rank: x (world_size, n_batches, batch_size), and y."""
    loaders = [loader_of(ex, n, batch_size, rank, world_size, seed) for rank in range(world_size)]
    batches = [[next(iter(loader)) for _ in range(n_batches)] for loader in loaders]
    return [torch.stack([torch.stack([b[i] for b in own]) for own in batches]) for i in (0, 1)]


def read_amid_other_draws(ex, n, seed, global_seed):
    """Ten batches, and whether the global generator is as before."""
    torch.manual_seed(global_seed)
    before = torch.get_rng_state()
    loader = loader_of(ex, n, 5, seed=seed)
    batches = [x for x, _ in islice(loader, 10)]
    return {"batches": batches, "untouched": torch.equal(before, torch.get_rng_state())}


def orders(ex, n, seeds):
    """The order of the first epoch for each seed."""
    return [[int(x) for x, _ in islice(loader_of(ex, n, 1, seed=seed), n)] for seed in seeds]


def first_epochs(ex, n, seeds):
    """The order of the first epoch for each seed, (seeds, n), of one large dataset."""
    items = [(torch.tensor(i), torch.tensor(0)) for i in range(n)]
    return torch.stack([next(ex.ShardedLoader(items, n, seed=seed))[0] for seed in seeds])


def stop_and_go_on(ex, n, batch_size, world_size, seed, before, lost, after):
    """Take the state of rank 0, lose some batches, and go on with new loaders on all ranks."""
    first = loader_of(ex, n, batch_size, 0, world_size, seed)
    for _ in range(before):
        next(first)
    state = first.state_dict()
    for _ in range(lost):
        next(first)
    written = json.dumps(state)
    batches = []
    for rank in range(world_size):
        loader = loader_of(ex, n, batch_size, rank, world_size, seed)
        for _ in range(lost):  # a state that must not count any more
            next(loader)
        loader.load_state_dict(json.loads(written))
        batches.append(torch.stack([x for x, _ in islice(loader, after)]))
    whole = all(type(value) is int for value in state.values())
    return {"batches": torch.stack(batches), "small": whole and len(state) < 9}


# --- statistics ----------------------------------------------------------------------------------

DELTA = 1e-9  # the chance that a right version fails one of these checks, at most


def check_equally_often(counts, n_kinds):
    """Bernstein: of n draws, a count of mean n·p is off by more with probability DELTA at most."""
    n, p, x = sum(counts.values()), 1 / n_kinds, math.log(2 * n_kinds / DELTA)
    bound = x / 3 + math.sqrt(x**2 / 9 + 2 * x * n * p * (1 - p))
    assert len(counts) <= n_kinds, f"there are {n_kinds} possibilities, got {dict(counts)}"
    seen = sorted([0] * (n_kinds - len(counts)) + list(counts.values()))
    assert n * p - bound <= seen[0] and seen[-1] <= n * p + bound, (
        f"{n_kinds} possibilities should come about {n * p:.0f} times each, got {dict(counts)}"
    )


def check_sum(name, observed, mean, variance):
    """Bernstein, for a sum of independent numbers between 0 and 1."""
    x = math.log(2 / DELTA)
    bound = x / 3 + math.sqrt(x**2 / 9 + 2 * x * variance)
    assert abs(observed - mean) <= bound, (
        f"{name}: should be {mean:.0f} ± {bound:.0f} in all, got {observed}"
    )


# --- get_batch -----------------------------------------------------------------------------------


def test_makes_the_next_token_the_target_of_each(attempt, rng):
    data = torch.randperm(100_000, generator=rng)[:57]  # all different, so each window is known
    block_size, batch_size = 6, 40

    x, y = attempt(batch_of, data, block_size, batch_size, 3)

    start = torch.stack([(data == token).nonzero()[0, 0] for token in x[:, 0]])
    place = start[:, None] + torch.arange(block_size)
    assert place.max() + 1 < len(data), f"the windows begin at {start.tolist()}, which is too late"
    assert_close((x, y), (data[place], data[place + 1]))


@pytest.mark.parametrize("n_windows", [1, 2, 5])
def test_draws_each_window_equally_often(attempt, n_windows):
    block_size, batch_size = 4, 1500
    data = torch.arange(block_size + n_windows)

    x, _ = attempt(batch_of, data, block_size, batch_size, 11)

    check_equally_often(Counter(x[:, 0].tolist()), n_windows)


def test_draws_each_window_independently_of_all_others(attempt):
    drawn = attempt(starts, 3, 2, 7, 1600)

    # Within a batch, and from one batch to the next: each pair of windows comes equally often.
    check_equally_often(Counter(map(tuple, drawn.tolist())), 9)
    check_equally_often(Counter(map(tuple, drawn[:, 0].view(-1, 2).tolist())), 9)


def test_draws_three_windows_independently(attempt):
    drawn = attempt(starts, 3, 3, 8, 1200)

    check_equally_often(Counter(map(tuple, drawn.tolist())), 27)


def test_takes_data_that_is_not_contiguous(attempt, rng):
    data = torch.randint(100, (40, 2), generator=rng)[:, 1]

    out = attempt(batch_of, data, 5, 3, 7)

    assert_close(out, attempt(batch_of, data.contiguous(), 5, 3, 7))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_gives_int64_of_data_that_is_stored_in_less(attempt, rng, dtype):
    data = torch.randint(100, (30,), generator=rng)

    out = attempt(batch_of, data.to(dtype), 5, 3, 7)

    assert_close(out, attempt(batch_of, data, 5, 3, 7))
    assert_close(out[0].new_zeros(()), torch.tensor(0))


def test_draws_from_the_given_generator_alone(attempt):
    data = torch.arange(5000)

    one, again, other = (attempt(two_batches, data, *seeds) for seeds in ((1, 1), (1, 2), (2, 1)))

    assert_close(one, again)
    assert one["untouched"], "torch's global generator must stay as it is"
    first, second = (batch[0] for batch in one["batches"])
    assert not torch.equal(first, second), "the second batch is the first once more"
    assert not torch.equal(first, other["batches"][0][0]), "two seeds give the same batch"


@pytest.mark.parametrize(("n", "block_size"), [(6, 6), (4, 9), (0, 5)])
def test_rejects_data_that_hold_no_window_with_its_targets(attempt, n, block_size):
    with pytest.raises(ValueError, match=rf"\b{n}\b"):
        attempt(batch_of, torch.arange(n), block_size, 2, 0)


# --- CharDataset ---------------------------------------------------------------------------------


@given(
    text=st.lists(st.sampled_from("abBé \n日Z"), min_size=2, max_size=15).map("".join),
    size=st.integers(0, 99),
)
@settings(max_examples=15)
def test_holds_every_window_of_the_text(attempt, text, size):
    block_size = 1 + size % (len(text) - 1)

    out = attempt(windows, text, block_size)

    chars = sorted(set(text))
    tokens = [chars.index(char) for char in text]
    n = len(text) - block_size
    x = torch.tensor([tokens[i : i + block_size] for i in range(n)])
    y = torch.tensor([tokens[i + 1 : i + 1 + block_size] for i in range(n)])
    assert_close(out, {"chars": chars, "len": n, "x": x, "y": y})


@pytest.mark.parametrize("i", [-1, -7, 7, 99])
def test_refuses_a_window_that_is_not_there(attempt, i):
    with pytest.raises(IndexError, match=str(i)):
        attempt(window, "abcdefghij", 3, i)


# --- sorting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length"), [(4, 6), (3, 2), (2, 1)])
def test_teaches_the_sorted_digits_and_none_of_those_before(attempt, rng, batch, length):
    digits = torch.randint(10, (batch, length), generator=rng)
    digits[0] = torch.tensor([9, 0])[torch.arange(length) % 2]

    out = attempt(sorting, digits)

    rows = [row + sorted(row) for row in digits.tolist()]
    x = torch.tensor([row[:-1] for row in rows])
    y = torch.tensor([[-100] * (length - 1) + row[length:] for row in rows])
    assert_close(out, (x, y))


# --- ShardedLoader -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size"), [(24, 2, 3), (7, 7, 1), (12, 1, 4)], ids=["3", "1", "4"]
)
def test_gives_each_item_to_one_rank_once_in_an_epoch(attempt, n, batch_size, world_size):
    steps = n // (batch_size * world_size)

    x, y = attempt(read, n, batch_size, world_size, 5, 2 * steps)

    for epoch in (0, 1):
        own = x[:, epoch * steps : (epoch + 1) * steps]
        assert_close(own.flatten().sort().values, torch.arange(n))
    assert_close(y, torch.stack([10 * x, -x], dim=-1))


def test_leaves_out_what_does_not_fill_a_step_of_all_ranks(attempt):
    n, batch_size, world_size, steps = 29, 4, 2, 3

    x, _ = attempt(read, n, batch_size, world_size, 5, 12 * steps)

    epochs = x.unflatten(1, (12, steps)).transpose(0, 1).flatten(1)  # (epoch, what it holds)
    for epoch in epochs:
        assert_close(len(epoch.unique()), world_size * batch_size * steps)
    # Each sits out with probability 5/29: all twelve times with 1e-9.
    assert_close(epochs.unique(), torch.arange(n))


def test_draws_a_new_order_and_new_shards_for_each_epoch(attempt):
    n, batch_size, world_size, steps = 48, 4, 2, 6

    x, _ = attempt(read, n, batch_size, world_size, 5, 3 * steps)

    # One order in 48! and one shard in 32 247 603 683 100 is the same by chance.
    epochs = x.unflatten(1, (3, steps)).transpose(0, 1)  # (epoch, rank, step, batch)
    shards = epochs[:, 0].flatten(1).sort().values
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(epochs[a], epochs[b]), f"epochs {a} and {b} have the same order"
        assert not torch.equal(shards[a], shards[b]), f"rank 0 has its items of epoch {a} in {b}"


def test_repeats_an_order_for_the_same_seed_alone(attempt):
    one, again, other = (
        attempt(read_amid_other_draws, 40, *seeds) for seeds in ((1, 1), (1, 2), (7, 1))
    )

    assert_close(one, again)
    assert one["untouched"], "torch's global generator must stay as it is"
    assert not torch.equal(one["batches"][0], other["batches"][0]), "two seeds give one order"


def test_draws_every_order_equally_often(attempt):
    # Far apart, lest the epochs of two seeds could have anything to do with each other.
    seeds = [1009 * i for i in range(600)]

    out = attempt(orders, 3, seeds)

    check_equally_often(Counter(map(tuple, out)), 6)


def test_brings_no_item_to_one_place_more_often_than_to_another(attempt):
    n, n_orders = 100, 200

    orders = attempt(first_epochs, n, [1009 * i for i in range(n_orders)])

    # How often an item stands before its own place, and how often a larger one precedes a smaller.
    # Both are Eulerian numbers: sums of independent ones and zeros, mean (n − 1)/2, variance
    # (n + 1)/12. Swapping each place with any place gives 3 more of the first in every order.
    assert_close(orders.sort(dim=1).values, torch.arange(n).expand(n_orders, n))
    moments = n_orders * (n - 1) / 2, n_orders * (n + 1) / 12
    check_sum("items before their place", int((orders > torch.arange(n)).sum()), *moments)
    check_sum("falls", int((orders[:, :-1] > orders[:, 1:]).sum()), *moments)


@given(
    world_size=st.integers(1, 3),
    batch_size=st.integers(1, 3),
    n_more=st.integers(0, 20),
    before=st.integers(0, 12),
    lost=st.integers(0, 4),
    seed=st.integers(0, 999),
)
@settings(max_examples=15)
@example(world_size=2, batch_size=3, n_more=13, before=3, lost=0, seed=1)  # an epoch's very end
@example(world_size=3, batch_size=2, n_more=12, before=3, lost=1, seed=2)
@example(world_size=1, batch_size=1, n_more=1, before=0, lost=4, seed=0)
def test_goes_on_where_it_was_stopped(attempt, world_size, batch_size, n_more, before, lost, seed):
    n = world_size * batch_size + n_more

    out = attempt(stop_and_go_on, n, batch_size, world_size, seed, before, lost, 6)

    x, _ = attempt(read, n, batch_size, world_size, seed, before + 6)
    assert_close(out, {"batches": x[:, before:], "small": True})


def test_rejects_a_dataset_too_small_for_all_ranks(attempt):
    with pytest.raises(ValueError, match="11"):
        attempt(read, 11, 4, 3, 0, 1)
