"""The sublayers of a block tried out on a few tokens: is what they give really what is added to the residual stream?

For a block of input x that gives y, attention a and MLP m: with both replaced by zeros it gives x, with m alone x + a, and y is the
block without m, plus m. That holds for blocks in sequence and in parallel. It fails where a norm follows the addition (BERT), where
the module adds the stream itself (BLOOM), and where the addition is weighted (Granite).

Shapes: B contexts in a batch, S positions in a context, D model width.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline import blocks, model_trial, sublayers
from pipeline.config.errors import UserError
from pipeline.config.sites import ATTENTION_OUTPUT, MLP_OUTPUT, RESIDUAL, SiteName


@torch.inference_mode()
def try_sites(model: Any, sites: list[SiteName], name: str) -> None:
    """Raises `UserError` for the first of `sites` that is not what a sublayer adds to the residual stream; runs each block five times."""
    for site in sites:
        if site.point != RESIDUAL:
            _try_site(model, site, name)


def _try_site(model: Any, site: SiteName, name: str) -> None:
    place = f"{site} of {name} ({type(model).__name__})"
    attention, mlp = (sublayers.module_path(model, SiteName(site.block, point), name) for point in (ATTENTION_OUTPUT, MLP_OUTPUT))
    own = attention if site.point == ATTENTION_OUTPUT else mlp
    tokens_S, changed_S = model_trial.trial_tokens(model)
    given = _given(model, site.block, tokens_S, {own})
    added, width = given.get(own), given[site.block].shape
    if not isinstance(added, Tensor) or added.shape != width:
        found = tuple(added.shape) if isinstance(added, Tensor) else type(added).__name__ if own in given else "nothing"
        raise UserError(f"{place} is {found}, expected {tuple(width)}, one vector a position; read the residual stream, {site.block}")
    if not bool(added.isfinite().all()):
        raise UserError(f"{place} is not finite (NaN or infinite) on the first tokens tried; choose a dtype with a wider range")
    later = _given(model, site.block, changed_S, {own})[own]
    if model_trial.greatest_change(added, later) > model_trial.tolerance(model):
        raise UserError(f"{place} sees the future: other tokens later in a text change it; use a causal language model")
    before = _given(model, site.block, tokens_S, set())["input"]
    nothing, attention_alone = (_block(model, site.block, tokens_S, zeroed) for zeroed in ({attention, mlp}, {mlp}))
    without, with_it = (attention_alone, given[site.block]) if site.point == MLP_OUTPUT else (nothing, attention_alone)
    scale = given[site.block].float().norm()
    off = max(_distance(nothing, before), _distance(with_it, without + added)) / float(scale)
    if off > model_trial.tolerance(model):
        raise UserError(
            f"{place} is not what is added to the residual stream (off by {100 * off:.1f} %): the module adds the stream itself, or a "
            f"norm or a factor follows; read the residual stream, {site.block}"
        )


def _block(model: Any, block: str, tokens_S: Tensor, zeroed: set[str]) -> Tensor:
    """What a block gives while modules of it give zeros."""
    found: Tensor = _given(model, block, tokens_S, set(), zeroed)[block]
    return found


def _given(model: Any, block: str, tokens_S: Tensor, read: set[str], zeroed: set[str] | None = None) -> dict[str, Any]:
    """By module path what `read` and the block give, and the block's `input`; `zeroed` modules give zeros."""
    given: dict[str, Any] = {}

    def take(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given["input"] = (inputs[0] if inputs else named["hidden_states"]).clone()

    def keep(path: str, output: Any) -> Any:
        acts = blocks.hidden(output)
        if path in read or path == block:
            given[path] = acts.clone() if isinstance(acts, Tensor) else acts
        if path == block:
            raise blocks.EnoughRead
        return blocks.with_hidden(output, torch.zeros_like(acts)) if path in (zeroed or ()) else None

    hook = model.get_submodule(block).register_forward_pre_hook(take, with_kwargs=True)
    try:
        blocks.run(model, tokens_S[None], dict.fromkeys([*read, *(zeroed or ()), block], keep))
    finally:
        hook.remove()
    return given


def _distance(found_BSD: Tensor, expected_BSD: Tensor) -> float:
    return float((found_BSD.float() - expected_BSD.float()).norm())
