"""A slow evaluation to compare with, one context after the other straight from the documents; and how near is equal."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_pieces import CONTEXT_TOKENS, D_MODEL, LAYERS, Json, Pieces, loss_row
from rounding import forward_pass
from torch import Tensor

from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.tokens import TokenSet

# The language model's float32 rounds differently in batches of other shapes, and on other processors; all that is summed afterwards is
# float64. Losses are of logits and their log-sum-exp, log(300) in size; squares change twice as much as what is squared, and both a
# share's numerator and its denominator change.
ROUNDING = forward_pass(context_tokens=CONTEXT_TOKENS)
NATS = ROUNDING * math.log(300)
SHARE = 4 * ROUNDING


# -- a slow evaluation: one context after the other, straight from the documents, with hooks of its own --------------------------


def slow_contexts(tokens: TokenSet) -> list[tuple[list[int], list[int]]]:
    """(ids, document of each id) of every context, from the documents; a separator belongs to the document that it ends."""
    contexts, document = [], 0
    for shard in tokens.shards:
        ids, documents = [], []
        for _ in range(shard.num_documents):
            here = [*tokens.document(document).tolist(), 0]
            ids, documents, document = ids + here, documents + [document] * len(here), document + 1
        contexts += [(ids[s : s + CONTEXT_TOKENS], documents[s : s + CONTEXT_TOKENS]) for s in range(0, len(ids), CONTEXT_TOKENS)]
    return contexts


def slow_logits(pieces: Pieces, ids: list[int], replacements: dict[str, Tensor]) -> Tensor:
    """logits_SV of one context; each replacement [S-1, D] goes to positions 1 on of its layer, but where it is NaN."""

    def hook_for(values: Tensor) -> Callable[..., Any]:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            acts = (output[0] if isinstance(output, tuple) else output).clone()
            acts[0, 1:] = torch.where(values.isnan(), acts[0, 1:], values)
            return (acts, *output[1:]) if isinstance(output, tuple) else acts

        return hook

    model = pieces.language_model.model
    hooks = [model.get_submodule(layer).register_forward_hook(hook_for(values)) for layer, values in replacements.items()]
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


def slow_loss(
    pieces: Pieces, replace: Callable[[int, Tensor], dict[str, Tensor]], contexts: list[tuple[list[int], list[int]]]
) -> tuple[float, float, int]:
    """Cross-entropy and divergence in nats and the number of predictions, from a context's number and acts_NLD of its positions 1 on."""
    losses, divergences = [], []
    for number, (ids, documents) in enumerate(contexts):
        acts_NLD = pieces.language_model.activations(torch.tensor([ids]), LAYERS)[0, 1:]
        chosen = replace(number, acts_NLD)
        clean, changed = (slow_logits(pieces, ids, choice).double().log_softmax(-1).numpy() for choice in ({}, chosen))
        for position in range(1, len(ids) - 1):
            if documents[position] == documents[position + 1]:
                losses.append(-changed[position, ids[position + 1]])
                divergences.append(np.sum(np.exp(clean[position]) * (clean[position] - changed[position])))
    return float(np.mean(losses)), float(np.mean(divergences)), len(losses)


def all_acts(pieces: Pieces, tokens: TokenSet) -> np.ndarray:
    """Every position of a token set that counts, [N, L, D] float64, in order."""
    rows = [pieces.language_model.activations(torch.tensor([ids]), LAYERS)[0, 1:] for ids, _ in slow_contexts(tokens)]
    return torch.cat(rows).double().numpy()


def slow_affine(to: np.ndarray, source: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Least squares with an intercept, of the rows given."""
    weights, *_ = np.linalg.lstsq(np.column_stack([source, np.ones(len(source))]), to, rcond=None)
    return lambda rows: np.column_stack([rows, np.ones(len(rows))]) @ weights


def slow_replacement(name: str, trained: TrainedCrosscoder, acts: np.ndarray, fitted: np.ndarray) -> Callable[..., dict[str, Tensor]]:
    mean_LD = torch.tensor(acts.mean(0)).float()
    fitted_mean_LD, spread_L = fitted.mean(0), np.sqrt(((fitted - fitted.mean(0)) ** 2).sum((0, 2)))

    def replace(number: int, acts_NLD: Tensor) -> dict[str, Tensor]:
        decoded = trained.decode(trained.encode(acts_NLD))
        matched = fitted_mean_LD[1] + (acts_NLD[:, 0].double().numpy() - fitted_mean_LD[0]) * spread_L[1] / spread_L[0]
        first_from_last = slow_affine(fitted[:, 0], fitted[:, 1])(acts_NLD[:, 1].double().numpy())
        part_S = np.random.default_rng([0, number]).integers(2, size=len(acts_NLD) + 1)  # of the whole context, position 0 included
        part_N1 = torch.tensor(part_S[1:])[:, None]

        def split(values_NLD: Tensor) -> dict[str, Tensor]:
            return {layer: values_NLD[:, index].where(part_N1 == index, torch.nan) for index, layer in enumerate(LAYERS)}

        return {
            "clean": {},
            "first spliced": {LAYERS[0]: decoded[:, 0]},
            "last zero": {LAYERS[1]: torch.zeros(D_MODEL)},
            "first mean": {LAYERS[0]: mean_LD[0]},
            "last mean": {LAYERS[1]: mean_LD[1]},
            "first from last": {LAYERS[0]: acts_NLD[:, 1]},
            "last from first, matched": {LAYERS[1]: torch.tensor(matched).float()},
            "first from last, affine": {LAYERS[0]: torch.tensor(first_from_last).float()},
            "split": split(decoded),
            "zeros split": split(torch.zeros_like(decoded)),
        }[name]

    return replace


# -- how near is equal ------------------------------------------------------------------------------------------------------------


def explained(error: float, spread: float) -> Any:
    """The share of `spread` that leaves `error`, as near as float32 activations let it be known."""
    return pytest.approx(1 - error / spread, abs=SHARE * max(1.0, error / spread))


def nearly(row: Json, document: Json) -> Json:
    """The row with every number replaced by what is equal to it but for the rounding of float32."""
    near = dict(row)
    for key, value in row.items():
        if key.startswith("recovered_against_") and value is not None:
            damage = abs(loss_row(document, row["layer"], key.removeprefix("recovered_against_"))["difference"])
            near[key] = pytest.approx(value, abs=4 * NATS * (1 + abs(value)) / damage)
        elif key in ("cross_entropy", "difference", "kl"):
            near[key] = pytest.approx(value, abs=2 * NATS)
        elif isinstance(value, float):
            # A median is the middle of a bin a two-thousandth wide: rounding may move it into the next.
            near[key] = pytest.approx(
                value, rel=1e-3 if key == "median_error" else SHARE, abs=SHARE * max(1.0, row["fraction_unexplained"])
            )
    return near
