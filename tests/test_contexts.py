"""Contexts cover every id of a token set once, with the right documents."""

import numpy as np
import pytest

from pipeline.config.errors import UserError
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


def test_beginning_of_text_is_one_of_the_tokens_of_every_context_worked_by_hand(tokens):
    contexts = Contexts(tokens, 4, beginning_of_text_id=50)
    assert contexts.lengths.tolist() == [4, 4, 4, 4, 4, 3]
    batch = contexts.read(np.arange(6))
    assert batch.tokens_BS.tolist() == [
        [50, 5, 6, 7], [50, END, 8, END], [50, 1, END, 2], [50, 3, 4, END], [50, 9, 10, END], [50, 11, END, END]
    ]  # fmt: skip
    assert batch.lengths_B.tolist() == [4, 4, 4, 4, 4, 3]
    # It belongs to the document of the context's first id, which may be the separator that ends it.
    assert batch.documents_BS.tolist() == [[0] * 4, [0, 0, 1, 1], [2, 2, 2, 3], [3] * 4, [3] * 4, [4] * 4]


def test_a_context_of_beginning_of_text_alone_is_refused(tokens):
    with pytest.raises(UserError, match="context_tokens is 1: a context that begins with beginning-of-text needs 2 or more"):
        Contexts(tokens, 1, beginning_of_text_id=50)


def test_an_id_greater_than_the_records_name_never_reaches_a_model(tmp_path):
    """The vocabulary would allow it, the embeddings may not: the model was checked for the greatest id of the records."""
    write_token_set(tmp_path, {"a-000": [[5, 6, 7]]}, vocab_size=100, end_of_text_id=9)
    content = (tmp_path / "a-000.bin").read_bytes()
    (tmp_path / "a-000.bin").write_bytes(b"\x50" + content[1:])
    with pytest.raises(UserError, match=r"holds id 80, but its records name 7 as the greatest: a file is damaged; `crosscoder verify"):
        Contexts(TokenSet.open(tmp_path), 4).read(np.array([0]))


@pytest.mark.parametrize("beginning", [None, 50])
@pytest.mark.parametrize("context_tokens", [2, 3, 5, 64])
def test_every_id_is_in_exactly_one_context_with_its_document(tokens, context_tokens, beginning):
    contexts = Contexts(tokens, context_tokens, beginning_of_text_id=beginning)
    batch = contexts.read(np.arange(len(contexts)))
    kept = np.arange(context_tokens) < batch.lengths_B[:, None]
    if beginning is not None:
        assert (batch.tokens_BS[:, 0] == beginning).all()
        kept[:, 0] = False
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
