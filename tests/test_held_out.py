"""Which contexts, positions and predictions of a held-out set count."""

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_pieces import CONTEXT_TOKENS, held_out_tokens

from pipeline.config.errors import UserError
from pipeline.contexts import Contexts
from pipeline.evaluation.held_out import HeldOut
from pipeline.tokens import TokenSet, write_token_set


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    return held_out_tokens(tmp_path_factory.mktemp("tokens"))


def test_positions_and_predictions_of_a_context_worked_by_hand(tmp_path: Path) -> None:
    tokens = write_token_set(tmp_path, {"a-000": [[5, 6], [7, 8, 9], [4] * 12]}, vocab_size=10, end_of_text_id=0)
    held_out = HeldOut(Contexts(tokens, 8), max_tokens=None, seed=0, batch_contexts=3, device=torch.device("cpu"))
    (batch,) = held_out.batches()
    # 5 6 e 7 8 9 e 4 | 4 4 4 4 4 4 4 4 | 4 4 4 e . . . .
    assert batch.tokens_BS.tolist() == [[5, 6, 0, 7, 8, 9, 0, 4], [4] * 8, [4, 4, 4, 0, 0, 0, 0, 0]]
    assert batch.replaced_BS.int().tolist() == [[0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.counted_BS.int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.targets_BS[batch.counted_BS].tolist() == [0, 8, 9, 0, 4, 4, 4, 4, 4, 4, 4, 0]


def test_with_beginning_of_text_every_id_is_a_position_and_the_first_is_not_predicted(tmp_path: Path) -> None:
    tokens = write_token_set(tmp_path, {"a-000": [[5, 6], [7, 8, 9]]}, vocab_size=60, end_of_text_id=0)
    contexts = Contexts(tokens, 5, beginning_of_text_id=50)
    (batch,) = HeldOut(contexts, max_tokens=None, seed=0, batch_contexts=3, device=torch.device("cpu")).batches()
    # bos 5 6 e 7 | bos 8 9 e: the prediction of 5 and of 8 is made at bos, which no crosscoder replaces.
    assert batch.tokens_BS.tolist() == [[50, 5, 6, 0, 7], [50, 8, 9, 0, 0]]
    assert batch.replaced_BS.int().tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]]
    assert batch.counted_BS.int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert batch.targets_BS[batch.counted_BS].tolist() == [6, 0, 9, 0]


def test_a_seed_draws_whole_contexts_up_to_the_limit(tokens: TokenSet) -> None:
    contexts = Contexts(tokens, CONTEXT_TOKENS)

    def drawn(**settings: Any) -> HeldOut:
        return HeldOut(contexts, **({"max_tokens": 60, "seed": 0, "batch_contexts": 2, "device": torch.device("cpu")} | settings))

    assert drawn().num_tokens <= 60
    assert drawn().num_tokens + CONTEXT_TOKENS > 60
    assert drawn().num_tokens == contexts.lengths[drawn().indices].sum()
    assert drawn().indices.tolist() == sorted(set(drawn().indices.tolist()))
    assert drawn().indices.tolist() == drawn(batch_contexts=5).indices.tolist()
    assert drawn().indices.tolist() != drawn(seed=1).indices.tolist()
    assert drawn(max_tokens=None).indices.tolist() == list(range(len(contexts)))
    assert drawn(max_tokens=10**6).indices.tolist() == list(range(len(contexts)))


def test_a_limit_that_lets_no_context_through_is_refused(tokens: TokenSet) -> None:
    with pytest.raises(UserError, match=r"gives 0 contexts of at most 12 tokens for max_tokens 5, .* allow more tokens"):
        HeldOut(Contexts(tokens, CONTEXT_TOKENS), max_tokens=5, seed=0, batch_contexts=2, device=torch.device("cpu"))
