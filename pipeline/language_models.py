"""Several language models that read the same tokens, as model diffing needs them: a base model and what was made of it.

`LanguageModels` gives the activations of sites of all of them in one tensor, as a `LanguageModel` gives those of its own. What reads
activations takes either, as `Models`; what runs a model to its predictions takes them one by one, from `each`.

Shapes: B contexts in a batch, S positions in a context, L sites read, D model width.
"""

import hashlib
import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.config.errors import UserError
from pipeline.config.language_models import ReadsModels, field_of
from pipeline.config.sites import SiteName
from pipeline.language_model import LanguageModel
from pipeline.run import Run


class LanguageModels:
    """Models by name. Raises `UserError` where they are too unlike to be read together (see `check_models`)."""

    def __init__(self, models: Mapping[str, LanguageModel], *, check_tokenizer: bool = True) -> None:
        check_models(models, check_tokenizer=check_tokenizer)
        self.by_name = dict(models)
        first = next(iter(self.by_name.values()))
        self.device, self.dtype, self.d_model = first.device, first.dtype, first.d_model
        self.name = ", ".join(f"{name}: {model.name}" for name, model in self.by_name.items())
        self.remarks = list(dict.fromkeys(remark for model in self.by_name.values() for remark in model.remarks))

    @property
    def hash(self) -> str:
        """sha256 over every name and the hash of what it names."""
        return hashlib.sha256(json.dumps({name: model.hash for name, model in self.by_name.items()}, sort_keys=True).encode()).hexdigest()

    def memory_used(self) -> dict[str, float]:
        """As of one model: they are on one device, of one process."""
        return next(iter(self.by_name.values())).memory_used()

    def check_use(self, layers: list[str], context_tokens: int, *, predictions: bool = False) -> None:
        """Raises `UserError` unless each model can be read at its own of the sites (see `LanguageModel.check_use`)."""
        for index, layer in enumerate(layers):
            name = SiteName.parse(layer).model
            if name not in self.by_name:
                raise UserError(f"{layer} is a site of none of the models {', '.join(self.by_name)}; begin it with one of these names")
            try:
                self.by_name[name].check_layers([in_its_model(layer)])
            except UserError as error:  # it counts the sites of that model alone
                raise UserError(str(error).replace("layers[0] is ", f"layers[{index}] is {name}/", 1)) from None
        for name, model in self.by_name.items():
            model.check_use([in_its_model(layer) for layer in sites_of(name, layers)], context_tokens, predictions=predictions)

    def activations(self, tokens_BS: Tensor, layers: list[str]) -> Tensor:
        """acts_BSLD of the sites, in their order; no model computes beyond the last of its own."""
        acts_BSLD = torch.empty((*tokens_BS.shape, len(layers), self.d_model), dtype=self.dtype, device=self.device)
        for name, model in self.by_name.items():
            if own := sites_of(name, layers):
                at_L = [layers.index(layer) for layer in own]
                acts_BSLD[:, :, at_L] = model.activations(tokens_BS, [in_its_model(layer) for layer in own])
        return acts_BSLD


Models = LanguageModel | LanguageModels
"""What activations are read from."""


def load_models(config: ReadsModels, device: str | None = None) -> Models:
    """The models that `config` names, on its own device if none is given. Raises `UserError` as `LanguageModel.load` does."""
    update = {} if device is None else {"device": device}
    loaded = {name: LanguageModel.load(model.model_copy(update=update)) for name, model in config.models.items()}
    if "" in loaded:
        return loaded[""]
    return LanguageModels(loaded, check_tokenizer=all(model.check_tokenizer for model in config.models.values()))


def each(models: Models) -> dict[str, LanguageModel]:
    """The models by name; a single one is called `""`."""
    return models.by_name if isinstance(models, LanguageModels) else {"": models}


def hashes(models: Models) -> dict[str, str] | None:
    """Each one's hash by its name; None of a single one, which has no name."""
    return {name: model.hash for name, model in models.by_name.items()} if isinstance(models, LanguageModels) else None


def bind(models: Models, run: Run) -> None:
    """Records every model as an input of the run, under the setting that names it."""
    for name, model in each(models).items():
        run.bind_input(field_of(name), model.hash, model.files)


def identities(models: Models) -> dict[str, str]:
    """Each one's hash by the setting that names it."""
    return {field_of(name): model.hash for name, model in each(models).items()}


def sites_of(name: str, layers: list[str]) -> list[str]:
    """Those of `layers` that are in the model of that name."""
    return [layer for layer in layers if SiteName.parse(layer).model == name]


def in_its_model(layer: str) -> str:
    """The site as its own model knows it: without the model's name."""
    return SiteName.parse(layer).in_its_model


def check_models(models: Mapping[str, LanguageModel], *, check_tokenizer: bool = True) -> None:
    """Raises `UserError` unless the models have one width, since the sites of a position stand in one tensor, and one vocabulary.

    check_tokenizer : false takes the user's word for it that the same id means the same token.
    """
    _same(models, "have width", lambda model: model.d_model, "sites of a crosscoder have one width; take models of one size")
    if check_tokenizer:
        unless = "all read the same ids; take models of one vocabulary, or set check_tokenizer of all to false if the ids mean the same"
        _same(models, "have numbers of embeddings", lambda model: model.vocab_size, unless)
        _same(models, "have the tokenizers", lambda model: model.tokenizer_hash and model.tokenizer_hash[:12], unless)


def _same(models: Mapping[str, LanguageModel], what: str, of: Callable[[LanguageModel], int | str | None], why: str) -> None:
    found = {name: value for name, model in models.items() if (value := of(model)) is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{value:,} ({name})" if isinstance(value, int) else f"{value} ({name})" for name, value in found.items())
        raise UserError(f"language_models {what} {listed}, but {why}")
