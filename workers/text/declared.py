"""
Declarations in the files next to a tokenizer: added tokens, and settings that change ids.

Promises: tokens are found in the same places as by transformers. If `added_tokens_decoder` of tokenizer_config.json
exists, only it counts; otherwise `added_tokens.json` and `special_tokens_map.json` do. Then come the named tokens
(`eos_token`) and the extra special ones. A token keeps its declared id, or there is an error. A setting that the
tokenizer does not follow is an error too, unless the tokenizer can be made to follow it.

Differs from transformers 5.23 in one point: a token that only `special_tokens_map.json` calls special is special (there
it is not), and a token of `added_tokens.json` is matched as written, even if a normalizer adds ▁ before a text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from store.records import parse_json

CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MISTRAL_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern with which transformers 5 splits words if `fix_mistral_regex` is true
(`tokenization_utils_tokenizers.py`)."""
MISTRAL_VOCABULARY = 100_000
"""transformers does so only for vocabularies larger than this, and not for every model_type and version."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Declared(NamedTuple):
    """An added token as declared in a file."""

    token: AddedToken
    id: int | None
    """None if the file leaves the id to the tokenizer."""
    file: str


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; a missing file is read as empty."""
    if not path.is_file():
        return {}
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, but must hold a JSON object; fetch it again")
    return value


def read_settings(folder: Path) -> dict[str, Any]:
    """Return `tokenizer_config.json`, overridden by `special_tokens_map.json` if transformers reads that too."""
    settings, named = (read_object(folder / name) for name in CONFIG_FILES[:2])
    return settings if "added_tokens_decoder" in settings else settings | named


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens that the settings name `bos_token`, `eos_token` and so on."""
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    contents = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def add_declared_tokens(backend: Tokenizer, folder: Path, settings: Mapping[str, Any]) -> None:
    """
    Add tokens that a folder declares but the tokenizer lacks.

    Raises
    ------
    ValueError
        A token would get, or has, another id than the declared one; or a file holds something other than tokens.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token, declared_id, file in _declared(folder, settings):
        overrules = declared_id is not None and file != "tokenizer.json" and known.get(token.content) != token
        if token.content not in known or overrules:
            backend.add_tokens([token])
            known[token.content] = token
        found = backend.token_to_id(token.content)
        if declared_id is not None and found != declared_id:
            raise ValueError(
                f"{folder / file} declares {token.content!r} with the id {declared_id}, but the tokenizer gives it "
                f"{found}: the files beside it do not belong together, or one is missing; fetch them again"
            )


def _declared(folder: Path, settings: Mapping[str, Any]) -> Iterator[Declared]:
    """Yield the tokens with declared ids by id, then the named and extra special ones."""
    published = read_object(folder / "tokenizer.json").get("added_tokens") or ()
    by_content = read_object(folder / "added_tokens.json")
    try:
        special = [_token(value, special=True) for value in _special_values(settings)]
        if "added_tokens_decoder" in settings:
            file, by_id = CONFIG_FILES[0], {int(i): _token(t) for i, t in settings["added_tokens_decoder"].items()}
        else:
            file, contents = "added_tokens.json", {token.content for token in special}
            by_id = {int(i): AddedToken(t, normalized=False, special=t in contents) for t, i in by_content.items()}
        yield from (Declared(_token(value), value["id"], "tokenizer.json") for value in published)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        listed = ", ".join(("tokenizer.json", *CONFIG_FILES))
        raise ValueError(f"the added tokens of {folder} ({listed}) have a form that is not known: {error!r}") from error
    yield from (Declared(token, i, file) for i, token in sorted(by_id.items()))
    yield from (Declared(token, None, CONFIG_FILES[0]) for token in special)


def _special_values(settings: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the named special tokens, then those without a name or with a name of the model's own."""
    yield from (settings[name] for name in named_tokens(settings))
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    yield from extra.values() if isinstance(extra, dict) else extra


def _token(value: Any, **flags: bool) -> AddedToken:
    """Return the token for a string, or for an object with `content` and flags."""
    if isinstance(value, str):
        return AddedToken(value, **flags)
    return AddedToken(value["content"], **{flag: value[flag] for flag in _FLAGS if flag in value} | flags)


def follow_settings(backend: Tokenizer, folder: Path, settings: Mapping[str, Any]) -> None:
    """
    Make the tokenizer follow the settings that change ids of text.

    Raises
    ------
    ValueError
        The tokenizer does not follow a setting, and the meaning of the setting here is not clear.
    """
    wanted = settings.get("add_prefix_space")
    if isinstance(wanted, bool) and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer.add_prefix_space = wanted
    steps = list(_steps(json.loads(backend.to_str())))
    _refuse_other_file(folder, settings)
    _refuse_other_pattern(folder, settings, backend.get_vocab_size(), steps)
    does = {
        "add_prefix_space": any(
            step["type"] == "Prepend"
            or step.get("prepend_scheme", "never") != "never"
            or step.get("add_prefix_space") is True
            for step in steps
        ),
        "do_lower_case": any(step["type"] == "Lowercase" or step.get("lowercase") is True for step in steps),
    }
    for name, done in does.items():
        if isinstance(settings.get(name), bool) and settings[name] != done:
            raise ValueError(
                f"{folder / CONFIG_FILES[0]} says {name}: {json.dumps(settings[name])}, but the tokenizer next to it "
                f"does {'' if done else 'not '}do so: save it again with the transformers version it was made for"
            )


def _refuse_other_file(folder: Path, settings: Mapping[str, Any]) -> None:
    """Reject a tokenizer with files for versions of transformers, which uses the newest that is not above its own
    version."""
    files = settings.get("fast_tokenizer_files") or []
    if others := [file for file in files if file != "tokenizer.json"]:
        raise ValueError(
            f"{folder / CONFIG_FILES[0]} says fast_tokenizer_files: {', '.join(map(str, others))}, one of which"
            " replaces tokenizer.json: copy that one to tokenizer.json, and remove the setting"
        )


def _refuse_other_pattern(
    folder: Path, settings: Mapping[str, Any], vocab_size: int, steps: Sequence[Mapping[str, Any]]
) -> None:
    """Reject a tokenizer without the pattern that transformers would add."""
    asked = settings.get("fix_mistral_regex") and vocab_size > MISTRAL_VOCABULARY
    if asked and not any(step.get("pattern") == {"Regex": MISTRAL_PATTERN} for step in steps):
        raise ValueError(
            f"{folder / CONFIG_FILES[0]} says fix_mistral_regex: true, but the tokenizer next to it splits words "
            "differently: save it with AutoTokenizer.from_pretrained(..., fix_mistral_regex=True), or remove the "
            "setting if it is not intended"
        )


def _steps(serialized: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the normalizers and pre-tokenizers of a serialized tokenizer, those in sequences too."""
    waiting = [serialized["normalizer"], serialized["pre_tokenizer"]]
    while waiting:
        step = waiting.pop()
        if step is not None:
            yield step
            waiting += [*step.get("normalizers", ()), *step.get("pretokenizers", ())]
