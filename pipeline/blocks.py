"""The blocks of a Hugging Face causal language model: what they are called, and forward passes that read or replace what they give.

Shapes: B contexts in a batch, S positions in a context, D model width.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.errors import UserError

Action = Callable[[str, Any], Any]
"""Called after a block with its name and its output; what it returns, if anything, takes the output's place."""


class EnoughRead(Exception):
    """Raised by an action, it ends `run` once everything asked for has been read."""


def block_names(model: Any) -> list[str]:
    """Module paths of the blocks of the text decoder, in order. Raises `UserError` for a model that has no list of them."""
    config = model.config.get_text_config()
    # Of a model with an encoder too, such as BART, num_hidden_layers counts the encoder's.
    num_blocks = getattr(config, "decoder_layers", None) or config.num_hidden_layers
    # A model of pictures and text has a tower of blocks for each; those of the text are in what transformers calls its decoder.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    names = {id(module): name for name, module in model.named_modules()}
    lists: list[str] = []
    for part in (decoder, model):
        found = part.modules() if isinstance(part, nn.Module) else ()
        lists = lists or [names[id(module)] for module in found if isinstance(module, nn.ModuleList) and len(module) == num_blocks]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of its {num_blocks} blocks, so its layers can't be named; use another model")
    # The experts of a block are a list too, and may be as many: the blocks are the outermost.
    outermost = min(lists, key=lambda name: name.count("."))
    return [f"{outermost}.{index}" for index in range(num_blocks)]


def hidden(output: Any) -> Any:
    """The residual stream in what a block gives, acts_BSD: a block may give more beside it."""
    return output[0] if isinstance(output, tuple | list) else output


def with_hidden(output: Any, new_BSD: Tensor) -> Any:
    """A block's output with another residual stream in it."""
    if isinstance(output, list):  # GPT (2018) adds its attention's output to another list
        return [new_BSD, *output[1:]]
    return (new_BSD, *output[1:]) if isinstance(output, tuple) else new_BSD


def run(model: Any, tokens_BS: Tensor, actions: Mapping[str, Action], *, cache: Any = None) -> Any:
    """The output of a forward pass that calls each block's action after it; None where one of them had read enough.

    tokens_BS : on the model's device.
    cache : the key-value cache of transformers, of the tokens before these, which are added to it; None: the text begins with these.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(EnoughRead))
        for name, action in actions.items():
            hook = model.get_submodule(name).register_forward_hook(lambda _m, _i, output, n=name, a=action: a(n, output))
            stack.callback(hook.remove)
        # A trainer that streams may call from within its own autocast; the model computes in the dtype it was loaded in.
        stack.enter_context(torch.autocast(tokens_BS.device.type, enabled=False))
        if cache is not None:
            return model(input_ids=tokens_BS, past_key_values=cache, use_cache=True)
        return model(input_ids=tokens_BS, use_cache=False)
    return None
