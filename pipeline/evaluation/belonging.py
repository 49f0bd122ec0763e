"""Whether a trained crosscoder, a language model and held-out text belong together: what every stage that uses one looks at first."""

from pathlib import Path

from pipeline import records
from pipeline.activations.token_check import check_tokens
from pipeline.config.errors import UserError
from pipeline.config.held_out_text import HeldOutText
from pipeline.config.sites import SiteName
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.language_model import LanguageModel
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


def check_inputs(trained: TrainedCrosscoder, language_model: LanguageModel, tokens: TokenSet, config: HeldOutText) -> list[str]:
    """Sentences for the log; raises `UserError` where crosscoder, language model and token set don't belong together."""
    provenance = trained.provenance
    check_model(trained, language_model, f"the crosscoder in {config.crosscoder}")
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
    language_model.check_use(trained.layers, config.context_tokens, predictions=True)
    remarks = check_readable(tokens, trained, language_model, config)
    does = "without beginning-of-text" if beginning is None else f"with beginning-of-text, id {beginning:,}"
    return [*language_model.remarks, *remarks, f"contexts begin {does}, as in training"]


def check_readable(tokens: TokenSet, trained: TrainedCrosscoder, language_model: LanguageModel, config: HeldOutText) -> list[str]:
    """Sentences for the log; raises `UserError` where the language model can't read the tokens as it did in training."""
    check_tokenizer, beginning = config.language_model.check_tokenizer, trained.provenance.beginning_of_text_id
    return check_tokens(tokens, language_model, check_tokenizer=check_tokenizer, beginning_of_text_id=beginning)


def check_model(trained: TrainedCrosscoder, language_model: LanguageModel, what: str) -> None:
    """Raises `UserError` where a crosscoder, `what` to the user, was trained on another language model."""
    known = trained.provenance.language_model_hash
    if known != language_model.hash:
        raise UserError(
            f"{what} was trained on a language model of hash {_short(known)}, but "
            f"language_model.model {language_model.name} has {_short(language_model.hash)}; name the model that it was trained on"
        )
    missing = [layer for layer in trained.layers if SiteName.parse(layer).block not in language_model.block_names]
    if missing:
        raise UserError(
            f"{what} reads {missing[0]}, but {language_model.name} has "
            f"{language_model.block_names[0]} to {language_model.block_names[-1]}; name the model that it was trained on"
        )
    if trained.d_model != language_model.d_model:
        raise UserError(
            f"{what} reads activations of width {trained.d_model:,}, but {language_model.name} has width "
            f"{language_model.d_model:,}; name the model that it was trained on"
        )


def _short(content_hash: str) -> str:
    return content_hash[:12] if content_hash else "(none)"
