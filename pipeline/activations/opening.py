"""From a training configuration to the activations that it names."""

import torch

from pipeline.activations.shards import ActivationSet
from pipeline.activations.source import ActivationSource
from pipeline.activations.stream import ActivationStream
from pipeline.config.activation_source import DiskActivations, StreamedActivations
from pipeline.language_models import bind, load_models
from pipeline.run import Run
from pipeline.tokens import TokenSet


def open_source(config: DiskActivations | StreamedActivations, run: Run, device: torch.device) -> ActivationSource:
    """The activations that `config` names, their batches on `device`; binds what is read as the run's inputs.

    Raises `UserError` for an input that is missing, damaged or not the one that the run began with.
    """
    if isinstance(config, DiskActivations):
        ahead, is_checked = config.prefetch_batches, config.check_hashes
        activations = ActivationSet.open(config.path, device, shuffle=config, prefetch_batches=ahead, check_hashes=is_checked)
        run.bind_input("activations", activations.data_id)
        return activations
    tokens = TokenSet.open(config.tokens)
    run.bind_input("tokens", tokens.data_id)
    if config.check_hashes:
        tokens.check_hashes(run)
    model = load_models(config, device.type)
    bind(model, run)
    return ActivationStream(tokens, model, config, run)
