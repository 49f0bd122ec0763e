"""Writing with a crosscoder spliced in: agreement with whole passes without a cache, edits, positions, draws."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_architectures
import torch
from generation_pieces import slow_changed, trained_on, whole_pass
from rounding import forward_pass
from tiny_models import tiny_gpt2

from pipeline.config.errors import UserError
from pipeline.config.generate_text import Breakdown, Sampling, Steering
from pipeline.config.language_model import LanguageModelConfig
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.generation.continuation import Continuation, Writer
from pipeline.generation.editing import Edit
from pipeline.generation.growing_text import can_be_cached
from pipeline.generation.sampling import NextToken
from pipeline.generation.splicing import Intervention
from pipeline.language_model import LanguageModel
from pipeline.language_models import LanguageModels

FIRST, SECOND, THIRD = (f"transformer.h.{number}" for number in range(3))
PROMPT = [17, 203, 5, 88, 140]
GREEDY = Sampling(max_new_tokens=4)
EDIT = Edit((3, 7), 25.0)
TOLERANCE = 16 * forward_pass()
"""Log-probabilities of up to 10 follow a splice, which multiplies what went before it by its own weights."""


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory = tiny_gpt2(tmp_path_factory.mktemp("model"))
    return LanguageModel.load(LanguageModelConfig(model=str(directory), device="cpu"))


@pytest.fixture(scope="module")
def trained(language_model: LanguageModel) -> TrainedCrosscoder:
    return trained_on(language_model, [THIRD, FIRST, SECOND])


def check_against_whole_passes(
    writer: Writer, models: LanguageModel | dict[str, LanguageModel], trained: TrainedCrosscoder, change: Intervention, written_by: str = ""
) -> None:
    language_model = models[written_by] if isinstance(models, dict) else models
    found = writer.continue_text(PROMPT, GREEDY, change)
    tokens = list(PROMPT)
    for token, kl, cross_entropy in zip(found.token_ids, found.kl, found.cross_entropies, strict=True):
        clean_V = whole_pass(language_model, tokens, {}, [])["log_p"]
        changed_V = slow_changed(models, trained, change, tokens, written_by)
        assert float(changed_V[token]) == pytest.approx(float(changed_V.max()), abs=TOLERANCE)
        assert kl == pytest.approx(float(torch.sum(clean_V.exp() * (clean_V - changed_V))), abs=TOLERANCE)
        assert cross_entropy == pytest.approx(-float(clean_V[token]), abs=TOLERANCE)
        tokens.append(token)
    assert max(found.kl) > 10 * TOLERANCE, "nothing was changed"


@pytest.mark.parametrize(("encode_from", "is_cached"), [("clean", True), ("spliced", True), ("spliced", False)])
@pytest.mark.parametrize(
    "change",
    [
        {"layers": [FIRST, SECOND, THIRD]},
        {"layers": [SECOND]},
        {"layers": [SECOND, THIRD], "edit": EDIT},
        {"layers": [FIRST, SECOND], "edit": Edit((3, 7), 4.0, "clamp"), "first_position": 4},
        {"layers": [FIRST, THIRD], "edit": Edit((3, 7), 3.0, "scale"), "keep_error": False, "first_position": 7},
        {"layers": [FIRST], "edit": Edit(tuple(range(24)), 0.0, "ablate")},
    ],
    ids=["all layers", "one layer", "add", "clamp", "scale", "ablate"],
)
def test_each_token_is_what_a_pass_over_the_whole_text_without_cache_gives(
    change: dict[str, Any], encode_from: Any, is_cached: bool, language_model: LanguageModel, trained: TrainedCrosscoder
) -> None:
    writer = Writer(language_model, trained)
    assert writer.is_cached
    writer.is_cached = is_cached
    check_against_whole_passes(writer, language_model, trained, Intervention(**change, encode_from=encode_from))


@pytest.mark.parametrize("encode_from", ["clean", "spliced"])
def test_a_transcoder_with_a_dense_path_and_groups_agrees_with_whole_passes(encode_from: Any, language_model: LanguageModel) -> None:
    read, written = SECOND, f"{THIRD}.mlp_output"
    groups = [{"features": 12, "reads": [read], "writes": [written]}, {"features": 12, "reads": "all", "writes": [written]}]
    transcoder = trained_on(language_model, [written, read], groups=groups, dense_rank=3)
    torch.nn.init.normal_(transcoder.crosscoder.dense.write_RC, std=0.3, generator=torch.Generator().manual_seed(2))  # type: ignore[union-attr]
    writer = Writer(language_model, transcoder)
    assert writer.splicer.written == [written]
    check_against_whole_passes(writer, language_model, transcoder, Intervention([written], encode_from=encode_from))
    with pytest.raises(UserError, match=f"layers names {read}, which the crosscoder reads but doesn't write; name {written}"):
        writer.continue_text(PROMPT, GREEDY, Intervention([read]))


@pytest.mark.parametrize("encode_from", ["clean", "spliced"])
def test_of_several_models_one_writes_and_the_others_read_the_same_text(
    encode_from: Any, language_model: LanguageModel, tmp_path: Path
) -> None:
    other = LanguageModel.load(LanguageModelConfig(model=str(tiny_gpt2(tmp_path, seed=1)), device="cpu"))
    models = {"base": other, "chat": language_model}
    layers = [f"chat/{SECOND}", f"base/{FIRST}", f"chat/{FIRST}"]
    both, trained = LanguageModels(models), trained_on(language_model, layers)
    writer = Writer(both, trained, written_by="chat")
    assert writer.splicer.written == [f"chat/{SECOND}", f"chat/{FIRST}"]
    check_against_whole_passes(writer, models, trained, Intervention(writer.splicer.written, encode_from=encode_from), "chat")
    with pytest.raises(UserError, match=f"names base/{FIRST}, which the crosscoder has in a model that only reads; name chat/{SECOND} or"):
        writer.continue_text(PROMPT, GREEDY, Intervention(layers))
    with pytest.raises(UserError, match="written_by is 'cat', but the models are base, chat"):
        Writer(both, trained, written_by="cat")


@pytest.mark.parametrize(("architecture", "is_cached"), [("Gemma 2", True), ("GPT-NeoX", True), ("Mamba", False), ("Jamba", False)])
def test_a_model_without_a_key_value_cache_reads_the_text_again(architecture: str, is_cached: bool, tmp_path: Path) -> None:
    directory = tiny_architectures.save(architecture, tmp_path)
    language_model = LanguageModel.load(LanguageModelConfig(model=str(directory), device="cpu"))
    assert can_be_cached(language_model) is is_cached
    trained = trained_on(language_model, language_model.block_names[:2])
    change = Intervention(trained.layers, encode_from="spliced")
    check_against_whole_passes(Writer(language_model, trained), language_model, trained, change)


def test_the_models_own_continuation_is_that_of_whole_passes(language_model: LanguageModel, trained: TrainedCrosscoder) -> None:
    found = Writer(language_model, trained).continue_text(PROMPT, GREEDY)
    tokens = list(PROMPT)
    for token in found.token_ids:
        log_p_V = whole_pass(language_model, tokens, {}, [])["log_p"]
        assert float(log_p_V[token]) == pytest.approx(float(log_p_V.max()), abs=TOLERANCE)
        tokens.append(token)
    assert found.kl == [0.0] * 4


def test_with_clean_features_replacing_every_layer_is_replacing_the_last_alone(
    language_model: LanguageModel, trained: TrainedCrosscoder
) -> None:
    writer = Writer(language_model, trained)
    together, alone = (writer.continue_text(PROMPT, GREEDY, Intervention(layers)) for layers in (trained.layers, [THIRD]))
    assert together.kl == pytest.approx(alone.kl, abs=TOLERANCE)
    again = writer.continue_text(PROMPT, GREEDY, Intervention(trained.layers, encode_from="spliced"))
    assert again.kl != pytest.approx(alone.kl, abs=TOLERANCE)


@pytest.mark.parametrize("encode_from", ["clean", "spliced"])
def test_a_feature_changes_nothing_at_a_layer_that_it_does_not_write(encode_from: Any, language_model: LanguageModel) -> None:
    groups = [{"features": 12, "reads": "all", "writes": [FIRST]}, {"features": 12, "reads": "all", "writes": [SECOND]}]
    writer = Writer(language_model, trained_on(language_model, [FIRST, SECOND], groups=groups))
    of_first = Edit((3,), 50.0)
    there, elsewhere = (
        writer.continue_text(PROMPT, GREEDY, Intervention([layer], of_first, encode_from=encode_from)) for layer in (FIRST, SECOND)
    )
    own = writer.continue_text(PROMPT, GREEDY)
    assert elsewhere.token_ids == own.token_ids
    assert elsewhere.kl == pytest.approx(own.kl, abs=TOLERANCE)
    assert there.kl_per_token > 10 * TOLERANCE


def test_positions_before_the_first_stay_and_position_0_always_does(language_model: LanguageModel, trained: TrainedCrosscoder) -> None:
    writer = Writer(language_model, trained)
    late = writer.continue_text(PROMPT, GREEDY, Intervention([FIRST], EDIT, first_position=len(PROMPT) + 2))
    assert late.kl[:3] == pytest.approx([0.0] * 3, abs=TOLERANCE)  # behind positions 4 to 6
    assert late.kl[3] > 10 * TOLERANCE
    first = writer.continue_text(PROMPT[:1], GREEDY, Intervention([FIRST], EDIT, first_position=0))
    assert first.kl[0] == pytest.approx(0.0, abs=TOLERANCE)
    assert first.kl[1] > 10 * TOLERANCE


def test_a_continuation_ends_with_the_end_of_text(language_model: LanguageModel, trained: TrainedCrosscoder) -> None:
    writer = Writer(language_model, trained)
    own = writer.continue_text(PROMPT, GREEDY)
    end = own.token_ids[2]
    language_model.end_of_text_ids, before = [end], language_model.end_of_text_ids
    try:
        ended = writer.continue_text([*PROMPT[:-1], end, PROMPT[-1]], Sampling(max_new_tokens=3))
        found = writer.continue_text(PROMPT, GREEDY)
    finally:
        language_model.end_of_text_ids = before
    assert found.token_ids == own.token_ids[: own.token_ids.index(end) + 1]
    assert found.has_ended
    assert ended.token_ids  # one in the prompt ends nothing


def test_a_strength_that_leads_out_of_the_numbers_is_refused(language_model: LanguageModel, trained: TrainedCrosscoder) -> None:
    with pytest.raises(UserError, match=r"not numbers \(NaN\) behind 5 tokens; use a smaller strength"):
        Writer(language_model, trained).continue_text(PROMPT, GREEDY, Intervention([FIRST], Edit((3,), 1e38)))


# -- the parts, by hand --------------------------------------------------------------------------------------------------


def test_drawn_is_by_the_inverse_of_the_distribution_over_tokens_in_falling_order() -> None:
    log_p_V = torch.tensor([0.2, 0.5, 0.0, 0.3]).log()

    def share_of(sampling: Sampling) -> list[float]:
        next_token = NextToken(sampling, 0)
        drawn = [next_token.choose(log_p_V) for _ in range(2000)]
        uniforms = np.random.default_rng(0).random(2000)
        assert sum(token == 1 for token in drawn) == sum(uniforms < share_of_first)
        return [drawn.count(token) / 2000 for token in range(4)]

    share_of_first = 0.5
    assert share_of(Sampling(temperature=1.0)) == pytest.approx([0.2, 0.5, 0.0, 0.3], abs=0.04)
    share_of_first = 0.5 / 0.8
    assert share_of(Sampling(temperature=1.0, top_p=0.6)) == pytest.approx([0.0, 0.5 / 0.8, 0.0, 0.3 / 0.8], abs=0.04)
    share_of_first = 1.0
    assert share_of(Sampling(temperature=1.0, top_p=0.4)) == [0.0, 1.0, 0.0, 0.0]
    share_of_first = 0.25 / 0.38  # squares over their sum
    assert share_of(Sampling(temperature=0.5))[1] == pytest.approx(0.25 / 0.38, abs=0.04)


def test_all_texts_of_a_prompt_get_the_same_draws(language_model: LanguageModel, trained: TrainedCrosscoder) -> None:
    writer, sampling = Writer(language_model, trained), Sampling(max_new_tokens=6, temperature=1.0)
    nothing = Intervention([FIRST], Edit((3,), 0.0))
    own, same, other = (writer.continue_text(PROMPT, sampling, change, seed=[1, s]) for change, s in ((None, 0), (nothing, 0), (None, 1)))
    assert own.token_ids == same.token_ids
    assert own.token_ids != other.token_ids


def test_first_positions_by_hand() -> None:
    def first(positions: str) -> int:
        return Steering(features=[1], strengths=[1.0], positions=positions).first_position(prompt_tokens=5)

    assert [first("all"), first("last"), first("3:"), first("0:"), first("12:")] == [1, 4, 3, 1, 12]
    assert Steering(features=[1], strengths=[1.0], positions="last").first_position(1) == 1


def test_repeats_and_breaking_down_by_hand() -> None:
    found = Continuation([1, 2, 3, 1, 2, 3, 1], [0.0] * 7, [1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 1.0], has_ended=False)
    assert found.repeated_share(3) == pytest.approx(2 / 5)  # 123 231 312 123 231
    assert found.repeated_share(8) == 0.0
    assert found.cross_entropy == 1.0
    rule = Breakdown(cross_entropy_rise=1.0, repeated_rise=0.25)

    def reason(cross_entropy: float, repeated: float) -> str | None:
        return rule.reason(cross_entropy, repeated, own_cross_entropy=1.0, own_repeated_share=0.125)

    assert [reason(2.0, 0.375), reason(2.01, 0.5), reason(2.0, 0.376), reason(0.0, 0.0)] == [None, "cross-entropy", "repeats", None]
    assert reason(math.inf, 0.0) == "cross-entropy"
