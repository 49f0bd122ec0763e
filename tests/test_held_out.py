"""Which contexts, positions and predictions of a held-out set count."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_pieces import CONTEXT_TOKENS, held_out_tokens

from pipeline.config.errors import UserError
from pipeline.contexts import Contexts
from pipeline.evaluation import held_out
from pipeline.evaluation.held_out import HeldOut, Parts, divide, draw
from pipeline.permutation import Permutation
from pipeline.tokens import TokenSet, write_token_set

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    return held_out_tokens(tmp_path_factory.mktemp("tokens"))


def test_positions_and_predictions_of_a_context_worked_by_hand(tmp_path: Path) -> None:
    tokens = write_token_set(tmp_path, {"a-000": [[5, 6], [7, 8, 9], [4] * 12]}, vocab_size=10, end_of_text_id=0)
    (batch,) = HeldOut(Contexts(tokens, 8), np.arange(3), batch_contexts=3, device=CPU).batches()
    # 5 6 e 7 8 9 e 4 | 4 4 4 4 4 4 4 4 | 4 4 4 e . . . .
    assert batch.tokens_BS.tolist() == [[5, 6, 0, 7, 8, 9, 0, 4], [4] * 8, [4, 4, 4, 0, 0, 0, 0, 0]]
    assert batch.replaced_BS.int().tolist() == [[0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.counted_BS.int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.targets_BS[batch.counted_BS].tolist() == [0, 8, 9, 0, 4, 4, 4, 4, 4, 4, 4, 0]


def test_with_beginning_of_text_every_id_is_a_position_and_the_first_is_not_predicted(tmp_path: Path) -> None:
    tokens = write_token_set(tmp_path, {"a-000": [[5, 6], [7, 8, 9]]}, vocab_size=60, end_of_text_id=0)
    contexts = Contexts(tokens, 5, beginning_of_text_id=50)
    (batch,) = HeldOut(contexts, np.arange(2), batch_contexts=3, device=CPU).batches()
    # bos 5 6 e 7 | bos 8 9 e: the prediction of 5 and of 8 is made at bos, which no crosscoder replaces.
    assert batch.tokens_BS.tolist() == [[50, 5, 6, 0, 7], [50, 8, 9, 0, 0]]
    assert batch.replaced_BS.int().tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]]
    assert batch.counted_BS.int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert batch.targets_BS[batch.counted_BS].tolist() == [6, 0, 9, 0]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    return held_out_tokens(tmp_path_factory.mktemp("training"), num_documents=60, seed=1)


def parts(tokens: TokenSet, training: TokenSet | None, **settings: Any) -> Parts:
    chosen: dict[str, Any] = {"max_tokens": 60, "fit_tokens": 40, "seed": 0, "batch_contexts": 2, "device": CPU} | settings
    return divide(Contexts(tokens, CONTEXT_TOKENS), None if training is None else Contexts(training, CONTEXT_TOKENS), **chosen)


def test_a_seed_draws_whole_contexts_up_to_the_limit(tokens: TokenSet, training: TokenSet) -> None:
    contexts = Contexts(tokens, CONTEXT_TOKENS)

    def drawn(**settings: Any) -> HeldOut:
        return parts(tokens, training, **settings).measured

    assert drawn().num_tokens <= 60
    assert drawn().num_tokens + CONTEXT_TOKENS > 60
    assert drawn().num_tokens == contexts.lengths[drawn().indices].sum()
    assert drawn().indices.tolist() == sorted(set(drawn().indices.tolist()))
    assert drawn().indices.tolist() == drawn(batch_contexts=5).indices.tolist()
    assert drawn().indices.tolist() != drawn(seed=1).indices.tolist()
    assert drawn(max_tokens=None).indices.tolist() == list(range(len(contexts)))
    assert drawn(max_tokens=10**6).indices.tolist() == list(range(len(contexts)))


def test_the_same_contexts_are_measured_wherever_baselines_are_fitted(tokens: TokenSet, training: TokenSet) -> None:
    on_training, on_held_out = parts(tokens, training), parts(tokens, None)
    assert on_training.measured.indices.tolist() == on_held_out.measured.indices.tolist()
    assert 40 - CONTEXT_TOKENS < on_training.fitted.num_tokens <= 40


def test_without_training_text_a_quarter_at_most_is_kept_back_and_not_measured(tokens: TokenSet) -> None:
    contexts = Contexts(tokens, CONTEXT_TOKENS)
    total = int(contexts.lengths.sum())
    for fit_tokens in (10**6, total // 8 + CONTEXT_TOKENS):
        found = parts(tokens, None, max_tokens=None, fit_tokens=fit_tokens)
        measured, fitted = found.measured.indices.tolist(), found.fitted.indices.tolist()
        assert not set(measured) & set(fitted)
        assert 0 < found.fitted.num_tokens <= min(fit_tokens, total // 4)
        assert found.measured.num_tokens >= total - min(fit_tokens, total // 4) - CONTEXT_TOKENS


def test_medians_are_of_contexts_drawn_from_the_whole_measured_part(tokens: TokenSet, training: TokenSet, monkeypatch: Any) -> None:
    everything = parts(tokens, training, max_tokens=None)
    assert sorted(everything.leading.indices.tolist()) == everything.measured.indices.tolist()
    monkeypatch.setattr(held_out, "LEADING_TOKENS", 40)
    some = parts(tokens, training, max_tokens=None).leading
    assert some.indices.tolist() == everything.leading.indices.tolist()[: len(some.indices)] != sorted(some.indices.tolist())
    assert 40 - CONTEXT_TOKENS < some.num_tokens <= 40


def test_drawing_computes_only_as_much_of_the_order_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    call = Permutation.__call__

    def counting(self: Permutation, indices: torch.Tensor) -> torch.Tensor:
        computed.append(len(indices))
        return call(self, indices)

    monkeypatch.setattr(Permutation, "__call__", counting)
    lengths = np.full(100_000, 12)
    lengths[::2] = 1  # so that far more contexts are needed than of the longest
    first, second = draw(lengths, [600, 120], seed=3)
    assert sum(computed) < 2000
    monkeypatch.undo()
    order = Permutation(100_000, seed=3).all().numpy()
    assert [*first, *second] == order[: len(first) + len(second)].tolist()
    assert lengths[first].sum() <= 600 < lengths[first].sum() + lengths[second[0]]
    assert lengths[second].sum() <= 600 + 120 - lengths[first].sum() + 12


def test_a_limit_that_lets_no_context_through_is_refused(tokens: TokenSet, training: TokenSet) -> None:
    with pytest.raises(UserError, match=r"gives 0 contexts of at most 12 tokens to measure for max_tokens 5, .* allow more tokens"):
        parts(tokens, training, max_tokens=5)
    with pytest.raises(UserError, match=r"gives no context of at most 12 tokens for fit_tokens 5: .* name training_tokens"):
        parts(tokens, training, fit_tokens=5)


def test_a_set_of_one_context_is_not_divided(tmp_path: Path) -> None:
    one = write_token_set(tmp_path, {"a-000": [[5, 6, 7, 8]]}, vocab_size=10, end_of_text_id=0)
    with pytest.raises(UserError, match=r"gives 0 contexts of at most 12 tokens to measure and 1 to fit baselines on"):
        parts(one, None)
