"""From the files of a checkpoint to a model of exactly its weights.

transformers draws at random what a checkpoint lacks, leaves out what it has no place for, asks on the terminal whether to run
a checkpoint's own code, and lets the errors of the libraries below it through. Here each of these is one sentence.
"""

import contextlib
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
import transformers

from pipeline import model_files, weight_files
from pipeline.config.errors import UserError
from pipeline.model_trial import first_line

# Keys of real checkpoints that hold no weight of the text model, beside those that each class of transformers ignores itself:
# causal masks of older GPT-Neo, GPT-J and CodeGen files; towers for pictures and sound; heads that predict several tokens ahead.
_NO_WEIGHT_OF_THE_TEXT = re.compile(
    r"(attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)(vision|visual|image|audio|speech|multi_?modal|mm_|mtp)[^.]*\."
)
_LFS_POINTER = b"version https://git-lfs"


def from_checkpoint(where: str, *, revision: str | None, dtype: torch.dtype) -> Any:
    """The causal language model saved at `where`, a directory or a name on the hub, in `dtype` on the CPU.

    Raises `UserError` where its weights are not those of the checkpoint, all of them and no others.
    """
    if transformers.utils.find_adapter_config_file(where, revision=revision) is not None:
        raise UserError(
            f"{where} holds an adapter (adapter_config.json), which is not read here; merge it into its model with peft's "
            "merge_and_unload, save that with save_pretrained, and name its directory"
        )
    config = _known_config(where, revision)
    with _without_load_report():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            revision=revision,
            dtype=dtype,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    check_weights(where, model, info)
    _check_files(_directory(where, revision), model)
    return model


def with_random_weights(where: str, *, revision: str | None, dtype: torch.dtype, seed: int) -> Any:
    """A model of the architecture that `where` describes, its weights drawn by `seed`; needs no weights there."""
    config = _known_config(where, revision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


@contextlib.contextmanager
def one_sentence(name: str, where: str, revision: str | None) -> Iterator[None]:
    """Turns whatever is raised while the files of a model are read into a `UserError` that names the file, where one is to blame."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors has error types of its own, tokenizers raises bare Exception
        fault = _damaged_file(where, revision) or _said_by_transformers(where, revision, error)
        raise UserError(f"the language model {name!r} could not be loaded: {fault}") from error


def _said_by_transformers(where: str, revision: str | None, error: Exception) -> str:
    """What an error says, and what in config.json may be to blame."""
    if isinstance(error, ImportError):
        return f"{first_line(error)}; install what it names, or take a model whose weights are not quantized"
    if isinstance(error, OSError):  # of files and the hub: these are sentences
        return first_line(error)
    directory = _directory(where, revision)
    told = f"transformers {transformers.__version__} says {first_line(error)}"
    if directory is None:
        return told
    return f"{told}; look at {_blamed(directory, error) or directory / 'config.json'}"


def _blamed(directory: Path, error: Exception) -> str | None:
    """The field of config.json whose value a table of transformers does not have, where that is the error."""
    if not isinstance(error, KeyError) or not error.args:
        return None
    config = model_files.read_config(directory)
    settings = [("", config)] + [(f"{key}.", value) for key, value in config.items() if isinstance(value, dict)]
    named = (f"{prefix}{key}" for prefix, part in settings for key, value in part.items() if value == error.args[0])
    field = next(named, None)
    return None if field is None else f"{field} in {directory / 'config.json'}, which is {error.args[0]!r}"


def check_weights(where: str, model: Any, info: dict[str, Any]) -> None:
    """Raises `UserError` unless the checkpoint's weights and the model's are the same, by what `from_pretrained` says of them.

    Tied weights and buffers that the model computes itself are no part of what it says.
    """
    missing = sorted(info["missing_keys"])
    own = {name for name, _ in model.named_buffers()}
    unexpected = sorted(key for key in info["unexpected_keys"] if key not in own and not _NO_WEIGHT_OF_THE_TEXT.search(key))
    mismatched = sorted((key, tuple(found), tuple(expected)) for key, found, expected in info["mismatched_keys"])
    faults = []
    if missing:
        faults.append(f"lacks {len(missing):,} of the model's {len(model.state_dict()):,} weights ({weight_files.few(missing)})")
    if unexpected:
        faults.append(f"holds {len(unexpected):,} that the model has no place for ({weight_files.few(unexpected)})")
    if mismatched:
        faults.append(
            f"holds {len(mismatched):,} of another shape than its config.json says "
            f"({weight_files.few(f'{key}: {found} instead of {expected}' for key, found, expected in mismatched)})"
        )
    if not faults:
        return
    prefix = _wrapper_prefix(missing, unexpected)
    mend = (
        f"every name begins with a wrapper's {prefix!r}: save the model inside the wrapper"
        if prefix
        else f"save the whole {type(model).__name__} with save_pretrained, or mend config.json"
    )
    raise UserError(f"the checkpoint in {where} {'; it '.join(faults)}, so that what runs would not be what was saved; {mend}")


def _directory(where: str, revision: str | None) -> Path | None:
    """Where the files of a model lie on this machine, its config.json among them; None if they don't."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    config = transformers.utils.cached_file(where, "config.json", revision=revision, local_files_only=True, **quietly)
    return None if config is None else Path(config).parent


def _check_files(directory: Path | None, model: Any) -> None:
    """Raises `UserError` where two files hold one weight, or where integers were taken for the weights of a float model."""
    if directory is None:
        return
    config = model_files.read_config(directory)
    held = {path: _dtypes(path) for path in weight_files.files_in(directory, config)}
    own = [name for name, _ in model.named_buffers()] + [name for name, found in model.named_parameters() if not found.is_floating_point()]
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    integers = {
        name: weight_files.INTEGERS[dtype]
        for file in held.values()
        for name, dtype in file.items()
        if dtype in weight_files.INTEGERS
        and not _NO_WEIGHT_OF_THE_TEXT.search(name)
        and not any(pattern.search(name) for pattern in ignored)
        and not any(f".{name}".endswith(f".{buffer}") or f".{buffer}".endswith(f".{name}") for buffer in own)
    }
    if found := weight_files.names_twice(held) or weight_files.integers_fault(integers, config):
        raise UserError(f"the checkpoint in {directory} can't be used: {found}")


def _dtypes(path: Path) -> dict[str, str]:
    """The dtype of each weight in a file, as safetensors names it."""
    if path.suffix == ".safetensors":
        return weight_files.dtypes(path)
    names = {f"torch.{dtype}": short for short, dtype in weight_files.INTEGERS.items()}
    # Nothing but the pickle of names and shapes is read: mapped into memory, and put where tensors have no bytes.
    tensors = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    return {name: names.get(str(tensor.dtype), str(tensor.dtype)) for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def _known_config(where: str, revision: str | None) -> Any:
    """The config of a causal language model that transformers has itself. Raises `UserError` for any other."""
    said, _ = transformers.PretrainedConfig.get_config_dict(where, revision=revision)
    model_type, library = said.get("model_type"), f"transformers {transformers.__version__}"
    if not said:
        raise UserError(f"the language model {where} could not be loaded: there is no config.json; give the directory of a saved model")
    if model_type not in transformers.CONFIG_MAPPING:
        if "auto_map" in said:
            raise UserError(
                f"{where} needs Python code that comes with it (auto_map in its config.json), which is never run here; use a model of a "
                f"type that {library} has itself, {model_type!r} is none"
            )
        raise UserError(f"the config.json of {where} is of model_type {model_type!r}, which {library} does not know; use a newer one")
    config = transformers.AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{where} is of model_type {model_type!r}, no causal language model to {library}; use one that predicts the next token"
        )
    return config


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps back the table of missing and unexpected weights, which `check_weights` judges; other warnings pass."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _wrapper_prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """What stands before the model's own name in every key of a checkpoint, if that is all that is wrong."""
    prefixes = {key.removesuffix(own) for own in missing for key in unexpected if key.endswith(f".{own}")}
    prefix = min(prefixes, key=len, default="")
    return prefix if prefix and all(key.startswith(prefix) for key in unexpected) else None


def _damaged_file(where: str, revision: str | None) -> str | None:
    """What is wrong with the first file of weights or of a tokenizer that can't be read; None if all can, or lie on the hub alone."""
    directory = _directory(where, revision)
    if directory is None:
        return None
    patterns = ("*.safetensors", "pytorch_model*.bin", "*.index.json", "tokenizer*.json")
    for path in sorted(path for pattern in patterns for path in directory.glob(pattern)):
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in {directory}"
        if reason := _unreadable(path):
            return f"{path} is cut off or damaged ({reason}); fetch it again"
    if any(directory.glob("*.index.json")):
        try:
            weight_files.files_in(directory, model_files.read_config(directory))
        except UserError as error:
            return str(error)
    return None


def _unreadable(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt"):
                return None
        if path.suffix == ".json":
            json.loads(path.read_bytes())
            if path.name == "tokenizer.json":
                tokenizers.Tokenizer.from_file(str(path))
        elif not zipfile.is_zipfile(path):
            return "not an archive of torch.save"
    except Exception as error:  # tokenizers raises bare Exception
        return first_line(error)
    return None
