"""Contexts cover every id of a token set once, with the right documents."""

import numpy as np
import pytest

from pipeline.contexts import Contexts
from pipeline.tokens import TokenSet, write_token_set

END = 99
SHARDS = {"a-000": [[5, 6, 7], [8]], "b-000": [], "c-000": [[1], [2, 3, 4, END, 9, 10], [11]]}


@pytest.fixture
def tokens(tmp_path):
    return write_token_set(tmp_path / "set", SHARDS, vocab_size=100, end_of_text_id=END)


def test_a_batch_worked_by_hand(tokens):
    # a-000 is 5 6 7 | 8 | ; c-000 is 1 | 2 3 4 end 9 10 | 11 | with separators at the bars
    contexts = Contexts(tokens, 4)
    assert contexts.lengths.tolist() == [4, 2, 4, 4, 3]
    batch = contexts.read(np.array([1, 2, 3, 4]))
    assert batch.tokens_BS.tolist() == [[8, END, END, END], [1, END, 2, 3], [4, END, 9, 10], [END, 11, END, END]]
    assert batch.lengths_B.tolist() == [2, 4, 4, 3]
    assert batch.documents_BS.tolist() == [[1, 1, 1, 1], [2, 2, 3, 3], [3, 3, 3, 3], [3, 4, 4, 4]]
    assert (batch.tokens_BS.dtype, batch.documents_BS.dtype) == (np.int64, np.uint32)


@pytest.mark.parametrize("context_tokens", [1, 2, 3, 5, 64])
def test_every_id_is_in_exactly_one_context_with_its_document(tokens, context_tokens):
    contexts = Contexts(tokens, context_tokens)
    batch = contexts.read(np.arange(len(contexts)))
    kept = np.arange(context_tokens) < batch.lengths_B[:, None]
    documents = [document for shard in SHARDS.values() for document in shard]
    wanted = [(number, token) for number, ids in enumerate(documents) for token in [*ids, END]]
    assert list(zip(batch.documents_BS[kept].tolist(), batch.tokens_BS[kept].tolist(), strict=True)) == wanted


def test_the_order_asked_for_is_the_order_given(tokens):
    contexts = Contexts(tokens, 3)
    forward = contexts.read(np.arange(len(contexts)))
    backward = contexts.read(np.arange(len(contexts))[::-1])
    assert (backward.tokens_BS[::-1] == forward.tokens_BS).all()
    assert (backward.documents_BS[::-1] == forward.documents_BS).all()


def test_a_set_without_documents_has_no_contexts(tmp_path):
    contexts = Contexts(write_token_set(tmp_path, {"a-000": []}, vocab_size=100, end_of_text_id=END), 8)
    assert len(contexts) == 0
    assert contexts.read(np.array([], np.int64)).tokens_BS.shape == (0, 8)


def test_a_context_that_does_not_exist_is_refused(tokens):
    contexts = Contexts(tokens, 4)
    with pytest.raises(IndexError, match="5 of 5"):
        contexts.read(np.array([0, 5]))
    assert isinstance(tokens, TokenSet)
