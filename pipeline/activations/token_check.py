"""Whether a language model can read a token set, and whether the set comes from its own tokenizer."""

from pipeline.config.errors import UserError
from pipeline.config.language_models import ReadsModels
from pipeline.language_model import LanguageModel
from pipeline.language_models import Models, each
from pipeline.text.tokenizer import load_transformers_tokenizer
from pipeline.tokens import TokenSet


def check_tokens(
    tokens: TokenSet, model: LanguageModel, *, check_tokenizer: bool = True, beginning_of_text_id: int | None = None
) -> list[str]:
    """Sentences for the log about what may surprise; raises `UserError` if `model` can't read the ids, or has another tokenizer.

    check_tokenizer : false takes the user's word for it that the tokenizers belong together.
    beginning_of_text_id : the id that contexts begin with, if they do.
    """
    if check_tokenizer and tokens.tokenizer_hash and model.tokenizer_hash and tokens.tokenizer_hash != model.tokenizer_hash:
        raise UserError(
            f"{tokens.directory} was made by tokenizer {tokens.tokenizer_hash[:12]}, but {model.name} has {model.tokenizer_hash[:12]}; "
            "tokenize with the model's own, or set language_model.check_tokenizer to false if the two give the same ids"
        )
    _check_embeddings(tokens, model, beginning_of_text_id)
    return _on_ends_of_text(tokens, model, check_tokenizer=check_tokenizer)


def check_models_tokens(tokens: TokenSet, models: Models, config: ReadsModels, *, beginning_of_text_id: int | None) -> list[str]:
    """`check_tokens` of each of the models that `config` names, by its own `check_tokenizer`."""
    lines = [
        check_tokens(tokens, model, check_tokenizer=config.models[name].check_tokenizer, beginning_of_text_id=beginning_of_text_id)
        for name, model in each(models).items()
    ]
    return list(dict.fromkeys(line for of_model in lines for line in of_model))


def _check_embeddings(tokens: TokenSet, model: LanguageModel, beginning_of_text_id: int | None) -> None:
    """By the ids that are used: a tokenizer may have more tokens than the model has embeddings, for images for example."""
    last = f"{model.name} has embeddings for ids up to {model.vocab_size - 1:,}"
    if tokens.max_id >= model.vocab_size:
        raise UserError(f"{tokens.directory} holds id {tokens.max_id:,}, but {last}; tokenize with the model's own tokenizer")
    if tokens.end_of_text_id >= model.vocab_size:
        raise UserError(
            f"{tokens.directory} has {_named(tokens.end_of_text_id, tokens.end_of_text)} as its end of text, but {last}; tokenize it again "
            "with tokenizer.end_of_text set to a token that the model has"
        )
    if beginning_of_text_id is not None and beginning_of_text_id >= model.vocab_size:
        raise UserError(
            f"contexts of {tokens.directory} would begin with beginning-of-text id {beginning_of_text_id:,}, but {last}; set "
            "beginning_of_text to false"
        )


def _on_ends_of_text(tokens: TokenSet, model: LanguageModel, *, check_tokenizer: bool) -> list[str]:
    """Model and token set may name different ends, as instruction-tuned models do: no fault if the tokenizer is known to be the model's."""
    ends = ends_of_text(model)
    if not ends or tokens.end_of_text_id in ends:
        return []
    in_config = " and ".join(_named(end, _token_of(model, end)) for end in ends)
    found = f"{tokens.directory} ends its documents with {_named(tokens.end_of_text_id, tokens.end_of_text)}, but the configuration of "
    found += f"{model.name} names {in_config} as the end of a text"
    if check_tokenizer and not (tokens.tokenizer_hash and tokens.tokenizer_hash == model.tokenizer_hash):
        raise UserError(
            f"{found}, and no tokenizer beside the model shows that it made these ids; tokenize with the model's own and "
            "tokenizer.end_of_text set to that token, or set language_model.check_tokenizer to false to go on as it is"
        )
    return [f"{found}; between documents the model reads the former. tokenizer.end_of_text, set when tokenizing, decides"]


def ends_of_text(model: LanguageModel) -> list[int]:
    """The ids that the model's configuration and its generation configuration call the end of a text."""
    generation = getattr(getattr(model.model, "generation_config", None), "eos_token_id", None)
    also = [] if generation is None else generation if isinstance(generation, list) else [generation]
    return list(dict.fromkeys([*model.end_of_text_ids, *also]))


def _token_of(model: LanguageModel, token_id: int) -> str | None:
    """The token as the tokenizer beside the model writes it; None where there is none."""
    if model.tokenizer_hash is None:
        return None
    try:
        return str(load_transformers_tokenizer(model.name, None).convert_ids_to_tokens(token_id))
    except (UserError, IndexError, OverflowError):
        return None


def _named(token_id: int, token: str | None) -> str:
    return f"id {token_id:,}" + (f" ({token})" if token is not None else "")
