"""What `outlier_norm_ratio` leaves out of a model's activations on real text, for several ratios.

    python -m bench.outliers --config configs/demo/cache.yaml --json bench/results/outliers-demo.json
    python -m bench.outliers --config configs/demo/cache.yaml --positions 98304 --json bench/results/outliers-smollm2-256.json \
        tokens=tokens/train language_model.model=smollm2 language_model.dtype=float32 \
        layers='[model.layers.14, model.layers.15]' context_tokens=256 model_batch_contexts=16 max_tokens=null

Run in the repository's root. The configuration is one of the cache stage, with changes behind it; its leading contexts are read, of
`--positions` positions in all, position 0 left out. The limits are those that the stage would fix, from the same contexts.

Shapes: N positions, L layers, D model width.
"""

import argparse
import datetime
import json
import platform
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.activations.harvest import Harvester
from pipeline.activations.outliers import LEADING_TOKENS, limits_from, norms
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.load import load
from pipeline.language_models import load_models
from pipeline.tokens import TokenSet

RATIOS = (3.0, 5.0, 10.0, 20.0, 50.0)


def leading_rows(harvester: Harvester, num_positions: int) -> tuple[Tensor, Tensor]:
    """acts_NLD and the place in its context of each, of the order's leading model batches with so many positions in all."""
    acts, places, found = list[Tensor](), list[Tensor](), 0
    for generation in range(harvester.order.num_generations):
        for made in harvester.rows(generation):
            if found >= num_positions:
                break
            acts.append(made.rows.acts_BLD.cpu())
            places.append(made.rows.positions_B.cpu())
            found += len(places[-1])
    return torch.cat(acts), torch.cat(places)


def row(acts_NLD: Tensor, places_N: Tensor, limits_L: Tensor, ratio: float) -> dict[str, Any]:
    """What the limits leave out."""
    norms_NL = norms(acts_NLD)
    outlier_N = (norms_NL > limits_L).any(1)
    squares_NL = norms_NL.double().square()
    # In chunks: all rows in float64 would take several GB.
    parts = torch.split(acts_NLD, 4096)
    mean_LD = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(acts_NLD)
    distances_NL = torch.cat([(part.double() - mean_LD).square().sum(-1) for part in parts])
    by_layer = {
        "norm_limit": limits_L.tolist(),
        "share_of_squared_norm": (squares_NL[outlier_N].sum(0) / squares_NL.sum(0)).tolist(),
        "share_of_variance": (distances_NL[outlier_N].sum(0) / distances_NL.sum(0)).tolist(),
        "greatest_norm_kept": norms_NL[~outlier_N].amax(0).tolist(),
        "greatest_norm": norms_NL.amax(0).tolist(),
    }
    positions = {"left_out": int(outlier_N.sum()), "their_positions": sorted(places_N[outlier_N].tolist())[:50]}
    return {"ratio": ratio, **positions, "by_layer": by_layer}


def measured(config: CacheConfig, num_positions: int) -> dict[str, Any]:
    """The figures of all ratios."""
    tokens, model = TokenSet.open(config.tokens), load_models(config)
    harvester = Harvester(tokens, model, config, lambda: None)
    acts_NLD, places_N = leading_rows(harvester, num_positions)
    first = norms(acts_NLD)[: max(1, min(LEADING_TOKENS, len(acts_NLD)))]
    rows = [row(acts_NLD, places_N, limits_from(first, ratio), ratio) for ratio in RATIOS]
    facts = {"language_model": model.name, "layers": config.layers, "context_tokens": config.context_tokens}
    median_L = first.median(dim=0).values.tolist()
    return facts | {"positions": len(acts_NLD), "median_norm": median_L, "ratios": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", help="settings of the configuration, key=value")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=65_536)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = load(arguments.config, arguments.changes)
    assert isinstance(config, CacheConfig), "the configuration is one of the cache stage"
    found = measured(config, arguments.positions)
    for each in found["ratios"]:
        shares = ", ".join(f"{100 * share:.3g} %" for share in each["by_layer"]["share_of_squared_norm"])
        print(f"ratio {each['ratio']:g}: {each['left_out']:,} of {found['positions']:,} positions, {shares} of |x|^2")
    if arguments.json is not None:
        named = [
            f"--config {arguments.config}",
            f"--positions {arguments.positions}",
            f"--json {arguments.json}",
            *map(shlex.quote, arguments.changes),
        ]
        head = {"command": f"python -m bench.outliers {' '.join(named)}", "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"}
        head |= {"machine": f"{platform.machine()}, {model_device(config)}; torch {torch.__version__}"}
        arguments.json.write_text(json.dumps(head | found, indent=1) + "\n", encoding="utf-8")


def model_device(config: CacheConfig) -> str:
    """Where the model ran, in words."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


if __name__ == "__main__":
    main()
