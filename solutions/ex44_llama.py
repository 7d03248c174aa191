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
        # solution
        h = self.attn_norm(x)
        q, k, v = _apply(h, self.attn_q, self.attn_k, self.attn_v)
        # (batch, n_new, n · head_dim) -> (batch, n, n_new, head_dim)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        heads = attend_with_cache(q, k, v, cache, frequencies, n_pad)
        x = x + self.attn_output(heads.transpose(1, 2).flatten(2))

        h = self.ffn_norm(x)
        gate, up = _apply(h, self.ffn_gate, self.ffn_up)
        return x + self.ffn_down(F.silu(gate) * up)


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
        # solution
        config = self.config
        # Made anew each time: a buffer would follow the model into bfloat16.
        frequencies = rope_frequencies(config.head_dim, config.rope_theta).to(ids.device)
        x = self.token_embd(ids)
        for block, cache in zip(self.blk, caches or [None] * config.n_layers, strict=True):
            x = block(x, frequencies, cache, n_pad)
        if last_only:
            x = x[:, -1:]
        head = self.token_embd if config.tied else self.output
        return F.linear(self.output_norm(x), head.weight)


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
    # solution
    reader = gguf.GGUFReader(path)

    def read(key, default=None):
        field = reader.get_field(key)
        if field is None and default is None:
            raise ValueError(f"{path} does not tell {key}")
        return default if field is None else field.contents()

    if (architecture := read("general.architecture")) != "llama":
        raise ValueError(f"{path} holds the architecture {architecture}, this reads llama only")

    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    n_heads = read("llama.attention.head_count")
    config = LlamaConfig(
        vocab_size=read("llama.vocab_size"),
        d_model=read("llama.embedding_length"),
        d_ff=read("llama.feed_forward_length"),
        n_layers=read("llama.block_count"),
        n_heads=n_heads,
        n_kv_heads=read("llama.attention.head_count_kv", n_heads),
        rope_theta=read("llama.rope.freq_base", 10_000.0),
        rms_eps=read("llama.attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
    )
    with torch.device("meta"):  # names and shapes only: the tensors of the file come in their place
        model = Llama(config)
    wanted = set(model.state_dict())
    if wanted != set(tensors):
        missing, unknown = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
        raise ValueError(f"{path} lacks the tensors {missing}, and has unknown ones: {unknown}")
    for name, tensor in tensors.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            tensors[name] = interleaved_to_half(tensor, config.head_dim)
    model.load_state_dict(tensors, assign=True)
    for block in model.blk:
        _join(block.attn_q, block.attn_k, block.attn_v)
        _join(block.attn_output)
        _join(block.ffn_gate, block.ffn_up)
    _join(model.token_embd if config.tied else model.output)
    return model


def _join(*maps: nn.Module) -> None:
    """Lay the weights of several maps with one input side by side in memory, column by column.

    A new token has one row to multiply, so its time is that of reading all weights, and these are
    read as fast as memory gives them when it is done in few long runs. Only ffn_down, with more
    columns than rows, is read faster as it lies in the file.
    """
    weights = [m.weight.detach() for m in maps]
    joined = torch.cat(weights).T.contiguous().T
    for m, part in zip(maps, joined.split([len(w) for w in weights]), strict=True):
        m.weight.data = part  # a view


def _apply(x: Tensor, *maps: nn.Module) -> list[Tensor]:
    """Apply maps to one input: in one product where no gradients are wanted and `_join` was here.

    A cast, a copy or an adapter parts the weights again; then each map has its own product.
    """
    if torch.is_grad_enabled() or not all(type(m) is nn.Linear for m in maps):
        return [m(x) for m in maps]
    weights, rows = [m.weight for m in maps], [m.out_features for m in maps]
    first, n_rows = weights[0], sum(rows)
    starts = [first.storage_offset() + sum(rows[:i]) for i in range(len(rows))]
    if (
        len({w.untyped_storage().data_ptr() for w in weights}) > 1
        or any(w.stride() != (1, n_rows) for w in weights)
        or [w.storage_offset() for w in weights] != starts
    ):
        return [m(x) for m in maps]
    joined = first.as_strided((n_rows, first.shape[1]), first.stride())
    return list(F.linear(x, joined).split(rows, dim=-1))


def generate(model: Llama, ids: Tensor, max_new_tokens: int, n_pad: Tensor | None = None) -> Tensor:
    """Continue each text with the likeliest token, max_new_tokens times.

    ids:     (batch, n_prompt) int64
    n_pad:   (batch,) int64, how many of each sequence's first tokens are padding; None: none
    returns: (batch, n_prompt + max_new_tokens) int64, the prompt and what follows

    No gradient is recorded. Each token passes through the layers once, the last one not at all,
    and of the prompt's tokens only the last one is scored: so the prompt is read in one call. With
    max_new_tokens 0 the prompt comes back. The model's mode stays as it is.
    """
    # solution
    config, weight = model.config, model.token_embd.weight
    room = (ids.shape[0], config.n_kv_heads, ids.shape[1] + max_new_tokens, config.head_dim)
    caches = [KVCache(*room, weight.dtype, weight.device) for _ in model.blk]
    new = ids
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            new = model(new, caches, n_pad, last_only=True)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, new), dim=1)
    return ids
