"""Exercise 36: GPT.

A GPT reads a row of tokens and gives, at every position, a score for each token that
could come next. It is a stack of causal transformer blocks between one embedding
matrix used twice: to read tokens in, and, transposed, to score tokens out.

    GPT-2:  x = wte[token] + wpe[position]              GPT-1:  the same x
            x = x + attn(ln_1(x))   ⎫ n_layers                  x = ln_1(x + attn(x))
            x = x + mlp(ln_2(x))    ⎭ times                     x = ln_2(x + mlp(x))
            logits = ln_f(x) wteᵀ                               logits = x wteᵀ

Both papers use dropout as well; it is left out here.

Source: Radford et al. 2018, "Improving Language Understanding by Generative
    Pre-Training", section 4.1, and 2019, "Language Models are Unsupervised Multitask
    Learners", section 2.3,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class GPTConfig:
    """The sizes of a GPT. The defaults are those of the smallest GPT-2.

    vocab_size: number of tokens that there are
    block_size: longest row of tokens that the model can read
    n_layers:   number of blocks
    n_heads:    number of attention heads; divides d_model
    d_model:    width of x; the MLP is 4·d_model wide inside
    pre_norm:   True for the GPT-2 form, False for the GPT-1 form
    """

    vocab_size: int = 50257
    block_size: int = 1024
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    pre_norm: bool = True


class Attention(nn.Module):
    """Causal self-attention: all heads at once, then one projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Let every position gather from itself and the positions before it.

        x, returns: (batch, seq_len, d_model)

        c_attn gives q, k and v side by side, in that order; within each, head 0 comes
        first. Scores are scaled by 1/√head_dim. Any attention may be used, your own of
        exercise 31 or torch's.
        """
        # solution
        batch, seq_len, d_model = x.shape
        heads = (batch, seq_len, self.n_heads, d_model // self.n_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).reshape(batch, seq_len, d_model))


class MLP(nn.Module):
    """Two linear layers with GELU between them, at each position alone."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.c_proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Widen, bend, narrow. x, returns: (..., d_model). GELU is its tanh form."""
        # solution
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each added to what it was given."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the two steps of the form. x, returns: (batch, seq_len, d_model)."""
        # solution
        if self.pre_norm:
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class GPT(nn.Module):
    """A language model of causal transformer blocks.

    Its parameters have the names of the released GPT-2 weights; i counts from 0:

        wte.weight  (vocab_size, d_model)    also scores the output: no matrix of its own
        wpe.weight  (block_size, d_model)
        h.{i}.…     one Block each: h.{i}.attn.c_attn.weight, h.{i}.ln_1.bias and so on
        ln_f.weight, ln_f.bias  (d_model,)   in the GPT-2 form only

    A separate lm_head may exist if its weight is wte's own parameter. LayerNorms have
    eps 1e-5.
    """

    def __init__(self, config: GPTConfig) -> None:
        """Make the parts, and draw the weights.

        All weights, those of the embeddings too, are normal with mean 0 and standard
        deviation 0.02. In the GPT-2 form the projections that end a branch
        (h.{i}.attn.c_proj.weight, h.{i}.mlp.c_proj.weight) have 0.02/√(2·n_layers) instead.
        Every bias is 0 and every LayerNorm weight is 1. Each number is drawn by itself.
        """
        super().__init__()
        self.config = config
        # solution
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.block_size, config.d_model)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        if config.pre_norm:
            self.ln_f = nn.LayerNorm(config.d_model)

        # x sums up 2·n_layers branches. So much smaller each, they add the variance of one.
        shrink = 1 / math.sqrt(2 * config.n_layers) if config.pre_norm else 1.0
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 * shrink)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score every token as the next one, at every position.

        tokens:  (batch, seq_len) int64, each in [0, vocab_size)
        returns: (batch, seq_len, vocab_size) logits, dtype of the weights

        Row t sees tokens 0 … t. Positions count from 0. More than block_size tokens raise
        ValueError, which gives both numbers.
        """
        # solution
        seq_len, block_size = tokens.shape[1], self.config.block_size
        if seq_len > block_size:
            raise ValueError(
                f"seq_len must be at most block_size = {block_size}, got {seq_len}: crop the tokens"
            )
        x = self.wte(tokens) + self.wpe(torch.arange(seq_len, device=tokens.device))
        for block in self.h:
            x = block(x)
        if self.config.pre_norm:
            x = self.ln_f(x)
        return x @ self.wte.weight.T

    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        """Write on, one token at a time, each drawn from softmax(logits / temperature).

        tokens:      (batch, seq_len) int64, seq_len ≥ 1; may be longer than block_size
        temperature: 0 or more; at 0 the token with the highest logit is taken
        returns:     (batch, seq_len + max_new_tokens) int64, the given tokens first

        The model reads the last block_size tokens, or all while there are fewer. Each draw is
        one of its own, from torch's global generator. Nothing is kept for backward, and the
        model stays as it was, in its mode too.
        """
        # solution
        for _ in range(max_new_tokens):
            with torch.no_grad():
                logits = self(tokens[:, -self.config.block_size :])[:, -1]
            if temperature == 0:
                following = logits.argmax(dim=-1, keepdim=True)
            else:
                probabilities = torch.softmax(logits / temperature, dim=-1)
                following = torch.multinomial(probabilities, num_samples=1)
            tokens = torch.cat([tokens, following], dim=1)
        return tokens
