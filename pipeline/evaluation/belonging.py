"""Whether a trained crosscoder, a language model and held-out text belong together: what every stage that uses one looks at first."""

from pathlib import Path

from pipeline import records
from pipeline.activations.model_check import other_model
from pipeline.activations.token_check import check_models_tokens
from pipeline.config.errors import UserError
from pipeline.config.held_out_text import HeldOutText
from pipeline.config.sites import SiteName
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.language_models import Models, each, in_its_model, sites_of
from pipeline.tokens import TokenSet


def find_run(path: Path) -> Path:
    """`path` itself if it is a run or a checkpoint; of a folder of runs of one name, the newest that finished."""
    if not path.is_dir() or (path / "checkpoints").exists() or (path / "crosscoder.json").exists():
        return path
    results = {result.parent: records.read_json(result) for result in path.glob("*/result.json")}
    finished = [directory for directory, result in results.items() if result.get("status") == "finished"]
    if not finished:
        raise UserError(f"{path} holds neither a checkpoint nor a finished run of train; train first, or name one of its checkpoints")
    return max(finished, key=lambda directory: directory.name)


def check_inputs(trained: TrainedCrosscoder, models: Models, tokens: TokenSet, config: HeldOutText) -> list[str]:
    """Sentences for the log; raises `UserError` where crosscoder, language model and token set don't belong together."""
    provenance = trained.provenance
    check_model(trained, models, f"the crosscoder in {config.crosscoder}")
    if provenance.tokenizer_hash != tokens.tokenizer_hash:
        raise UserError(
            f"{tokens.directory} was made by the tokenizer {_short(tokens.tokenizer_hash)}, the tokens that the crosscoder was trained on "
            f"by {_short(provenance.tokenizer_hash)}; tokenize the held-out text with the same tokenizer"
        )
    beginning = provenance.beginning_of_text_id
    if config.beginning_of_text not in ("auto", beginning is not None):
        was = "without beginning-of-text" if beginning is None else f"that begin with beginning-of-text, id {beginning:,}"
        raise UserError(
            f"beginning_of_text is {str(config.beginning_of_text).lower()}, but the crosscoder in {config.crosscoder} was trained on "
            f"contexts {was}; set it to auto, which does as training did"
        )
    models.check_use(trained.layers, config.context_tokens, predictions=True)
    remarks = check_readable(tokens, trained, models, config)
    does = "without beginning-of-text" if beginning is None else f"with beginning-of-text, id {beginning:,}"
    return [*models.remarks, *remarks, f"contexts begin {does}, as in training"]


def check_readable(tokens: TokenSet, trained: TrainedCrosscoder, models: Models, config: HeldOutText) -> list[str]:
    """Sentences for the log; raises `UserError` where a language model can't read the tokens as it did in training."""
    return check_models_tokens(tokens, models, config, beginning_of_text_id=trained.provenance.beginning_of_text_id)


def check_model(trained: TrainedCrosscoder, models: Models, what: str) -> None:
    """Raises `UserError` where a crosscoder, `what` to the user, was trained on another language model than `models`, or on others."""
    if (other := other_model(trained.provenance, models)) is not None:
        raise UserError(f"{what} was trained on {other.known}, but {other.given}; name the model that it was trained on")
    for name, model in each(models).items():
        own = sites_of(name, trained.layers)
        missing = [layer for layer in own if SiteName.parse(in_its_model(layer)).block not in model.block_names]
        if missing:
            raise UserError(
                f"{what} reads {missing[0]}, but {model.name} has {model.block_names[0]} to {model.block_names[-1]}; name the model that "
                "it was trained on"
            )
    if trained.d_model != models.d_model:
        raise UserError(
            f"{what} reads activations of width {trained.d_model:,}, but {models.name} has width {models.d_model:,}; name the model that "
            "it was trained on"
        )


def _short(content_hash: str) -> str:
    return content_hash[:12] if content_hash else "(none)"
