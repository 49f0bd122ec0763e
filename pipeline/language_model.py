"""A Hugging Face causal language model whose layers can be read and replaced.

A layer is named by the module path of a block (`transformer.h.7`); its activation is the residual stream after the block.
Hooks on the blocks read it, not `output_hidden_states`: there the last entry of GPT-2 already has the final layer norm applied.

Shapes: B contexts in a batch, S positions in a context, L layers read, D model width, V vocabulary.
"""

import contextlib
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.text.tokenizer import load_tokenizer

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Say where and by what a model was saved, not what it computes; `dtype` is the format of the file, whose bytes are hashed anyway.
_CONFIG_KEYS_WITHOUT_MEANING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}


class _LastLayerRead(Exception):
    """Ends a forward pass once everything asked for has been read."""


class LanguageModel:
    """A causal language model in evaluation mode on one device; `load` makes one."""

    def __init__(self, model: Any, *, name: str, content_hash: str, tokenizer_hash: str | None = None) -> None:
        self.model = model
        self.name = name
        self.hash = content_hash
        self.tokenizer_hash = tokenizer_hash
        """Of the tokenizer that lies beside the weights; None where there is none, or it is not to be compared."""
        text_config = model.config.get_text_config()
        self.d_model: int = text_config.hidden_size
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self.max_context: int | None = getattr(text_config, "max_position_embeddings", None)
        ends = text_config.eos_token_id
        self.end_of_text_ids: list[int] = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.block_names = _block_names(model, text_config.num_hidden_layers)

    @classmethod
    def load(cls, config: LanguageModelConfig) -> "LanguageModel":
        """The model that `config` names, on its device, in its dtype. Raises `UserError` when there is none."""
        where = str(DEMO_MODEL) if config.model == "demo" else config.model
        transformers.utils.logging.disable_progress_bar()  # it is redrawn with carriage returns even in a log file
        if where.startswith((".", "/", "~")) and not Path(where).expanduser().is_dir():
            raise UserError(
                f"language_model.model is {where}, but there is no such directory; give a model's directory or its name on the hub"
            )
        device = _device(config.device)
        dtype = DTYPES[config.dtype]
        tokenizer_hash = None
        try:
            if config.random_weights:
                model = _with_random_weights(where, config, dtype)
                content_hash = _hash_of_tensors(model)
            else:
                model = transformers.AutoModelForCausalLM.from_pretrained(where, revision=config.revision, dtype=dtype)
                content_hash = _hash_of_files(where, config.revision)
                tokenizer_hash = _tokenizer_hash(where, config.revision) if config.check_tokenizer else None
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            first_line = str(error).strip().splitlines()[0]
            raise UserError(f"the language model {config.model!r} could not be loaded: {first_line}") from error
        model = model.eval().requires_grad_(False).to(device)
        return cls(model, name=config.model, content_hash=content_hash, tokenizer_hash=tokenizer_hash)

    @property
    def end_of_text_id(self) -> int | None:
        """The first id that ends a text, as the model's own config says; None where it says none."""
        return self.end_of_text_ids[0] if self.end_of_text_ids else None

    def memory_used(self) -> dict[str, float]:
        """For a stage's result: `peak_memory_gib`, the most GPU memory that this process held; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(self.device) / 2**30}

    def check_layers(self, layers: list[str]) -> None:
        """Raises `UserError` naming the first layer that the model does not have, and what it has."""
        blocks = self.block_names
        prefix, first = blocks[0].rpartition(".")[::2]
        for index, layer in enumerate(layers):
            if layer in blocks:
                continue
            found = f"layers[{index}] is {layer}, but {self.name} has blocks {first} to {blocks[-1].rpartition('.')[2]} ({prefix}.N)"
            if layer.rpartition(".")[0] == prefix and layer.rpartition(".")[2].isdigit():
                raise UserError(f"{found}; use a smaller number")
            near = difflib.get_close_matches(layer, blocks, n=1)
            raise UserError(f"{found}; " + (f"did you mean {near[0]}?" if near else f"the first is {blocks[0]}"))

    def check_context(self, context_tokens: int) -> None:
        """Raises `UserError` if contexts of this length are longer than the model can read."""
        if self.max_context is not None and context_tokens > self.max_context:
            raise UserError(
                f"context_tokens is {context_tokens:,}, but {self.name} reads at most {self.max_context:,} tokens; use a smaller number"
            )

    @torch.inference_mode()
    def activations(self, tokens_BS: Tensor, layers: list[str]) -> Tensor:
        """acts_BSLD of `layers`, in their order; no block after the last of them is computed."""
        self.check_layers(layers)
        last = max(layers, key=self.block_names.index)
        read: dict[str, Tensor] = {}

        def read_output(name: str, output: Any) -> None:
            read[name] = _hidden(output)
            if name == last:
                raise _LastLayerRead

        with contextlib.suppress(_LastLayerRead):
            self._run(tokens_BS, dict.fromkeys(layers, read_output))
        return torch.stack([read[name] for name in layers], dim=2)

    @torch.inference_mode()
    def logits(self, tokens_BS: Tensor, replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """logits_BSV, with the output of each layer in `replace` put through its callable (acts_BSD to acts_BSD).

        A later callable sees what the earlier ones changed. The replacement is cast to the model's dtype and device.
        """
        replace = replace or {}
        self.check_layers(list(replace))

        def replaced(name: str, output: Any) -> Any:
            acts_BSD = _hidden(output)
            new_BSD = replace[name](acts_BSD)
            if new_BSD.shape != acts_BSD.shape:
                raise ValueError(f"the replacement of {name} has shape {tuple(new_BSD.shape)}, expected {tuple(acts_BSD.shape)}")
            new_BSD = new_BSD.to(acts_BSD)
            return (new_BSD, *output[1:]) if isinstance(output, tuple) else new_BSD

        logits_BSV: Tensor = self._run(tokens_BS, dict.fromkeys(replace, replaced)).logits
        return logits_BSV

    def _run(self, tokens_BS: Tensor, actions: dict[str, Callable[[str, Any], Any]]) -> Any:
        """A forward pass that calls `actions[layer](layer, output)` after each of these blocks; a result replaces the output."""
        with contextlib.ExitStack() as stack:
            for name, action in actions.items():
                hook = self.model.get_submodule(name).register_forward_hook(lambda _m, _i, output, n=name, a=action: a(n, output))
                stack.callback(hook.remove)
            # A trainer that streams may call from within its own autocast; the model computes in the dtype it was loaded in.
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            return self.model(input_ids=tokens_BS.to(self.device), use_cache=False)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("language_model.device is cuda, but torch sees no GPU here; use `auto` or `cpu`")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _block_names(model: nn.Module, num_blocks: int) -> list[str]:
    """Module paths of the model's blocks: the outermost list of `num_blocks` modules."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == num_blocks]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of its {num_blocks} blocks, so its layers can't be named; use another model")
    outermost = min(lists, key=lambda name: name.count("."))
    return [f"{outermost}.{index}" for index in range(num_blocks)]


def _with_random_weights(where: str, config: LanguageModelConfig, dtype: torch.dtype) -> Any:
    architecture = transformers.AutoConfig.from_pretrained(where, revision=config.revision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.random_weights_seed)
        return transformers.AutoModelForCausalLM.from_config(architecture, dtype=dtype)


def _hash_of_tensors(model: Any) -> str:
    """sha256 over a hash of the names, shapes, dtypes and bytes of all weights, and over the config."""
    hasher = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return _with_config(hasher.hexdigest(), model.config.to_dict())


def _hash_of_files(where: str, revision: str | None) -> str:
    """sha256 over the hashes of the weight files and the config: the same wherever they lie and in whatever dtype they are run."""
    config_path = Path(transformers.utils.cached_file(where, "config.json", revision=revision))
    hashes = [records.hash_file(path) for path in _weight_files(config_path.parent)]
    return _with_config(" ".join(hashes), records.read_json(config_path))


def _tokenizer_hash(where: str, revision: str | None) -> str | None:
    """The hash that token sets record of the model's tokenizer; None if it comes without one."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = transformers.utils.cached_file(where, "tokenizer.json", revision=revision, **quietly)
    if found is None:
        return None
    # The token that ends a text is no part of the hash; any that exists will do for a tokenizer that names none.
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, revision=revision)
    end_of_text = None if tokenizer.eos_token is not None else tokenizer.convert_ids_to_tokens(0)
    return load_tokenizer(where, revision=revision, special_text="token", end_of_text=end_of_text).vocabulary.tokenizer_hash


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads the weights from, in the order in which it looks for them."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / single).exists():
            return [directory / single]
        if (directory / f"{single}.index.json").exists():
            index = records.read_json(directory / f"{single}.index.json")
            return [directory / name for name in sorted(set(index["weight_map"].values()))]
    raise UserError(f"{directory} holds neither model.safetensors nor pytorch_model.bin: it is not a saved model")


def _with_config(weights_hash: str, config: dict[str, Any]) -> str:
    meaning = {key: value for key, value in config.items() if key not in _CONFIG_KEYS_WITHOUT_MEANING}
    return hashlib.sha256(f"{weights_hash}\n{json.dumps(meaning, sort_keys=True, default=str)}".encode()).hexdigest()
