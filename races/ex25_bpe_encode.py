"""Exercise 25: what it holds at once while a text comes in chunks, beside the whole text."""

from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

from ex24_bpe_train import train_bpe
from kata.racing import Race, megabytes

PAGES = list(topics.values())
COPIES = 4
CHUNK = 4096


def race(ex: Any) -> Iterator[Race]:
    """The lap that doesn't count lets the tokenizer remember the text's words."""
    tokenizer = ex.Tokenizer(*train_bpe("".join(PAGES), 2000))
    n_letters = COPIES * sum(map(len, PAGES))
    yield Race(
        f"memory to encode {n_letters / 1e6:.1f} MB in chunks",
        lambda: sum(1 for _ in tokenizer.encode_iterable(chunks())),
        {"all at once": lambda: len(tokenizer.encode("".join(PAGES * COPIES)))},
        unit="MB",
        measure=megabytes,
    )


def chunks() -> Iterator[str]:
    """The text as a file would be read."""
    for page in PAGES * COPIES:
        for start in range(0, len(page), CHUNK):
            yield page[start : start + CHUNK]
