"""
Conversations to token ids, with a role for every token.

Promises: ids are those of the model's chat template, except that text in a message which looks like a
special token stays text; each token has the role of the message that its last character comes from.

The template is applied twice: to the messages, and to the messages with marks around their contents. The
marks tell who wrote what, whatever order the template has; where the two renderings differ otherwise, the
template rewrites contents and the conversation is refused. (Growing prefixes of a conversation, the usual
way, fail on templates that fold the system message into a later turn.)

Does not know: tool calls and contents that are not strings; `system` messages where the template has none.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models

ROLES = ("system", "user", "assistant", "tool", "template")
"""Who wrote a token; `template` is what the chat template itself put in."""

_TEMPLATE = ROLES.index("template")
_DIGITS = "".join(str(number) for number in range(_TEMPLATE))
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # never assigned: Unicode keeps them for such use


class ChatTemplate:
    """
    The chat template of a tokenizer.

    Parameters
    ----------
    backend
        The tokenizer of the model; it is not changed.
    settings
        `tokenizer_config.json`, with the template as `chat_template`.
    name
        Of the model, for messages.

    Raises
    ------
    ValueError
        There is no template.
    """

    def __init__(self, backend: Tokenizer, settings: Mapping[str, Any], name: str) -> None:
        template = settings.get("chat_template")
        if isinstance(template, list):  # an older layout: several templates by name
            template = {each["name"]: each["template"] for each in template}.get("default")
        if not template:
            raise ValueError(
                f"{name} has no chat template (looked for chat_template.jinja and tokenizer_config.json): "
                "messages need an instruction-tuned model, or a data set with a plain text field"
            )
        self.sha256 = hashlib.sha256(template.encode()).hexdigest()
        self._backend = backend
        self._template = template
        self._named_tokens = named_tokens(settings)
        self._name = name
        self._special = [(i, t) for i, t in backend.get_added_tokens_decoder().items() if t.special]
        self._marked_backends: dict[str, Tokenizer] = {}

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """
        Encode a conversation.

        Parameters
        ----------
        messages
            Each with `role`, one of the first four of `ROLES`, and `content`, a string.

        Returns
        -------
        ids
            (position) int32, the template's special tokens included.
        roles
            (position) uint8, index into `ROLES`; white space around a content counts as `template`.

        Raises
        ------
        ValueError
            A message of another form, or messages that the template refuses or rewrites.
        """
        for number, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if role not in ROLES[:_TEMPLATE] or not isinstance(content, str) or message.get("tool_calls"):
                raise ValueError(
                    f"message {number} has the role {role!r}, a content of type {type(content).__name__} and "
                    f"{len(message.get('tool_calls') or ())} tool calls; it must have one of the roles "
                    f"{', '.join(ROLES[:_TEMPLATE])}, a string and none"
                )
        plain = self._render(messages)
        text = "".join([plain, *(message["content"] for message in messages)])
        mark = next((character for character in _NONCHARACTERS if character not in text), None)
        if mark is None:
            raise ValueError("the conversation holds every noncharacter from U+FDD0 to U+FDEF: it is no text")
        marked = self._render([_marked(message, mark) for message in messages])
        # By turns what the template wrote, and the digit of a role followed by a content.
        parts = [(_TEMPLATE, part) for part in marked.split(mark)]
        parts[1::2] = [(_DIGITS.find(part[:1]), part[1:]) for _, part in parts[1::2]]
        if "".join(part for _, part in parts) != plain:
            raise ValueError(
                f"the chat template of {self._name} rewrites what messages say, so that no token can be "
                "given a role: encode the messages' text without it"
            )
        return self._encode_parts(parts, mark)

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return str(self._renderer.apply_chat_template(conversation, chat_template=self._template, tokenize=False))
        except Exception as error:  # templates are programs: in Jinja's sandbox they raise whatever they run into
            raise ValueError(f"the chat template of {self._name} refuses the messages: {error}") from error

    @cached_property
    def _renderer(self) -> Any:
        """A tokenizer of transformers that knows the names of special tokens, and no vocabulary."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **self._named_tokens)

    def _encode_parts(self, parts: Sequence[tuple[int, str]], mark: str) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Encode (role, text) parts as one text in which only the template's special tokens are special."""
        id_of = {token.content: i for i, token in self._special}
        special = re.compile("|".join(map(re.escape, sorted(id_of, key=len, reverse=True))) or r"(?!)")
        texts = [
            special.sub(lambda found: f"{mark}{id_of[found[0]]}{mark}", part) if role == _TEMPLATE else part
            for role, part in parts
        ]
        backend = self._marked_backend(mark)
        true_id = {backend.token_to_id(f"{mark}{i}{mark}"): i for i in id_of.values()}
        encoding = backend.encode("".join(texts), add_special_tokens=False)
        ids = np.array([true_id.get(i, i) for i in encoding.ids], dtype=np.int32)
        role_of_character = np.repeat(np.array([role for role, _ in parts], np.uint8), [len(t) for t in texts])
        last_character = np.array([max(end - 1, 0) for _, end in encoding.offsets], dtype=np.int64)
        return ids, role_of_character[last_character]

    def _marked_backend(self, mark: str) -> Tokenizer:
        """Return a tokenizer to which special tokens are text, and their ids between marks are special."""
        if mark not in self._marked_backends:
            backend = Tokenizer.from_str(self._backend.to_str())
            backend.encode_special_tokens = True
            backend.add_tokens(
                [
                    AddedToken(f"{mark}{i}{mark}", lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
                    for i, token in self._special
                ]
            )
            self._marked_backends[mark] = backend
        return self._marked_backends[mark]


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return what a `tokenizer_config.json` calls `bos_token`, `eos_token` and so on."""
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    contents = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def _marked(message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Put marks and the role's digit around a content, inside its white space, which templates may strip."""
    content: str = message["content"]
    core = content.strip()
    if not core:
        return dict(message)
    return {
        **message,
        "content": content.replace(core, f"{mark}{ROLES.index(message['role'])}{core}{mark}", 1),
    }
