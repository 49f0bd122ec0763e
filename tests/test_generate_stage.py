"""The stage generate: its lines and manifest, what they agree with, and what it refuses."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from generation_pieces import trained_on
from tiny_models import tiny_gpt2, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline import records
from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.generate_text import GenerateConfig, Sampling
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.site_file import Site
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.checkpoint import crosscoder_part, load_crosscoder
from pipeline.crosscoder.checkpoint_files import Part
from pipeline.generation import samples
from pipeline.generation.continuation import Writer
from pipeline.generation.editing import Edit
from pipeline.generation.prompts import Prompts, read_prompts
from pipeline.generation.splicing import Intervention
from pipeline.language_model import LanguageModel
from pipeline.language_models import hashes, load_models
from pipeline.run import Run, Stopped
from pipeline.stages import generate_text

LAYERS = ["transformer.h.0", "transformer.h.2"]
PROMPTS = ["def f1(x):", "    return"]


class Place:
    """A language model with a tokenizer, and a run of train."""

    def __init__(self, root: Path) -> None:
        self.root, self.model = root, tiny_gpt2(root / "model")
        tiny_tokenizer(self.model)
        self.language_model = LanguageModel.load(self.model_config)
        self.run = self.train("train")

    @property
    def model_config(self) -> LanguageModelConfig:
        return LanguageModelConfig(model=str(self.model), device="cpu")

    def train(self, name: str, **facts: Any) -> Path:
        trained = trained_on(self.language_model, LAYERS)
        known = {name: getattr(trained, name) for name in ("step", "dead_window_tokens", "activations_id", "batch_positions")}
        known |= {
            "tokens": 1,
            "layers": LAYERS,
            **trained.provenance.facts(),
            "tokenizer_hash": self.language_model.tokenizer_hash,
            **facts,
        }
        part = crosscoder_part(trained.crosscoder, trained.normalizer, trained.tokens_since_fired_F, trained.config, known)
        return checkpoint_files.write(self.root / name / "checkpoints", 1, {"crosscoder": part, "training": Part({}, {})}).parent.parent

    def config(self, **changes: Any) -> GenerateConfig:
        values: dict[str, Any] = {"stage": "generate", "name": "test", "crosscoder": str(self.run), "prompts": PROMPTS, "seed": 3}
        values |= {"language_model": {"model": str(self.model), "device": "cpu"}, "sampling": {"max_new_tokens": 5, "temperature": 1.0}}
        found = load.from_values(values | changes, where="test", site=Site())
        assert isinstance(found, GenerateConfig)
        return found

    def generate(self, directory: Path, **changes: Any) -> tuple[dict[str, Any], list[samples.Row], str]:
        """Result, lines and log."""
        log = io.StringIO()
        result = generate_text.run(self.config(**changes), Run(directory, output=log))
        lines = (directory / "generations/generations.jsonl").read_text(encoding="utf-8").splitlines()
        return result, [json.loads(line) for line in lines], log.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def test_lines_hold_what_the_writer_gives_and_the_manifest_their_means(place: Place, tmp_path: Path) -> None:
    steering = {"features": [3, 7], "strengths": [4.0, -8.0], "layers": LAYERS[:1], "positions": "last"}
    result, rows, _ = place.generate(tmp_path, steering=steering, encode_from="spliced", layers=LAYERS[1:])
    kinds = [("clean", None), ("reconstruction", None), ("steered", 4.0), ("steered", -8.0)]
    assert [(row["prompt"], row["kind"], row["strength"]) for row in rows] == [(number, *kind) for number in range(2) for kind in kinds]

    trained = load_crosscoder(place.run)
    writer, prompts = Writer(place.language_model, trained), Prompts.of(place.language_model, trained)
    sampling = Sampling(max_new_tokens=5, temperature=1.0)
    for number, text in enumerate(PROMPTS):
        prompt = prompts.encode(text)
        assert prompts.decode(prompt) == text
        steered = [Intervention(LAYERS[:1], Edit((3, 7), s), True, len(prompt) - 1, "spliced") for s in (4.0, -8.0)]
        changes = [None, Intervention(LAYERS[1:], encode_from="spliced"), *steered]
        for row, change in zip(rows[4 * number : 4 * number + 4], changes, strict=True):
            found = writer.continue_text(prompt, sampling, change, seed=[3, number])
            assert (row["token_ids"], row["kl"], row["cross_entropies"]) == (found.token_ids, found.kl, found.cross_entropies)
            assert (row["prompt_text"], row["prompt_ids"]) == (text, prompt)
            assert row["text"] == prompts.decode([*prompt, *found.token_ids])[len(text) :]

    manifest, _ = records.read_data_set(tmp_path / "generations", samples.SET_FORMAT, samples.SHARD_FORMAT)
    assert [(one["kind"], one["strength"], one["texts"]) for one in manifest["summary"]] == [(*kind, 2) for kind in kinds]
    assert manifest["summary"][1]["kl_per_token"] == pytest.approx((rows[1]["kl_per_token"] + rows[5]["kl_per_token"]) / 2)
    assert result["reconstruction"]["kl_per_token"] == manifest["summary"][1]["kl_per_token"] > 0
    assert [one["strength"] for one in result["steered"]] == [4.0, -8.0]
    assert records.verify(tmp_path / "generations") == []


def test_the_same_settings_give_the_same_bytes(place: Place, tmp_path: Path) -> None:
    ids = [place.generate(tmp_path / name)[0]["data_id"] for name in ("one", "other")]
    assert ids[0] == ids[1] != place.generate(tmp_path / "third", seed=4)[0]["data_id"]


def test_prompts_begin_as_contexts_of_the_training_did(place: Place, tmp_path: Path) -> None:
    _, rows, log = place.generate(tmp_path / "without", reconstruct=False)
    with_beginning = place.train("train-bos", beginning_of_text_id=0)
    _, others, said = place.generate(tmp_path / "with", crosscoder=str(with_beginning), reconstruct=False)
    assert [row["prompt_ids"] for row in others] == [[0, *row["prompt_ids"]] for row in rows]
    assert "prompts begin without beginning-of-text, as contexts of the training did" in log
    assert "prompts begin with beginning-of-text, id 0, as contexts of the training did" in said


def test_a_file_of_prompts_is_read_by_lines_or_as_json_lines(place: Place, tmp_path: Path) -> None:
    lines, json_lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("one\n\n two \n")
    json_lines.write_text('{"text": "one\\ntwo"}\n{"text": "three", "more": 1}\n')
    assert read_prompts(lines) == ["one", " two "]
    assert read_prompts(json_lines) == ["one\ntwo", "three"]
    _, rows, _ = place.generate(tmp_path / "run", prompts=["zero"], prompts_file=str(lines), reconstruct=False)
    assert [row["prompt_text"] for row in rows] == ["zero", "one", " two "]
    for text, sentence in (("", "holds no prompt"), ("[1]\n", "line 1 has no text"), ("{\n", "line 1 is not JSON")):
        json_lines.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_prompts(json_lines)
    with pytest.raises(UserError, match="there is no file"):
        read_prompts(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"layers": ["transformer.h.1"]},
            "layers names transformer.h.1, which the crosscoder doesn't know; name transformer.h.0 or transformer.h.2",
        ),
        ({"steering": {"features": [24], "strengths": [1.0]}}, "feature 24 is none of the crosscoder's, which has features 0 to 23"),
        ({"sampling": {"max_new_tokens": 80}}, "reads at most 64 tokens; use a shorter prompt, or fewer new tokens"),
        ({"written_by": "chat"}, "written_by is 'chat', but there is one language_model alone"),
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [""]}, "the prompt '' has no tokens"),
        ({"sampling": {"top_p": 0.5}}, "top_p is 0.5, but with temperature 0 nothing is drawn"),
        ({"steering": {"features": [1], "strengths": []}}, "strengths is empty, but mode add needs one or more"),
        ({"steering": {"features": [1], "mode": "ablate", "strengths": [1.0]}}, "mode ablate sets activations to 0 and takes no strengths"),
        ({"steering": {"features": [1, 1], "mode": "ablate"}}, "features names 1 twice"),
        (
            {"steering": {"features": [1], "mode": "ablate", "positions": "3"}},
            "positions is '3', expected all, last, or the first position",
        ),
    ],
)
def test_what_can_not_be_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str, place: Place, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        place.generate(tmp_path, **changes)
    assert sentence in str(refused.value)
    assert not (tmp_path / "generations").exists()


def test_another_tokenizer_or_language_model_than_in_training_is_refused(place: Place, tmp_path: Path) -> None:
    other = place.train("train-other", tokenizer_hash="f" * 64)
    with pytest.raises(UserError, match=r"prompts would be other tokens; language_model\.check_tokenizer=false does without"):
        place.generate(tmp_path / "a", crosscoder=str(other))
    model = {"model": str(place.model), "device": "cpu", "check_tokenizer": False}
    place.generate(tmp_path / "b", crosscoder=str(other), language_model=model, reconstruct=False)
    other = place.train("train-another", language_model_hash="f" * 64)
    with pytest.raises(UserError, match="was trained on a language model of hash ffffffffffff"):
        place.generate(tmp_path / "c", crosscoder=str(other))


def test_with_several_language_models_the_one_that_is_named_writes(place: Place, tmp_path: Path) -> None:
    other = tiny_gpt2(tmp_path / "other", seed=1)
    tiny_tokenizer(other)
    model = {"device": "cpu"}
    several = {
        "language_model": None,
        "language_models": {"base": {"model": str(other), **model}, "chat": {"model": str(place.model), **model}},
    }
    config = place.config(**several, written_by="chat")
    provenance = {"language_models": hashes(load_models(config)), "language_model_hash": load_models(config).hash}
    layers = [f"base/{LAYERS[0]}", f"chat/{LAYERS[1]}"]
    both = place.train("train-both", layers=layers, **provenance)
    result, rows, _ = place.generate(tmp_path / "run", **several, written_by="chat", crosscoder=str(both))
    _, alone, _ = place.generate(tmp_path / "alone")
    assert [row["token_ids"] for row in rows if row["kind"] == "clean"] == [row["token_ids"] for row in alone if row["kind"] == "clean"]
    assert result["reconstruction"]["kl_per_token"] > 0
    with pytest.raises(UserError, match="written_by is missing, expected one of base, chat"):
        place.config(**several)


class StoppedAt(Run):
    """Is asked to stop at the n-th look."""

    def __init__(self, directory: Path, at: int) -> None:
        super().__init__(directory, output=io.StringIO())
        self._left = at

    def check_stop(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.request_stop("test")
        super().check_stop()


def test_stopped_within_a_text_and_started_again_it_gives_the_same_bytes(place: Place, tmp_path: Path) -> None:
    whole, _, _ = place.generate(tmp_path / "whole")
    with pytest.raises(Stopped):
        generate_text.run(place.config(), StoppedAt(tmp_path / "stopped", 13))  # tokens
    assert not (tmp_path / "stopped/generations/generations.jsonl").exists()
    assert place.generate(tmp_path / "stopped")[0]["data_id"] == whole["data_id"]


def test_the_space_between_prompt_and_continuation_stays_where_a_tokenizer_drops_the_first() -> None:
    tokenizer = Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1, "s": 2}, unk_token="s"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    prompts = Prompts(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer), beginning_of_text_id=None, vocab_size=3)
    assert prompts.encode("one") == [0]
    assert prompts.decode([1]) == "two"
    assert prompts.decode_behind([0], [1, 2]) == " twos"
