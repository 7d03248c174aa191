"""Exercise 24 on the Python manual: beside tokenizers' trainer, in Rust, and the definition."""

from collections.abc import Iterator
from functools import partial
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from kata.racing import Race
from test_ex24_bpe_train import defined

TEXT = "\n".join(topics.values())
N_MERGES = 200


def race(ex: Any) -> Iterator[Race]:
    """A whole vocabulary, and a few merges of texts that double: the definition's cost grows."""
    yield Race(
        f"a vocabulary of 2,000 from {len(TEXT) / 1000:.0f} kB",
        partial(ex.train_bpe, TEXT, 2000),
        {"tokenizers' trainer": train_by_tokenizers},
    )
    yield few_merges(ex, TEXT[: len(TEXT) // 8])
    yield few_merges(ex, TEXT[: len(TEXT) // 4])


def few_merges(ex: Any, text: str) -> Race:
    """The definition goes through all words for each merge."""
    return Race(
        f"{N_MERGES} merges from {len(text) / 1000:.0f} kB",
        lambda: ex.train_bpe(text, 256 + N_MERGES)[1],
        {"the definition": lambda: defined(text, 256 + N_MERGES)["merges"]},
    )


def train_by_tokenizers() -> None:
    """It numbers the bytes as GPT-2 does, so that ties go another way: nothing to compare."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
