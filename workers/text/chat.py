"""
Conversations to token ids, with a role for every token.

Promises: text and ids are those of transformers' `apply_chat_template`, with all parts of a message, tools and
documents, except that text which looks like a special token stays text. Each token has the role of the message from
which its last character comes (`workers/text/speakers.py`). Nothing depends on the day of the run.

Not supported: pictures and sounds. The alternation of turns is checked by the templates themselves.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from functools import cached_property
from string import ascii_letters
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models

from workers.text import Unrenderable
from workers.text.cuts import CUT_CHARACTERS, Cuts
from workers.text.declared import named_tokens
from workers.text.speakers import ROLES, SPEAKERS, Conversation, Speakers, codes

TODAY = date(2024, 7, 26)
"""The day that templates use as the day of the run: the default date of Llama 3's templates, which have no clock."""

_MEDIA = ("image", "image_url", "video", "video_url", "audio", "audio_url", "input_audio", "file")
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # never assigned: Unicode reserves them for internal use
_TEMPLATE = ROLES.index("template")
_CLOCK = """{%- macro strftime_now(format) -%}
{%- set text = namespace(now=format.replace('%%', '\0')) -%}
{%- for directive, value in DIRECTIVES -%}
{%- set text.now = text.now.replace(directive, value) -%}
{%- endfor -%}
{{- text.now.replace('\0', '%') -}}
{%- endmacro %}
"""


class ChatTemplate:
    """
    The chat templates of a tokenizer: the one for tools if there are tools and such a template, otherwise the default.

    Parameters
    ----------
    backend
        The tokenizer of the model, which is not changed.
    settings
        `tokenizer_config.json`, with the template, or templates by name, as `chat_template`.
    name
        Name of the model, for messages.
    pieces
        Returns the tokenizer's readable pieces.
    today
        The day that templates use as the day of the run.

    Raises
    ------
    ValueError
        There is no template.
    """

    def __init__(
        self,
        backend: Tokenizer,
        settings: Mapping[str, Any],
        name: str,
        pieces: Callable[[], Sequence[str]],
        today: date = TODAY,
    ) -> None:
        self._templates = _by_name(settings.get("chat_template"))
        if not self._templates.get("default"):
            raise ValueError(
                f"{name} has no chat template (looked for chat_template.jinja and tokenizer_config.json): "
                "use an instruction-tuned model for messages, or a data set with a plain text field"
            )
        texts = [self._templates[each] for each in ("default", "tool_use") if each in self._templates]
        self.sha256 = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        self.has_clock = any(re.search(r"\b(strftime_now|date_string)\b", text) for text in texts)
        self._today = today
        self._backend = backend
        self._pieces = pieces
        self._named_tokens = named_tokens(settings)
        self._name = name
        self._special = [(i, t) for i, t in backend.get_added_tokens_decoder().items() if t.special]
        contents = [token.content for _, token in self._special]
        self._speakers = {each: Speakers(text, contents) for each, text in self._templates.items()}
        self._marked_backends: dict[str, tuple[Tokenizer, Cuts]] = {}

    def encode(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, documents: Any = None
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """
        Encode a conversation.

        Parameters
        ----------
        messages
            Each with `role`, one of `SPEAKERS`, and other fields of the template: `content`, text or a list of parts,
            `tool_calls`, `reasoning_content` and so on. Fields that are None are omitted.
        tools, documents
            Lists of objects, as for `apply_chat_template`.

        Returns
        -------
        ids
            (position) int32, the template's special tokens included.
        roles
            (position) uint8, index into `ROLES`; white space around a string counts as `template`.

        Raises
        ------
        Unrenderable
            A message of another form, or messages that the template rejects or rewrites.
        """
        conversation = _conversation(messages, tools, documents)
        template = "tool_use" if tools is not None and "tool_use" in self._templates else "default"

        def render(conversation: Conversation) -> str:
            return self._render(self._templates[template], conversation)

        plain = render(conversation)
        roles, given = self._speakers[template].roles(conversation, plain, render)
        return self._encode_text(plain, roles, given)

    def _render(self, template: str, conversation: Conversation) -> str:
        directives = self._directives if "strftime_now" in template else None
        clock = "" if directives is None else _CLOCK.replace("DIRECTIVES", repr(directives))
        variables = {} if self._today == TODAY else {"date_string": self._today.strftime("%d %b %Y")}
        try:
            return str(
                self._renderer.apply_chat_template(
                    conversation["messages"],
                    tools=conversation.get("tools"),
                    documents=conversation.get("documents"),
                    chat_template=clock + template,
                    tokenize=False,
                    **variables,
                )
            )
        except Exception as error:  # templates are programs: in Jinja's sandbox they raise errors of many kinds
            raise Unrenderable(f"the chat template of {self._name} rejects the messages: {error}") from error

    @cached_property
    def _renderer(self) -> Any:
        """A tokenizer of transformers that knows the names of special tokens but has no vocabulary."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **self._named_tokens)

    @cached_property
    def _directives(self) -> list[list[str]]:
        """The result of each `strftime` directive at the start of the day."""
        now = datetime.combine(self._today, time())
        names = [flag + letter for flag in ("%", "%-") for letter in ascii_letters if letter != "s"]  # %s has a zone
        return [[name, now.strftime(name)] for name in names]

    def _encode_text(
        self, text: str, roles: NDArray[np.uint8], given: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Encode a text in which special tokens are special only where they are not part of the given texts."""
        mark = next((character for character in _NONCHARACTERS if character not in text), None)
        if mark is None:
            raise Unrenderable("the conversation holds every noncharacter from U+FDD0 to U+FDEF, so it is not text")
        backend, cuts = self._marked_backend(mark)
        id_of = {token.content: i for i, token in self._special}
        special = re.compile("|".join(map(re.escape, sorted(id_of, key=len, reverse=True))) or r"(?!)")
        own = np.where(given, np.uint32(ord(mark)), codes(text)).tobytes().decode("utf-32-le")
        marked, marked_roles, end = [], [], 0
        for found in special.finditer(own):
            replaced = f"{mark}{id_of[found[0]]}{mark}"
            marked += [text[end : found.start()], replaced]
            marked_roles += [roles[end : found.start()], np.full(len(replaced), _TEMPLATE, np.uint8)]
            end = found.end()
        whole = "".join([*marked, text[end:]])
        role_of_character = np.concatenate([*marked_roles, roles[end:]])
        true_id = {backend.token_to_id(f"{mark}{i}{mark}"): i for i in id_of.values()}
        ids, ends = [], []
        for part in cuts.parts(whole, CUT_CHARACTERS):
            encoding = backend.encode(part.lead + part.text, add_special_tokens=False)
            lead = cuts.lead_tokens(part.lead)
            ids += [true_id.get(i, i) for i in encoding.ids[lead:]]
            ends += [end + part.start - len(part.lead) for _, end in encoding.offsets[lead:]]
        last_character = np.array([max(end - 1, 0) for end in ends], dtype=np.int64)
        return np.array(ids, dtype=np.int32), role_of_character[last_character]

    def _marked_backend(self, mark: str) -> tuple[Tokenizer, Cuts]:
        """Return a tokenizer that treats special tokens as text, and their ids between marks as special."""
        if mark not in self._marked_backends:
            backend = Tokenizer.from_str(self._backend.to_str())
            backend.encode_special_tokens = True
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            backend.add_tokens(
                [AddedToken(f"{mark}{i}{mark}", **{f: getattr(token, f) for f in flags}) for i, token in self._special]
            )
            self._marked_backends[mark] = backend, Cuts(backend, self._pieces)
        return self._marked_backends[mark]


def _by_name(configured: Any) -> dict[str, str]:
    """Return chat templates by name, from any layout."""
    if isinstance(configured, list):
        return {each["name"]: each["template"] for each in configured}
    if isinstance(configured, Mapping):
        return dict(configured)
    return {"default": configured} if configured else {}


def _conversation(messages: Sequence[Mapping[str, Any]], tools: Any, documents: Any) -> dict[str, Any]:
    """
    Return a conversation without fields that are None.

    Raises
    ------
    Unrenderable
        A message, the tools or the documents have a form that no template supports.
    """
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in SPEAKERS:
            raise Unrenderable(f"message {number} has the role {role!r}, but must have one of {', '.join(SPEAKERS)}")
        if content is not None and not isinstance(content, str | list | tuple | Mapping):
            raise Unrenderable(f"message {number} has a content of type {type(content).__name__}, not text or parts")
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and part.get("type") in _MEDIA:
                raise Unrenderable(
                    f"message {number} holds a part of type {part['type']!r}, but only text is supported"
                )
    given = {"tools": tools, "documents": documents}
    for name, value in given.items():
        if value is not None and not (isinstance(value, list) and all(isinstance(item, Mapping) for item in value)):
            raise Unrenderable(f"its {name} are of type {type(value).__name__}, but must be a list of objects")
    kept = [{field: value for field, value in message.items() if value is not None} for message in messages]
    return {"messages": kept} | {name: value for name, value in given.items() if value is not None}
