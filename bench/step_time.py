"""How near a training step is to the matrix products that it can't do without: both timed in turn, in one run.

    python bench/step_time.py --device cuda --precision bfloat16 --features 12288 32768 --positions 4096 8192
    python bench/step_time.py --features 256 --positions 128 --width 32          # a minute on a CPU, to see that it runs

The floor is the five products of a step (encode, decode, and the gradients of features, decoder and encoder) on operands
that lie ready in the step's precision. `adam` is the update of the float32 weights alone, which moves 28 bytes a weight.
The step is the trainer's own, from raw activations to updated weights and counters. Median of the rounds; in a round each
is timed once, over `--steps` steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.activations.source import ActivationBatch, LayerStatistics, Provenance
from pipeline.config.schema import build
from pipeline.config.train_crosscoder import TrainConfig
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run


class Shape(NamedTuple):
    positions: int
    layers: int
    width: int
    features: int


class OneBatch:
    """An activation source that the bench never iterates: it calls the trainer's step with a batch of its own."""

    data_id = "bench"
    provenance = Provenance("bench", "bench", "bench", 1024, [0])
    num_positions = 10**9

    def __init__(self, shape: Shape) -> None:
        self.layers = [f"layer.{i}" for i in range(shape.layers)]
        self.d_model = shape.width
        moments = torch.full((shape.layers,), float(shape.width), dtype=torch.float64)
        self.statistics = LayerStatistics(torch.zeros(shape.layers, shape.width, dtype=torch.float64), moments, 1)

    def batches(self, *, batch_positions: int, epoch: int, cursor: int) -> Iterator[ActivationBatch]:
        raise NotImplementedError


def training_step(shape: Shape, variant: str, options: argparse.Namespace, directory: Path) -> Callable[[], None]:
    """One step of the trainer on random activations; `auxk` is batch_topk with a share of its features dead."""
    device = torch.device(options.device)
    relu = variant == "relu"
    values: dict[str, Any] = {
        "stage": "train",
        "name": "bench",
        "activations": {"kind": "disk", "path": directory},
        "crosscoder": {
            "num_features": shape.features,
            "activation_function": {"kind": "relu"} if relu else {"kind": "batch_topk", "k": options.k},
        },
        "loss": {"l1": {"coefficient": 2.0}} if relu else {"auxk": {}},
        "num_tokens": 10**9,
        "batch_positions": shape.positions,
        "dead_window_tokens": 10**9,
        "precision": options.precision,
        "compile": options.compile,
    }
    trainer = Trainer(build(TrainConfig, values, "bench"), OneBatch(shape), Run(directory), device)
    dtype = getattr(torch, options.precision)
    raw_BLD = torch.randn(shape.positions, shape.layers, shape.width, device=device).to(dtype)
    if variant == "auxk":
        trainer.state.dead_J = torch.arange(max(1, round(options.dead * shape.features)), device=device)
    return lambda: trainer.train_step(raw_BLD)


def five_products(shape: Shape, options: argparse.Namespace) -> Callable[[], None]:
    """The matrix products of a step, forward and backward, and nothing else."""
    columns, dtype = shape.layers * shape.width, getattr(torch, options.precision)
    acts_BC = torch.randn(shape.positions, columns, device=options.device, dtype=dtype)
    features_BF = torch.randn(shape.positions, shape.features, device=options.device, dtype=dtype)
    W_enc_CF = torch.randn(columns, shape.features, device=options.device, dtype=dtype)
    W_dec_FC = torch.randn(shape.features, columns, device=options.device, dtype=dtype)

    def products() -> None:
        acts_BC @ W_enc_CF
        features_BF @ W_dec_FC
        acts_BC @ W_dec_FC.T
        features_BF.T @ acts_BC
        acts_BC.T @ features_BF

    return products


def adam(shape: Shape, options: argparse.Namespace) -> Callable[[], None]:
    """The optimizer's update of encoder and decoder alone."""
    weights: list[Tensor] = []
    for _ in range(2):
        weight = torch.randn(shape.layers * shape.width, shape.features, device=options.device, requires_grad=True)
        weight.grad = torch.randn_like(weight)
        weights.append(weight)
    return torch.optim.Adam(weights, fused=options.device == "cuda").step


def milliseconds(work: Callable[[], None], steps: int, device: str) -> float:
    """Of one step, over `steps` steps between two waits for the device."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        work()
    _wait(device)
    return 1e3 * (time.perf_counter() - started) / steps


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(shape: Shape, options: argparse.Namespace) -> None:
    """Times everything at one shape and prints a line for each."""
    for variant in options.variants:
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as directory:
            works = {"products": five_products(shape, options), "adam": adam(shape, options)}
            works["step"] = training_step(shape, variant, options, Path(directory))
            times: dict[str, list[float]] = {name: [] for name in works}
            for work in works.values():
                milliseconds(work, options.warmup, options.device)
            for _ in range(options.rounds):
                for name, work in works.items():
                    times[name].append(milliseconds(work, options.steps, options.device))
        _print(shape, variant, {name: statistics.median(values) for name, values in times.items()}, options)


def _print(shape: Shape, variant: str, median: dict[str, float], options: argparse.Namespace) -> None:
    peak = f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if options.device == "cuda" else ""
    teraflops = 10 * shape.positions * shape.layers * shape.width * shape.features / median["products"] / 1e9
    floor = median["products"] + median["adam"]
    print(
        f"B {shape.positions:5d}  F {shape.features:6d}  {variant:10s}  products {median['products']:8.3f} ms ({teraflops:.1f} TFLOP/s)  "
        f"adam {median['adam']:7.3f} ms  step {median['step']:8.3f} ms  step/products {median['step'] / median['products']:.2f}  "
        f"step/(products+adam) {median['step'] / floor:.2f}  {1e3 * shape.positions / median['step']:,.0f} positions/s{peak}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--positions", type=int, nargs="+", default=[4096], help="positions in a batch")
    parser.add_argument("--features", type=int, nargs="+", default=[12288], help="size of the dictionary")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=768, help="of the language model")
    parser.add_argument("--k", type=int, default=64, help="features that fire a position, for batch_topk")
    parser.add_argument("--dead", type=float, default=0.1, help="share of features that are dead, for auxk")
    parser.add_argument("--variants", nargs="+", choices=["relu", "batch_topk", "auxk"], default=["relu", "batch_topk", "auxk"])
    parser.add_argument("--compile", action="store_true", help="compile the step with torch.compile")
    parser.add_argument("--steps", type=int, default=10, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first round")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}, {options.precision}, L {options.layers}, D {options.width}, compile {options.compile}")
    for positions in options.positions:
        for features in options.features:
            measure(Shape(positions, options.layers, options.width, features), options)


if __name__ == "__main__":
    main()
