"""Looks on the login node at sizes and shapes: inputs that don't belong together, disk that won't hold what is made.

Reads manifests and a model's config.json, without torch. What is not there yet, made by an earlier run of the chain, or lies
on a hub is left to the stage, which checks all of this again by what it opens.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import records
from pipeline.config import token_limit
from pipeline.config.activation_source import DiskActivations, Harvest, StreamedActivations
from pipeline.config.beginning_of_text import is_wanted
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.count_tokens import CountConfig
from pipeline.config.errors import UserError
from pipeline.config.generate_text import GenerateConfig
from pipeline.config.held_out_text import HeldOutText
from pipeline.config.import_crosscoder import ImportConfig
from pipeline.config.language_model import CONTEXT_FIELDS, LanguageModelConfig
from pipeline.config.language_models import field_of
from pipeline.config.sites import SiteName
from pipeline.config.stage import StageConfig
from pipeline.config.tokenize_text import TokenizeConfig
from pipeline.config.train_crosscoder import LogSpacedHistory, TokensHistory, TrainConfig
from pipeline.model_files import read_config
from pipeline.run import byte_size
from slurm.record.known_hashes import KnownHashes
from slurm.submission import model_preflight
from slurm.submission.block_names import layer_fault
from slurm.submission.data_preflight import is_pending, output_faults, set_faults, source_faults

Facts = dict[str, Any]
Models = Mapping[str, LanguageModelConfig]
"""By name; a single one is called `""`."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SPARE_BYTES = 64 << 20
"""Beside the data, for records and whatever else the disk is used for meanwhile."""


class ModelShape(NamedTuple):
    """What a model's config.json says; None where it doesn't."""

    num_blocks: int | None
    d_model: int | None
    max_context: int | None
    vocab_size: int | None
    model_type: str | None


def check(parsed: Sequence[tuple[str, StageConfig]], runs: Path, pending: Sequence[Path] = ()) -> None:
    """Raises `UserError` with each reason why a stage of `parsed` would refuse its inputs or outputs, or run out of disk.

    pending : what runs that are queued already will make.
    """
    faults, pending = [], list(pending)
    for where, config in parsed:
        faults += [f"{where}: {fault}" for fault in faults_of(config, runs, pending)]
        pending += [*config.outputs().values(), runs.absolute() / config.stage / config.name]
    if faults:
        raise UserError("\n".join(faults))


def faults_of(config: StageConfig, runs: Path, pending: Sequence[Path] = ()) -> list[str]:
    """One phrase for each thing that can be seen to be wrong: field, what was found, what there is.

    pending : what runs before this one will make; what stands there now is not what it will read.
    """
    faults = [fault for field, path in _sets_read(config).items() for fault in set_faults(field, path, pending)]
    return faults + output_faults(config, pending, KnownHashes(runs.absolute()).hash_file) + _stage_faults(config, runs, pending)


def notices(parsed: Sequence[tuple[str, StageConfig]], pending: Sequence[Path] = ()) -> list[str]:
    """A sentence for each `max_tokens` of `parsed` that allows more than the token set holds that is there already."""
    said, pending = [], list(pending)
    for where, config in parsed:
        said += [f"{where}: {notice}" for notice in _limit_notices(config, pending)]
        pending += config.outputs().values()
    return list(dict.fromkeys(said))


def _limit_notices(config: StageConfig, pending: Sequence[Path]) -> list[str]:
    reading = config.activations if isinstance(config, TrainConfig | ImportConfig) else config
    if not isinstance(reading, Harvest | HeldOutText) or (tokens := _manifest(reading.tokens, pending, "token-set")) is None:
        return []
    if isinstance(reading, HeldOutText):
        there = int(tokens["tokens"]) + int(tokens["documents"])
        return token_limit.notices(reading.max_tokens, there, where=reading.tokens, unit="tokens", is_estimate=True)
    there = _kept_positions(reading, tokens)
    return token_limit.notices(reading.max_tokens, there, where=reading.tokens, unit="positions", is_estimate=True)


def _sets_read(config: StageConfig) -> dict[str, Path]:
    """The data sets among the inputs, by the field as it is written in YAML."""
    read = config.inputs() if isinstance(config, CacheConfig | CountConfig | HeldOutText | ImportConfig | TrainConfig) else {}
    runs = ("crosscoder", "compare_with")
    return {config.field_of_input(name): path for name, path in read.items() if not name.startswith(runs)}


def _stage_faults(config: StageConfig, runs: Path, pending: Sequence[Path]) -> list[str]:
    if isinstance(config, TokenizeConfig):
        return source_faults(config, pending) + model_preflight.tokenizer_faults(config.tokenizer)
    if isinstance(config, CacheConfig):
        tokens = _manifest(config.tokens, pending, "token-set")
        return _harvest_faults(config, tokens) + _cache_disk_faults(config, tokens)
    if isinstance(config, TrainConfig):
        return _train_faults(config, runs, pending)
    if isinstance(config, HeldOutText):
        return _held_out_faults(config, pending)
    if isinstance(config, GenerateConfig):
        return _generate_faults(config, pending)
    if isinstance(config, ImportConfig):
        absent = [] if config.path.exists() else [f"path is {config.path}, but nothing is there; name the directory of the files"]
        return absent + _source_faults(config.activations, pending)[0]
    return []


def model_shape(config: LanguageModelConfig) -> ModelShape:
    """The shape of a model whose directory, or copy in the hub's cache, is on this machine."""
    path = model_preflight.telling_file(config)
    facts = read_config(path.parent) if path is not None else {}
    model_type = facts.get("model_type")
    facts = facts.get("text_config") or facts

    def first(*keys: str) -> int | None:
        return next((int(facts[key]) for key in keys if isinstance(facts.get(key), int)), None)

    return ModelShape(
        first("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        first("hidden_size", "n_embd", "d_model"),
        min((limit for key in CONTEXT_FIELDS if (limit := first(key)) and limit > 0), default=None),
        first("vocab_size"),
        model_type,
    )


def _manifest(directory: Path, pending: Sequence[Path], kind: str) -> Facts | None:
    """The manifest of a data set that is there already. Raises `UserError` if it is of another kind than `kind`."""
    if not (directory / records.MANIFEST).is_file() or is_pending(directory, pending):
        return None
    facts = records.read_manifest(directory)
    if (found := str(facts.get("format"))).partition("/")[0] != kind:
        raise UserError(
            f"{directory / records.MANIFEST} is of format {found!r}, expected {kind!r}: it is not the data set that belongs here"
        )
    return facts


# -- inputs that don't belong together --------------------------------------------------------------------------------


def _harvest_faults(settings: Harvest, tokens: Facts | None) -> list[str]:
    shapes, faults = _shapes(settings.models), _model_faults(settings.models, settings, tokens)
    if tokens is not None and settings.beginning_of_text is True and tokens.get("beginning_of_text_id") is None:
        why = "it was made before that was recorded" if "adds_beginning_of_text" not in tokens else "its tokenizer has none"
        faults.append(f"beginning_of_text is true, but {settings.tokens} names no such token: {why}; set it to auto or false")
    for index, layer in enumerate(settings.layers):
        key = SiteName.parse(layer).model
        if fault := layer_fault(layer, settings.models[key].model, shapes[key].model_type, shapes[key].num_blocks):
            faults.append(f"layers[{index}] is {layer}, {fault}")
    return faults


def _shapes(models: Models) -> dict[str, ModelShape]:
    return {name: model_shape(model) for name, model in models.items()}


def _model_faults(models: Models, config: Harvest | HeldOutText, tokens: Facts | None) -> list[str]:
    """What is wrong with the models themselves, with each one's reading of the tokens, and with their being read together."""
    faults = []
    shapes = _shapes(models)
    for name, model in models.items():
        faults += model_preflight.faults_of(model, field=field_of(name))
        faults += _reading_faults(config.context_tokens, model, shapes[name], tokens, config.tokens)
        faults += _excluded_faults(config, model, shapes[name])
    widths = {name: shape.d_model for name, shape in shapes.items() if shape.d_model is not None}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{width:,} ({name})" for name, width in widths.items())
        faults.append(f"language_models have width {listed}, but sites of a crosscoder have one width; take models of one size")
    sizes = {name: shape.vocab_size for name, shape in shapes.items() if shape.vocab_size is not None}
    if len(set(sizes.values())) > 1 and all(model.check_tokenizer for model in models.values()):
        listed = ", ".join(f"{size:,} ({name})" for name, size in sizes.items())
        faults.append(
            f"language_models have numbers of embeddings {listed}, but all read the same ids; take models of one vocabulary, or set "
            "check_tokenizer of all to false if the ids mean the same"
        )
    return faults


def _excluded_faults(config: Harvest | HeldOutText, model: LanguageModelConfig, shape: ModelShape) -> list[str]:
    """`exclude_token_ids` that the model does not have."""
    if not isinstance(config, Harvest) or shape.vocab_size is None:
        return []
    unknown = [token_id for token_id in config.exclude_token_ids if token_id >= shape.vocab_size]
    last = f"{model.model} has the ids 0 to {shape.vocab_size - 1:,}"
    return [f"exclude_token_ids names {unknown[0]:,}, but {last}; correct it or leave it out"] if unknown else []


def _d_model(models: Models) -> int | None:
    """The width of the models, as far as the configuration of one of them says it."""
    return next((shape.d_model for shape in _shapes(models).values() if shape.d_model is not None), None)


def _reading_faults(context_tokens: int, model: LanguageModelConfig, shape: ModelShape, tokens: Facts | None, directory: Path) -> list[str]:
    faults = []
    if shape.max_context is not None and context_tokens > shape.max_context:
        faults.append(
            f"context_tokens is {context_tokens:,}, but {model.model} reads at most {shape.max_context:,} tokens; use a smaller number"
        )
    if tokens is None or shape.vocab_size is None or tokens["vocab_size"] <= shape.vocab_size:
        return faults
    # A tokenizer may have more tokens than the model has embeddings; only those that are used have to be there.
    last = f"{model.model} has embeddings for ids up to {shape.vocab_size - 1:,}"
    greatest = max((int(records.read_json(directory / f"{stem}.json")["max_id"]) for stem in tokens["shards"]), default=-1)
    if greatest >= shape.vocab_size:
        faults.append(f"tokens holds id {greatest:,}, but {last}; tokenize with the model's own tokenizer")
    elif tokens["end_of_text_id"] >= shape.vocab_size:
        end = f"id {tokens['end_of_text_id']:,} ({tokens.get('end_of_text', 'not recorded as text')})"
        faults.append(f"tokens has {end} as its end of text, but {last}; tokenize it again with tokenizer.end_of_text set to another")
    return faults


def _held_out_faults(config: HeldOutText, pending: Sequence[Path]) -> list[str]:
    models, tokens = config.models, _manifest(config.tokens, pending, "token-set")
    faults = _model_faults(models, config, tokens)
    trained, of_crosscoder = _crosscoder_faults(config.crosscoder, models, pending)
    faults += of_crosscoder
    if trained is None:
        return faults
    if tokens is not None and tokens["tokenizer_hash"] != trained["tokenizer_hash"]:
        faults.append(
            f"tokens was made by the tokenizer {tokens['tokenizer_hash'][:12] or '(none)'}, the tokens that the crosscoder was trained on "
            f"by {trained['tokenizer_hash'][:12] or '(none)'}; tokenize the held-out text with the same tokenizer"
        )
    if config.beginning_of_text not in ("auto", "beginning_of_text_id" in trained):
        does = "begin" if "beginning_of_text_id" in trained else "do not begin"
        faults.append(
            f"beginning_of_text is {str(config.beginning_of_text).lower()}, but contexts of the training {does} so; set it to auto"
        )
    return faults


def _generate_faults(config: GenerateConfig, pending: Sequence[Path]) -> list[str]:
    faults = [fault for name, model in config.models.items() for fault in model_preflight.faults_of(model, field=field_of(name))]
    if config.prompts_file is not None and not config.prompts_file.is_file():
        faults.append(f"prompts_file is {config.prompts_file}, where there is no file; name one with a prompt a line, or one of JSON lines")
    trained, of_crosscoder = _crosscoder_faults(config.crosscoder, config.models, pending)
    faults += of_crosscoder
    if trained is None:
        return faults
    named = {"layers": config.layers or [], "steering.layers": (config.steering and config.steering.layers) or []}
    known = [layer for layer in trained["layers"] if SiteName.parse(layer).model == config.written_by]
    unknown = [(field, layer) for field, layers in named.items() for layer in layers if layer not in known]
    faults += [f"{field} names {layer}, but the crosscoder is of {', '.join(known)}; name one of those" for field, layer in unknown]
    count = int(trained["config"]["num_features"])
    features = [] if config.steering is None else [feature for feature in config.steering.features if feature >= count]
    return faults + [f"steering.features names {feature}, but the crosscoder has features 0 to {count - 1:,}" for feature in features]


def _crosscoder_faults(path: Path, models: Models, pending: Sequence[Path]) -> tuple[Facts | None, list[str]]:
    """The record of the crosscoder at `path`, None where there is none to be seen yet; and what is wrong with it for these models."""
    if is_pending(path, pending) or not path.exists():
        return None, []
    trained = _crosscoder(path)
    if trained is None:
        return None, [f"crosscoder is {path}, which holds no checkpoint; name a run of train, or one of its checkpoints"]
    shapes, faults = _shapes(models), []
    for layer in trained["layers"]:
        site = SiteName.parse(layer)
        if site.model not in shapes:
            names = "one language_model" if "" in shapes else f"language_models {', '.join(shapes)}"
            faults.append(f"crosscoder reads {layer}, but {names} is named here; name the models that it was trained on")
            continue
        number, num_blocks = site.block.rpartition(".")[2], shapes[site.model].num_blocks
        if num_blocks is not None and number.isdigit() and int(number) >= num_blocks:
            faults.append(
                f"crosscoder reads {layer}, but {models[site.model].model} has blocks 0 to {num_blocks - 1}; name the model "
                "that it was trained on"
            )
    return trained, faults


def _crosscoder(path: Path) -> Facts | None:
    """The record of the newest checkpoint of the run, or of the folder of runs of one name, at `path`."""
    found = [path / "crosscoder.json"] if (path / "crosscoder.json").is_file() else []
    found = found or sorted(path.glob("checkpoints/*/crosscoder.json")) or sorted(path.glob("*/checkpoints/*/crosscoder.json"))
    return dict(records.read_json(found[-1])) if found else None


# -- disk -------------------------------------------------------------------------------------------------------------


def _cache_disk_faults(config: CacheConfig, tokens: Facts | None) -> list[str]:
    d_model, dtype = _d_model(config.models), next(iter(config.models.values())).dtype
    if tokens is None or d_model is None:
        return []
    positions = cached_positions(config, tokens)
    row = len(config.layers) * d_model * DTYPE_BYTES[dtype] + 4 + _item_bytes(tokens["dtype"]) + 2
    made = sum(path.stat().st_size for path in config.output.glob("*.safetensors")) if config.output.is_dir() else 0
    what = f"{positions:,} positions of {len(config.layers)} layers of width {d_model:,} in {dtype}"
    return _disk_faults("output", config.output, positions * row - made, what, "; or train with activations.kind=stream, which needs none")


def cached_positions(config: CacheConfig, tokens: Facts) -> int:
    """About how many rows the cache will have."""
    kept = _kept_positions(config, tokens)
    return min(kept, config.max_tokens) if config.max_tokens is not None else kept


def _kept_positions(config: Harvest, tokens: Facts) -> int:
    """About how many positions a token set has: every id but for the dropped positions of each context."""
    ids = int(tokens["tokens"]) + int(tokens["documents"])
    leading = {0} if is_wanted(config.beginning_of_text, is_added=tokens.get("adds_beginning_of_text")) else set()
    contexts = -(-ids // max(config.context_tokens - len(leading), 1))
    dropped = sum(position < config.context_tokens for position in leading.union(config.drop_positions))
    return ids + contexts * (len(leading) - dropped)


def _item_bytes(dtype: str) -> int:
    return 4 if dtype.endswith("32") else 2


def _source_faults(source: DiskActivations | StreamedActivations, pending: Sequence[Path]) -> tuple[list[str], tuple[int, int] | None]:
    """What is wrong with activations, and how many layers they are of and of which width, as far as that is known."""
    if isinstance(source, DiskActivations):
        facts = _manifest(source.path, pending, "activation-set")
        return [], (len(facts["layers"]), int(facts["d_model"])) if facts is not None else None
    d_model = _d_model(source.models)
    faults = [f"activations.{fault}" for fault in _harvest_faults(source, _manifest(source.tokens, pending, "token-set"))]
    return faults, (len(source.layers), d_model) if d_model is not None else None


def _train_faults(config: TrainConfig, runs: Path, pending: Sequence[Path]) -> list[str]:
    faults, size = _source_faults(config.activations, pending)
    if size is None:
        return faults
    layers, d_model = size
    features = config.crosscoder.num_features
    # Weights and Adam's two moments in float32; one checkpoint is written before the oldest goes.
    crosscoder = 4 * (2 * layers * d_model * features + features + layers * d_model)
    checkpoints, snapshots = config.checkpoints.keep + 1, _most_snapshots(config)
    written = f"{checkpoints} checkpoints" + (f" and {snapshots:,} snapshots" if snapshots else "")
    what = f"{written} of {features:,} features, {layers} layers of width {d_model:,}"
    needed, fewer = (3 * checkpoints + snapshots) * crosscoder, "checkpoints or snapshots" if snapshots else "checkpoints"
    return faults + _disk_faults("the root of runs", runs, needed, what, f"; or keep fewer {fewer}")


def _most_snapshots(config: TrainConfig) -> int:
    """How many snapshots a run writes at most; of one whose length is in epochs, those every so many tokens aren't known before."""
    history = config.checkpoints.history
    if isinstance(history, LogSpacedHistory):
        return history.points
    if isinstance(history, TokensHistory) and config.num_tokens is not None:
        return config.num_tokens // history.tokens + 1
    return 0


def _disk_faults(field: str, path: Path, needed: int, what: str, way_out: str) -> list[str]:
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed + SPARE_BYTES <= free:
        return []
    wanted, left = byte_size(needed + SPARE_BYTES), byte_size(free)
    return [f"{field} {path} needs {wanted} for {what} and their records, but its disk has {left} free; free some{way_out}"]
