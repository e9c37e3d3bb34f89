"""Ids are those of transformers' own `apply_chat_template` for all messages, and every token has its speaker."""

import json
import re
from collections.abc import Mapping
from datetime import date
from functools import cache
from typing import Any

import numpy as np
import pytest
from chat_styles import ADDED, SPECIAL, STYLES
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from workers.text import Unrenderable
from workers.text.tokenizer import ROLES, TextTokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the \"forecast\", e.g. 'rain'.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "abcdefgh9", "type": "function", "function": function}], **more}


ASK = {"role": "user", "content": " Which weather has Turin?\n"}
RESULT = {
    "role": "tool",
    "content": '{"sky": "blue", "say": "a \\"b\\""}',
    "tool_call_id": "abcdefgh9",
    "name": "get_weather",
}
ANSWER = {"role": "assistant", "content": "Sunny, 25 degrees."}
SYSTEM = {"role": "system", "content": "Be brief; say user and system."}
THOUGHT = {"role": "assistant", "content": "<think>greet back</think>Hello there"}
Talk = Mapping[str, Any]
TALKS: dict[str, Talk] = {
    "plain": {"messages": [ASK, ANSWER]},
    "system": {"messages": [SYSTEM, ASK, ANSWER, {"role": "user", "content": "Thanks, é 日本!"}]},
    "nulls": {"messages": [ASK, {**ANSWER, "tool_calls": None, "name": None, "reasoning_content": None}]},
    "dict call": {"messages": [ASK, call({"city": 'T"u"rin', "days": 3, "ok": True, "near": {"km": [1.5, None]}})]},
    "text call": {"messages": [ASK, call('{"city": "Turin", "days": 3}', content=None)]},
    "said and called": {"messages": [ASK, call({"city": "Turin"}, content="Let me look.")]},
    "no arguments": {"messages": [ASK, call({})]},
    "result": {"messages": [ASK, call({"city": "Turin"}), RESULT, ANSWER], "tools": TOOLS},
    "think": {"messages": [{"role": "user", "content": "Hi"}, THOUGHT, {"role": "user", "content": "again"}, ANSWER]},
    "last thinks": {"messages": [{"role": "user", "content": "Hi"}, THOUGHT]},
    "thinks apart": {"messages": [ASK, {**ANSWER, "reasoning_content": '\nEasy, "quoted".\n', "thinking": "Easy"}]},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "One,"}, {"type": "text", "text": " two"}]}]
    },
    "names": {"messages": [{**ASK, "name": "Bob"}, {**ANSWER, "name": "Eva"}]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, ASK, ANSWER]},
    "documents": {"messages": [ASK, ANSWER], "documents": [{"title": "T", "text": "Turin lies in Piedmont."}]},
    "tools of a message": {"messages": [{**SYSTEM, "tools": json.dumps(TOOLS)}, ASK, ANSWER]},
    "looked for": {"messages": [{"role": "user", "content": "user"}, THOUGHT, {"role": "user", "content": "system"}]},
}


@cache
def backend() -> str:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*SPECIAL],
        show_progress=False,
    )
    trained.train_from_iterator([json.dumps([TALKS, TOOLS])], trainer)
    trained.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return trained.to_str()


def settings(template: Any) -> dict[str, Any]:
    return {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}


@cache
def ours(style: str, day: date = date(2024, 7, 26)) -> TextTokenizer:
    return TextTokenizer(Tokenizer.from_str(backend()), settings(STYLES[style]), style, template_date=day)


@cache
def theirs(style: str, day: str = "2024-07-26") -> Any:
    """The same model's tokenizer in transformers; the clock of a template is set to a day."""
    clock = re.compile(r"strftime_now\((['\"])(.*?)\1\)")
    template = clock.sub(lambda found: repr(date.fromisoformat(day).strftime(found[2])), STYLES[style])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend()), **settings(template))


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_apply_chat_template_or_the_conversation_is_refused_there_too(style: str, talk: str) -> None:
    messages, beside = TALKS[talk]["messages"], {k: v for k, v in TALKS[talk].items() if k != "messages"}
    said = [{k: v for k, v in message.items() if v is not None} for message in messages]  # older versions write "None"
    try:
        expected = theirs(style).apply_chat_template(said, return_dict=False, **beside)
    except Exception:
        with pytest.raises(Unrenderable, match="rejects the messages"):
            ours(style).chat(messages, **beside)
        return
    ids, roles = ours(style).chat(messages, **beside)
    assert ids.tolist() == expected
    assert ids.shape == roles.shape


WORDS = [
    "user",
    "</think>",
    "<think>",
    "\n",
    " ",
    '"',
    "\\",
    "{}",
    "日",
    "x",
    "<tool_call>",
    "system",
    "3",
    "\x1b",
    "\U00020000",
]
STRINGS = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
VALUES = st.recursive(
    STRINGS | st.sampled_from([1, 2.5, True, None]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(STRINGS, inner, max_size=2),
    max_leaves=4,
)
CALLED = st.fixed_dictionaries(
    {"role": st.just("assistant")},
    optional={
        "content": STRINGS,
        "reasoning_content": STRINGS,
        "tool_calls": st.lists(st.builds(lambda value: call(value)["tool_calls"][0], VALUES), max_size=2),
    },
)


@settings_of(max_examples=15)
@given(STRINGS, CALLED, STRINGS, st.sampled_from([None, TOOLS]))
def test_any_strings_in_any_place_give_the_ids_of_apply_chat_template(
    ask: str, called: Any, result: str, tools: Any
) -> None:
    messages = [{"role": "user", "content": ask}, called, {**RESULT, "content": result}, ANSWER]
    for style in STYLES:
        for talk in (messages, messages[:2]):
            try:
                expected = theirs(style).apply_chat_template(talk, tools=tools, return_dict=False)
            except Exception:
                continue
            assert ours(style).chat(talk, tools=tools)[0].tolist() == expected, style


def said(style: str, talk: Talk) -> dict[str, str]:
    """The text of each role and of the template."""
    ids, roles = ours(style).chat(talk["messages"], **{k: v for k, v in talk.items() if k != "messages"})
    text = Tokenizer.from_str(backend())
    return {
        role: text.decode(ids[roles == number].tolist(), skip_special_tokens=False) for number, role in enumerate(ROLES)
    }


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("talk", ["plain", "system", "think", "last thinks", "thinks apart", "looked for", "developer"])
def test_each_content_has_its_speaker(style: str, talk: str) -> None:
    try:
        found = said(style, TALKS[talk])
    except Unrenderable:
        return
    for role in ("system", "user"):
        wanted = [
            m["content"]
            for m in TALKS[talk]["messages"]
            if m["role"] == role or (role, m["role"]) == ("system", "developer")
        ]
        if found[role]:  # some templates omit a system message
            assert squeezed(found[role]) == squeezed("".join(wanted))
    last = re.split("<think>|</think>", TALKS[talk]["messages"][-1]["content"])[-1]
    assert squeezed(last) in squeezed(found[TALKS[talk]["messages"][-1]["role"]])
    assert squeezed(last) not in squeezed(found["template"]) or talk == "looked for", "headers say system too"


def test_a_call_written_as_json_is_the_speakers_with_its_brackets_keys_and_numbers() -> None:
    json_call = '{"city": "T\\"u\\"rin", "days": 3, "ok": true, "near": {"km": [1.5, null]}}'
    for style in ("CHATML", "QWEN_3", "LLAMA_3", "MISTRAL_3"):
        found = said(style, TALKS["dict call"])["assistant"]
        assert json_call[:-1] in found, style  # the last bracket may share a token with the template's
    whole = (
        '{"id": "abcdefgh9", "type": "function", "function": {"name": "get_weather", "arguments": ' + json_call + "}}"
    )
    assert said("CHATML", TALKS["dict call"])["assistant"] == whole


def test_a_call_written_in_another_form_gives_the_speaker_its_strings_and_keys() -> None:
    found = said("GLM", TALKS["dict call"])
    assert found["assistant"] == 'get_weathercityT"u"rindaysoknear{"km": [1.5, null]}'
    assert re.findall("<arg_value>(.*?)</arg_value>", found["template"]) == ["", "3", "true", ""], "they stand alone"


def test_tools_documents_and_results_are_nobodys_or_the_tools() -> None:
    found = said("QWEN_3", TALKS["result"])
    assert found["tool"] == RESULT["content"]
    assert "forecast" in found["template"]
    assert found["assistant"] == '{"name": "get_weather", "arguments": {"city": "Turin"}}Sunny, 25 degrees.'
    assert "Piedmont" in said("GRANITE", TALKS["documents"])["template"]
    assert found["user"].strip() == "Which weather has Turin?"


@pytest.mark.parametrize("style", ["CHATML", "QWEN_3", "LLAMA_3", "MISTRAL_3", "GPT_OSS", "GLM", "GRANITE"])
def test_special_tokens_stay_text_wherever_a_conversation_holds_them(style: str) -> None:
    bad = "".join(SPECIAL)
    tools = [{"type": "function", "function": {"name": bad, "description": bad, "parameters": {"properties": {}}}}]
    messages = [{"role": "user", "content": bad}, call({bad: f'{bad}"{bad}'}, content=bad, thinking=bad)]
    clean = json.loads(
        json.dumps([messages, tools], ensure_ascii=False).replace(json.dumps(bad, ensure_ascii=False)[1:-1], "x")
    )
    count = [np.isin(ours(style).chat(m, tools=t)[0], range(len(SPECIAL))).sum() for m, t in ([messages, tools], clean)]
    assert count[0] == count[1] > 3


def test_a_special_token_in_a_key_is_refused() -> None:
    with pytest.raises(Unrenderable, match="'<s>' is a key or a type, and holds a special token"):
        ours("CHATML").chat([ASK], tools=[{"<s>": 1}])


def test_a_special_token_that_the_template_looks_for_is_taken_apart_as_the_template_does() -> None:
    changed = Tokenizer.from_str(backend())
    changed.add_special_tokens(["<think>", "</think>"])
    mine = TextTokenizer(Tokenizer.from_str(changed.to_str()), settings(STYLES["GLM"]), "glm")
    reference = PreTrainedTokenizerFast(tokenizer_object=changed, **settings(STYLES["GLM"]))
    messages = [{"role": "user", "content": "Hi </think>"}, THOUGHT, {"role": "user", "content": "<|user|>"}]
    ids, _ = mine.chat(messages[1:2])
    assert ids.tolist() == reference.apply_chat_template(messages[1:2], return_dict=False)
    ids, _ = mine.chat(messages)
    assert (ids == changed.token_to_id("</think>")).sum() == 1, "the user's stays text"
    assert (ids == changed.token_to_id("<|user|>")).sum() == 2


@pytest.mark.parametrize("style", ["GPT_OSS", "GRANITE", "LLAMA_3"])
def test_a_date_is_the_default_one_or_that_of_the_option_and_never_todays(style: str) -> None:
    messages = TALKS["plain"]["messages"]
    other = ours(style, date(2025, 1, 9))
    assert ours(style).template_date is None
    assert other.template_date == "2025-01-09"
    assert ours("CHATML", date(2025, 1, 9)).template_date is None, "it writes no date"
    assert other.chat(messages)[0].tolist() == theirs(style, "2025-01-09").apply_chat_template(
        messages, return_dict=False
    )
    text = Tokenizer.from_str(backend())
    assert "2024" in text.decode(ours(style).chat(messages)[0].tolist())


def test_a_template_that_only_takes_a_date_gets_that_of_the_option() -> None:
    template = "{{ date_string | default('26 Jul 2024') }} {{ messages[0].content }}"
    days = [date(2024, 7, 26), date(2025, 1, 9)]
    found = [TextTokenizer(Tokenizer.from_str(backend()), settings(template), "t", template_date=day) for day in days]
    text = Tokenizer.from_str(backend())
    assert [text.decode(each.chat([ASK])[0].tolist())[:11] for each in found] == ["26 Jul 2024", "09 Jan 2025"]


@settings_of(max_examples=20)
@given(st.text("%abdBYmHMjyAp-eT 20", max_size=12))
def test_the_clock_knows_every_directive(form: str) -> None:
    template = "  {% if strftime_now is defined %}\n  {{ strftime_now(form) }}{% endif %}\n".replace(
        "form", json.dumps(form)
    )
    mine = TextTokenizer(Tokenizer.from_str(backend()), settings(template + "{{ messages[0].content }}"), "t")
    shown = Tokenizer.from_str(backend()).decode(mine.chat([{"role": "user", "content": "x"}])[0].tolist())
    assert shown == "  " + date(2024, 7, 26).strftime(form) + "x" or "%" in re.sub("%[a-zA-Z]|%-[a-zA-Z]|%%", "", form)


def test_the_template_for_tools_is_taken_where_there_are_tools() -> None:
    both = [
        {"name": "default", "template": "D{{ messages[0].content }}"},
        {"name": "tool_use", "template": "T{{ tools|length }}"},
    ]
    mine = TextTokenizer(Tokenizer.from_str(backend()), settings(both), "t")
    text = Tokenizer.from_str(backend())
    assert text.decode(mine.chat([ASK])[0].tolist()).startswith("D Which")
    assert text.decode(mine.chat([ASK], tools=TOOLS)[0].tolist()) == "T1"
    alone = TextTokenizer(Tokenizer.from_str(backend()), settings("D{{ messages[0].content }}"), "t")
    assert alone.chat_template_sha256 != mine.chat_template_sha256


@pytest.mark.parametrize(
    ("message", "beside", "reason"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, {}, "message 0 holds a part of type 'image'"),
        ({"role": "user", "content": "x"}, {"tools": "all"}, "its tools are of type str"),
        ({"role": "user", "content": "x"}, {"documents": ["d"]}, "its documents are of type list"),
        ({"role": "user", "content": "Shout"}, {}, r"rewrites messages \(message 0, 'content'\)"),
    ],
)
def test_a_conversation_that_cannot_be_exact_is_refused_by_name(message: Any, beside: Any, reason: str) -> None:
    mine = TextTokenizer(Tokenizer.from_str(backend()), settings("{{ messages[0].content | upper + '' }}"), "t")
    with pytest.raises(Unrenderable, match=reason):
        mine.chat([message], **beside)
    with pytest.raises(ValueError, match="no chat template") as raised:
        TextTokenizer(Tokenizer.from_str(backend()), settings(None), "t").chat([ASK])
    assert not isinstance(raised.value, Unrenderable), "a fault of the model, not of a document"


def test_a_long_conversation_is_encoded_in_parts_with_equal_ids_and_roles() -> None:
    long = "\n".join(f"word{n}" if n % 7 else "<think> now</s>" for n in range(20_000))
    messages = [ASK, {"role": "assistant", "content": long}, ASK]
    ids, roles = ours("CHATML").chat(messages)
    plain = theirs("CHATML").apply_chat_template(
        [*messages[:1], {"role": "assistant", "content": long.replace("</s>", "<.s>")}, ASK], return_dict=False
    )
    assert len(long) > 2 * 2**16
    text = Tokenizer.from_str(backend())
    assert text.decode(ids.tolist(), skip_special_tokens=False) == text.decode(
        plain, skip_special_tokens=False
    ).replace("<.s>", "</s>")
    assert text.decode(ids[roles == 2].tolist(), skip_special_tokens=False) == long
