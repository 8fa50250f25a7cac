"""A conversation of the page: what was said, as plain data that a browser can keep, and how it changes.

{"id": …, "system_prompt": …, "messages": [message, …]}, and "is_busy" while a reply is written; a message is one of

    {"role": "user", "content": …}
    {"role": "assistant", "content": …, "thinking": …, "others": [{"content": …, "thinking": …}, …]}   best-of-N's rest
    {"role": "note", "content": …}                                     what the page says itself: why there is no reply

Every function returns a new conversation. Nothing here knows models or the page.
"""

from __future__ import annotations

import html
import uuid
from typing import Any

Conversation = dict[str, Any]
Message = dict[str, Any]
ORDINALS = {1: "st", 2: "nd", 3: "rd"}


def new(system_prompt: str = "") -> Conversation:
    return {"id": uuid.uuid4().hex, "system_prompt": system_prompt, "messages": []}


def checked(value: Any) -> Conversation:
    """What a browser kept, if it is a conversation; a new one if it is not."""
    try:
        messages = [checked_message(message) for message in value["messages"]]
        return {"id": str(value["id"]), "system_prompt": str(value["system_prompt"]), "messages": messages}
    except (KeyError, TypeError, ValueError):
        return new()


def checked_message(message: Message) -> Message:
    role, content = message["role"], message["content"]
    if role not in ("user", "assistant", "note") or not isinstance(content, str):
        raise ValueError("not a message of a conversation")
    if role != "assistant":
        return {"role": role, "content": content}
    others = [{key: str(other[key]) for key in ("content", "thinking")} for other in message.get("others", [])]
    return {"role": role, "content": content, "thinking": str(message.get("thinking", "")), "others": others}


def title(conversation: Conversation) -> str:
    """The first thing that the user said, shortened."""
    asked = [message["content"] for message in conversation["messages"] if message["role"] == "user"]
    words = " ".join(asked[0].split()) if asked else "empty"
    return words if len(words) <= 48 else words[:47] + "…"


def dialogue(conversation: Conversation) -> list[dict[str, str]]:
    """What was really said: no notes, and no message that was never answered but the last."""
    said: list[dict[str, str]] = []
    for message in conversation["messages"]:
        if message["role"] == "note":
            continue
        if said and said[-1]["role"] == message["role"]:
            said.pop()
        said.append({"role": message["role"], "content": message["content"]})
    return said


def dialogues_to_score(conversation: Conversation) -> list[list[dict[str, str]]]:
    """For each reply, in order, the dialogue that ends in it."""
    ends = [end for end, message in enumerate(conversation["messages"], 1) if message["role"] == "assistant"]
    return [dialogue({**conversation, "messages": conversation["messages"][:end]}) for end in ends]


# ---------------------------------------------------------------------------------------------------------------------
# Changes
# ---------------------------------------------------------------------------------------------------------------------


def _with(conversation: Conversation, messages: list[Message]) -> Conversation:
    return {**conversation, "messages": messages}


def say(conversation: Conversation, text: str) -> Conversation:
    return _with(conversation, [*conversation["messages"], {"role": "user", "content": text}])


def answer(conversation: Conversation, replies: list[tuple[str, str]]) -> Conversation:
    """Add a reply; of several (content, thinking) the first is the one that counts."""
    (content, thinking), *rest = replies
    others = [{"content": other, "thinking": thought} for other, thought in rest]
    reply = {"role": "assistant", "content": content, "thinking": thinking, "others": others}
    return _with(conversation, [*conversation["messages"], reply])


def note(conversation: Conversation, text: str) -> Conversation:
    return _with(conversation, [*conversation["messages"], {"role": "note", "content": text}])


def before_last_reply(conversation: Conversation) -> Conversation:
    """Without what followed the user's last message: ready to be answered again."""
    messages = list(conversation["messages"])
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    return _with(conversation, messages)


def undo(conversation: Conversation) -> tuple[Conversation, str]:
    """Without the user's last message and what followed it, and that message's text."""
    messages = before_last_reply(conversation)["messages"]
    text = messages[-1]["content"] if messages else ""
    return _with(conversation, messages[:-1]), text


def edit(conversation: Conversation, index: int, text: str) -> Conversation:
    """With another user's message at `index` and nothing after it."""
    return say(_with(conversation, conversation["messages"][:index]), text)


def pick(conversation: Conversation, which: int) -> Conversation:
    """With another of the last reply's candidates in its place; the one that stood there joins the others."""
    *earlier, last = conversation["messages"]
    others = list(last["others"])
    picked = others[which]
    others[which] = {"content": last["content"], "thinking": last["thinking"]}
    return _with(conversation, [*earlier, {**last, **picked, "others": others}])


# ---------------------------------------------------------------------------------------------------------------------
# How it is shown
# ---------------------------------------------------------------------------------------------------------------------


def shown(
    conversation: Conversation, footers: list[str], options: list[tuple[str, int]] = ()
) -> tuple[list[Message], list[int]]:
    """A conversation as messages for gr.Chatbot, and for each of them the index of the message it shows.

    All that a person or a model wrote is escaped: the page shows it letter by letter and runs none of it. It goes into
    blocks, because Gradio takes the indentation out of plain strings. `footers`
    are lines of ours beneath the replies, in order; `options` (label, index into `others`) stand under the last reply.
    """
    messages, indices = [], []
    footers_left = iter(footers)

    def add(index: int, **message: Any) -> None:
        messages.append(message)
        indices.append(index)

    def block(text: str) -> dict[str, str]:
        return {"type": "text", "text": html.escape(text, quote=False)}

    last = len(conversation["messages"]) - 1
    for index, message in enumerate(conversation["messages"]):
        written = [block(message["content"])]
        if message["role"] == "user":
            add(index, role="user", content=written)
        elif message["role"] == "note":
            add(index, role="assistant", content=written, metadata={"title": "no reply"})
        else:
            if message["thinking"]:
                is_thinking = not message["content"]
                metadata = {"title": "Thinking", "status": "pending" if is_thinking else "done"}
                add(index, role="assistant", content=[block(message["thinking"])], metadata=metadata)
            if footer := next(footers_left, ""):
                small = f'<small class="footer">{html.escape(footer, quote=False)}</small>'
                written.append({"type": "text", "text": small})
            choices = [{"label": label, "value": str(which)} for label, which in options] if index == last else []
            add(index, role="assistant", content=written, options=choices)
    return messages, indices


def rank_of(index: int, rewards: list[float]) -> int:
    """1 for the highest of the rewards; equal ones share the better rank."""
    return 1 + sum(reward > rewards[index] for reward in rewards)


def ordinal(number: int) -> str:
    """1 -> '1st', 12 -> '12th'."""
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ORDINALS.get(number % 10, 'th')}"


def reward_footers(rewards: list[float]) -> list[str]:
    """For each reply its reward and how it ranks among the conversation's."""
    if len(rewards) == 1:
        return [f"reward {rewards[0]:+.3f}"]
    count = len(rewards)
    return [
        f"reward {reward:+.3f} · {ordinal(rank_of(index, rewards))} of this chat's {count} replies"
        for index, reward in enumerate(rewards)
    ]


def candidate_options(contents: list[str], rewards: list[float] | None) -> list[tuple[str, int]]:
    """Labels of the last reply's candidates; `contents` and `rewards` have the shown one first."""
    labels = []
    for index, content in enumerate(contents[1:], 1):
        words = " ".join(content.split())
        start = words if len(words) <= 60 else words[:59] + "…"
        rank = f"{ordinal(rank_of(index, rewards))} of {len(rewards)}, {rewards[index]:+.3f}: " if rewards else ""
        labels.append((rank + start, index - 1))
    return labels
