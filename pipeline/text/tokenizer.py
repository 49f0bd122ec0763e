"""Any Hugging Face tokenizer, as a definition that worker processes rebuild and a hash that doesn't depend on where it lies.

The ids are those of `AutoTokenizer.from_pretrained(name)(text, add_special_tokens=False)`: the whole text, nothing put before
or after it, nothing cut off. What the literal text of a special token (`<|endoftext|>`) becomes is `special_text`:

    token   the special token, as the tokenizer does by default       "a<|endoftext|>b" -> 64, 50256, 65 (GPT-2)
    text    ordinary text, as if the token did not exist              "a<|endoftext|>b" -> 64, 27, 91, 437, 1659, 5239, 91, 29, 65
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline import model_files
from pipeline.config.errors import UserError
from pipeline.text.probes import PROBES, added_token_probes
from pipeline.tokens import BeginningOfText, Vocabulary

SpecialText = Literal["token", "text"]


class TokenizerDefinition(NamedTuple):
    """A tokenizer, small enough to be sent to workers."""

    name: str
    """As the configuration gives it: `demo`, a directory, a tokenizer.json or a name on the Hugging Face hub."""
    revision: str | None
    special_text: SpecialText
    added_tokens: list[str]
    """Special ones and others, as they are written in a text."""
    backend_json: str | None
    """The definition that the library `tokenizers` reads; None for a tokenizer that exists in Python only."""
    vocabulary: Vocabulary
    end_of_text: str
    """The token of `vocabulary.end_of_text_id`, as text."""
    beginning_of_text: BeginningOfText
    remarks: list[str]
    """Sentences for the log of whoever tokenizes with it."""
    files: dict[str, str] | None = None
    """The hash of each file that it was made of (see `pipeline.model_files`), taken after it was loaded."""

    def facts(self) -> dict[str, Any]:
        """What a token set's manifest says of it beside the vocabulary."""
        return {"end_of_text": self.end_of_text, **self.beginning_of_text.facts()}

    def provenance(self, encoder: str) -> dict[str, Any]:
        """Where the ids come from, for a record; `encoder` is the library that made them."""
        versions = {library: importlib.metadata.version(library) for library in sorted({"tokenizers", "transformers", encoder})}
        return {"tokenizer": self.name, "revision": self.revision, "encoder": encoder, "versions": versions}


def load_tokenizer(name: str, *, revision: str | None, special_text: SpecialText, end_of_text: str | None) -> TokenizerDefinition:
    """The tokenizer called `name`; `end_of_text` names the token that stands for a document's end if its own is not to.

    A tokenizer.json by its path, or alone in a directory, is taken as it is; all else goes through transformers. Raises `UserError`
    for one that gives other ids each time.
    """
    definition = _loaded(name, revision, special_text, end_of_text)
    place = model_files.find(name, revision)
    if place is not None and (fault := model_files.tokenizer_fault(place.path)):
        raise UserError(f"tokenizer: {fault}")
    return definition._replace(files=model_files.tokenizer_files(name, revision))


def _loaded(name: str, revision: str | None, special_text: SpecialText, end_of_text: str | None) -> TokenizerDefinition:
    path = model_files.local_path(name)
    if path is not None:
        file = path / "tokenizer.json" if path.is_dir() else path
        alone = file.is_file() and file.suffix == ".json" and not (file.parent / "tokenizer_config.json").exists()
        if alone or path.is_file():
            return _from_file(name, file, special_text, end_of_text)
    return _from_transformers(name, revision, special_text, end_of_text)


def _from_file(name: str, file: Path, special_text: SpecialText, end_of_text: str | None) -> TokenizerDefinition:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer: {file} is not a tokenizer.json that tokenizers {tokenizers.__version__} can read: {error}") from error
    special_tokens = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    if end_of_text is None and len(special_tokens) == 1:
        end_of_text = special_tokens[0]
    if end_of_text is None:
        raise UserError(f"tokenizer: {file} does not say which token ends a text; set end_of_text, for example to <|endoftext|>")
    end_id = _id_of(end_of_text, backend.token_to_id(end_of_text), str(file))
    backend_json = _canonical(backend)
    vocabulary = Vocabulary(max(backend.get_vocab(with_added_tokens=True).values()) + 1, end_id, _hash(backend_json))
    bare = backend_tokenizer(backend_json, "token")
    leading = _leading(bare.encode("a").ids, bare.encode("a", add_special_tokens=False).ids)
    beginning = BeginningOfText(leading[0] if len(leading) == 1 else None, len(leading) == 1)
    return TokenizerDefinition(
        name, None, special_text, _added_tokens(backend), backend_json, vocabulary, end_of_text, beginning, _on_leading(name, leading)
    )


def _from_transformers(name: str, revision: str | None, special_text: SpecialText, end_of_text: str | None) -> TokenizerDefinition:
    tokenizer = load_transformers_tokenizer(name, revision)
    vocab: dict[str, int] = tokenizer.get_vocab()
    end_id = tokenizer.eos_token_id if end_of_text is None else vocab.get(end_of_text)
    if end_of_text is None and end_id is None:
        raise UserError(f"tokenizer: {name} has no end-of-text token; set end_of_text to one of its tokens")
    end_id = _id_of(end_of_text, end_id, name)
    added_tokens = [str(token) for token in dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    backend_json = None
    if backend is not None:
        backend_json = _canonical(backend)
        if _first_difference(tokenizer, backend_tokenizer(backend_json, special_text), special_text, added_tokens) is not None:
            backend_json = None
    size = max(max(vocab.values()) + 1, len(tokenizer))
    described = json.dumps([type(tokenizer).__name__, sorted(vocab.items()), sorted(tokenizer.all_special_tokens)])
    vocabulary = Vocabulary(size, end_id, _hash(backend_json) if backend_json else _sha256(described))
    leading = _leading(tokenizer("a")["input_ids"], transformers_ids(tokenizer, "a", "token"))
    beginning = BeginningOfText(leading[0] if len(leading) == 1 else tokenizer.bos_token_id, len(leading) == 1)
    place = model_files.find(name, revision)
    remarks = model_files.own_code(place.path, tokenizer=True) if place is not None else []
    remarks += [*_on_file_beside(tokenizer, name, revision, special_text, added_tokens), *_on_leading(name, leading)]
    return TokenizerDefinition(
        name,
        revision,
        special_text,
        added_tokens,
        backend_json,
        vocabulary,
        str(end_of_text if end_of_text is not None else tokenizer.eos_token),
        beginning,
        remarks,
    )


def load_transformers_tokenizer(name: str, revision: str | None) -> Any:
    """The tokenizer called `name` as transformers builds it."""
    # Imported here: it takes seconds and brings torch, which a worker with a definition does without.
    from transformers import AutoTokenizer

    location = model_files.location(name, "tokenizer.name")
    try:
        return AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"tokenizer: {location} can't be loaded: {reason} Give a directory that holds one, a name on the Hugging Face hub, or `demo`"
        ) from error


def backend_tokenizer(backend_json: str, special_text: SpecialText) -> Any:
    """The tokenizer of the library `tokenizers`, set to give whole texts' ids."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(backend_json)
    backend.encode_special_tokens = special_text == "text"
    return backend


def transformers_ids(tokenizer: Any, text: str, special_text: SpecialText) -> list[int]:
    """The ids of one text by transformers' own call: the reference that all else is held to."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=special_text == "text", verbose=False)["input_ids"]
    return ids


def _first_difference(tokenizer: Any, backend: Any, special_text: SpecialText, added_tokens: list[str]) -> str | None:
    """The first probe for which transformers gives other ids than `backend` of the library `tokenizers`; None if it is the same for all."""
    texts = [*PROBES, *added_token_probes(added_tokens)]
    # In one call: there may be thousands of added tokens.
    wanted = tokenizer(texts, add_special_tokens=False, split_special_tokens=special_text == "text", verbose=False)["input_ids"]
    found = backend.encode_batch_fast(texts, add_special_tokens=False)
    return next((text for text, ids, encoding in zip(texts, wanted, found, strict=True) if encoding.ids != ids), None)


def _on_file_beside(tokenizer: Any, name: str, revision: str | None, special_text: SpecialText, added_tokens: list[str]) -> list[str]:
    """A sentence if transformers makes another tokenizer of a directory or name than the tokenizer.json in it is."""
    import tokenizers
    import transformers

    file = transformers.utils.cached_file(
        model_files.location(name, "tokenizer.name"),
        "tokenizer.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return []
    try:
        definition = Path(file).read_text(encoding="utf-8")
        in_file = backend_tokenizer(_canonical(tokenizers.Tokenizer.from_str(definition)), special_text)
    except Exception as error:  # the library raises bare Exception
        return [f"{file} can't be read by tokenizers {tokenizers.__version__} ({error}); transformers' own reading of {name} is used"]
    text = _first_difference(tokenizer, in_file, special_text, list(dict.fromkeys([*added_tokens, *_added_tokens(in_file)])))
    if text is None:
        return []
    made = f"transformers {transformers.__version__} makes a {type(tokenizer).__name__} of {name}"
    found = f"{made} that gives other ids than the tokenizer.json in it does, first for the text that begins {text[:40]!r}"
    return [f"{found}; transformers' ids are used, as its users get them. tokenizer.name={file} takes the file's"]


def _added_tokens(backend: Any) -> list[str]:
    return [token.content for token in backend.get_added_tokens_decoder().values()]


def _leading(with_special: list[int], alone: list[int]) -> list[int]:
    """The ids that a tokenizer's call puts in front of a text."""
    for start in range(len(with_special) - len(alone) + 1):
        if with_special[start : start + len(alone)] == alone:
            return with_special[:start]
    return []


def _on_leading(name: str, leading: list[int]) -> list[str]:
    if len(leading) < 2:
        return []
    return [
        f"{name} puts {len(leading)} tokens in front of a text ({leading}); contexts can begin with one at most, so they get none of them"
    ]


def _id_of(token: str | None, found: int | None, where: str) -> int:
    if found is None:
        raise UserError(f"tokenizer: {where} has no token {token!r}; set end_of_text to one that it has")
    return found


def _canonical(backend: Any) -> str:
    """The backend's definition without truncation and padding, which would change ids, in one fixed order of keys."""
    definition = json.loads(backend.to_str())
    definition |= {"truncation": None, "padding": None}
    return json.dumps(definition, sort_keys=True, ensure_ascii=False)


def _hash(backend_json: str) -> str:
    """sha256 of what decides a text's ids. Without what is put around it (which transformers adds to) and what leads back to text."""
    definition = json.loads(backend_json)
    deciding = {key: value for key, value in definition.items() if key not in ("post_processor", "decoder")}
    return _sha256(json.dumps(deciding, sort_keys=True, ensure_ascii=False))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
