"""A language model tried out on a few tokens before any work: is it what the stages take it for?

A stage takes for granted that every block runs once, in order, and gives the residual stream [B, S, D]; that a token changes
nothing before it; that numbers are finite; that a context of the length asked for can be read. A model that breaks one of
these would give an error half way, or figures without meaning.

Shapes: B contexts in a batch, S positions in a context, D model width, V vocabulary.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline import blocks
from pipeline.config.errors import UserError
from pipeline.config.language_model import CONTEXT_FIELDS

TRIAL_TOKENS = 8
LOGITS = "logits"


class Trial(NamedTuple):
    """What a model showed of itself."""

    d_model: int
    """Width of the blocks' output, which a config's hidden_size need not be."""
    not_finite: list[str]
    """Blocks that gave NaN or infinity, and `logits` if the predictions did."""


@torch.inference_mode()
def try_model(model: Any, block_names: list[str], name: str) -> Trial:
    """Runs the model three times on 8 tokens. Raises `UserError` if its blocks can't be read or it sees the future.

    All passes have one shape: kernels round differently for another.
    """
    tokens_S, changed_S = trial_tokens(model)
    before, order = _forward(model, name, tokens_S, block_names)
    if order != block_names:
        raise UserError(
            f"{_described(model, name)} does not run its blocks {block_names[0]} to {block_names[-1]} once each and in this order, "
            f"but {', '.join(order[:4]) or 'none of them'}{', ...' if len(order) > 4 else ''}: its layers can't be read; use another model"
        )
    d_model = _check_shapes(model, before, block_names, name)
    after, _ = _forward(model, name, changed_S, block_names)
    not_finite = [place for place, values in before.items() if not bool(values.isfinite().all())]
    # A layer that overflows need not be one that is read; what is not finite can't be compared.
    finite = [place for place in before if place not in not_finite and bool(after[place].isfinite().all())]
    _check_causal(model, {place: greatest_change(before[place], after[place]) for place in finite}, name)
    if LOGITS in finite:
        _check_nothing_passes_by(model, name, tokens_S, block_names, before[LOGITS])
    return Trial(d_model, not_finite)


@torch.inference_mode()
def check_length(model: Any, block_names: list[str], context_tokens: int, name: str) -> None:
    """Raises `UserError` if the model can't read one context of `context_tokens`, as its config says or as it shows.

    Positions are looked up before the first block or in it, so that this one is enough to run.
    """
    limit = context_limit(model.config)
    if limit is not None and context_tokens > limit:
        raise UserError(f"context_tokens is {context_tokens:,}, but {name} reads at most {limit:,} tokens; use a smaller number")

    def stop(_name: str, output: Any) -> None:
        blocks.hidden(output).flatten()[0].item()  # waits for the GPU, whose errors come late
        raise blocks.EnoughRead

    tokens_S = trial_tokens(model)[0]
    repeated_S = tokens_S.repeat(context_tokens // len(tokens_S) + 1)[:context_tokens]
    try:
        blocks.run(model, repeated_S[None], {block_names[0]: stop})
    except Exception as error:  # what a model raises for too long a context is its own affair
        raise UserError(
            f"context_tokens is {context_tokens:,}, but {_described(model, name)} can't read a context of that length: "
            f"{first_line(error)}; use a smaller number"
        ) from error


def context_limit(config: Any) -> int | None:
    """The longest context that a model's config allows; None where it sets no limit. The window of a sliding attention is none."""
    text_config = config.get_text_config()
    limits = [getattr(text_config, field, None) for field in CONTEXT_FIELDS]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def first_line(error: BaseException) -> str:
    """What an error says first, after its type where that says more; the type alone where it says nothing."""
    said = str(error).strip().splitlines()
    if len(said) > 1 and said[0].endswith(":"):  # a heading
        said[0] += f" {said[1].strip()}"
    if said and isinstance(error, OSError | ValueError | ImportError):
        return said[0]
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def trial_tokens(model: Any) -> tuple[Tensor, Tensor]:
    """Two texts tokens_S with one first half: ids from all over the vocabulary, none that the config gives a meaning."""
    config = model.config.get_text_config()
    vocab_size = model.get_input_embeddings().num_embeddings
    named = [value for settings in (model.config, config) for key, value in settings.to_dict().items() if key.endswith("_token_id")]
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    step = max(1, vocab_size // (4 * TRIAL_TOKENS))
    ordinary = [index for index in range(step, vocab_size, step) if index not in special] or [0]
    length = min(TRIAL_TOKENS, context_limit(model.config) or TRIAL_TOKENS)
    ids = list(itertools.islice(itertools.cycle(ordinary), length + length // 2))
    device = next(model.parameters()).device
    tokens_S = torch.tensor(ids[:length], device=device)
    return tokens_S, torch.cat([tokens_S[: length - length // 2], torch.tensor(ids[length:], device=device, dtype=torch.int64)])


def _forward(
    model: Any, name: str, tokens_S: Tensor, block_names: list[str], *, zeroed: str | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """What each block gives, and the logits; and the blocks in the order in which they ran.

    zeroed : a block whose output the model goes on from as if it were 0.
    """
    order: list[str] = []
    given: dict[str, Any] = {}

    def read(block: str, output: Any) -> Any:
        order.append(block)
        acts = blocks.hidden(output)
        given[block] = acts.clone() if isinstance(acts, Tensor) else acts
        return blocks.with_hidden(output, torch.zeros_like(acts)) if block == zeroed else None

    try:
        given[LOGITS] = blocks.run(model, tokens_S[None], dict.fromkeys(block_names, read)).logits
    except Exception as error:  # a model's own code, on input that every causal language model takes
        raise UserError(
            f"{_described(model, name)} can't be run on {len(tokens_S)} tokens alone: {first_line(error)}; use a causal language model"
        ) from error
    return given, order


def _check_shapes(model: Any, given: dict[str, Any], block_names: list[str], name: str) -> int:
    """The width that all blocks have in common."""
    num_tokens = given[LOGITS].shape[1]
    for block in block_names:
        found = tuple(given[block].shape) if isinstance(given[block], Tensor) else type(given[block]).__name__
        width = found[-1] if isinstance(found, tuple) and found[:-1] == (1, num_tokens) else None
        if width is None or width != given[block_names[0]].shape[-1]:
            raise UserError(
                f"{block} of {_described(model, name)} gives {found} for 1 context of {num_tokens} tokens, expected (1, {num_tokens}, D) "
                "with the same D for every block: its residual stream can't be read; use another model"
            )
    return int(given[block_names[0]].shape[-1])


def greatest_change(before_BSX: Tensor, after_BSX: Tensor) -> float:
    """The greatest |after - before| / |before| of a position in the first half, where both texts are the same."""
    same = before_BSX.shape[1] - before_BSX.shape[1] // 2
    before, after = before_BSX[:, :same].float(), after_BSX[:, :same].float()
    norm_BS = before.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((after - before).norm(dim=-1) / norm_BS).max())


def _check_causal(model: Any, changes: dict[str, float], name: str) -> None:
    """Raises `UserError` if a later token changed something before it by more than rounding can."""
    for place, change in changes.items():
        if change > tolerance(model):
            raise UserError(
                f"{_described(model, name)} sees the future: other tokens in the second half of a text change its {place} in the "
                f"first half by {100 * change:.1f} %; use a causal language model"
            )


def _check_nothing_passes_by(model: Any, name: str, tokens_S: Tensor, block_names: list[str], logits_BSV: Tensor) -> None:
    """Raises `UserError` unless the predictions rest on the last block's output alone, as they do on a residual stream.

    With zeros in its place all positions must predict the same. They don't where what is taken for blocks are parts of blocks,
    or where a block gives what is to be added to a stream that it passes on beside it.
    """
    last = block_names[-1]
    zeroed_BSV = _forward(model, name, tokens_S, block_names, zeroed=last)[0][LOGITS].float()
    difference = (zeroed_BSV - zeroed_BSV[:, :1]).norm(dim=-1).max() / logits_BSV.float().norm(dim=-1).max()
    if float(difference) > tolerance(model):
        raise UserError(
            f"{_described(model, name)} predicts from more than {last} gives: that is not its whole residual stream, "
            "so its layers can't be read; use another model"
        )


def tolerance(model: Any) -> float:
    """The relative difference that may be rounding: the square root of the dtype's precision.

    Dense models differ by exactly 0. Those with experts round differently when other tokens go to an expert: by 1e-6 in float32 and
    0 in half precision, over 24 blocks on an H100 and on a CPU. BERT, which sees the future, differs by 0.5 there, in any dtype.
    """
    # A block may give float32 in a model of bfloat16 weights; what was rounded on the way counts.
    return float(torch.finfo(next(model.parameters()).dtype).eps ** 0.5)


def _described(model: Any, name: str) -> str:
    return f"{name} ({type(model).__name__})"
