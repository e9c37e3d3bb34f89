"""
Convert text to token ids, with the model's own tokenizer and on all cores.

Promises: the ids are those of the published `tokenizer.json`, or of sentencepiece itself if a folder has only
`tokenizer.model`. No special token is added, and text that looks like one (`<s>`) stays text. Long texts are cut so
that memory is bounded; the ids are those of the uncut text, or the first of them if only a number of ids was requested.

`transformers.AutoTokenizer` is not used for text. Without `tokenizer.json` it derives other merges; with it, the class
LlamaTokenizer rebuilds the normalizer, and a leading space is lost (transformers 5.23).

Tokens that the files next to it declare are added (`workers/text/declared.py`). Those that their publisher did not mark
as special (Qwen's `<think>`) are ordinary vocabulary here and are matched in text.

Does not deal with the model or the meaning of an id.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from workers.text.chat import TODAY, ChatTemplate
from workers.text.cuts import CUT_CHARACTERS, SPACE, Cuts, Part
from workers.text.declared import CONFIG_FILES, add_declared_tokens, follow_settings, named_tokens, read_settings
from workers.text.speakers import ROLES

__all__ = ["ROLES", "TextTokenizer", "load_tokenizer", "sentencepiece_tokenizer"]

GROUP_CHARACTERS = 1 << 20
"""Text encoded in one parallel call, in characters: the Rust encodings take about 100 bytes per token."""

_FILES = ("tokenizer.json", "tokenizer.model")
_TEMPLATE_FILE, _TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
_FETCHED = (*_FILES, *CONFIG_FILES, _TEMPLATE_FILE, f"{_TEMPLATE_FOLDER}/*.jinja")


def load_tokenizer(
    model: str | Path,
    revision: str | None = None,
    *,
    limit_tokens: int | None = None,
    template_date: date = TODAY,
) -> "TextTokenizer":
    """
    Load the tokenizer of a model from a local folder or from the hub.

    Parameters
    ----------
    model
        A folder that holds `tokenizer.json` (used first) or `tokenizer.model`, or a hub id (`org/name`).
    revision
        Commit, tag or branch on the hub; not used for a folder.
    limit_tokens
        Return only this number of first ids of a text or conversation.
    template_date
        The day that chat templates use as the day of the run.

    Returns
    -------
    TextTokenizer
        Texts to token ids (int32), and token ids to pieces.

    Raises
    ------
    FileNotFoundError
        The folder has no tokenizer, or the hub cannot provide one (offline, unknown, gated).
    ValueError
        A file of it cannot be read, or declares a token or a setting that the tokenizer does not follow.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _fetch(str(model), revision)
    settings = read_settings(folder)
    if templates := _template_files(folder):
        settings["chat_template"] = templates
    if (folder / "tokenizer.json").is_file():
        backend = _backend(folder / "tokenizer.json")
        follow_settings(backend, folder, settings)
        add_declared_tokens(backend, folder, settings)
    elif (folder / "tokenizer.model").is_file():
        backend = _model_backend(folder, settings)
        settings = {"bos_token": "<s>", "eos_token": "</s>"} | settings  # sentencepiece's names
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: looked for {' and '.join(_FILES)}. Copy the model's tokenizer files "
            "into the folder, or name a folder that has them."
        )
    return TextTokenizer(backend, settings, str(model), limit_tokens, template_date)


def _template_files(folder: Path) -> dict[str, str]:
    """Chat templates by name from separate files; if there are any, only these count."""
    files = {path.stem: path for path in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / _TEMPLATE_FILE).is_file():
        files["default"] = folder / _TEMPLATE_FILE
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def _model_backend(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """
    Build the tokenizer of a folder that has only `tokenizer.model`.

    Raises
    ------
    ValueError
        ▁ must be added before a text but not before text after an added token, which no normalizer does.
    """
    backend = sentencepiece_tokenizer(folder / "tokenizer.model")
    own = len(backend.get_added_tokens_decoder())
    prefix = settings.get("add_prefix_space") is not False
    if not prefix:
        backend.normalizer = normalizers.Replace(" ", SPACE)
    add_declared_tokens(backend, folder, settings)
    extended = len(backend.get_added_tokens_decoder()) > own
    if prefix and settings.get("legacy") is False and (extended or settings.get("chat_template")):
        raise ValueError(
            f"{folder / CONFIG_FILES[0]} says legacy: false, which concerns text after an added token, but "
            "tokenizer.model alone does not say how such text begins: copy the model's tokenizer.json into the folder"
        )
    return backend


def _backend(path: Path) -> Tokenizer:
    """A `tokenizer.json`."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a supported tokenizer: {error}; fetch it again") from error


def _fetch(model: str, revision: str | None) -> Path:
    """Fetch a hub model's tokenizer files into the local cache and return their folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_FETCHED)))
    except (OSError, HFValidationError) as error:  # the hub's own errors and httpx's are wrapped as OSError
        raise FileNotFoundError(
            f"no tokenizer for {model!r}{f' at revision {revision!r}' if revision else ''}: it is not a local "
            f"folder, and the hub returned none ({type(error).__name__}: {error}). Without a network, or for a "
            f"gated model, give the path of a folder that holds {' or '.join(_FILES)}."
        ) from error


def sentencepiece_tokenizer(path: str | Path) -> Tokenizer:
    """
    Build a fast BPE tokenizer with sentencepiece's own ids from a `tokenizer.model`.

    sentencepiece joins the adjacent pieces whose joined piece has the best score, so the merges are all ways to split a
    piece into two others, in the order of the scores. Text is prepared as in Llama and Mixtral: ▁ in front, ▁ for each
    space, bytes for characters without a piece.

    Raises
    ------
    ValueError
        The file is not such a BPE model: its ids differ for the model's own pieces.
    """
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(path))
    ids = range(reference.vocab_size())
    vocabulary = {reference.id_to_piece(i): i for i in ids}
    special = [i for i in ids if reference.is_control(i) or reference.is_unknown(i)]
    left_out = {*special, *(i for i in ids if reference.is_byte(i) or reference.is_unused(i))}
    normal = {piece: i for piece, i in vocabulary.items() if i not in left_out}
    merges = sorted(
        (-reference.get_score(joined), joined, normal[piece[:cut]], normal[piece[cut:]])
        for piece, joined in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    )
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(reference.id_to_piece(a), reference.id_to_piece(b)) for _, _, a, b in merges],
            unk_token=reference.id_to_piece(reference.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(reference.id_to_piece(i), normalized=False, special=True) for i in special])
    backend.encode_special_tokens = True
    for piece in vocabulary:
        ours, theirs = backend.encode(piece).ids, reference.encode(piece)
        if ours != theirs:
            raise ValueError(
                f"{path} is not a BPE model with byte fallback and an identity normalizer: for {piece!r} the "
                f"fast tokenizer gives {ours} and sentencepiece {theirs}. Use a tokenizer.json instead."
            )
    return backend


class TextTokenizer:
    """
    A model's tokenizer for the planner; created by `load_tokenizer`.

    Parameters
    ----------
    backend
        The fast tokenizer.
    settings
        `tokenizer_config.json`, with the chat template as `chat_template`.
    name
        Of the model, for messages.
    limit_tokens
        Return only this number of first ids of a text or conversation.
    template_date
        The day that chat templates use as the day of the run.

    Attributes
    ----------
    vocab_size
        Largest id + 1, added tokens included.
    bos_id
        The id that starts a sequence, or None if the tokenizer names none.
    special_ids
        Ids that never represent text, ascending.
    sha256
        Hash of the serialized backend: vocabulary, merges, normalizer, added tokens; not the chat template.
    """

    def __init__(
        self,
        backend: Tokenizer,
        settings: Mapping[str, Any],
        name: str,
        limit_tokens: int | None = None,
        template_date: date = TODAY,
    ) -> None:
        backend.no_truncation()  # both may be part of a published tokenizer.json
        backend.no_padding()
        backend.encode_special_tokens = True
        serialized = backend.to_str()
        self._backend = backend
        self._settings = settings
        self._name = name
        self._limit_tokens = limit_tokens
        self._template_date = template_date
        self._byte_level = "ByteLevel" in json.dumps(json.loads(serialized)["decoder"])
        self._added = backend.get_added_tokens_decoder()
        self.sha256 = hashlib.sha256(serialized.encode()).hexdigest()
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.special_ids = sorted(i for i, token in self._added.items() if token.special)
        bos = named_tokens(settings).get("bos_token")
        self.bos_id: int | None = None if bos is None else backend.token_to_id(bos)

    def pieces(self) -> list[str]:
        """Return the readable piece of each id (▁ is a space, <0x0A> a byte, "" an id without a piece)."""
        raw = [self._backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        readable = _readable if self._byte_level else str
        return [self._added[i].content if i in self._added else readable(raw[i]) for i in range(len(raw))]

    def encode_batch(self, texts: Sequence[str], limit: int = CUT_CHARACTERS) -> list[NDArray[np.int32]]:
        """
        Encode texts on all cores, without special tokens; an empty text gives an empty array.

        Parameters
        ----------
        texts
            Texts without lone surrogates.
        limit
            A text longer than this, in characters, is encoded in parts; the ids are the same.
        """
        parts: list[list[NDArray[np.int32]]] = [[] for _ in texts]
        for group in _groups((n, part) for n, text in enumerate(texts) for part in self._cuts.parts(text, limit)):
            encodings = self._backend.encode_batch_fast([p.lead + p.text for _, p in group], add_special_tokens=False)
            for (n, part), encoding in zip(group, encodings, strict=True):
                parts[n].append(np.array(encoding.ids[self._cuts.lead_tokens(part.lead) :], dtype=np.int32))
        ids = [np.concatenate(each) if each else np.empty(0, np.int32) for each in parts]
        if self._limit_tokens is None:
            return ids
        return [each[: self._limit_tokens].copy() for each in ids]  # a view would keep all of them in memory

    @cached_property
    def _cuts(self) -> Cuts:
        return Cuts(self._backend, self.pieces)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, documents: Any = None
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """
        Encode a conversation through the model's chat template: see `ChatTemplate.encode`.

        Returns
        -------
        ids
            (position) int32, the template's special tokens included.
        roles
            (position) uint8, index into `ROLES`.

        Raises
        ------
        Unrenderable
            The template cannot take this conversation.
        ValueError
            There is no chat template.
        """
        ids, roles = self._chat_template.encode(messages, tools, documents)
        return ids[: self._limit_tokens], roles[: self._limit_tokens]

    @property
    def chat_template_sha256(self) -> str:
        """Hash of the chat template's text and that for tools, if any; a ValueError if there is no template."""
        return self._chat_template.sha256

    @property
    def template_date(self) -> str | None:
        """The date that the chat template writes, if it can write one and it is not the default."""
        return str(self._template_date) if self._chat_template.has_clock and self._template_date != TODAY else None

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self._backend, self._settings, self._name, self.pieces, self._template_date)


def _groups(parts: Iterable[tuple[int, Part]]) -> Iterator[list[tuple[int, Part]]]:
    """Batch the numbered, non-empty parts of texts into lists of about `GROUP_CHARACTERS`."""
    group: list[tuple[int, Part]] = []
    characters = 0
    for number, part in parts:
        if part.text:
            group.append((number, part))
            characters += len(part.text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _readable(piece: str) -> str:
    """Turn a byte-level piece (GPT-2's alphabet) into text: ▁ for a space, <0x80> for a stray byte."""
    data = bytes(map(_BYTE_OF.__getitem__, piece))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "".join(chr(byte) if byte < 0x80 else f"<0x{byte:02X}>" for byte in data)
    return text.replace(" ", SPACE)


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 is itself, other bytes are the letters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
