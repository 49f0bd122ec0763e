"""Activations of text that training doesn't see, for measuring a crosscoder as it is trained."""

import torch

from pipeline.activations.model_check import other_model
from pipeline.activations.source import ActivationBatch, ActivationSource
from pipeline.activations.stream import ActivationStream
from pipeline.config.activation_source import StreamedActivations
from pipeline.config.errors import UserError
from pipeline.config.train_crosscoder import HeldOut
from pipeline.language_models import Models, bind, load_models
from pipeline.run import Run
from pipeline.tokens import TokenSet

MODEL_BATCH_CONTEXTS = 8


def held_out_rows(settings: HeldOut, source: ActivationSource, run: Run, device: torch.device, *, seed: int) -> ActivationBatch:
    """The rows of `settings.positions` positions, harvested as the source's are, on `device`; fewer where the text has fewer.

    What the source leaves out, for its norm or token, is left out of these, too.

    Raises `UserError` if the model is not the one that the source's activations are of, or the token set is the source's own.
    """
    made_from, tokens = source.provenance, TokenSet.open(settings.tokens)
    run.bind_input("held_out", tokens.data_id)
    if tokens.data_id == made_from.tokens_id:
        raise UserError(f"held_out.tokens is {settings.tokens}, the token set that is trained on; name one that training does not see")
    model = _model(settings, source, run, device)
    if (other := other_model(made_from, model)) is not None:
        raise UserError(f"held_out: {other.given}, but the activations are of {other.known}; name the model that they were computed with")
    models = settings if settings.models else _streamed(source).settings
    harvest = StreamedActivations(
        tokens=settings.tokens,
        language_model=models.language_model,
        language_models=models.language_models,
        layers=source.layers,
        context_tokens=made_from.context_tokens,
        drop_positions=made_from.drop_positions,
        outlier_norm_ratio=None,
        exclude_token_ids=made_from.exclude_token_ids or [],
        beginning_of_text=made_from.beginning_of_text_id is not None,
        # One generation, so that the rows are those of contexts drawn from all of the text.
        contexts_per_generation=-(-settings.positions // max(1, made_from.context_tokens - len(made_from.drop_positions))) + 1,
        model_batch_contexts=MODEL_BATCH_CONTEXTS,
        max_tokens=settings.positions,
        seed=seed,
    )
    stream = ActivationStream(tokens, model, harvest, run, outlier_norms=made_from.outlier_norms)
    return next(stream.batches(batch_positions=stream.num_positions, epoch=0, cursor=0))


def _model(settings: HeldOut, source: ActivationSource, run: Run, device: torch.device) -> Models:
    if not settings.models:
        return _streamed(source).models
    model = load_models(settings, device.type)
    bind(model, run)
    return model


def _streamed(source: ActivationSource) -> ActivationStream:
    assert isinstance(source, ActivationStream), "the configuration asks for a model wherever activations are not streamed"
    return source
