"""train: a crosscoder from activations on disk or straight from the language model."""

from typing import Any

import torch

from pipeline.activations.held_out_rows import held_out_rows
from pipeline.activations.opening import open_source
from pipeline.config.activation_source import StreamedActivations
from pipeline.config.errors import UserError
from pipeline.config.token_limit import short_of
from pipeline.config.train_crosscoder import TrainConfig
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run


def run(config: TrainConfig, run: Run) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint in the run directory where there is one."""
    device = chosen_device(config.device)
    source = open_source(config.activations, run, device)
    if (there := source.num_positions) < config.batch_positions:
        run.say(f"batch_positions is {config.batch_positions:,}, but there are {there:,} positions: every step takes all of them")
    held_out_NLD = None
    if config.held_out is not None:
        held_out_NLD = held_out_rows(config.held_out, source, run, device, seed=config.seed).acts_BLD
    allowed = config.activations.max_tokens if isinstance(config.activations, StreamedActivations) else None
    return Trainer(config, source, run, device, held_out_NLD).train() | short_of(allowed, source.num_positions)


def chosen_device(setting: str) -> torch.device:
    """`auto` is a GPU when there is one; `cuda` without one raises `UserError`."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here; use device=auto or cpu, or ask for one with resources.gpus=1")
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")
