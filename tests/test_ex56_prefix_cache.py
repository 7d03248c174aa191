"""Specs for exercise 56: a prefix cache."""

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kata.testing import assert_close

pytestmark = pytest.mark.cpu


# --- run on the code under test ------------------------------------------------------------------


def hashes(ex, texts, block_size):
    """The hashes of several texts as small numbers: equal ones have one number."""
    found = [ex.block_hashes(ids, block_size) for ids in texts]
    numbers = {}
    return [[numbers.setdefault(name, len(numbers)) for name in text] for text in found]


def raw_hashes(ex, ids, block_size):
    return ex.block_hashes(ids, block_size)


def use(ex, n_blocks, block_size, steps):
    """A cache's answers to some steps. What was matched has a number, by which it is released."""
    cache, held, answers = ex.PrefixCache(n_blocks, block_size), [], []
    names = {}  # the hash of a block to its prefix, as a text
    for step, *rest in steps:
        if step == "match":
            found, data = cache.match(rest[0])
            held.append(found)
            answers.append(data)
        elif step == "release":
            cache.release(held[rest[0]])
            answers.append("released")
        elif step == "insert":
            ids, data = rest
            for i, name in enumerate(ex.block_hashes(ids, block_size), 1):
                names[name] = shown(ids[: i * block_size])
            answers.append(cache.insert(ids, data))
        elif step == "evict":
            answers.append([names[name] for name in cache.evict(rest[0])])
        answers.append(len(cache))
    return answers


def shown(ids):
    return "".join(map(str, ids))


def try_to_use(ex, n_blocks, block_size, steps, wrong):
    """Whether the last step is refused, and what the cache answers then."""
    cache = ex.PrefixCache(n_blocks, block_size)
    held = []
    for step, *rest in steps:
        out = getattr(cache, step)(*rest)
        held = out[0] if step == "match" else held
    try:
        cache.release(held * 2) if wrong == "release" else cache.insert(*wrong)
        refused = ""
    except ValueError:
        refused = "ValueError"
    return refused, len(cache), [len(cache.evict(1)) for _ in range(3)]


OTHERS = ["never here", "here and free", "evicted"]


def release_together_with(ex, other):
    """Let go two held blocks, together with one that nobody holds; what can be evicted then."""
    cache = ex.PrefixCache(8, 2)
    cache.insert([3, 3], ["c"])
    name = ex.block_hashes([3, 3], 2)[0]
    if other == "evicted":
        cache.release(cache.match([3, 3, 0])[0])
        cache.evict(1)
    if other == "never here":
        name = ex.block_hashes([7, 7], 2)[0]
    cache.insert([1, 1, 2, 2], ["a", "b"])
    held, _ = cache.match([1, 1, 2, 2, 9])
    try:
        cache.release([*held, name])
    except ValueError:
        return "ValueError", len(cache.evict(9))
    return "", len(cache.evict(9))


def release_at_once(ex, ids, times):
    """What can be evicted while a text is held some times, and after one release of all of it."""
    cache = ex.PrefixCache(8, 2)
    cache.insert(ids, list(ids[::2]))
    names = [name for _ in range(times) for name in cache.match([*ids, 0])[0]]
    return [len(cache.evict(9)), cache.release(names), len(cache.evict(9))]


def keep_objects(ex):
    """Objects of several kinds, each the only block of a text: which ones come back as they are."""
    kinds = {"None": None, "0": 0, "object": object(), "list": [], "tensor": torch.zeros(2)}
    cache = ex.PrefixCache(8, 2)
    for n, value in enumerate(kinds.values()):
        cache.insert([n, n], [value])
        cache.insert([n, n], ["another"])
    found = [cache.match([n, n, 0])[1] for n in range(len(kinds))]
    return {
        kind: len(data) == 1 and data[0] is value
        for (kind, value), data in zip(kinds.items(), found, strict=True)
    }


def serve(ex, sizes, weights, requests, n_blocks, block_size):
    """The last logits for each request in turn, and how many tokens were computed for it."""
    from ex43_kv_cache import KVCache
    from ex44_llama import Llama, LlamaConfig

    model = Llama(LlamaConfig(**sizes)).double()
    model.load_state_dict(weights)
    config, cache = model.config, ex.PrefixCache(n_blocks, block_size)
    answers = []
    for ids in requests:
        names, blocks = cache.match(ids.tolist())
        room = (1, config.n_kv_heads, len(ids), config.head_dim, torch.float64)
        caches = [KVCache(*room) for _ in model.blk]
        for block in blocks:
            for layer, (k, v) in zip(caches, block, strict=True):
                layer.append(k, v)
        n_known = caches[0].length
        with torch.no_grad():
            logits = model(ids[None, n_known:], caches, last_only=True)[0, -1]
        pieces = [
            [
                (
                    c.keys[:, :, at : at + block_size].clone(),
                    c.values[:, :, at : at + block_size].clone(),
                )
                for c in caches
            ]
            for at in range(0, len(ids) - block_size + 1, block_size)
        ]
        cache.insert(ids.tolist(), pieces)
        cache.release(names)
        answers.append({"logits": logits, "computed": len(ids) - n_known})
    return answers


# --- by definition -------------------------------------------------------------------------------


def by_prefixes(texts, block_size):
    """The same small numbers, from the prefixes themselves."""
    numbers = {}
    return [
        [
            numbers.setdefault(tuple(ids[:end]), len(numbers))
            for end in range(block_size, len(ids) + 1, block_size)
        ]
        for ids in texts
    ]


class Slow:
    """A cache that keeps whole prefixes, with a list of uses in place of cleverness."""

    def __init__(self, n_blocks, block_size):
        self.n_blocks, self.block_size = n_blocks, block_size
        self.blocks = OrderedDict()  # prefix to [what was inserted, holders]
        self.held = []

    def prefixes(self, ids):
        return [tuple(ids[:end]) for end in range(self.block_size, len(ids) + 1, self.block_size)]

    def touch(self, prefixes):
        for prefix in reversed(prefixes):
            self.blocks.move_to_end(prefix)

    def match(self, ids):
        found = []
        for prefix in self.prefixes(ids[:-1]):
            if prefix not in self.blocks:
                break
            found.append(prefix)
            self.blocks[prefix][1] += 1
        self.touch(found)
        self.held.append(found)
        return [self.blocks[prefix][0] for prefix in found]

    def release(self, which):
        for prefix in self.held[which]:
            self.blocks[prefix][1] -= 1
        return "released"

    def insert(self, ids, data):
        mine, here = self.prefixes(ids), 0
        for prefix, value in zip(mine, data, strict=True):
            if prefix not in self.blocks:
                others = [p for p, (_, n) in self.blocks.items() if not n and p not in mine]
                if len(self.blocks) >= self.n_blocks:
                    if not others:
                        break
                    del self.blocks[others[0]]
                self.blocks[prefix] = [value, 0]
            here += 1
        self.touch(mine[:here])
        return here

    def evict(self, n):
        gone = [p for p, (_, holders) in self.blocks.items() if not holders][:n]
        for prefix in gone:
            del self.blocks[prefix]
        return [shown(prefix) for prefix in gone]

    def answers(self, steps):
        out = []
        for step, *rest in steps:
            out += [getattr(self, step)(*rest), len(self.blocks)]
        return out


# --- the hashes ----------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    texts=st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=2, max_size=6),
    block_size=st.integers(1, 4),
)
def test_blocks_have_one_hash_where_all_up_to_their_end_is_equal(attempt, texts, block_size):
    out = attempt(hashes, texts, block_size)

    assert_close(out, by_prefixes(texts, block_size))


@pytest.mark.parametrize(
    "texts",
    [
        [[1, 2, 3, 4], [9, 9, 3, 4]],  # a block out of its context
        [[1, 23], [12, 3], [123, 0]],  # digits that run together
        [[5, 6], [6, 5], [11, 0]],
        [[1, 0], [257, 0], [65537, 0], [2**32 + 1, 0], [2**62 + 1, 0], [1, 1]],
        [[n, n + k] for n in (2**24, 2**53, 2**62, 2**63 - 2) for k in (0, 1)],
        [[0, 0, 0, 0], [0, 0]],
        [[49_151, 0], [0, 49_151], [49_151, 49_151]],
    ],
    ids=["context", "digits", "order", "large", "neighbours", "zeros", "vocabulary"],
)
def test_other_prefixes_have_other_hashes(attempt, texts):
    out = attempt(hashes, texts, 2)

    assert_close(out, by_prefixes(texts, 2))


def test_a_block_has_another_hash_behind_each_of_many_beginnings(attempt):
    # Of 1500 names two are alike in their first 16 bits, but for a chance of 3e-8.
    texts = [[n, 5] for n in range(1500)]

    out = attempt(hashes, texts, 1)

    assert len({text[1] for text in out}) == 1500


def test_a_hash_is_long_and_the_same_in_every_process(attempt, tmp_path, request):
    ids = [7, 300, 12, 5, 9]

    out = attempt(raw_hashes, ids, 2)

    assert all(isinstance(name, bytes) and len(name) >= 16 for name in out), f"got {out}"
    again = attempt(raw_hashes_elsewhere, ids, 2)
    assert_close(again, out)


def raw_hashes_elsewhere(ex, ids, block_size):
    """In a process of its own, where Python's hash() of strings has another seed."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("one", {ex.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*(name.hex() for name in module.block_hashes({ids!r}, {block_size})))
"""
    folders = [folder for folder in sys.path if Path(folder).is_dir()]
    start = f"import sys; sys.path[:0] = {folders!r}\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    return [bytes.fromhex(name) for name in done.stdout.split()]


@pytest.mark.parametrize("block_size", [0, -2])
def test_refuses_blocks_of_no_tokens(attempt, block_size):
    with pytest.raises(ValueError):
        attempt(raw_hashes, [1, 2, 3], block_size)


# --- the cache -----------------------------------------------------------------------------------


def test_finds_the_longest_prefix_in_whole_blocks(attempt):
    steps = [
        ("match", [1, 2, 3]),
        ("insert", [1, 2, 3, 4, 5, 6, 7], ["a", "b", "c"]),
        ("match", [1, 2, 3, 4, 5, 6, 7]),
        ("match", [1, 2, 3, 4, 9, 6, 7, 8]),
        ("match", [9, 2, 3, 4, 5, 6]),  # the second block, but in another text
        ("match", [1, 2, 9, 9, 5, 6, 7]),
        ("match", [1]),
        ("match", []),
    ]

    out = attempt(use, 8, 2, steps)

    found = [[], ["a", "b", "c"], ["a", "b"], [], ["a"], [], []]
    assert_close(out[::2], [found[0], 3, *found[1:]])


def test_leaves_a_token_to_compute(attempt):
    steps = [
        ("insert", [1, 2, 3, 4], ["a", "b"]),
        ("match", [1, 2, 3, 4]),
        ("match", [1, 2]),
        ("match", [1, 2, 3]),
        ("match", [1, 2, 3, 4, 5]),
    ]

    out = attempt(use, 8, 2, steps)

    assert_close(out[::2], [2, ["a"], [], ["a"], ["a", "b"]])


def test_evicts_the_least_recently_used_and_children_before_parents(attempt):
    steps = [
        ("insert", [1, 1, 2, 2], ["a", "b"]),
        ("insert", [3, 3], ["c"]),
        ("insert", [1, 1, 4, 4, 5, 5], ["-", "d", "e"]),
        ("match", [3, 3, 0]),
        ("release", 0),
        ("evict", 2),
        ("evict", 9),
    ]

    out = attempt(use, 8, 2, steps)

    assert_close(out[-4:], [["1122", "114455"], 3, ["1144", "11", "33"], 0])


@pytest.mark.parametrize("ids", [[1, 1, 2, 2, 9], [1, 1, 2, 2, 9, 9, 9]], ids=["whole", "in part"])
def test_all_that_a_match_gives_counts_as_used(attempt, ids):
    steps = [
        ("insert", [1, 1, 2, 2], ["a", "b"]),
        ("insert", [3, 3], ["c"]),
        ("match", ids),
        ("release", 0),
        ("evict", 1),
        ("evict", 9),
    ]

    out = attempt(use, 8, 2, steps)

    assert_close(out[-4:], [["33"], 2, ["1122", "11"], 0])


def test_evicts_nothing_where_there_is_room_for_what_is_new(attempt):
    steps = [
        ("insert", [1, 1], ["a"]),
        ("insert", [3, 3], ["c"]),
        ("insert", [1, 1, 2, 2], ["-", "b"]),  # room for three, and two are here
        ("evict", 9),
    ]

    out = attempt(use, 3, 2, steps)

    assert_close(out, [1, 1, 1, 2, 2, 3, ["33", "1122", "11"], 0])


def test_keeps_what_somebody_holds(attempt):
    steps = [
        ("insert", [1, 1, 2, 2, 3, 3], ["a", "b", "c"]),
        ("match", [1, 1, 2, 2, 9]),
        ("match", [1, 1, 2, 2, 3, 3]),
        ("evict", 5),
        ("release", 0),
        ("evict", 5),
        ("release", 1),
        ("evict", 5),
    ]

    out = attempt(use, 8, 2, steps)

    gone = [answer for (step, *_), answer in zip(steps, out[::2], strict=True) if step == "evict"]
    assert_close(gone, [["112233"], [], ["1122", "11"]])


def test_makes_room_and_takes_the_beginning_where_there_is_none(attempt):
    steps = [
        ("insert", [1, 1, 2, 2], ["a", "b"]),
        ("insert", [3, 3, 4, 4], ["c", "d"]),  # room for three: b goes
        ("match", [3, 3, 9]),
        ("insert", [5, 5, 6, 6, 7, 7], ["e", "f", "g"]),  # c is held: two places
        ("insert", [8, 8, 9, 9, 8, 8, 9, 9], ["h", "i", "j", "k"]),
        ("match", [8, 8, 9, 9, 1]),
        ("insert", [7, 7], ["l"]),
        ("match", [7, 7, 1]),
    ]

    out = attempt(use, 3, 2, steps)

    assert_close(out, [2, 2, 2, 3, ["c"], 3, 2, 3, 2, 3, ["h", "i"], 3, 0, 3, [], 3])


def test_a_block_that_is_here_keeps_what_it_has(attempt):
    steps = [
        ("insert", [1, 1, 2, 2], ["a", "b"]),
        ("insert", [1, 1, 3, 3], ["z", "c"]),
        ("match", [1, 1, 2, 2, 0]),
        ("match", [1, 1, 3, 3, 0]),
    ]

    out = attempt(use, 8, 2, steps)

    assert_close(out[::2], [2, 2, ["a", "b"], ["a", "c"]])


def test_gives_back_whatever_object_was_inserted(attempt):
    out = attempt(keep_objects)

    assert_close(out, dict.fromkeys(out, True))


texts = st.lists(st.integers(0, 1), max_size=7)


@settings(max_examples=40)
@given(
    n_blocks=st.integers(0, 5),
    block_size=st.integers(1, 2),
    wishes=st.lists(st.tuples(st.sampled_from("mmiirre"), texts, st.integers(0, 3)), max_size=14),
)
def test_answers_like_one_that_keeps_whole_prefixes(attempt, n_blocks, block_size, wishes):
    steps, open_ones, n_matches, n_data = [], [], 0, 0
    for kind, ids, number in wishes:
        if kind == "m":
            steps.append(("match", ids))
            open_ones.append(n_matches)
            n_matches += 1
        elif kind == "i":
            n = len(ids) // block_size
            steps.append(("insert", ids, list(range(n_data, n_data + n))))
            n_data += n
        elif kind == "e":
            steps.append(("evict", number))
        elif open_ones:
            steps.append(("release", open_ones.pop(number % len(open_ones))))

    out = attempt(use, n_blocks, block_size, steps)

    assert_close(out, Slow(n_blocks, block_size).answers(steps))


def test_refuses_to_release_what_nobody_holds(attempt):
    steps = [("insert", [1, 1, 2, 2], ["a", "b"]), ("match", [1, 1, 2, 2, 3])]

    out = attempt(try_to_use, 8, 2, steps, "release")

    # It was held once, and twice was let go: nothing is, so nothing can be evicted.
    assert_close(out, ("ValueError", 2, [0, 0, 0]))


@pytest.mark.parametrize("other", OTHERS)
def test_refuses_a_release_of_which_one_block_is_held_by_nobody(attempt, other):
    out = attempt(release_together_with, other)

    assert_close(out, ("ValueError", 0 if other == "evicted" else 1))  # the block "c"


@pytest.mark.parametrize("times", [1, 2, 3])
def test_lets_go_at_once_what_several_matches_have_given(attempt, times):
    out = attempt(release_at_once, [1, 1, 2, 2], times)

    assert_close(out, [0, None, 2])


@pytest.mark.parametrize("n", [0, 1, 3])
def test_refuses_data_that_are_not_one_for_each_whole_block(attempt, n):
    wrong = [[1, 1, 2, 2, 3], ["a", "b", "c"][:n]]

    out = attempt(try_to_use, 8, 2, [("insert", [5, 5], ["e"])], wrong)

    assert_close(out, ("ValueError", 1, [1, 0, 0]))


def test_refuses_data_for_a_text_without_a_whole_block(attempt):
    out = attempt(try_to_use, 8, 2, [("insert", [5, 5], ["e"])], [[1], ["a"]])

    assert_close(out, ("ValueError", 1, [1, 0, 0]))


# --- a model -------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 13, "d_model": 8, "d_ff": 12, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
    "rope_theta": 100.0, "rms_eps": 1e-5, "tied": True,
}  # fmt: skip


def weights_of(rng):
    def randn(*shape):
        return 0.4 * torch.randn(*shape, generator=rng, dtype=torch.float64)

    layer = {
        "attn_norm": 1 + randn(8), "attn_q": randn(8, 8), "attn_k": randn(4, 8),
        "attn_v": randn(4, 8), "attn_output": randn(8, 8), "ffn_norm": 1 + randn(8),
        "ffn_gate": randn(12, 8), "ffn_up": randn(12, 8), "ffn_down": randn(8, 12),
    }  # fmt: skip
    weights = {"token_embd.weight": randn(13, 8), "output_norm.weight": 1 + randn(8)}
    for n in range(2):
        weights |= {f"blk.{n}.{name}.weight": (1 + 0.1 * n) * x for name, x in layer.items()}
    return weights


def test_a_chat_computes_its_system_prompt_once_and_says_the_same(attempt, rng):
    system = torch.randint(13, (10,), generator=rng)
    turns = [torch.randint(13, (n,), generator=rng) for n in (5, 3, 7)]
    requests = [torch.cat((system, turn)) for turn in turns]
    requests += [torch.cat((requests[0], turns[1])), requests[2]]
    weights = weights_of(rng)

    out = attempt(serve, SIZES, weights, requests, 64, 4)

    # Without a cache nothing is found, and every token is computed.
    alone = attempt(serve, SIZES, weights, requests, 0, 4)
    assert_close([a["computed"] for a in alone], [15, 13, 17, 18, 17])
    assert_close([a["logits"] for a in out], [a["logits"] for a in alone])
    assert_close([a["computed"] for a in out], [15, 13 - 8, 17 - 8, 18 - 12, 17 - 16])
