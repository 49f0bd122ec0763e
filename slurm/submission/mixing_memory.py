"""How much memory a training takes to mix its activations, from manifests and a model's config.json, without torch."""

from pipeline import records
from pipeline.config.activation_source import DiskActivations, StreamedActivations
from pipeline.config.stage import StageConfig
from pipeline.config.train_crosscoder import TrainConfig
from slurm.submission.input_preflight import DTYPE_BYTES, model_shape

_NUMBER_BYTES = 3 * 8
"""Of a position in memory: token, document and place in its context."""


def mixing_memory(config: StageConfig) -> str | None:
    """A sentence; None where nothing is mixed, or what is read is not there yet."""
    if not isinstance(config, TrainConfig):
        return None
    if isinstance(config.activations, StreamedActivations):
        return _of_stream(config.activations)
    return _of_disk(config.activations)


def _of_disk(source: DiskActivations) -> str | None:
    if not (source.path / records.MANIFEST).is_file():
        return None
    facts = records.read_manifest(source.path)
    row = len(facts["layers"]) * int(facts["d_model"]) * DTYPE_BYTES[facts["dtype"]] + _NUMBER_BYTES
    # One pool is read while batches are gathered from another.
    needed = 2 * min(source.shuffle_positions, int(facts["num_positions"])) * row
    return f"mixing takes {needed / 1e9:.2f} GB of the CPU's memory (activations.shuffle_positions: {source.shuffle_positions:,})"


def _of_stream(source: StreamedActivations) -> str | None:
    models = list(source.models.values())
    d_model = next((shape.d_model for shape in map(model_shape, models) if shape.d_model is not None), None)
    if d_model is None:
        return None
    dropped = sum(position < source.context_tokens for position in source.drop_positions)
    positions = source.shuffle_generations * source.contexts_per_generation * (source.context_tokens - dropped)
    row, held = len(source.layers) * d_model * DTYPE_BYTES[models[0].dtype] + _NUMBER_BYTES, source.shuffle_generations
    needed = min(positions, source.max_tokens or positions) * row
    return f"the buffer takes up to {needed / 1e9:.2f} GB on the model's device (activations.shuffle_generations: {held})"
