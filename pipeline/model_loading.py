"""From the files of a checkpoint to a model of exactly its weights.

transformers draws at random what a checkpoint lacks, leaves out what it has no place for, asks on the terminal whether to run
a checkpoint's own code, and lets the errors of the libraries below it through. Here each of these is one sentence.
"""

import contextlib
import json
import logging
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
import transformers

from pipeline.config.errors import UserError
from pipeline.model_trial import first_line

# Keys of real checkpoints that hold no weight of the text model, beside those that each class of transformers ignores itself:
# causal masks of older GPT-Neo, GPT-J and CodeGen files; towers for pictures and sound; heads that predict several tokens ahead.
_NO_WEIGHT_OF_THE_TEXT = re.compile(
    r"(attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)(vision|visual|image|audio|speech|multi_?modal|mm_|mtp)[^.]*\."
)
_LFS_POINTER = b"version https://git-lfs"
_SHOWN = 3


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
        fault = _damaged_file(where, revision) or first_line(error)
        advice = "; install what it names, or take a model whose weights are not quantized" if isinstance(error, ImportError) else ""
        raise UserError(f"the language model {name!r} could not be loaded: {fault}{advice}") from error


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
        faults.append(f"lacks {len(missing):,} of the model's {len(model.state_dict()):,} weights ({_few(missing)})")
    if unexpected:
        faults.append(f"holds {len(unexpected):,} that the model has no place for ({_few(unexpected)})")
    if mismatched:
        faults.append(
            f"holds {len(mismatched):,} of another shape than its config.json says "
            f"({_few(f'{key}: {found} instead of {expected}' for key, found, expected in mismatched)})"
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
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    config = transformers.utils.cached_file(where, "config.json", revision=revision, local_files_only=True, **quietly)
    if config is None:
        return None
    directory = Path(config).parent
    patterns = ("*.safetensors", "pytorch_model*.bin", "*.index.json", "tokenizer*.json")
    for path in sorted(path for pattern in patterns for path in directory.glob(pattern)):
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in {directory}"
        if reason := _unreadable(path):
            return f"{path} is cut off or damaged ({reason}); fetch it again"
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


def _few(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
