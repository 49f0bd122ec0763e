"""A Hugging Face causal language model whose layers can be read and replaced.

A layer is named by the module path of a block (`transformer.h.7`); its activation is the residual stream after the block. With a point
behind it (`transformer.h.7.mlp_output`) it is what a part of the block adds to that stream (see `pipeline.config.sites`).
Hooks on the blocks read it, not `output_hidden_states`: there the last entry of GPT-2 already has the final layer norm applied.

Shapes: B contexts in a batch, S positions in a context, L layers read, D model width, V vocabulary.
"""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

from pipeline import blocks, model_files, model_loading, model_trial, sublayer_trial, sublayers
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.sites import SiteName
from pipeline.prediction_head import PredictionHead
from pipeline.text.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Replacements = Mapping[str, Callable[[Tensor], Tensor]]
"""By layer, acts_BSD to what the next block gets in their place."""


class LanguageModel:
    """A causal language model in evaluation mode on one device; `load` makes one."""

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        content_hash: str,
        tokenizer_hash: str | None = None,
        files: dict[str, str] | None = None,
        remarks: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.name = name
        self.hash = content_hash
        self.files = files
        """The hash of each file that it was loaded from (see `pipeline.model_files`)."""
        self.remarks = list(remarks)
        """Sentences for the log of whoever uses it."""
        self.tokenizer_hash = tokenizer_hash
        """Of the tokenizer that lies beside the weights; None where there is none, or it is not to be compared."""
        text_config = model.config.get_text_config()
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self.max_context: int | None = model_trial.context_limit(model.config)
        ends = getattr(text_config, "eos_token_id", None)
        self.end_of_text_ids: list[int] = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.block_names = blocks.block_names(model)
        trial = model_trial.try_model(model, self.block_names, name)
        self.d_model: int = trial.d_model
        self._not_finite = trial.not_finite
        self._module_paths: dict[str, str] = {}

    @classmethod
    def load(cls, config: LanguageModelConfig) -> "LanguageModel":
        """The model that `config` names, on its device, in its dtype. Raises `UserError` when there is none."""
        where = model_files.location(config.model, "language_model.model")
        transformers.utils.logging.disable_progress_bar()  # it is redrawn with carriage returns even in a log file
        device = _device(config.device)
        dtype = DTYPES[config.dtype]
        tokenizer_hash = None
        with model_loading.one_sentence(config.model, where, config.revision):
            if config.random_weights:
                seed = config.random_weights_seed
                model = model_loading.with_random_weights(where, revision=config.revision, dtype=dtype, seed=seed)
            else:
                model = model_loading.from_checkpoint(where, revision=config.revision, dtype=dtype)
                tokenizer_hash = _tokenizer_hash(where, config.revision) if config.check_tokenizer else None
            directory = Path(transformers.utils.cached_file(where, "config.json", revision=config.revision)).parent
            record = model_files.language_model_record(directory, random_weights=config.random_weights)
            content_hash = record.get("data_id") or _hash_of_tensors(model)
            model = model.eval().requires_grad_(False).to(device)
            remarks = model_files.own_code(directory)
        return cls(
            model, name=config.model, content_hash=content_hash, tokenizer_hash=tokenizer_hash, files=record["files"], remarks=remarks
        )

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
        names = self.block_names
        prefix, first = names[0].rpartition(".")[::2]
        for index, layer in enumerate(layers):
            site = SiteName.parse(layer)
            if site.block in names and not site.model:
                self._module_path(layer)
                continue
            found = f"layers[{index}] is {layer}, but {self.name} has blocks {first} to {names[-1].rpartition('.')[2]} ({prefix}.N)"
            if site.block.rpartition(".")[0] == prefix and site.block.rpartition(".")[2].isdigit():
                raise UserError(f"{found}; use a smaller number")
            near = difflib.get_close_matches(site.block, names, n=1)
            raise UserError(f"{found}; " + (f"did you mean {near[0]}?" if near else f"the first is {names[0]}"))

    def check_use(self, layers: list[str], context_tokens: int, *, predictions: bool = False) -> None:
        """Raises `UserError` unless the model can be read at `layers` in contexts of that length; what is cheap to see before any work.

        predictions : the logits are used, too.
        """
        self.check_layers(layers)
        used = [*layers, model_trial.LOGITS] if predictions else layers
        if wrong := [place for place in used if place in self._not_finite]:
            raise UserError(
                f"{wrong[0]} of {self.name} is not finite (NaN or infinite) on the first tokens tried, in {self.dtype}; check the model's "
                "weights, or choose a dtype with a wider range (bfloat16 or float32)"
            )
        sublayer_trial.try_sites(self.model, [SiteName.parse(layer) for layer in layers], self.name)
        model_trial.check_length(self.model, self.block_names, context_tokens, self.name)

    @torch.inference_mode()
    def activations(self, tokens_BS: Tensor, layers: list[str]) -> Tensor:
        """acts_BSLD of `layers`, in their order; nothing after the last of them is computed."""
        self.check_layers(layers)
        left = set(layers)
        acts_BSLD = torch.empty((*tokens_BS.shape, len(layers), self.d_model), dtype=self.dtype, device=self.device)

        def read_output(name: str, output: Any) -> None:
            # Copied at once, since a later block may add to the residual stream in place. Mamba keeps it in float32 whatever the dtype.
            acts_BSLD[:, :, layers.index(name)] = blocks.hidden(output)
            left.discard(name)
            if not left:
                raise blocks.EnoughRead

        blocks.run(self.model, tokens_BS.to(self.device), self._at(dict.fromkeys(layers, read_output)))
        return acts_BSLD

    @torch.inference_mode()
    def logits(self, tokens_BS: Tensor, replace: Replacements | None = None, *, cache: Any = None) -> Tensor:
        """logits_BSV, with the output of each layer in `replace` put through its callable (acts_BSD to acts_BSD).

        A later callable sees what the earlier ones changed. The replacement is cast to the model's dtype and device.
        With a `cache` the tokens go on from those in it (see `pipeline.blocks.run`).
        """
        logits_BSV: Tensor = blocks.run(self.model, tokens_BS.to(self.device), self._replacing(replace or {}), cache=cache).logits
        return logits_BSV

    @functools.cached_property
    def head(self) -> PredictionHead:
        """Turns what `before_head` gives into float32 logits, a row a position."""
        return PredictionHead.of(self.model)

    @torch.inference_mode()
    def before_head(self, tokens_BS: Tensor, replace: Replacements | None = None, *, cache: Any = None) -> Tensor:
        """hidden_BSD that the model's head is given, of the same run as `logits`; of a head that can't be taken apart, the logits."""
        if self.head.linear is None:
            return self.logits(tokens_BS, replace, cache=cache)
        read: list[Tensor] = []

        def read_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read.append(inputs[0])
            raise blocks.EnoughRead

        hook = self.head.linear.register_forward_pre_hook(read_input)
        try:
            blocks.run(self.model, tokens_BS.to(self.device), self._replacing(replace or {}), cache=cache)
        finally:
            hook.remove()
        return read[0]

    def _replacing(self, replace: Replacements) -> dict[str, blocks.Action]:
        self.check_layers(list(replace))

        def replaced(name: str, output: Any) -> Any:
            acts_BSD = blocks.hidden(output)
            new_BSD = replace[name](acts_BSD)
            if new_BSD.shape != acts_BSD.shape:
                raise ValueError(f"the replacement of {name} has shape {tuple(new_BSD.shape)}, expected {tuple(acts_BSD.shape)}")
            return blocks.with_hidden(output, new_BSD.to(acts_BSD))

        return self._at(dict.fromkeys(replace, replaced))

    def _at(self, actions: Mapping[str, blocks.Action]) -> dict[str, blocks.Action]:
        """By module path, actions that are given by layer and called with it."""

        def of(layer: str) -> blocks.Action:
            return lambda _path, output: actions[layer](layer, output)

        return {self._module_path(layer): of(layer) for layer in actions}

    def _module_path(self, layer: str) -> str:
        if layer not in self._module_paths:
            self._module_paths[layer] = sublayers.module_path(self.model, SiteName.parse(layer), self.name)
        return self._module_paths[layer]


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("language_model.device is cuda, but torch sees no GPU here; use `auto` or `cpu`")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _hash_of_tensors(model: Any) -> str:
    """sha256 over a hash of the names, shapes, dtypes and bytes of all weights, and over the config."""
    hasher = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return model_files.with_config(hasher.hexdigest(), model.config.to_dict())


def _tokenizer_hash(where: str, revision: str | None) -> str | None:
    """The hash that token sets record of the model's tokenizer; None if it comes without one."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = transformers.utils.cached_file(where, "tokenizer.json", revision=revision, **quietly)
    if found is None:
        return None
    # The token that ends a text is no part of the hash; any that exists will do for a tokenizer that names none.
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
    end_of_text = None if tokenizer.eos_token is not None else tokenizer.convert_ids_to_tokens(0)
    return load_tokenizer(where, revision=revision, special_text="token", end_of_text=end_of_text).vocabulary.tokenizer_hash
