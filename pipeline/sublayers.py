"""The attention and the MLP of a block: the modules whose outputs are added to the residual stream, by the names that architectures give.

What a module adds is tried on the model before it is used (`pipeline.sublayer_trial`), so a name that misleads is refused there.
"""

from typing import Any

from torch import nn

from pipeline.config.errors import UserError
from pipeline.config.sites import ATTENTION_OUTPUT, MLP_OUTPUT, RESIDUAL, SiteName

ATTENTIONS = ("self_attn", "attn", "attention", "self_attention", "multi_head_attention")
MLPS = ("mlp", "ffn", "feed_forward", "mlp_block", "fc2")
"""`fc2` is the last part of an MLP that is no module of its own, in OPT, XGLM and BART."""
NORMED_AFTERWARDS = {ATTENTION_OUTPUT: "post_attention_layernorm", MLP_OUTPUT: "post_feedforward_layernorm"}
"""The norms of what is added, in blocks that have one behind each sublayer (Gemma 2 and 3, OLMo 2). The second tells that there are:
elsewhere `post_attention_layernorm` stands before the MLP."""


def module_path(model: Any, site: SiteName, name: str) -> str:
    """The module whose output the site is. Raises `UserError` for a block in which no such module is known."""
    if site.point == RESIDUAL:
        return site.block
    block: nn.Module = model.get_submodule(site.block)
    parts = dict(block.named_children())
    known: tuple[str, ...] = ATTENTIONS if site.point == ATTENTION_OUTPUT else MLPS
    if "post_feedforward_layernorm" in parts:
        known = (NORMED_AFTERWARDS[site.point],)
    found = next((part for part in known if part in parts), None)
    if found is None:
        raise UserError(
            f"{site.block} of {name} is a {type(block).__name__} of {', '.join(parts)}: which of them gives the {site.point} is not known "
            f"(known are {', '.join(known)}); read the residual stream, {site.block}"
        )
    return f"{site.block}.{found}"
