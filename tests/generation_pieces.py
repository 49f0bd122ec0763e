"""Small trained crosscoders over any language model, and a slow reference of what they do to a pass: whole texts, no cache, no folding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import blocks, sublayers
from pipeline.activations.source import Provenance
from pipeline.config.crosscoder import CrosscoderConfig
from pipeline.config.schema import build
from pipeline.config.sites import SiteName
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.normalizer import Normalizer
from pipeline.generation.splicing import Intervention
from pipeline.language_model import LanguageModel


def trained_on(language_model: LanguageModel, layers: Sequence[str], **settings: Any) -> TrainedCrosscoder:
    """Random weights that reconstruct badly, biases and a mean that are not zero, and ReLU: a small error stays a small error."""
    values = {"num_features": 24, "activation_function": {"kind": "relu"}, "normalization": {"center": True}, **settings}
    config = build(CrosscoderConfig, values, "test")
    crosscoder = Crosscoder(config, layers=list(layers), d_model=language_model.d_model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        crosscoder.parameterization.W_dec_FLD.mul_(10.0)  # decoders of norm 1, so that an edit is seen
        for bias in (crosscoder.b_enc_F, crosscoder.b_dec_LD):
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    mean_LD = 0.2 * torch.randn(len(layers), language_model.d_model, generator=generator)
    return TrainedCrosscoder(
        config=config,
        layers=list(layers),
        crosscoder=crosscoder.requires_grad_(False),
        normalizer=Normalizer(mean_LD, torch.linspace(0.5, 0.8, len(layers)), center=config.normalization.center),
        step=1,
        tokens_trained=1,
        tokens_since_fired_F=torch.zeros(config.num_features, dtype=torch.int64),
        dead_window_tokens=1,
        identity="i" * 64,
        activations_id="a" * 64,
        provenance=Provenance(language_model.hash, "t" * 64, "", 32, [0]),
        batch_positions=1,
    )


def whole_pass(language_model: LanguageModel, tokens: Sequence[int], fixed: Mapping[str, Tensor], read: Sequence[str]) -> dict[str, Any]:
    """What a pass over the whole text gives at the sites `read`, in the order in which they came, each before it is replaced by `fixed`;
    under `log_p`, the prediction behind the last token."""
    found: dict[str, Any] = {}

    def hook(site: str) -> Any:
        def act(_module: object, _inputs: object, output: Any) -> Any:
            found[site] = blocks.hidden(output)[0].clone()
            return blocks.with_hidden(output, fixed[site][None]) if site in fixed else None

        return act

    model = language_model.model
    paths = {site: sublayers.module_path(model, SiteName.parse(site), "test") for site in read}
    hooks = [model.get_submodule(path).register_forward_hook(hook(site)) for site, path in paths.items()]
    with torch.inference_mode():
        logits_V = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
    for one in hooks:
        one.remove()
    return {**found, "log_p": logits_V.log_softmax(-1)}


def slow_changed(
    models: LanguageModel | Mapping[str, LanguageModel],
    trained: TrainedCrosscoder,
    intervention: Intervention,
    tokens: Sequence[int],
    written_by: str = "",
) -> Tensor:
    """log_p_V behind the last token of a text whose pass is changed: a pass of its own for every layer."""
    by_name = models if isinstance(models, Mapping) else {"": models}
    read, order = dict[str, Tensor](), list[str]()
    for name, model in by_name.items():
        prefix = f"{name}/" if name else ""
        own = [layer.removeprefix(prefix) for layer in trained.layers if layer.startswith(prefix)]
        found = {prefix + layer: acts_SD for layer, acts_SD in whole_pass(model, tokens, {}, own).items() if layer != "log_p"}
        read |= found
        order += found if name == written_by else []
    fixed, prefix, own = dict[str, Tensor](), f"{written_by}/" if written_by else "", [layer.rpartition("/")[2] for layer in order]
    for layer in order:
        here = whole_pass(by_name[written_by], tokens, fixed, own)[layer.removeprefix(prefix)]
        if intervention.encode_from == "spliced":
            read[layer] = here
        if layer not in intervention.layers:
            continue
        raw_SLD = torch.stack([read[name] for name in trained.layers], dim=1)
        features_SF = trained.encode(raw_SLD)
        edited_SF = features_SF.clone()
        edit = intervention.edit
        for feature in () if edit is None else edit.features:
            before_S = features_SF[:, feature]
            edited_SF[:, feature] = {
                "add": before_S + edit.strength,  # type: ignore[union-attr]
                "scale": before_S * edit.strength,  # type: ignore[union-attr]
                "clamp": torch.full_like(before_S, edit.strength),  # type: ignore[union-attr]
                "ablate": torch.zeros_like(before_S),
            }[edit.mode]  # type: ignore[union-attr]
        number = trained.layers.index(layer)
        edited_SD = trained.decode(edited_SF, raw_SLD)[:, number]
        if edit is not None and intervention.keep_error:
            edited_SD = here + edited_SD - trained.decode(features_SF, raw_SLD)[:, number]
        first = max(1, intervention.first_position)
        fixed[layer.removeprefix(prefix)] = torch.cat([here[:first], edited_SD[first:]])
    log_p_V: Tensor = whole_pass(by_name[written_by], tokens, fixed, own)["log_p"]
    return log_p_V
