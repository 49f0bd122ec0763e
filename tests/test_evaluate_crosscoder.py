"""The stage evaluate: its files and what it says, what it refuses, and that a stop leaves nothing half done."""

import io
import json
import math
from pathlib import Path
from typing import Any

import evaluation_pieces
import pytest
import torch
from evaluation_pieces import (
    CONTEXT_TOKENS,
    LAYERS,
    Json,
    Pieces,
    batch_topk_config,
    evaluated,
    exact_crosscoder,
    held_out_tokens,
    loss_row,
    random_crosscoder,
    reconstruction_row,
)
from tiny_models import tiny_gpt2

from pipeline import records
from pipeline.config.crosscoder import CrosscoderConfig, Relu
from pipeline.config.errors import UserError
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.evaluation.definitions import DEFINITIONS
from pipeline.prediction_head import PredictionHead
from pipeline.run import Run, Stopped
from pipeline.stages import evaluate_crosscoder
from pipeline.tokens import write_token_set

pieces, trained_run, metrics = evaluation_pieces.pieces, evaluation_pieces.trained_run, evaluation_pieces.metrics


# -- what it writes and says ------------------------------------------------------------------------------------------------------


def numbers_in(value: Any, names: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """The names on the way to every number."""
    if isinstance(value, dict):
        return {path for key, inner in value.items() for path in numbers_in(inner, (*names, key))}
    if isinstance(value, list):
        return {path for inner in value for path in numbers_in(inner, names)}
    return {names} if isinstance(value, int | float) else set()


def test_every_number_is_defined_in_words(pieces: Pieces, metrics: Json, trained_run: Path, tmp_path: Path) -> None:
    compared = evaluated(pieces, trained_run, tmp_path, compare_with=[trained_run])
    for document in (metrics, compared):
        kinds = {row["by"] for row in [*document["reconstruction"], *document["replaced"]]} | {"joint", "mean_over_layers", "split"}
        assert document["definitions"] == DEFINITIONS
        assert kinds <= set(DEFINITIONS)
        for path in numbers_in(document):
            # A number is named by its own name, or by that of the group that says what it is of (a layer, a quantile).
            assert any(name.removesuffix("_fraction") in DEFINITIONS or name in DEFINITIONS for name in path[-2:]), path


def test_result_names_the_headline_numbers_and_the_files(pieces: Pieces, trained_run: Path, metrics: Json, tmp_path: Path) -> None:
    result = evaluate_crosscoder.run(pieces.config(trained_run), Run(tmp_path, output=io.StringIO()))
    assert json.loads(json.dumps(result)) == result
    assert result["l0"] == metrics["sparsity"]["l0"]
    assert result["explained_variance"] == reconstruction_row(metrics, "joint", "crosscoder")["explained_variance"]
    mean = loss_row(metrics, "mean_over_layers", "crosscoder")
    assert (result["cross_entropy_difference"], result["recovered_against_zero"]) == (mean["difference"], mean["recovered_against_zero"])
    assert result["cross_entropy_difference_split"] == loss_row(metrics, "split", "crosscoder")["difference"]
    fitted = ("affine", "other_layer", "other_layer_matched", "pca", "pca_joint", "random_dictionary")
    best = [min(row["difference"] for row in metrics["replaced"] if row["layer"] == layer and row["by"] in fitted) for layer in LAYERS]
    assert result["cross_entropy_difference_of_baseline"] == pytest.approx(sum(best) / 2)
    assert Path(result["files"][0]).name == "metrics.json"
    assert all(Path(file).stat().st_size > 0 for file in result["files"])


def test_inputs_are_recorded_by_content(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    evaluated(pieces, trained_run, tmp_path)
    inputs = {field: entry["data_id"] for field, entry in records.read_json(tmp_path / "inputs.json").items()}
    assert inputs == {
        "crosscoder": load_crosscoder(trained_run).identity,
        "language_model": pieces.language_model.hash,
        "tokens": pieces.tokens.data_id,
        "training_tokens": pieces.training_tokens.data_id,
    }


def test_every_table_is_in_a_file_within_100_columns(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    output = io.StringIO()
    evaluate_crosscoder.run(pieces.config(trained_run), Run(tmp_path, output=output))
    text = (tmp_path / "tables.txt").read_text(encoding="utf-8")
    lines = [*output.getvalue().splitlines(), *text.splitlines()]
    of_paths = (str(tmp_path), str(pieces.tokens.directory))  # a path is as long as it is
    assert max(len(line) for line in lines if not any(path in line for path in of_paths)) <= 100
    for phrase in (
        "L0 ",
        "dense: ",
        "Outliers",
        "Reconstruction",
        "Cross-entropy",
        "each position at one layer",
        "At other L0s",
        "What drives the features",
    ):
        assert phrase in text
    assert "…" not in text
    assert not any(line != line.rstrip() for line in lines)


def said_by(pieces: Pieces, crosscoder: Path, directory: Path, **changes: Any) -> str:
    """What the terminal shows, each sentence on a line of its own."""
    output = io.StringIO()
    evaluate_crosscoder.run(pieces.config(crosscoder, **changes), Run(directory, output=output))
    return output.getvalue()


def test_the_terminal_shows_five_numbers_the_verdict_and_where_the_rest_is(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    text = said_by(pieces, trained_run, tmp_path)
    document, result = records.read_json(tmp_path / "metrics.json"), load_crosscoder(trained_run)
    lines = text[text.index(f"crosscoder {result.identity[:12]}") :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("  cost"))
    names = [line.split("  ")[1].strip() for line in lines[first : first + 5]]
    assert names == ["cost", "explained variance", "L0", "dead", "sharing"]
    mean, joint = loss_row(document, "mean_over_layers", "crosscoder"), reconstruction_row(document, "joint", "crosscoder")
    assert lines[first].split()[1] == f"{mean['difference']:.4f}"
    assert lines[first + 1].split()[2].rstrip(";") == f"{joint['explained_variance']:.4f}"
    assert lines[first + 2].split()[1] == f"{document['sparsity']['l0']:.2f}"
    assert lines[first + 5 : first + 6 + len(document["verdict"])] == ["", *document["verdict"]]
    paths = [line for line in lines if line.startswith(str(tmp_path))]
    named = ["metrics.json", "nats.png", "tables.txt", "explained_variance.png", "l0_curves.png", "feature_density.png"]
    assert [Path(path).name for path in paths] == [*named, "features.safetensors"]
    assert "Reconstruction" not in text, "the wide tables are in the file"


def test_a_crosscoder_worse_than_the_strongest_baseline_is_called_so(pieces: Pieces, tmp_path: Path) -> None:
    config = CrosscoderConfig(num_features=4, activation_function=Relu())
    poor = pieces.write_crosscoder(config, random_crosscoder(config), run="poor")
    exact = pieces.write_crosscoder(*exact_crosscoder(), run="exact")
    said = {name: " ".join(said_by(pieces, run, tmp_path / name).split()) for name, run in {"poor": poor, "exact": exact}.items()}
    assert f"{LAYERS[0]}: WORSE than the strongest baseline by nats: the crosscoder costs" in said["poor"]
    assert "WORSE by explained variance" in said["poor"]
    assert "the crosscoder costs 0.0000, " in said["exact"]


def test_an_evaluation_on_its_own_training_text_says_so(pieces: Pieces, tmp_path: Path) -> None:
    config = batch_topk_config()
    run = pieces.write_crosscoder(config, random_crosscoder(config), run="own-text", tokens_id=pieces.tokens.data_id)
    assert "is the token set that the crosscoder was trained on" in said_by(pieces, run, tmp_path)


def test_where_the_baselines_are_fitted_is_said(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    on_training = said_by(pieces, trained_run, tmp_path / "training")
    assert "a part of" not in on_training
    assert "training_tokens" not in on_training
    assert "that is not measured; training_tokens names another set" in said_by(
        pieces, trained_run, tmp_path / "part", training_tokens=None
    )
    document = records.read_json(tmp_path / "part" / "metrics.json")
    assert document["baselines"]["fitted_on"] == "tokens"
    assert document["held_out"]["positions"] < records.read_json(tmp_path / "training" / "metrics.json")["held_out"]["positions"]
    itself = said_by(pieces, trained_run, tmp_path / "itself", training_tokens=pieces.tokens.directory)
    assert "the baselines are fitted on what they are measured on" in itself
    other = held_out_tokens(tmp_path / "tokens", seed=5)
    assert "is not the token set that the crosscoder was trained on" in said_by(
        pieces, trained_run, tmp_path / "other", training_tokens=other.directory
    )


def test_logits_in_the_models_own_precision_are_warned_of(
    pieces: Pieces, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warning = "cross-entropy and KL come from logits in its own precision"
    assert warning not in " ".join(said_by(pieces, trained_run, tmp_path / "exact").split())
    monkeypatch.setattr(PredictionHead, "of", classmethod(lambda cls, _model: cls(None, lambda logits: logits)))
    assert warning in " ".join(said_by(pieces, trained_run, tmp_path / "own").split())


def test_few_rows_to_fit_on_are_warned_of(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    few = " ".join(said_by(pieces, trained_run, tmp_path / "few", fit_tokens=60).split())
    assert "beware, the baselines were fitted on 51 positions, little for a width of 16" in few
    assert "the baselines were fitted on" not in said_by(pieces, trained_run, tmp_path / "enough")


@pytest.mark.parametrize("stopped_in", ["norms", "means", "fit baselines", "evaluate"])
def test_an_evaluation_that_is_stopped_leaves_no_metrics(pieces: Pieces, trained_run: Path, tmp_path: Path, stopped_in: str) -> None:
    class StoppingRun(Run):
        last: tuple[str, float] = ("", 0)

        def report(self, phase: str, step: float, *args: Any, **named: Any) -> None:
            super().report(phase, step, *args, **named)
            self.last = (phase, step)
            if phase == stopped_in:
                self.request_stop("SIGTERM")

    run = StoppingRun(tmp_path, output=io.StringIO())
    with pytest.raises(Stopped, match="SIGTERM"):
        evaluate_crosscoder.run(pieces.config(trained_run), run)
    assert run.last == (stopped_in, 4), "it stops after the first batch"
    assert {path.name for path in tmp_path.iterdir()} == {"inputs.json", "progress.json"}


# -- what it refuses --------------------------------------------------------------------------------------------------------------


def refused(pieces: Pieces, crosscoder: Path, directory: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        evaluated(pieces, crosscoder, directory, **changes)
    assert not (directory / "metrics.json").exists()
    return str(caught.value)


def test_another_language_model_is_refused(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    other = pieces.language_model_config().model_copy(update={"model": str(tiny_gpt2(tmp_path / "other", seed=1))})
    message = refused(pieces, trained_run, tmp_path / "run", language_model=other)
    assert f"trained on a language model of hash {pieces.language_model.hash[:12]}" in message
    assert message.endswith("name the model that it was trained on")


def test_a_layer_or_width_that_the_model_does_not_have_is_refused(pieces: Pieces, tmp_path: Path) -> None:
    config = batch_topk_config()
    run = pieces.write_crosscoder(config, random_crosscoder(config), run="missing-layer", layers=[LAYERS[0], "transformer.h.9"])
    assert "reads transformer.h.9, but" in refused(pieces, run, tmp_path)
    assert "has transformer.h.0 to transformer.h.2" in refused(pieces, run, tmp_path)
    run = pieces.write_crosscoder(config, random_crosscoder(config, d_model=8), run="narrow")
    assert "reads activations of width 8, but" in refused(pieces, run, tmp_path)


def test_a_compared_crosscoder_of_another_language_model_is_refused(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    config = batch_topk_config()
    other = pieces.write_crosscoder(config, random_crosscoder(config), run="other-model", language_model_hash="b" * 64)
    message = refused(pieces, trained_run, tmp_path, compare_with=[other])
    assert message.startswith(f"compare_with {other} was trained on a language model of hash bbbbbbbbbbbb, but ")


def test_a_compared_crosscoder_of_other_layers_is_refused(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    config = batch_topk_config()
    other = pieces.write_crosscoder(config, random_crosscoder(config, 1), run="elsewhere/id", layers=["transformer.h.1"])
    message = refused(pieces, trained_run, tmp_path, compare_with=[other])
    assert f"compare_with {other} reconstructs transformer.h.1, the crosscoder in {trained_run} {', '.join(LAYERS)}; name runs" in message


def test_a_run_to_compare_with_that_is_named_twice_is_refused(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    message = refused(pieces, trained_run, tmp_path, compare_with=[trained_run, trained_run])
    assert message == f"compare_with[1] is {trained_run}, which is named already; name each run once"


def test_a_compared_crosscoder_of_contexts_that_begin_otherwise_is_said(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    config = batch_topk_config()
    other = pieces.write_crosscoder(config, random_crosscoder(config), run="begins/id", beginning_of_text_id=5)
    said = said_by(pieces, trained_run, tmp_path, compare_with=[other])
    assert "begins was trained on contexts that begin otherwise (beginning-of-text id 5, here none)" in said


def test_compared_runs_of_one_name_are_told_apart(pieces: Pieces, trained_run: Path) -> None:
    config = batch_topk_config()
    runs = [pieces.write_crosscoder(config, random_crosscoder(config), run=f"same/{number}") for number in (1, 2)]
    checkpoint = runs[1] / "checkpoints" / "00000007"
    settings = pieces.config(trained_run, compare_with=[*runs, checkpoint])
    trained = load_crosscoder(trained_run)
    labels = [run.label for run in evaluate_crosscoder.compared_runs(settings, trained, pieces.language_model)]
    assert labels == ["same/1", "same/2", "same/2 at 00000007"]
    task = pieces.write_crosscoder(config, random_crosscoder(config), run="sweep/id/tasks/3")
    of_task = pieces.config(trained_run, compare_with=[task, runs[0]])
    labels = [run.label for run in evaluate_crosscoder.compared_runs(of_task, trained, pieces.language_model)]
    assert labels == ["sweep/tasks/3", "same"]
    (alone,) = evaluate_crosscoder.compared_runs(pieces.config(trained_run, compare_with=runs[:1]), trained, pieces.language_model)
    assert alone.label == "same"


def test_training_tokens_that_the_model_can_not_read_are_refused(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    large = write_token_set(tmp_path / "tokens", {"a-000": [[5, 400, 7]]}, vocab_size=500, end_of_text_id=0, tokenizer_hash="tokenizer")
    assert "holds id 400, but" in refused(pieces, trained_run, tmp_path / "run", training_tokens=large.directory)


def test_tokens_of_another_tokenizer_are_refused(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    other = held_out_tokens(tmp_path / "tokens", tokenizer_hash="another")
    message = refused(pieces, trained_run, tmp_path / "run", tokens=other.directory)
    assert "was made by the tokenizer another, the tokens that the crosscoder was trained on by tokenizer" in message


def test_contexts_longer_than_the_model_reads_are_refused(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    assert "context_tokens is 65" in refused(pieces, trained_run, tmp_path, context_tokens=65)


def test_other_contexts_or_positions_than_in_training_are_said(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    config = batch_topk_config()
    odd = pieces.write_crosscoder(
        config, random_crosscoder(config), run="odd", drop_positions=[0, 1], context_tokens=32, outlier_norms=[9.0, 9.0]
    )
    said = {}
    for name, (run, ratio) in {"odd": (odd, None), "alike": (trained_run, 10.0)}.items():
        output = io.StringIO()
        evaluate_crosscoder.run(pieces.config(run, outlier_norm_ratio=ratio), Run(tmp_path / name, output=output))
        said[name] = output.getvalue()
    assert f"context_tokens is {CONTEXT_TOKENS}, in training it was 32" in said["odd"]
    assert "training left out positions [0, 1] of each context; these figures leave out position 0 alone" in said["odd"]
    assert "training left out positions of large norm, outlier_norm_ratio null counts them" in said["odd"]
    assert "in training it was" not in said["alike"]
    assert "training left out" not in said["alike"]


def test_the_evaluation_does_as_training_did_about_beginning_of_text_and_refuses_otherwise(
    pieces: Pieces, trained_run: Path, tmp_path: Path
) -> None:
    config = batch_topk_config()
    with_bos = pieces.write_crosscoder(config, random_crosscoder(config), run="bos", beginning_of_text_id=5)
    documents = {run.name: evaluated(pieces, run, tmp_path / run.name) for run in (with_bos, trained_run)}
    held_out = {name: document["held_out"] for name, document in documents.items()}
    ids = pieces.tokens.num_tokens + pieces.tokens.num_documents
    assert held_out["bos"]["positions"] == ids > held_out["train-run"]["positions"]
    assert documents["bos"]["clean_cross_entropy"] != documents["train-run"]["clean_cross_entropy"]
    evaluated(pieces, with_bos, tmp_path / "said", beginning_of_text=True)
    message = refused(pieces, with_bos, tmp_path / "no", beginning_of_text=False)
    assert "beginning_of_text is false, but the crosscoder in" in message
    assert "contexts that begin with beginning-of-text, id 5; set it to auto, which does as training did" in message
    assert "was trained on contexts without beginning-of-text" in refused(pieces, trained_run, tmp_path / "yes", beginning_of_text=True)


def test_weights_that_are_not_finite_are_named_and_nothing_is_written(pieces: Pieces, tmp_path: Path) -> None:
    config, crosscoder = exact_crosscoder()
    with torch.no_grad():
        crosscoder.b_dec_LD[1, 3] = math.nan
    message = refused(pieces, pieces.write_crosscoder(config, crosscoder, run="nan"), tmp_path)
    assert message.startswith("metrics.reconstruction[1].explained_variance is nan: ")


def test_the_newest_finished_run_of_a_name_is_taken(tmp_path: Path) -> None:
    for run, status in {"20260101-000000-aaaa": "finished", "20260102-000000-bbbb": "finished", "20260103-000000-cccc": "failed"}.items():
        records.write_json(tmp_path / run / "result.json", {"status": status})
    assert evaluate_crosscoder.find_run(tmp_path).name == "20260102-000000-bbbb"


def test_a_run_and_a_checkpoint_stand_for_themselves(trained_run: Path) -> None:
    checkpoint = trained_run / "checkpoints" / "00000007"
    assert evaluate_crosscoder.find_run(trained_run) == trained_run
    assert evaluate_crosscoder.find_run(checkpoint) == checkpoint


def test_a_folder_without_a_finished_run_is_refused(pieces: Pieces, tmp_path: Path) -> None:
    records.write_json(tmp_path / "runs" / "20260103-000000-cccc" / "result.json", {"status": "failed"})
    assert "holds neither a checkpoint nor a finished run of train" in refused(pieces, tmp_path / "runs", tmp_path / "run")
    assert f"{tmp_path}/nowhere does not exist" in refused(pieces, tmp_path / "nowhere", tmp_path / "run")
