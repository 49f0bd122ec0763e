"""Every encoder gives the tokenizer's own ids, and special tokens written out in a text become what was asked for."""

import collections
import multiprocessing
import time

import numpy as np
import pytest
import tokenizers
from token_fixtures import END_OF_TEXT, make_texts, make_tokenizer

from pipeline.config.errors import UserError
from pipeline.text import encoders, running_check
from pipeline.text.chunk_encoder import ChunkSettings, EncoderPool
from pipeline.text.encoders import GigatokenEncoder, ReferenceEncoder, choose_encoder, make_encoder
from pipeline.text.probes import PROBES
from pipeline.text.running_check import EncoderDiffers
from pipeline.text.text_source import Chunk
from pipeline.text.tokenizer import load_tokenizer

TEXTS = [*PROBES, *make_texts(30), f"a{END_OF_TEXT}b {END_OF_TEXT}", ""]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def definition_of(file, special_text="token", end_of_text=None):
    return load_tokenizer(str(file), revision=None, special_text=special_text, end_of_text=end_of_text)


def ids_of(encoder, texts=TEXTS):
    encoded = encoder.encode(list(texts))
    return [part.tolist() for part in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])]


@pytest.mark.parametrize("name", ["tokenizers", "gigatoken"])
@pytest.mark.parametrize("special_text", ["token", "text"])
def test_ids_are_the_tokenizers_own(file, name, special_text):
    if name == "gigatoken":
        pytest.importorskip("gigatoken")
    own = tokenizers.Tokenizer.from_file(str(file))
    own.encode_special_tokens = special_text == "text"
    assert ids_of(make_encoder(definition_of(file, special_text), name)) == [own.encode(text).ids for text in TEXTS]


def test_a_special_token_in_a_text_is_the_token_or_ordinary_text(file):
    (as_token,) = ids_of(ReferenceEncoder(definition_of(file, "token")), [f"a{END_OF_TEXT}b"])
    (as_text,) = ids_of(ReferenceEncoder(definition_of(file, "text")), [f"a{END_OF_TEXT}b"])
    end = definition_of(file).vocabulary.end_of_text_id
    own = tokenizers.Tokenizer.from_file(str(file))
    assert as_token == [own.token_to_id("a"), end, own.token_to_id("b")]
    assert end not in as_text
    assert own.decode(as_text) == f"a{END_OF_TEXT}b"


def test_transformers_gives_the_same_definition_and_the_python_path_the_same_ids(file, tmp_path):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=END_OF_TEXT).save_pretrained(tmp_path)
    through_transformers = definition_of(tmp_path)
    assert through_transformers.vocabulary == definition_of(file).vocabulary
    assert ids_of(make_encoder(through_transformers, "transformers")) == ids_of(ReferenceEncoder(definition_of(file)))
    as_text = definition_of(tmp_path, "text")
    assert ids_of(make_encoder(as_text, "transformers")) == ids_of(ReferenceEncoder(as_text))


def test_a_tokenizer_that_exists_in_python_only_is_run_by_transformers(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    definition = definition_of(tmp_path)
    said = []
    name = choose_encoder(definition, "auto", [], said.append)
    assert (name, len(said), definition.backend_json) == ("transformers", 1, None)
    # ByT5 is bytes shifted by three special ids.
    assert ids_of(make_encoder(definition, name), ["ab", "é"]) == [[100, 101], [0xC3 + 3, 0xA9 + 3]]


def test_truncation_and_padding_in_the_file_do_not_touch_the_ids(file, tmp_path):
    own = tokenizers.Tokenizer.from_file(str(file))
    own.enable_truncation(4)
    own.enable_padding(length=9)
    own.save(str(tmp_path / "tokenizer.json"))
    assert ids_of(ReferenceEncoder(definition_of(tmp_path))) == ids_of(ReferenceEncoder(definition_of(file)))
    assert definition_of(tmp_path).vocabulary == definition_of(file).vocabulary


def test_an_encoder_that_gives_other_ids_is_not_chosen(file, monkeypatch):
    definition = definition_of(file)
    monkeypatch.setattr(encoders, "GigatokenEncoder", _broken_on("broken"))
    said = []
    assert choose_encoder(definition, "auto", ["fine"], said.append) == "gigatoken"
    assert choose_encoder(definition, "auto", ["fine", "this is broken"], said.append) == "tokenizers"
    assert len(said) == 1
    assert "its ids differ for the text that begins 'this is broken'" in said[0]
    with pytest.raises(UserError, match="gigatoken can't be used: its ids differ"):
        choose_encoder(definition, "gigatoken", ["this is broken"], said.append)


def test_without_the_fast_library_the_reference_is_used_and_the_reason_said(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    said = []
    assert choose_encoder(definition_of(file), "auto", [], said.append) == "tokenizers"
    assert "it is not installed" in said[0]


def test_why_the_fast_library_refuses_a_tokenizer_is_one_line(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, END_OF_TEXT: 2}, unk_token="a"))
    words.add_special_tokens([END_OF_TEXT])
    words.save(str(tmp_path / "tokenizer.json"))
    definition = load_tokenizer(str(tmp_path / "tokenizer.json"), revision=None, special_text="token", end_of_text=END_OF_TEXT)
    said = []
    assert choose_encoder(definition, "auto", ["a b"], said.append) == "tokenizers"
    (line,) = said
    assert "its model is WordLevel, not BPE" in line
    assert "\n" not in line


def test_the_fast_encoder_is_watched_as_it_works(file):
    pytest.importorskip("gigatoken")
    encoder = watched_by_another(file)
    with pytest.raises(EncoderDiffers, match=r"gigatoken gives other ids than .* for the text that begins 'a<\|endoftext"):
        encoder.encode(["x" * 3000, f"a{END_OF_TEXT}b"])


def test_documents_are_checked_all_through_a_run_and_long_ones_too(file):
    pytest.importorskip("gigatoken")
    encoder = watched_by_another(file)
    for _ in range(40):
        encoder.encode(["the cat " * 20_000])
    # Longer than all that is saved up by then: only slices of them can be checked.
    with pytest.raises(EncoderDiffers):
        collections.deque((encoder.encode([f"a{END_OF_TEXT}b " * 10_000]) for _ in range(40)), maxlen=0)


def test_a_long_document_is_now_and_then_checked_by_the_ids_that_it_was_given(file, monkeypatch):
    monkeypatch.setattr(running_check, "FIRST_CHARACTERS", 0)
    check = running_check.RunningCheck(lambda text: np.empty(0, np.uint32), "x")
    chunks = [["short " * 200] * 700 + ["long " * 10_000] * 4 for _ in range(1000)]
    drawn = [(texts, check.draw(texts)) for texts in chunks]
    whole = {len(texts[number]) for texts, found in drawn for number in found.whole}
    assert whole == {1200, 50_000}
    assert any(found.slices for _, found in drawn)
    checked = sum(len(texts[number]) for texts, found in drawn for number in found.whole)
    checked += sum(len(piece) for _, found in drawn for piece in found.slices)
    assert checked <= sum(len(text) for texts in chunks for text in texts) * running_check.CHECKED_SHARE


def watched_by_another(file):
    """gigatoken, held to a reference for which special tokens are ordinary text."""
    encoder = GigatokenEncoder(definition_of(file))
    other = ReferenceEncoder(definition_of(file, "text"))
    encoder._check = running_check.RunningCheck(lambda text: other.encode([text]).ids, "the tokenizer")
    return encoder


def test_the_fast_encoders_memory_of_words_is_thrown_away_in_time(file, monkeypatch):
    pytest.importorskip("gigatoken")
    encoder = GigatokenEncoder(definition_of(file))
    first = encoder._tokenizer
    encoder.encode(["a"])
    assert encoder._tokenizer is first
    monkeypatch.setattr(encoders, "MAX_CACHE_GROWTH_BYTES", -(1 << 40))
    encoder.encode(["a"])
    assert encoder._tokenizer is not first


def test_a_token_or_a_tokenizer_that_is_not_there_is_named(file, tmp_path):
    with pytest.raises(UserError, match=r"has no token '</s>'; set end_of_text"):
        definition_of(file, end_of_text="</s>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json that tokenizers"):
        definition_of(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.name is .*nothing, which does not exist; put it back"):
        definition_of(tmp_path / "nothing")


def test_a_killed_worker_is_said_in_one_sentence(file):
    settings = ChunkSettings(definition_of(file), "tokenizers", "text", 1000, 0.0, 0)

    def chunks():
        yield Chunk(0, 1, b'{"text": "a"}\n', None, None)
        while not multiprocessing.active_children():
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()
        while True:
            yield Chunk(0, 2, b'{"text": "b"}\n', None, None)

    with EncoderPool(settings, 2) as pool, pytest.raises(UserError, match="a tokenizing process was killed, most often for want of mem"):
        for _ in pool.map(chunks()):
            pass


def _broken_on(word):
    class Broken(ReferenceEncoder):
        def _encode(self, texts):
            encoded = self.encode(texts)
            is_broken = np.repeat([word in text for text in texts], encoded.lengths)
            return encoded._replace(ids=encoded.ids + is_broken)

    return Broken
