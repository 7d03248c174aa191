"""Exercise 44: Llama, from a file to a sentence.

The parts are all there: rotary positions (40), normalisation and SwiGLU (41), query heads
that share their keys (42) and the cache (43). A layer adds to its input twice,

    h = x + W_o attention(norm(x))
    y = h + W_down (silu(W_gate norm(h)) ⊙ W_up norm(h))

and the model is an embedding, n_layers of these, a norm and a head. What remains is to read
real weights into it, exactly as they were meant, and to let it speak.

Source: Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models",
    section 2.2, https://arxiv.org/abs/2302.13971
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ex40_rope import interleaved_to_half, rope_frequencies
from ex43_kv_cache import KVCache, attend_with_cache


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama, and three choices that its weights were trained with."""

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    rope_theta: float
    rms_eps: float
    tied: bool  # whether the embedding is also the head

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


class Block(nn.Module):
    """One layer. Its parameters bear the names that GGUF files give to their tensors."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        d_model, d_kv = config.d_model, config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.attn_norm = nn.RMSNorm(d_model, eps=config.rms_eps)
        self.attn_q = nn.Linear(d_model, d_model, bias=False)
        self.attn_k = nn.Linear(d_model, d_kv, bias=False)
        self.attn_v = nn.Linear(d_model, d_kv, bias=False)
        self.attn_output = nn.Linear(d_model, d_model, bias=False)
        self.ffn_norm = nn.RMSNorm(d_model, eps=config.rms_eps)
        self.ffn_gate = nn.Linear(d_model, config.d_ff, bias=False)
        self.ffn_up = nn.Linear(d_model, config.d_ff, bias=False)
        self.ffn_down = nn.Linear(config.d_ff, d_model, bias=False)

    def forward(
        self, x: Tensor, frequencies: Tensor, cache: KVCache | None, n_pad: Tensor | None
    ) -> Tensor:
        """Map (batch, n_new, d_model) to the same shape.

        frequencies, cache, n_pad: as attend_with_cache takes them; the pairs of a head are its
                                   two halves
        """
        raise NotImplementedError("exercise 44 is not written yet")


class Llama(nn.Module):
    """The language model: token_embd, blk.0 to blk.{n_layers − 1}, output_norm, output."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.vocab_size, config.d_model)
        self.blk = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.output_norm = nn.RMSNorm(config.d_model, eps=config.rms_eps)
        if not config.tied:
            self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        ids: Tensor,
        caches: list[KVCache] | None = None,
        n_pad: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Score every token of the vocabulary as the successor of each of `ids`.

        ids:       (batch, n_new) int64
        caches:    one for each layer, with the tokens before; None: there are none, keep none
        n_pad:     (batch,) int64, how many of each sequence's first tokens are padding; None: none
        last_only: whether to score after the last of `ids` alone, without the others' cost
        returns:   (batch, n_new, vocab_size) logits; (batch, 1, vocab_size) where last_only
        """
        raise NotImplementedError("exercise 44 is not written yet")


def from_gguf(path: str | Path) -> Llama:
    """Read a model from a GGUF file, with all its weights as float32, in memory of their own.

    path:    a file with general.architecture "llama". Its sizes stand in llama.vocab_size,
             llama.embedding_length, llama.feed_forward_length, llama.block_count,
             llama.attention.head_count, llama.attention.head_count_kv (where there is none,
             every query head has its own), llama.attention.layer_norm_rms_epsilon and
             llama.rope.freq_base (where there is none, it is 10,000). Its tensors may be
             quantised, and the rows of attn_q and attn_k are interleaved pairs. A file
             without output.weight has a tied head.
    returns: the Llama, whose parameters require gradients

    A file that is not there raises FileNotFoundError. ValueError, with the name in question in
    its message: another architecture; a key of the metadata or a tensor that is missing (of
    several tensors, all); a tensor that the model has no place for, such as rope_freqs.weight. A
    model that is nearly right would run, and talk nonsense.
    """
    raise NotImplementedError("exercise 44 is not written yet")


def generate(model: Llama, ids: Tensor, max_new_tokens: int, n_pad: Tensor | None = None) -> Tensor:
    """Continue each text with the likeliest token, max_new_tokens times.

    ids:     (batch, n_prompt) int64
    n_pad:   (batch,) int64, how many of each sequence's first tokens are padding; None: none
    returns: (batch, n_prompt + max_new_tokens) int64, the prompt and what follows

    No gradient is recorded. Each token passes through the layers once, the last one not at all,
    and of the prompt's tokens only the last one is scored: so the prompt is read in one call. With
    max_new_tokens 0 the prompt comes back. The model's mode stays as it is.
    """
    raise NotImplementedError("exercise 44 is not written yet")
