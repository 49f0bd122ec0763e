"""The model card beside exported weights: README.md with the YAML front matter that the Hugging Face hub reads.

What it tells of language models are names on the hub, and of data only ids: a path on somebody's disk says nothing to its reader.
"""

from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.config import yaml_file
from pipeline.crosscoder.checkpoint import TrainedCrosscoder

Json = dict[str, Any]

TRAINING_SETTINGS = ("seed", "batch_positions", "num_tokens", "epochs", "precision", "layer_mask_rate")
"""What a card tells of a training run's configuration, besides `loss` and `optimizer`."""


@dataclass(frozen=True)
class Card:
    """What a card is made of, besides the crosscoder itself."""

    library: str
    """As the hub names it: `library_name`."""
    loading: str
    """Python that loads the files."""
    remarks: list[str]
    """What whoever loads them has to know."""
    training: Json
    """The configuration of the run that trained it; empty where it is not known."""
    metrics: Json | None
    """`metrics.json` of an evaluation of it."""
    language_models: list[str]
    """Names on the hub, with the revision behind an `@` where one was given."""
    license: str | None
    """Of the weights, as the hub abbreviates it."""


def model_card(trained: TrainedCrosscoder, card: Card) -> str:
    """The text of README.md."""
    parts = [_front_matter(card), _what(trained, card), _loading(trained, card), _settings(trained, card)]
    if card.metrics is not None:
        parts.append(_results(card.metrics))
    return "\n\n".join([*parts, _origin(trained, card), _license(card)]) + "\n"


def _front_matter(card: Card) -> str:
    values: Json = {"library_name": card.library, "tags": ["crosscoder", "sparse-autoencoder", "mechanistic-interpretability"]}
    if card.language_models:
        names = list(dict.fromkeys(model.partition("@")[0] for model in card.language_models))
        values["base_model"] = names[0] if len(names) == 1 else names
    if card.license is not None:
        values["license"] = card.license
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _what(trained: TrainedCrosscoder, card: Card) -> str:
    of = f" of {' and '.join(card.language_models)}" if card.language_models else ""
    layers = ", ".join(f"`{layer}`" for layer in trained.layers)
    trained_on = f"It was trained on {trained.tokens_trained:,} positions. " if trained.tokens_trained else "It was trained elsewhere. "
    return (
        f"# A crosscoder of {trained.num_features:,} features\n\n"
        f'A sparse dictionary that reads and writes {layers}{of} (width {trained.d_model:,}; Lindsey et al. 2024, "Sparse Crosscoders"). '
        f"{trained_on}Normalization and thresholds are multiplied into the weights: it takes "
        "and gives activations as the language model has them."
    )


def _loading(trained: TrainedCrosscoder, card: Card) -> str:
    order = "\n".join(f"{index}. `{layer}`" for index, layer in enumerate(trained.layers))
    remarks = "".join(f"\n\n{remark}" for remark in card.remarks)
    first = ", ".join(map(str, trained.provenance.drop_positions))
    left_out = f" Position {first} of a context was left out of training." if first else ""
    return (
        f"## Loading it\n\n```python\n{card.loading}\n```\n\nThe layers stand in this order; a block's name is the residual stream after "
        f"it, as the hidden states of the Hugging Face model hold it:\n\n{order}\n\n"
        "Each position is judged alone, by thresholds: where TopK trained it, a position may have more or fewer features than k."
        f"{left_out}{remarks}"
    )


def _settings(trained: TrainedCrosscoder, card: Card) -> str:
    settings: Json = {"crosscoder": trained.config.chosen()}
    settings |= {key: card.training[key] for key in ("loss", "optimizer", *TRAINING_SETTINGS) if card.training.get(key) is not None}
    return f"## Settings\n\n```yaml\n{yaml_file.write(_without_nulls(settings))}```"


def _results(metrics: Json) -> str:
    held_out, sparsity = metrics["held_out"], metrics["sparsity"]
    explained = {row["layer"]: row["explained_variance"] for row in metrics["reconstruction"] if row["by"] == "crosscoder"}
    rows = []
    for layer in metrics["layers"]:
        losses = {row["by"]: row["difference"] for row in metrics["replaced"] if row["layer"] == layer}
        others = {by: nats for by, nats in losses.items() if by not in ("crosscoder", "dense_path", "compared")}
        if "crosscoder" not in losses or not others:
            continue
        best = min(others, key=lambda by: others[by])
        rows.append(f"| `{layer}` | {_number(explained.get(layer))} | {_number(losses['crosscoder'])} | {_number(others[best])} ({best}) |")
    measured = (
        f"On {held_out['positions']:,} held-out positions, {held_out['outliers']:,} outliers left out; "
        f"{_number(metrics['clean_cross_entropy'])} nats with nothing replaced."
    )
    heading = "| layer | explained variance | nats more with the reconstruction in its place | the same for the strongest baseline |"
    counts = f"L0 {sparsity['l0']:.2f}; {sparsity['dead_eval']:,} features never fired on these positions"
    dense = f"{sparsity['dense']:,} on over 10 % of them"
    return "\n".join(["## Results", "", measured, "", heading, "|---|---|---|---|", *rows, "", f"{counts}, {dense}."])


def _origin(trained: TrainedCrosscoder, card: Card) -> str:
    provenance = trained.provenance
    rows = {
        "crosscoder": trained.identity,
        "activations": trained.activations_id,
        "tokens": provenance.tokens_id,
        "language model": provenance.language_model_hash,
        "tokenizer": provenance.tokenizer_hash,
    }
    lines = [f"| {name} | `{value}` |" for name, value in rows.items() if value]
    heading = "## Where it comes from\n\nIds by content: sha256 over weights, data and files.\n\n| what | id |\n|---|---|"
    contexts = f"Contexts of {provenance.context_tokens:,} tokens"
    beginning = provenance.beginning_of_text_id
    begins = "" if beginning is None else f", each behind the beginning-of-text token {beginning}"
    return "\n".join([heading, *lines]) + f"\n\n{contexts}{begins}; step {trained.step:,} of training. Made with crosscoder-pipeline."


def _license(card: Card) -> str:
    own = f"The weights are under {card.license}." if card.license is not None else "No license was given for these weights."
    return (
        f"## License\n\n{own} The language model and the text that it was trained on have terms of their own, which this does not change."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _without_nulls(value: Any) -> Any:
    return {key: _without_nulls(item) for key, item in value.items() if item is not None} if isinstance(value, dict) else value
