"""Exercise 04: cross-entropy.

A language model gives each word of its vocabulary a score, the logit, and softmax makes
probabilities p of them. The loss asks one thing: how surprised was the model by the word
that really came? It is −log p of that word, averaged over all positions:

    loss = −log p[target]

Some positions don't count, padding for one: they carry the target `ignore_index`. And
label smoothing ε keeps a model from growing ever more certain. It takes the share ε off
the truth and divides it equally among the whole vocabulary, the truth included:

    loss = −(1 − ε) log p[target] − ε · (mean of log p over the vocabulary)

Source: Goodfellow, Bengio & Courville 2016, "Deep Learning", section 6.2.2.3,
    https://www.deeplearningbook.org/contents/mlp.html; Szegedy et al. 2016, "Rethinking the
    Inception Architecture", section 7 (smoothing), https://arxiv.org/abs/1512.00567
"""

import numpy as np


def cross_entropy(
    logits: np.ndarray,
    targets: np.ndarray,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> np.floating:
    """Average the surprise at the targets, over all positions that count.

    logits:          (..., vocab_size) float32 or float64, for instance (batch, seq_len, vocab_size)
    targets:         (...) int64, the number of the true word at each position, or ignore_index
    ignore_index:    int, which target marks a position that doesn't count; it may also be
                     the number of a word
    label_smoothing: float from 0 to 1, the share ε
    returns:         one number, dtype of logits, in nats (the natural logarithm)

    >>> float(cross_entropy(np.zeros((2, 3, 8)), np.ones((2, 3), int)))  # log 8
    2.0794415416798357

    Logits of any size give exact losses. Without smoothing a logit may be −inf: that word
    cannot come, which costs nothing where it isn't the truth, and inf where it is. A position
    that doesn't count has no part in the sum or in what the sum is divided by, whatever its
    logits are, NaN too. At least one position counts. A target that is neither ignore_index
    nor in 0 … vocab_size − 1 raises IndexError, and the message holds that target.
    """
    # solution
    counts = targets != ignore_index
    logits, targets = logits[counts], targets[counts]  # (n, vocab_size), (n,)
    vocab_size = logits.shape[-1]
    # NumPy would take a negative one for a word counted from the end.
    bad = targets[(targets < 0) | (targets >= vocab_size)]
    if bad.size:
        raise IndexError(
            f"a target must lie in 0 … {vocab_size - 1} or be ignore_index, {ignore_index}; "
            f"got {bad[0]}"
        )

    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    truth = log_probs[np.arange(len(targets)), targets]  # (n,)
    losses = -(1 - label_smoothing) * truth
    if label_smoothing > 0:  # 0 times −inf would be NaN
        losses = losses - label_smoothing * log_probs.mean(axis=-1)
    return losses.mean()
