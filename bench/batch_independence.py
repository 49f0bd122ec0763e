"""How near the batches of an epoch are to independent samples of the rows: their variance, and what two epochs have in common.

    python -m bench.batch_independence data/tokens/demo/train --json bench/results/batch_independence.json

Three orders are compared: `stored`, shard after shard as rows lie on disk; `mixed`, as training reads them; `independent`, one
permutation of all rows.

Variance: activations of the model at 2 layers and 2,048 contexts of 256 tokens, in the proportions of configs/gpt2-pile on a
scale of 1 to 16: shards of 64 contexts, batches of 512, 16 shards side by side, pools of 8,192 positions. The variance of batch
means over three epochs, summed over dimensions and divided by what a batch of independent rows has (the variance of rows over
the size of a batch); the mean over layers.

Overlap: 32 shards of configs/gpt2-pile in full size, without activations. For each batch of epoch 1 the share of its rows that
is in the one batch of epoch 0 with which it has most in common; and how many rows of a batch share their context with a row of it.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from pipeline.activations.epoch_order import EpochOrder
from pipeline.activations.order import Numbers, Order
from pipeline.activations.shards import ActivationSet
from pipeline.config.activation_source import DiskActivations, Harvest
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.schema import build
from pipeline.run import Run
from pipeline.stages import cache_activations

CPU = torch.device("cpu")
SCALE, NUM_SHARDS, BATCH_POSITIONS, CONTEXTS_A_SHARD, CONTEXT_TOKENS = 16, 32, 8192, 1024, 1024
NUM_EPOCHS = 3


def measured_variances(tokens: Path, model: str, layers: list[str]) -> dict[str, float]:
    """The variance of batch means in each order, in units of that of independent rows."""
    shipped = DiskActivations(path=Path("unused"))
    shuffle = shipped.model_copy(update={"shuffle_positions": shipped.shuffle_positions // SCALE})
    with tempfile.TemporaryDirectory() as temporary:
        contexts = CONTEXTS_A_SHARD // SCALE
        values = {"stage": "cache", "name": "bench", "output": f"{temporary}/set", "tokens": str(tokens), "layers": layers}
        values |= {"language_model": {"model": model}, "context_tokens": 256, "contexts_per_generation": contexts}
        values |= {"max_tokens": NUM_SHARDS * contexts * 255}
        cache_activations.run(build(CacheConfig, values, "bench"), Run(Path(temporary) / "run"))
        activations = ActivationSet.open(Path(temporary) / "set", CPU, shuffle=shuffle)
        return _variances(activations, Path(temporary) / "set")


def _variances(activations: ActivationSet, directory: Path) -> dict[str, float]:
    size = BATCH_POSITIONS // SCALE
    rows_NLD = torch.cat([safetensors.torch.load_file(path)["act"] for path in sorted(directory.glob("*.safetensors"))])
    independent_L = rows_NLD.double().var(0).sum(-1) / size
    generator = torch.Generator().manual_seed(0)

    def shuffled() -> Iterator[Tensor]:
        for _ in range(NUM_EPOCHS):
            for indices in torch.randperm(len(rows_NLD), generator=generator).split(size):
                yield rows_NLD[indices]

    def mixed() -> Iterator[Tensor]:
        for epoch in range(NUM_EPOCHS):
            for batch in activations.batches(batch_positions=size, epoch=epoch, cursor=0):
                yield batch.acts_BLD

    orders = {"stored": iter(rows_NLD.split(size)), "mixed": mixed(), "independent": shuffled()}
    return {name: _variance_of_means(batches, size, independent_L) for name, batches in orders.items()}


def _variance_of_means(batches: Iterator[Tensor], size: int, independent_L: Tensor) -> float:
    """Of batches that have nearly all their rows: a few are left out as outliers, and the last of an epoch is short."""
    means_MLD = torch.stack([acts_BLD.double().mean(0) for acts_BLD in batches if len(acts_BLD) > 0.95 * size])
    return float((means_MLD.var(0).sum(-1) / independent_L).mean())


def overlaps() -> dict[str, dict[str, float]]:
    """Of each order, at full size."""
    lengths = np.full(NUM_SHARDS * CONTEXTS_A_SHARD, CONTEXT_TOKENS)
    settings = Harvest.model_construct(context_tokens=CONTEXT_TOKENS, contexts_per_generation=CONTEXTS_A_SHARD, max_tokens=None, seed=0)
    order = Order(lengths, settings, drop_positions=[0])
    context_of_row = np.concatenate([_contexts_as_stored(order, generation) for generation in range(order.num_generations)])
    first_row = np.cumsum(order.rows) - order.rows
    source = np.random.default_rng(0)
    found = {}
    for name in ("stored", "mixed", "independent"):
        if name == "stored":
            epochs = [_stored(order, first_row, source.permutation(order.num_generations) if epoch else None) for epoch in (0, 1)]
        elif name == "mixed":
            epochs = [_mixed(order, first_row, epoch) for epoch in (0, 1)]
        else:
            epochs = [source.permutation(order.num_positions) for _ in (0, 1)]
        found[name] = _in_common(*epochs) | {"rows_of_the_same_context": _same_context(context_of_row[epochs[0]])}
    return found


def _contexts_as_stored(order: Order, generation: int) -> Numbers:
    """The context of each row of a shard, as it lies on disk; numbered in the order of harvesting."""
    contexts = np.empty(int(order.rows[generation]), np.int64)
    harvested = np.repeat(np.arange(*order.context_range(generation)), CONTEXT_TOKENS - 1)
    contexts[order.places(generation, CPU).numpy()] = harvested
    return contexts


def _stored(order: Order, first_row: Numbers, generations: Numbers | None) -> Numbers:
    taken = range(order.num_generations) if generations is None else generations.tolist()
    return np.concatenate([np.arange(first_row[g], first_row[g] + order.rows[g]) for g in taken])


def _mixed(order: Order, first_row: Numbers, epoch: int) -> Numbers:
    """The rows of an epoch in its order, numbered as they are stored."""
    epoch_order = EpochOrder(order.rows, DiskActivations(path=Path("unused")), seed=0, epoch=epoch)
    taken = np.empty(order.num_positions, np.int64)
    for strip in epoch_order.strips:
        stored = np.concatenate([np.arange(first_row[g], first_row[g] + order.rows[g]) for g in strip.generations])
        taken[strip.first + epoch_order.places(strip, CPU).numpy()] = stored
    return taken


def _batches(taken: Numbers) -> Numbers:
    """The whole batches of an epoch, a row each."""
    return taken[: len(taken) // BATCH_POSITIONS * BATCH_POSITIONS].reshape(-1, BATCH_POSITIONS)


def _in_common(first: Numbers, second: Numbers) -> dict[str, float]:
    batch_of_row = np.empty(len(first), np.int64)
    batch_of_row[first] = np.arange(len(first)) // BATCH_POSITIONS
    shares = np.array([np.bincount(batch_of_row[batch]).max() for batch in _batches(second)]) / BATCH_POSITIONS
    return {"mean_overlap": float(shares.mean()), "greatest_overlap": float(shares.max())}


def _same_context(context_of_taken: Numbers) -> float:
    """How many other rows of its batch a row shares its context with; the mean."""
    counts = [np.unique(batch, return_counts=True)[1] for batch in _batches(context_of_taken)[::16]]
    return float(np.mean([(count * (count - 1)).sum() / BATCH_POSITIONS for count in counts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path, help="a token set of the model's tokenizer")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--layers", nargs="+", default=["transformer.h.2", "transformer.h.3"])
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = dict(overlaps())
    for name, variance in measured_variances(options.tokens, options.model, options.layers).items():
        found[name] |= {"variance": variance}
    for name, values in found.items():
        print(
            f"{name}: variance of batch means {values['variance']:.3f}; a batch of epoch 1 has {values['mean_overlap']:.2%} of its rows in "
            f"common with one of epoch 0, {values['greatest_overlap']:.2%} at most; {values['rows_of_the_same_context']:.2f} other rows "
            "of a row's context in its batch"
        )
    if options.json is not None:
        facts = {"command": "python -m bench.batch_independence " + " ".join(sys.argv[1:]), "date": time.strftime("%Y-%m-%d")}
        facts |= {"machine": f"{os.cpu_count()} cores of {platform.machine()}; torch {torch.__version__}"}
        options.json.write_text(json.dumps(facts | {"orders": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
