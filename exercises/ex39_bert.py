"""Exercise 39: BERT.

A GPT sees only what came before. BERT sees a whole text at once, and so it cannot be asked for the
next token. Instead some tokens are hidden, and it is asked which they were; and of two texts,
whether the second one followed the first. What it learns on the way, a vector for each token that
knows all of its surroundings, serves to compare texts.

    x = norm(word[token] + position[i] + token_type[type])
    x = norm(x + attention(x))            ⎫ n_layers
    x = norm(x + W₂ gelu(W₁ x + b₁) + b₂) ⎭ times

    loss = mean over hidden tokens of −log p(token)  −  mean over pairs of log p(follows or not)

The paper uses dropout as well; it is left out here.

Source: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
    Understanding", section 3, https://arxiv.org/abs/1810.04805. Vectors of sentences: Reimers &
    Gurevych 2019, "Sentence-BERT", section 3, https://arxiv.org/abs/1908.10084
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

IGNORED = -100


@dataclass
class BertConfig:
    """The sizes of a BERT, each with the name that it has in a released config.json."""

    vocab_size: int  # vocab_size
    d_model: int  # hidden_size
    d_ff: int  # intermediate_size
    n_layers: int  # num_hidden_layers
    n_heads: int  # num_attention_heads
    block_size: int = 512  # max_position_embeddings
    n_types: int = 2  # type_vocab_size
    norm_eps: float = 1e-12  # layer_norm_eps


def norm(config: BertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.d_model, eps=config.norm_eps)


class Attention(nn.Module):
    """Self-attention in which every position sees every other, and its residual."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        d_model = config.d_model
        self.n_heads = config.n_heads
        self.self = nn.ModuleDict(
            {n: nn.Linear(d_model, d_model) for n in ("query", "key", "value")}
        )
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(d_model, d_model), "LayerNorm": norm(config)}
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Let every position gather from all tokens that are real; then add x and normalise.

        x:       (batch, seq_len, d_model)
        mask:    (batch, seq_len) bool, False at padding; None: there is none
        returns: (batch, seq_len, d_model)

        Within a projection head 0 comes first. Scores are scaled by 1/√head_dim, and give finite
        results whatever their size. Any attention may be used, your own of exercise 31 or torch's.
        """
        raise NotImplementedError("exercise 39 is not written yet")


class Block(nn.Module):
    """Attention and an MLP, each added to what it was given and then normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        d_model, d_ff = config.d_model, config.d_ff
        self.attention = Attention(config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(d_model, d_ff)})
        self.output = nn.ModuleDict({"dense": nn.Linear(d_ff, d_model), "LayerNorm": norm(config)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Apply the two steps. x, returns: (batch, seq_len, d_model). GELU is its exact form."""
        raise NotImplementedError("exercise 39 is not written yet")


class BertModel(nn.Module):
    """The encoder. Its parameters have the names of the released weights; this is all of them."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, config.d_model),
                "position_embeddings": nn.Embedding(config.block_size, config.d_model),
                "token_type_embeddings": nn.Embedding(config.n_types, config.d_model),
                "LayerNorm": norm(config),
            }
        )
        layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.d_model, config.d_model)})

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Give each token a vector that knows its surroundings.

        tokens:      (batch, seq_len) int64
        mask:        (batch, seq_len) bool, True at tokens, False at padding; None: all are tokens
        token_types: (batch, seq_len) int64, which of two texts a token belongs to; None: all 0
        returns:     (batch, seq_len, d_model), the hidden states after the last block

        Positions count from 0. The mask alone tells what is padding, not the number of a token. No
        result at a token depends on what stands at padding; what the results are at padding does
        not matter. The pooler has no part in this.
        """
        raise NotImplementedError("exercise 39 is not written yet")


class BertForPreTraining(nn.Module):
    """A BertModel and its two heads. The decoder's weight is the matrix of word embeddings."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        d_model = config.d_model
        self.bert = BertModel(config)
        transform = {"dense": nn.Linear(d_model, d_model), "LayerNorm": norm(config)}
        decoder = nn.Linear(d_model, config.vocab_size)
        decoder.weight = self.bert.embeddings["word_embeddings"].weight
        predictions = {"transform": nn.ModuleDict(transform), "decoder": decoder}
        self.cls = nn.ModuleDict(
            {"predictions": nn.ModuleDict(predictions), "seq_relationship": nn.Linear(d_model, 2)}
        )

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Guess what each token is, and whether the second text followed the first.

        tokens, mask, token_types: as BertModel takes them
        returns: mlm_logits (batch, seq_len, vocab_size) = decoder(norm(gelu(dense(hidden state))));
                 nsp_logits (batch, 2) = seq_relationship(tanh(pooler's dense(h))), with the hidden
                 state h of the first token, [CLS]; number 0 stands for "it followed"
        """
        raise NotImplementedError("exercise 39 is not written yet")


def mask_tokens(
    tokens: Tensor,
    special: Tensor,
    mask_token: int,
    vocab_size: int,
    generator: torch.Generator,
    rate: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Choose tokens to be guessed, and hide most of them.

    tokens:     (…) int64
    special:    (…) bool, True at [CLS], [SEP] and padding, which are never chosen
    mask_token: the id of [MASK]
    generator:  the source of all randomness
    rate:       the probability with which each other token is chosen, whatever becomes of the rest
    returns:    inputs (…) int64, the tokens; but of the chosen ones 80 % have become mask_token,
                10 % a token drawn from all vocab_size, each as likely as the other (it may be the
                old one), and 10 % are what they were: by independent draws for each token, and
                anew at every call;
                labels (…) int64, the old token where one was chosen, elsewhere IGNORED
    """
    raise NotImplementedError("exercise 39 is not written yet")


def pretraining_loss(
    mlm_logits: Tensor, nsp_logits: Tensor, labels: Tensor, followed: Tensor
) -> Tensor:
    """Add the mean loss of the chosen tokens to the mean loss of the pairs.

    mlm_logits: (batch, seq_len, vocab_size)
    nsp_logits: (batch, 2)
    labels:     (batch, seq_len) int64, IGNORED where nothing is asked
    followed:   (batch) int64, 0 where the second text followed the first, 1 where it is another
    returns:    (), the sum; its first part is 0 where not one token was chosen
    """
    raise NotImplementedError("exercise 39 is not written yet")


def from_pretrained(folder: str | Path) -> BertModel:
    """Read a model from config.json and model.safetensors.

    The sizes have the names that BertConfig lists, and the weights those of BertModel's
    parameters, or the same after "bert.": so they are called where the heads were stored as well.
    Those, which begin with "cls.", are passed over, as is "embeddings.position_ids", which old
    files have and which is no weight. Any other weight that is missing or unknown raises
    RuntimeError, which names it, as load_state_dict does. A hidden_act other than "gelu" raises
    ValueError, which gives it.
    """
    raise NotImplementedError("exercise 39 is not written yet")


def embed_sentences(model: BertModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """Give each text one vector: the mean of the hidden states of its tokens, of length 1.

    tokens, mask: (batch, seq_len), as BertModel takes them
    returns:      (batch, d_model); the dot product of two is the cosine of the angle between them

    [CLS] and [SEP] count as tokens. Padding does not.
    """
    raise NotImplementedError("exercise 39 is not written yet")
