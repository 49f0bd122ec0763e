"""Which features fire: BatchTopK in training and at inference, and its threshold."""

import pytest
import torch
from torch import Tensor

from pipeline.config.crosscoder import BatchTopk
from pipeline.crosscoder.sparsity import ACTIVATION_FUNCTIONS, update_threshold

BATCH_TOPK = ACTIVATION_FUNCTIONS[BatchTopk]
BY_ACTIVATION = BatchTopk(k=1, rank_by="activation")
BY_NORM = BatchTopk(k=1)


def decoders(norms_F: Tensor) -> Tensor:
    """Decoders over two layers, [F, 2, 2], whose norms add up to `norms_F`."""
    return norms_F[:, None, None] * torch.tensor([[0.15, 0.2], [0.75, 0.0]])


def test_batch_topk_by_hand() -> None:
    pre_BF = torch.tensor([[5.0, 4.0, 1.0], [2.0, 3.0, -7.0]])
    firing = BATCH_TOPK.in_training(pre_BF, decoders(torch.ones(3)), BY_ACTIVATION)
    # 2 of 6 fire, and both are at the first position: the batch decides, not the position.
    assert firing.features_BF.tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert firing.smallest_rank is not None
    assert firing.smallest_rank.item() == 4.0


def test_ranking_by_decoder_norm_by_hand() -> None:
    pre_BF = torch.tensor([[5.0, 4.0, 1.0], [2.0, 3.0, -7.0]])
    firing = BATCH_TOPK.in_training(pre_BF, decoders(torch.tensor([1.0, 2.0, 9.0])), BY_NORM)
    # Ranks: 5, 8, 9 and 2, 6, -63.
    assert firing.features_BF.tolist() == [[0.0, 4.0, 1.0], [0.0, 0.0, 0.0]]
    assert firing.smallest_rank is not None
    assert firing.smallest_rank.item() == 8.0


def slow_batch_topk(pre_BF: Tensor, norms_F: Tensor, k: int) -> Tensor:
    ranked = sorted(((pre_BF[b, f] * norms_F[f]).item(), b, f) for b in range(pre_BF.shape[0]) for f in range(pre_BF.shape[1]))
    features_BF = torch.zeros_like(pre_BF)
    for rank, b, f in ranked[-k * pre_BF.shape[0] :]:
        if rank > 0:
            features_BF[b, f] = pre_BF[b, f]
    return features_BF


@pytest.mark.parametrize("shift", [0.0, -1.5])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_batch_topk_agrees_with_sorting_all_of_the_batch(k: int, shift: float) -> None:
    torch.manual_seed(0)
    pre_BF, norms_F = torch.randn(6, 8) + shift, torch.rand(8) + 0.1
    firing = BATCH_TOPK.in_training(pre_BF, decoders(norms_F), BatchTopk(k=k))
    expected_BF = slow_batch_topk(pre_BF, norms_F, k)
    assert torch.equal(firing.features_BF, expected_BF)
    assert firing.smallest_rank is not None
    assert firing.smallest_rank.item() == pytest.approx((expected_BF * norms_F)[expected_BF > 0].min().item())


def test_scaling_a_feature_up_and_its_decoder_down_changes_nothing_about_what_fires() -> None:
    torch.manual_seed(0)
    pre_BF, norms_F, scale_F = torch.randn(6, 8), torch.rand(8) + 0.1, torch.tensor([4.0, 0.5] * 4)
    fires = BATCH_TOPK.in_training(pre_BF, decoders(norms_F), BY_NORM).features_BF > 0
    assert torch.equal(BATCH_TOPK.in_training(pre_BF * scale_F, decoders(norms_F / scale_F), BY_NORM).features_BF > 0, fires)
    by_activation = BATCH_TOPK.in_training(pre_BF * scale_F, decoders(norms_F / scale_F), BY_ACTIVATION).features_BF > 0
    assert not torch.equal(by_activation, fires)


def test_the_gradient_reaches_what_fired_and_nothing_else() -> None:
    torch.manual_seed(0)
    pre_BF = torch.randn(6, 8, requires_grad=True)
    weights_BF = torch.rand(6, 8) + 0.5
    features_BF = BATCH_TOPK.in_training(pre_BF, decoders(torch.rand(8) + 0.1), BatchTopk(k=2)).features_BF
    (features_BF * weights_BF).sum().backward()
    assert pre_BF.grad is not None
    assert torch.equal(pre_BF.grad, weights_BF * (features_BF > 0))


def test_inference_judges_every_feature_alone_and_agrees_with_training_at_the_batchs_own_threshold() -> None:
    torch.manual_seed(0)
    pre_BF, norms_F = torch.randn(6, 8), torch.rand(8) + 0.1
    firing = BATCH_TOPK.in_training(pre_BF, decoders(norms_F), BatchTopk(k=2))
    assert firing.smallest_rank is not None
    threshold = firing.smallest_rank * 0.9999
    at_inference_BF = BATCH_TOPK.at_inference(pre_BF, decoders(norms_F), threshold, BatchTopk(k=2))
    assert torch.equal(at_inference_BF, firing.features_BF)
    alone_BF = torch.cat([BATCH_TOPK.at_inference(row_BF, decoders(norms_F), threshold, BatchTopk(k=2)) for row_BF in pre_BF.split(1)])
    assert torch.equal(alone_BF, at_inference_BF)


def test_the_threshold_is_an_even_mean_first_and_a_running_average_later() -> None:
    threshold, num_updates = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    found = []
    for smallest in (4.0, 2.0, 6.0, 8.0):
        update_threshold(threshold, num_updates, torch.tensor(smallest), momentum=0.5)
        found.append(threshold.item())
    # Means of the first one and two; from then on half old, half new: (3 + 6) / 2, (4.5 + 8) / 2.
    assert found == [4.0, 3.0, 4.5, 6.25]
    assert num_updates.item() == 4


def test_a_batch_in_which_nothing_fires_leaves_the_threshold_alone() -> None:
    firing = BATCH_TOPK.in_training(-torch.ones(2, 3), decoders(torch.ones(3)), BY_NORM)
    assert not firing.features_BF.any()
    threshold, num_updates = torch.tensor(0.7), torch.tensor(5)
    assert firing.smallest_rank is not None
    update_threshold(threshold, num_updates, firing.smallest_rank, momentum=0.9)
    assert (threshold.item(), num_updates.item()) == (pytest.approx(0.7), 5)
