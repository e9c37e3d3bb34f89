"""
Text to token ids, with the model's own tokenizer and on all cores.

Promises: the ids are those of the published `tokenizer.json`, or of sentencepiece itself where a folder
has only `tokenizer.model`; no special token is added, and text that looks like one (`<s>`) stays text;
long texts are cut so that memory is bounded, and the ids are those of the uncut text, or the first of
them where so many were asked for.

`transformers.AutoTokenizer` is not used for text. Without `tokenizer.json` it derives other merges; with
it, the class LlamaTokenizer builds the normalizer anew, and a leading space is lost (transformers 5.23).

Does not know: the model, and what an id means to it. Added tokens that their publisher did not mark as
special (Qwen's `<think>`) are ordinary vocabulary here, and are matched in text.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from store.records import parse_json
from workers.text.chat import ROLES, ChatTemplate, named_tokens

__all__ = ["ROLES", "TextTokenizer", "load_tokenizer", "sentencepiece_tokenizer"]

CUT_CHARACTERS = 1 << 18
"""Longest text that is encoded in one go, in characters (arbitrary; the ids do not depend on it)."""
GROUP_CHARACTERS = 1 << 22
"""Text encoded in one parallel call, in characters: the Rust encodings take about 100 bytes a token."""

_FILES = ("tokenizer.json", "tokenizer.model")
_CHAT_FILES = ("tokenizer_config.json", "chat_template.jinja")
_SPACE = "▁"
_CUT = re.compile(rf"[^\s{_SPACE}] (?=.)", re.DOTALL)
_CROSSES_CUT = re.compile(rf"[^\s{_SPACE}][ {_SPACE}]")


def load_tokenizer(
    model: str | Path, revision: str | None = None, *, limit_tokens: int | None = None
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
        Give the first so many ids of a text or conversation only.

    Returns
    -------
    TextTokenizer
        Texts to token ids (int32), and token ids to pieces.

    Raises
    ------
    FileNotFoundError
        The folder has no tokenizer, or the hub cannot give one (offline, unknown, gated).
    ValueError
        A file of it cannot be read; it names the file.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _fetch(str(model), revision)
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = _settings(folder / "tokenizer_config.json")
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "tokenizer.json").is_file():
        backend = _backend(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        backend = sentencepiece_tokenizer(folder / "tokenizer.model")
        settings = {"bos_token": "<s>", "eos_token": "</s>"} | settings  # sentencepiece's names
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: looked for {' and '.join(_FILES)}. Copy the model's tokenizer files "
            "into the folder, or name a folder that has them."
        )
    return TextTokenizer(backend, settings, str(model), limit_tokens)


def _settings(path: Path) -> dict[str, Any]:
    """A `tokenizer_config.json`."""
    try:
        settings = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}, and must hold a JSON object; fetch it again")
    return settings


def _backend(path: Path) -> Tokenizer:
    """A `tokenizer.json`."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer that is known here: {error}; fetch it again") from error


def _fetch(model: str, revision: str | None) -> Path:
    """Bring a hub model's tokenizer files into the local cache and return their folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*_FILES, *_CHAT_FILES]))
    except (OSError, HFValidationError) as error:  # the hub's own errors and httpx's are wrapped as OSError
        raise FileNotFoundError(
            f"no tokenizer for {model!r}{f' at revision {revision!r}' if revision else ''}: it is no local "
            f"folder, and the hub gave none ({type(error).__name__}: {error}). Without a network, or for a "
            f"gated model, give the path of a folder that holds {' or '.join(_FILES)}."
        ) from error


def sentencepiece_tokenizer(path: str | Path) -> Tokenizer:
    """
    Build the fast BPE tokenizer that gives sentencepiece's own ids, from a `tokenizer.model`.

    sentencepiece joins the neighbours whose joined piece has the best score, so the merges are all the
    ways to split a piece into two others, in the order of the scores. Text is prepared as in Llama and
    Mixtral: ▁ in front, ▁ for each space, bytes for characters without a piece.

    Raises
    ------
    ValueError
        The file is no BPE model of that kind: its ids differ on the model's own pieces.
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
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(reference.id_to_piece(i), normalized=False, special=True) for i in special])
    backend.encode_special_tokens = True
    for piece in vocabulary:
        ours, theirs = backend.encode(piece).ids, reference.encode(piece)
        if ours != theirs:
            raise ValueError(
                f"{path} is no BPE model with byte fallback and an identity normalizer: for {piece!r} the "
                f"fast tokenizer gives {ours} and sentencepiece {theirs}. Use a tokenizer.json instead."
            )
    return backend


class TextTokenizer:
    """
    A model's tokenizer as the planner uses it; `load_tokenizer` makes it.

    Parameters
    ----------
    backend
        The fast tokenizer.
    settings
        `tokenizer_config.json`, with the chat template as `chat_template`.
    name
        Of the model, for messages.
    limit_tokens
        Give the first so many ids of a text or conversation only.

    Attributes
    ----------
    vocab_size
        Largest id + 1, added tokens included.
    bos_id
        The id that begins a sequence, or None where the tokenizer names none.
    special_ids
        Ids that never stand for text, ascending.
    sha256
        Of the serialized backend: vocabulary, merges, normalizer, added tokens; not the chat template.
    """

    def __init__(
        self, backend: Tokenizer, settings: Mapping[str, Any], name: str, limit_tokens: int | None = None
    ) -> None:
        backend.no_truncation()  # both may be baked into a published tokenizer.json
        backend.no_padding()
        backend.encode_special_tokens = True
        serialized = backend.to_str()
        self._backend = backend
        self._settings = settings
        self._name = name
        self._limit_tokens = limit_tokens
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
        for group in _groups((n, part) for n, text in enumerate(texts) for part in self._cut(text, limit)):
            encodings = self._backend.encode_batch_fast([part for _, part in group], add_special_tokens=False)
            for (n, _), encoding in zip(group, encodings, strict=True):
                parts[n].append(np.array(encoding.ids, dtype=np.int32))
        ids = [np.concatenate(each) if each else np.empty(0, np.int32) for each in parts]
        if self._limit_tokens is None:
            return ids
        return [each[: self._limit_tokens].copy() for each in ids]  # a view would keep all of them in memory

    def _cut(self, text: str, limit: int) -> Iterator[str]:
        """Cut a text before spaces that follow a non-space, each part but the last at least `limit` long."""
        start = 0
        while self._cut_skips is not None and len(text) - start > limit:
            found = _CUT.search(text, start + limit - 1)
            if found is None:
                break
            yield text[start : found.start() + 1]
            start = found.start() + 1 + self._cut_skips
        yield text[start:]

    @cached_property
    def _cut_skips(self) -> int | None:
        """
        Characters to drop at a cut: 1 where the normalizer supplies the space, else 0; None forbids cutting.

        A cut is exact when no piece reaches over it, for then no merge does. How the rest must begin is found
        by trying, beside added tokens too: they split a text before it is normalized.
        """
        special = set(self.special_ids)
        if any(_CROSSES_CUT.search(piece) for i, piece in enumerate(self.pieces()) if i not in special):
            return None
        added = [token.content for i, token in self._added.items() if i not in special]
        probes = [(text, text.index(" ")) for text in ("a b", "a  b", "word.  x = 1", "7 7", "é 日  語", "🙂 \t🙂")]
        probes += [(f"a {token} b", 1) for token in added]
        probes += [(f"{token} b", len(token)) for token in added if _CUT.match(f"{token} b", len(token) - 1)]
        for skips in (1, 0):
            if all(self._cut_is_exact(text, at, skips) for text, at in probes):
                return skips
        return None

    def _cut_is_exact(self, text: str, at: int, skips: int) -> bool:
        whole, left, right = self._backend.encode_batch([text, text[:at], text[at + skips :]], add_special_tokens=False)
        return bool(whole.ids == left.ids + right.ids)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
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
        ValueError
            There is no chat template, or it cannot take the messages.
        """
        ids, roles = self._chat_template.encode(messages)
        return ids[: self._limit_tokens], roles[: self._limit_tokens]

    @property
    def chat_template_sha256(self) -> str:
        """Of the chat template's text; a ValueError where there is none."""
        return self._chat_template.sha256

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self._backend, self._settings, self._name)


def _groups(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Batch the numbered, non-empty parts of texts into lists of about `GROUP_CHARACTERS`."""
    group: list[tuple[int, str]] = []
    characters = 0
    for number, part in parts:
        if part:
            group.append((number, part))
            characters += len(part)
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
    return text.replace(" ", _SPACE)


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 is itself, other bytes are the letters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
