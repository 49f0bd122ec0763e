"""How far two computations of the same number may lie apart, from the arithmetic: for sums that are added up in another order.

The order in which a matrix product or a sum adds depends on the processor (its vector instructions), on the number of threads, on
the library behind torch and on the shapes: one context alone and in a batch differ in the last bits on most machines and agree on some.
"""

import math

import torch


def tolerance(*num_terms: int, dtype: torch.dtype = torch.float32) -> float:
    """The relative error within which results of sums of `num_terms` products each, one feeding the next, agree in any order.

    n roundings of at most eps / 2 each end at most n * eps / 2 from the exact value; they go either way, so that their sum grows as
    sqrt(n) (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis"). Eight times sqrt(n) * eps / 2 is not
    reached by chance. Relative to the size of what is added, not of the result: where terms cancel, multiply by their size.
    """
    return 4 * math.sqrt(sum(num_terms)) * torch.finfo(dtype).eps


def forward_pass(*, num_blocks: int = 3, d_model: int = 16, context_tokens: int = 16, dtype: torch.dtype = torch.float32) -> float:
    """The same for the activations and logits of one of `tiny_models`, whose blocks neither amplify nor cancel much."""
    norms = 4 * d_model  # two of them, each a mean and a variance
    attention, feed_forward = (d_model, d_model, context_tokens, d_model), (d_model, 4 * d_model)
    return tolerance(*(norms, *attention, *feed_forward) * num_blocks, 2 * d_model, d_model, dtype=dtype)
