"""The stage `tokenize`: the same bytes however the work is done, every line accounted for, and nothing lost to a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import xxhash
from token_fixtures import compressed, files_of, json_lines, make_texts, make_tokenizer, tokenize
from waiting import wait_until

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.run import Run, Stopped
from pipeline.text.source_parts import PartWriter
from pipeline.tokens import TokenSet

BAD = [b"{", b'{"other": 1}', b'{"text": 7}', b'{"text": "\xff"}', b"", b'{"text": "' + b"a" * 5000 + b'"}']


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture
def corpus(tmp_path, tokenizer_file):
    return make_corpus(tmp_path / "corpus", tokenizer_file)


def make_corpus(directory, tokenizer_file, endings=("", ".gz", ".zst"), texts=60):
    """One source in each form, 60 texts each, beside the tokenizer."""
    directory.mkdir()
    (directory / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    for number, ending in enumerate(endings):
        (directory / f"s{number}.jsonl{ending}").write_bytes(compressed(json_lines(make_texts(texts, seed=number)), ending))
    return directory


def documents_of(directory):
    tokens = TokenSet.open(directory)
    return [tokens.document(i).tolist() for i in range(tokens.num_documents)]


def test_every_document_is_in_the_split_that_its_hash_says_with_the_tokenizers_own_ids(corpus):
    result = tokenize(corpus, part_bytes=2000)
    own = tokenizers.Tokenizer.from_file(str(corpus / "tokenizer.json"))
    wanted = {"train": [], "validation": []}
    for text in [text for seed in range(3) for text in make_texts(60, seed=seed)]:
        held_out = xxhash.xxh3_64_intdigest(text.encode()) < 0.2 * 2**64
        wanted["validation" if held_out else "train"].append(own.encode(text).ids)
    assert {split: documents_of(corpus / "tokens" / split) for split in wanted} == wanted
    assert len(wanted["validation"]) > 10
    assert result["sealed"]
    assert result["sets"]["train"]["documents"] == len(wanted["train"])


@pytest.mark.parametrize(
    "settings",
    [{"processes": 2, "chunk_bytes": 500}, {"processes": 1, "chunk_bytes": 100}, {"encoder": "auto"}],
    ids=["processes", "chunks", "encoder"],
)
def test_bytes_do_not_depend_on_how_the_work_is_done(corpus, settings):
    tokenize(corpus, part_bytes=3000)
    wanted = without_provenance(files_of(corpus / "tokens"))
    tokenize(corpus, part_bytes=3000, output=str(corpus / "other"), **settings)
    assert without_provenance(files_of(corpus / "other")) == wanted


def test_bytes_do_not_depend_on_the_number_of_tasks_or_the_compression(corpus, tmp_path, tokenizer_file):
    tokenize(corpus, part_bytes=3000)
    plain = make_corpus(tmp_path / "plain", tokenizer_file, endings=("", "", ""))
    results = [tokenize(plain, part_bytes=3000, task=task, num_tasks=2) for task in (1, 0)]
    assert [(result["sealed"], result["this_run"]["documents"]) for result in results] == [(False, 60), (True, 120)]
    assert without_provenance(files_of(plain / "tokens")) == without_provenance(files_of(corpus / "tokens"))


def test_adding_a_file_moves_no_document_and_keeps_the_shards(corpus):
    tokenize(corpus)
    before = files_of(corpus / "tokens" / "validation")
    (corpus / "t.jsonl").write_bytes(json_lines(make_texts(20, seed=9)))
    result = tokenize(corpus)
    after = files_of(corpus / "tokens" / "validation")
    assert result["this_run"]["documents"] == 20
    assert {name: after[name] for name in before if name != "manifest.json"} == {k: v for k, v in before.items() if k != "manifest.json"}
    assert json.loads(after["manifest.json"])["shards"] == ["s0-000", "s1-000", "s2-000", "t-000"]


def test_without_a_validation_fraction_there_is_one_set(corpus):
    tokenize(corpus, validation_fraction=0.0)
    assert sorted(path.name for path in (corpus / "tokens").iterdir()) == ["rejects", "train"]
    assert len(documents_of(corpus / "tokens" / "train")) == 180


def test_the_vocabulary_decides_the_width_of_ids(corpus):
    own = tokenizers.Tokenizer.from_file(str(corpus / "tokenizer.json"))
    own.add_tokens([f"<{i}>" for i in range(65_600 - own.get_vocab_size())])
    own.save(str(corpus / "tokenizer.json"))
    (corpus / "wide.jsonl").write_bytes(json_lines(["a<65000>b"]))
    tokenize(corpus, validation_fraction=0.0)
    assert TokenSet.open(corpus / "tokens" / "train").dtype.name == "uint32"
    assert own.encode("a<65000>b").ids in documents_of(corpus / "tokens" / "train")


def test_every_line_is_accounted_for_and_bad_ones_are_named_in_the_side_file(corpus):
    lines = json_lines(make_texts(10, seed=4)).splitlines()
    mixed = [line for pair in zip(lines, BAD, strict=False) for line in pair]
    (corpus / "s0.jsonl").write_bytes(b"\n".join(mixed))
    result = tokenize(corpus, max_bad_fraction=0.9, max_line_bytes=4000, part_bytes=300, chunk_bytes=100)
    reasons = ["not_json", "no_text_field", "not_a_string", "invalid_utf8", "empty", "too_long"]
    rejects = [json.loads(line) for line in (corpus / "tokens/rejects/s0.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["line"], r["reason"]) for r in rejects] == list(zip(range(2, 13, 2), reasons, strict=True))
    assert sorted(path.name for path in (corpus / "tokens/rejects").iterdir()) == ["s0.jsonl"]
    for split in ("train", "validation"):
        for record in records.committed_shards(corpus / "tokens" / split, "token-shard/1").values():
            assert record["lines"] == record["documents"] + record["documents_elsewhere"] + record["empty"] + record["rejected"]
            assert record["rejected"] == sum(record["rejected_by_reason"].values())
    assert result["this_run"]["lines"] == 132
    assert (result["this_run"]["empty"], result["this_run"]["rejected"]) == (1, 5)


def test_too_many_bad_lines_fail_with_the_side_file_in_place_and_finished_sources_kept(corpus):
    (corpus / "s1.jsonl.gz").unlink()
    (corpus / "s1.jsonl").write_bytes(b"\n".join([*json_lines(make_texts(8)).splitlines(), b"{", b"[]"]))
    with pytest.raises(
        UserError, match=r"s1\.jsonl: 2 of 10 lines give no document, more than max_bad_fraction 0\.19 .*1 not_json, 1 no_te"
    ):
        tokenize(corpus, max_bad_fraction=0.19)
    assert len((corpus / "tokens/rejects/s1-000.jsonl").read_text().splitlines()) == 2
    assert (corpus / "tokens/train/s0-000.json").exists()
    assert not list((corpus / "tokens").rglob("*s1-000.bin*"))
    assert tokenize(corpus, max_bad_fraction=0.2)["sealed"]


@pytest.mark.parametrize("part_bytes", [200, 1 << 30])
def test_blank_lines_are_empty_ones_and_no_bad_ones(corpus, part_bytes):
    (corpus / "s0.jsonl").write_bytes(b"\n\n" + b"\n \r\n".join(json_lines(make_texts(10)).splitlines()) + b"\n\n\n")
    result = tokenize(corpus, max_bad_fraction=0.0, part_bytes=part_bytes)
    assert (result["this_run"]["lines"], result["this_run"]["documents"], result["this_run"]["empty"]) == (143, 130, 13)
    for record in records.committed_shards(corpus / "tokens" / "train", "token-shard/1").values():
        assert record["lines"] == record["documents"] + record["documents_elsewhere"] + record["empty"] + record["rejected"]
    (corpus / "s0.jsonl").write_bytes(b"\n" * 1000 + b"\n".join([*json_lines(make_texts(9)).splitlines(), b'{"text": ""}']))
    with pytest.raises(UserError, match=r"s0\.jsonl: 1 of 10 lines give no document, more than max_bad_fraction 0\.09"):
        tokenize(corpus, output=str(corpus / "other"), max_bad_fraction=0.09)


def test_a_nested_field_gives_the_same_documents(corpus):
    tokenize(corpus, output=str(corpus / "flat"))
    for number in range(3):
        for path in corpus.glob(f"s{number}.*"):
            path.unlink()
        texts = make_texts(60, seed=number)
        (corpus / f"s{number}.jsonl").write_bytes(b"".join(json.dumps({"message": {"content": text}}).encode() + b"\n" for text in texts))
    tokenize(corpus, text_field="message.content")
    assert documents_of(corpus / "tokens" / "train") == documents_of(corpus / "flat" / "train")


def test_a_text_that_the_tokenizer_makes_nothing_of_is_empty(corpus):
    own = tokenizers.Tokenizer.from_file(str(corpus / "tokenizer.json"))
    own.normalizer = tokenizers.normalizers.Strip()
    own.save(str(corpus / "tokenizer.json"))
    (corpus / "s0.jsonl").write_bytes(json_lines(["a", "   ", "b"]))
    tokenize(corpus, max_bad_fraction=0.5, validation_fraction=0.0)
    (reject,) = (corpus / "tokens/rejects/s0.jsonl").read_text(encoding="utf-8").splitlines()
    assert (json.loads(reject)["line"], json.loads(reject)["reason"]) == (2, "empty")
    assert documents_of(corpus / "tokens/train")[:2] == [own.encode("a").ids, own.encode("b").ids]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_point_it_redoes_only_unfinished_parts_and_ends_with_the_same_bytes(tmp_path, tokenizer_file, processes):
    corpus = make_corpus(tmp_path / "corpus", tokenizer_file, endings=(".zst",), texts=6000)
    settings = {"part_bytes": 100_000, "chunk_bytes": 20_000, "processes": processes}
    tokenize(corpus, output=str(corpus / "whole"), **settings)
    children = kill_after_parts(corpus, settings, parts=2)
    assert len(children) >= (processes if processes > 1 else 0)
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), "the children's end")
    kept = {path: path.stat().st_mtime_ns for path in (corpus / "tokens").rglob("s0-00[01].*") if ".tmp" not in path.name}
    total = len(list((corpus / "whole" / "train").glob("*.bin")))
    assert 2 <= len(list((corpus / "tokens/train").glob("s0-*.json"))) < total
    result = tokenize(corpus, **settings)
    assert files_of(corpus / "tokens") == files_of(corpus / "whole")
    assert len(kept) >= 12
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items() if "rejects" not in str(path))
    assert 0 < result["this_run"]["lines"] < 6000


def kill_after_parts(corpus, settings, *, parts):
    """Starts the stage as a process, kills it without warning once it has committed some parts; its child processes."""
    program = f"from token_fixtures import tokenize\nfrom pathlib import Path\ntokenize(Path({str(corpus)!r}), **{settings!r})\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_until(
            lambda: len(list((corpus / "tokens").rglob("s0-*.json"))) >= 2 * parts or process.poll() is not None,
            "the parts",
            poll_seconds=0.005,
        )
        assert process.poll() is None, "it ended before it could be killed"
        return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_asked_to_stop_it_keeps_finished_parts_and_goes_on_from_there(corpus, tmp_path):
    class StopsAfter(Run):
        calls = 0

        def check_stop(self):
            self.calls += 1
            if self.calls == 12:
                self.request_stop("test")
            super().check_stop()

    settings = {"part_bytes": 2000, "chunk_bytes": 500}
    with pytest.raises(Stopped):
        tokenize(corpus, run=StopsAfter(tmp_path / "run"), **settings)
    assert not list((corpus / "tokens").rglob("*.tmp"))
    done = len(list((corpus / "tokens/train").glob("s0-*.json")))
    result = tokenize(corpus, **settings)
    total = len(TokenSet.open(corpus / "tokens/train").shards)
    assert 0 < done < total
    assert result["this_run"]["lines"] < 180
    assert result["sets"]["train"]["lines"] == 180


def test_a_damaged_shard_is_redone_alone_and_keeps_the_other_parts_rejects(corpus):
    lines = [line for text in json_lines(make_texts(40, seed=3)).splitlines() for line in (text, b"{")]
    (corpus / "s0.jsonl").write_bytes(b"\n".join(lines))
    settings = {"part_bytes": 1500, "max_bad_fraction": 0.6}
    tokenize(corpus, **settings)
    wanted = files_of(corpus / "tokens")
    (corpus / "tokens/train/s0-001.json").unlink()
    result = tokenize(corpus, **settings)
    assert files_of(corpus / "tokens") == wanted
    assert 0 < result["this_run"]["lines"] == records.read_json(corpus / "tokens/train/s0-001.json")["lines"] < 80


def test_run_again_it_does_nothing_and_gives_the_same_sets(corpus):
    first = tokenize(corpus)
    wanted = files_of(corpus / "tokens")
    second = tokenize(corpus)
    assert second["sets"] == first["sets"]
    assert second["this_run"]["lines"] == 0
    assert files_of(corpus / "tokens") == wanted


def test_other_settings_or_another_tokenizer_do_not_mix_into_a_set(corpus):
    tokenize(corpus)
    with pytest.raises(UserError, match="was made with other settings: settings"):
        tokenize(corpus, validation_fraction=0.3, run=Run(corpus / "second"))
    make_tokenizer(corpus / "tokenizer.json", vocab_size=350)
    with pytest.raises(UserError, match="was made with other settings: inputs"):
        tokenize(corpus, run=Run(corpus / "third"))


def test_a_source_that_changed_is_refused(corpus):
    tokenize(corpus, part_bytes=2000)
    content = (corpus / "s0.jsonl").read_bytes()
    (corpus / "s0.jsonl").write_bytes(content + b"\n")
    with pytest.raises(UserError, match=r"s0\.jsonl holds .* the file changed"):
        tokenize(corpus, part_bytes=2000)
    (corpus / "s0.jsonl").write_bytes(content[:20] + b"X" + content[21:])
    (corpus / "tokens/train/s0-001.json").unlink()
    with pytest.raises(UserError, match=r"s0\.jsonl is not the text that .*s0-000 was made of"):
        tokenize(corpus, part_bytes=2000)


def test_shards_of_files_that_are_gone_are_named(corpus):
    tokenize(corpus)
    (corpus / "s1.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"holds s1-000, made of files that sources no longer names"):
        tokenize(corpus)


def test_a_file_that_is_cut_off_fails_and_keeps_its_finished_parts(corpus):
    content = json_lines(make_texts(2000, seed=2))
    (corpus / "s2.jsonl.zst").write_bytes(compressed(content, ".zst")[:-100])
    with pytest.raises(UserError, match=r"s2\.jsonl\.zst ends in the middle"):
        tokenize(corpus, part_bytes=20_000)
    assert len(list((corpus / "tokens/train").glob("s2-*.json"))) >= 2
    (corpus / "s2.jsonl.zst").write_bytes(compressed(content, ".zst"))
    assert tokenize(corpus, part_bytes=20_000)["this_run"]["lines"] < 2000


def without_provenance(files):
    """Files by name, with what a record says of where and by what it was made left out."""
    kept = dict(files)
    for name, content in files.items():
        if name.endswith(".json"):
            kept[name] = {key: value for key, value in json.loads(content).items() if key != "provenance"}
    return kept


@pytest.fixture
def treacherous(corpus, monkeypatch):
    """A tokenizer that gigatoken reads otherwise, as if neither its definition nor probes told; only the last file has such text."""
    pytest.importorskip("gigatoken")
    monkeypatch.setattr("pipeline.text.encoders.unshared", lambda _definition: None)
    monkeypatch.setattr("pipeline.text.encoders.added_token_probes", lambda _tokens: [])
    own = tokenizers.Tokenizer.from_file(str(corpus / "tokenizer.json"))
    own.add_tokens([tokenizers.AddedToken("zq", single_word=True)])
    own.save(str(corpus / "tokenizer.json"))
    (corpus / "s2.jsonl.zst").write_bytes(compressed(json_lines([*make_texts(20, seed=2), "in a word: azqb"]), ".zst"))
    return corpus


def encoders_of(directory):
    return {record["provenance"]["encoder"] for record in records.committed_shards(directory, "token-shard/1").values()}


@pytest.mark.parametrize("processes", [1, 2])
def test_where_the_fast_encoder_is_found_wrong_nothing_that_it_made_stays(treacherous, capsys, processes):
    corpus = treacherous
    tokenize(corpus, output=str(corpus / "wanted"), part_bytes=1500)
    result = tokenize(corpus, encoder="auto", part_bytes=1500, chunk_bytes=500, processes=processes)
    found = without_provenance(files_of(corpus / "tokens"))
    assert found.pop("gigatoken-differs.json")
    assert found == without_provenance(files_of(corpus / "wanted"))
    assert result["encoder"] == "tokenizers"
    assert encoders_of(corpus / "tokens/train") | encoders_of(corpus / "tokens/validation") == {"tokenizers"}
    assert "for the text that begins 'in a word: azqb'; what it made in" in capsys.readouterr().out
    # It is remembered: what is added later is not given to it again.
    (corpus / "t.jsonl").write_bytes(json_lines(make_texts(20, seed=9)))
    assert tokenize(corpus, encoder="auto", part_bytes=1500)["encoder"] == "tokenizers"


def test_asked_for_by_name_and_found_wrong_the_fast_encoder_fails_and_its_parts_are_made_again(treacherous):
    settings = {"encoder": "gigatoken", "part_bytes": 1500}
    with pytest.raises(UserError, match=r"gigatoken gives other ids than .*azqb'; set encoder: auto and start it again"):
        tokenize(treacherous, **settings)
    assert encoders_of(treacherous / "tokens/train") == {"gigatoken"}
    with pytest.raises(UserError, match="encoder: gigatoken can't be used: gigatoken gives other ids"):
        tokenize(treacherous, **settings)
    assert tokenize(treacherous, encoder="tokenizers", part_bytes=1500)["sealed"]
    assert encoders_of(treacherous / "tokens/train") == {"tokenizers"}


def test_a_task_keeps_nothing_of_what_another_task_found_wrong(corpus, monkeypatch):
    pytest.importorskip("gigatoken")
    commit = PartWriter.commit

    def commit_and_another_finds_it(self, end):
        commit(self, end)
        records.write_json(corpus / "tokens/gigatoken-differs.json", {"found": "gigatoken gives other ids than the tokenizer"})

    monkeypatch.setattr(PartWriter, "commit", commit_and_another_finds_it)
    result = tokenize(corpus, encoder="auto", part_bytes=1500)
    assert (result["encoder"], result["sealed"]) == ("tokenizers", True)
    assert encoders_of(corpus / "tokens/train") == {"tokenizers"}
