"""Message lists in the forms that people have them, as one: `{"role": …, "content": text, …}`.

Roles and keys go by several names, a content may be a list of parts, and a message may carry more than text (tool
calls, reasoning): whole messages are kept and handed to the chat template.
"""

import ast
import itertools
import json
import operator
import re
from collections.abc import Callable
from typing import Any

from utils import UserError

Messages = list[dict[str, Any]]
RowError = Callable[..., UserError]  # makes the error about a row from what is wrong with it, and a key for counting

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "chatbot", "chatgpt", "model"),
    "tool": ("tool", "function", "observation", "tool_response", "function_response"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
NOT_TEXT = ("type", "id", "tool_call_id")  # of what a message carries, these need not be read by the model,
NOT_TEXT_OF_A_MESSAGE = (*NOT_TEXT, "name")  # nor who a message is from
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
# ChatML, which Qwen and others render a dialogue into
_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\s*|\Z)", re.DOTALL)
# what other templates begin a turn with
_OTHER_TURN = re.compile(
    r"\s*(?:<s>)?\s*(\[INST\]|<\|start_header_id\|>|<start_of_turn>|<\|user\|>|<\|system\|>|<\|begin_of_text\|>"
    r"|<\|start\|>|<\|im_start\|>|<\|prompter\|>|<\|assistant\|>|<\|endoftext\|>)"
)
_HELPSTEER_TURN = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")  # between the turns of HelpSteer2's prompts


def normalized(value: Any, column: str, row_error: RowError) -> Messages:
    """A message, or a list of them, in the one form."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        wanted = "a list of messages" if isinstance(value, str) else "text or a list of messages"
        raise row_error(f"{column!r} is {kind_of(value)}, not {wanted}", _key_of(value))
    if not value:
        raise row_error(f"{column!r} is an empty list")
    if all(isinstance(turn, dict) and turn.keys() == {"input", "output"} for turn in value):  # Capybara's
        pairs = [(("user", turn["input"]), ("assistant", turn["output"])) for turn in value]
        value = [{"role": role, "content": text} for pair in pairs for role, text in pair]
    return [_message(message, column, row_error) for message in value]


def kind_of(value: Any) -> str:
    """What a value is, in words: "a number", "null"."""
    kinds = {"NoneType": "null", "str": "text", "bool": "true or false", "int": "a number", "float": "a number"}
    kinds |= {"dict": "an object", "list": "a list", "bytes": "bytes"}
    return kinds.get(type(value).__name__, f"a {type(value).__name__}")


def _key_of(value: Any) -> str:
    return "null" if value is None else "wrong_type"


def _message(message: Any, column: str, row_error: RowError) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise row_error(f"{column!r} holds {str(message)[:60]!r}, not a message with role and content")
    role_key, content_key = (next((key for key in keys if key in message), None) for keys in (ROLE_KEYS, CONTENT_KEYS))
    others = {
        key: without_nulls(value)
        for key, value in message.items()
        if key not in (role_key, content_key) and value is not None and value not in ([], {}, "")
    }
    if role_key is None or (content_key is None and not others):
        raise row_error(f"{column!r} holds {str(message)[:60]!r}, not a message with role and content")
    role = ROLE_OF.get(str(message[role_key]).strip().lower())
    if role is None:
        raise row_error(f"{column!r} has the role {message[role_key]!r}, not one of {', '.join(ROLES)}", "unknown_role")
    if "tool_calls" in others:
        if not isinstance(others["tool_calls"], list):
            raise row_error(f"{column!r} has tool_calls that are {kind_of(others['tool_calls'])}, not a list")
        if not all(isinstance(call, dict) for call in others["tool_calls"]):
            raise row_error(f"{column!r} has tool_calls that are not all objects")
        others["tool_calls"] = [_with_parsed_arguments(call) for call in others["tool_calls"]]
    content = _text(message.get(content_key), bool(others), column, row_error)
    return {"role": role, "content": content, **others}


def _text(content: Any, has_more: bool, column: str, row_error: RowError) -> str:
    """A message's text: itself, or that of its parts."""
    if isinstance(content, str):
        return content
    if content is None and has_more:
        return ""
    if not isinstance(content, list):
        raise row_error(f"{column!r} has content that is {kind_of(content)}, not text", _key_of(content))
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            found = kind if kind not in ("text", "input_text", "output_text") else type(text).__name__
            raise row_error(f"{column!r} has content of the type {found!r}: only text can be read", "not_text")
        texts.append(text)
    return "\n".join(texts)


def without_nulls(value: Any) -> Any:
    """A nested value without null entries: tables give every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _with_parsed_arguments(call: Any) -> Any:
    """A tool call whose arguments are an object, as templates expect, where the data has them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def with_arguments_as_text(dialogues: list[Messages]) -> list[Messages]:
    """Dialogues whose tool calls have their arguments as JSON text."""

    def changed(call: Any) -> Any:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        [
            {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}
            if message.get("tool_calls") else message
            for message in dialogue
        ]
        for dialogue in dialogues
    ]  # fmt: skip


def merge_same_speaker(messages: Messages) -> Messages:
    """Join consecutive messages of one speaker, with an empty line between them; those with more than text stay."""
    merged: Messages = []
    for (role, is_plain), turns in itertools.groupby(messages, key=lambda message: (message["role"], is_text(message))):
        turns = list(turns)
        if not is_plain or role == "tool":
            merged += turns
            continue
        content = "\n\n".join(filter(None, map(operator.itemgetter("content"), turns)))
        merged.append({"role": role, "content": content})
    return merged


def is_text(message: dict[str, Any]) -> bool:
    """Whether a message has nothing but a role and a text."""
    return message.keys() == {"role", "content"}


def joined(prompt: Messages, side: Messages) -> Messages:
    """A dialogue from a prompt and a side that continues it, or that repeats its end or all of it."""
    if prompt and side[0]["role"] == "system" and prompt[0]["role"] != "system" and len(side) > 1:
        return [side[0], *joined(prompt, side[1:])]
    if _is_within(prompt, side[:-1]):
        return side
    for start in range(len(prompt)):
        rest = prompt[start:]
        if [_key(message) for message in side[: len(rest)]] == [_key(message) for message in rest]:
            return [*prompt[:start], *side]
    return [*prompt, *side]


def _is_within(prompt: Messages, before: Messages) -> bool:
    """Whether a prompt is the end of what comes before a reply, or all of it written as one text."""
    if len(before) > len(prompt) > 0 and [_key(m) for m in before[-len(prompt) :]] == [_key(m) for m in prompt]:
        return True
    texts = [" ".join(message["content"].split()) for message in before]
    whole = " ".join(prompt[0]["content"].split()) if len(prompt) == 1 else ""
    return len(before) > 2 and all(text and text in whole for text in texts)


def _key(message: dict[str, Any]) -> tuple[str, str]:
    return message["role"], " ".join(message["content"].split())


def parse_chatml(text: str) -> Messages | None:
    """Text that was already rendered in ChatML, read back; None if it was not. An open last turn is left out."""
    if not text.lstrip().startswith("<|im_start|>"):
        return None
    turns = list(_CHATML_TURN.finditer(text))
    if not turns or _CHATML_TURN.sub("", text).strip():  # there is text between or behind the turns
        return None
    messages = [{"role": turn.group(1), "content": turn.group(2).strip()} for turn in turns]
    if any(message["role"].lower() not in ROLE_OF for message in messages):
        return None
    messages = [{**message, "role": ROLE_OF[message["role"].lower()]} for message in messages]
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    return messages or None


def parse_helpsteer(text: str) -> Messages | None:
    """HelpSteer2's prompts of several turns, of which the first is the user's; None if there is one turn."""
    first, *rest = _HELPSTEER_TURN.split(text)
    if not rest:
        return None
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    messages = [{"role": speaker.lower(), "content": content.strip()} for speaker, content in turns]
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    return messages


def parse_list(text: str) -> Any:
    """Messages that a text holds, as JSON or as Python writes a list; None if it holds none."""
    if text.lstrip()[:1] in ("[", "{") and ("role" in text or "from" in text):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, dict) and any(key in first for key in ROLE_KEYS):
                return value
    return None


def is_dialogue(value: Any) -> bool:
    """Whether a value is a list of messages of known speakers that ends in a reply, and nothing else."""
    return (
        isinstance(value, list)
        and all(isinstance(message, dict) and any(key in message for key in CONTENT_KEYS) for message in value)
        and all(str(message.get("role", message.get("from"))).lower() in ROLE_OF for message in value)
        and len(value) > 0
        and ROLE_OF[str(value[-1].get("role", value[-1].get("from"))).lower()] == "assistant"
    )


def is_list_of_numpy(text: str) -> bool:
    """Whether a text is a list of messages as numpy prints arrays: without commas between them."""
    return re.match(r"\s*\[\{'(role|content|from|value)': ", text) is not None and text.rstrip().endswith("}]")


def without_end_of_turn(reply: str) -> str:
    """A reply without the token that ends a turn in ChatML."""
    return reply.rstrip().removesuffix("<|im_end|>").rstrip() if reply.rstrip().endswith("<|im_end|>") else reply


def template_marker(text: str) -> str | None:
    """What shows that a text was rendered by another chat template; None if nothing does."""
    found = _OTHER_TURN.match(text)
    return found.group(1) if found else None


def is_rendered(dialogues: list[Messages], tools: Any, texts: list[str]) -> bool:
    """Whether rendered texts hold the texts of all messages, what these carry besides, and the tools."""
    wanted = [(name, text) for text in texts for name in texts_of(without_keys(tools, NOT_TEXT)) if name]
    for dialogue, text in zip(dialogues, texts, strict=True):
        for message in dialogue:
            wanted.append((message["content"], text))
            if not is_text(message):
                left_out = ("role", "content", *NOT_TEXT_OF_A_MESSAGE)
                extras = {key: value for key, value in message.items() if key not in left_out}
                wanted += [(part, text) for part in texts_of(without_keys(extras, NOT_TEXT)) if part.strip()]
    return all(part.strip() in text or json.dumps(part)[1:-1] in text for part, text in wanted)


def without_keys(value: Any, names: tuple[str, ...]) -> Any:
    """A nested value without the entries of some names."""
    if isinstance(value, dict):
        return {key: without_keys(item, names) for key, item in value.items() if key not in names}
    return [without_keys(item, names) for item in value] if isinstance(value, list) else value


def checked_tools(value: Any, row_error: RowError) -> list[dict[str, Any]] | None:
    """What a row's `tools` column says that the assistant could call: a list of objects, or JSON text of one."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise row_error("'tools' is text that is not JSON") from None
    if not value:
        return None
    value = without_nulls(value)
    if not isinstance(value, list) or not all(isinstance(tool, dict) and tool for tool in value):
        raise row_error("'tools' is not a list of objects")
    return value


def texts_of(value: Any) -> list[str]:
    """Every text in a nested value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in texts_of(item)] if isinstance(value, list) else []
