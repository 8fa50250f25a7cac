"""A conversation as plain data that a browser can store, and its changes. Independent of models and components.

A conversation is {"id": …, "system_prompt": …, "messages": [message, …]}, and "is_busy": true while a reply is being
generated. A message is one of

    {"role": "user", "content": …}
    {"role": "assistant", "content": …, "thinking": …, "others": [{"content": …, "thinking": …}, …]}
    {"role": "note", "content": …}                                      from the page: why there is no reply

where "others" are the candidates that best-of-N did not pick. Every function returns a new conversation and leaves the
old one unchanged.
"""

import html
import uuid
from typing import Any

from data_pipeline import parsing
from data_pipeline.messages import Messages

Conversation = dict[str, Any]
Message = dict[str, Any]
ORDINAL_SUFFIXES = {1: "st", 2: "nd", 3: "rd"}


def new(system_prompt: str = "") -> Conversation:
    return {"id": uuid.uuid4().hex, "system_prompt": system_prompt, "messages": []}


def checked(value: Any) -> Conversation:
    """The conversation that a browser stored; a new one if the value is not a conversation."""
    try:
        messages = [_checked_message(message) for message in value["messages"]]
        return {"id": str(value["id"]), "system_prompt": str(value["system_prompt"]), "messages": messages}
    except (KeyError, TypeError, ValueError):
        return new()


def _checked_message(message: Message) -> Message:
    role, content = message["role"], message["content"]
    if role not in ("user", "assistant", "note") or not isinstance(content, str):
        raise ValueError("not a message of a conversation")
    if role != "assistant":
        return {"role": role, "content": content}
    others = [{key: str(other[key]) for key in ("content", "thinking")} for other in message.get("others", [])]
    return {"role": role, "content": content, "thinking": str(message.get("thinking", "")), "others": others}


def title(conversation: Conversation) -> str:
    """The user's first message, shortened; "" for a conversation that has none, which is not worth saving."""
    questions = (message["content"] for message in conversation["messages"] if message["role"] == "user")
    return shortened(next(questions, ""), 48)


def shortened(text: str, length: int) -> str:
    """A text on one line, cut to `length` characters."""
    words = " ".join(text.split())
    return words if len(words) <= length else words[: length - 1] + "…"


# -- As messages for a model -------------------------------------------------------------------------------------------


def dialogue(conversation: Conversation) -> Messages:
    """The messages that models see: no notes, and of consecutive messages with the same role only the last."""
    messages: Messages = []
    for message in conversation["messages"]:
        if message["role"] == "note":
            continue
        if messages and messages[-1]["role"] == message["role"]:
            messages.pop()
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def dialogues_to_score(conversation: Conversation) -> list[Messages]:
    """For each reply, in order, the dialogue that ends in it."""
    messages = conversation["messages"]
    ends = [end for end, message in enumerate(messages, 1) if message["role"] == "assistant"]
    return [dialogue(_with(conversation, messages[:end])) for end in ends]


def with_system_prompt(system_prompt: str, messages: Messages) -> Messages:
    """A dialogue with its system prompt, if there is one, in front."""
    prompt = system_prompt.strip()
    return [{"role": "system", "content": prompt}, *messages] if prompt else list(messages)


def with_reply(prompt: Messages, reply: str) -> Messages:
    return [*prompt, {"role": "assistant", "content": reply}]


def prompt_messages(prompt: str, from_chat: tuple[str, Messages] | None = None) -> Messages:
    """A typed prompt as messages; ValueError if it is not something to reply to.

    `from_chat` is (text, messages) of a prompt copied from the chat. While its text is unchanged, those messages are
    used, even if words in the text look like turns.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    messages = from_chat[1] if from_chat and from_chat[0] == prompt else parsing.parse_prompt(prompt)
    if messages[-1]["role"] != "user":
        raise ValueError('the prompt ends in the assistant\'s turn: the two replies need a "Human:" turn to answer')
    return messages


def transcript(messages: Messages) -> str:
    """A dialogue as text, in the form that `prompt_messages` reads; a single question stays as it is."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    names = {"user": "Human", "assistant": "Assistant"}
    return "\n\n".join(f"{names[message['role']]}: {message['content']}" for message in messages)


# -- Changes -----------------------------------------------------------------------------------------------------------


def _with(conversation: Conversation, messages: list[Message]) -> Conversation:
    return {**conversation, "messages": messages}


def ask(conversation: Conversation, text: str) -> Conversation:
    """Add a message from the user."""
    return _with(conversation, [*conversation["messages"], {"role": "user", "content": text}])


def answer(conversation: Conversation, replies: list[tuple[str, str]]) -> Conversation:
    """Add a reply. `replies` are (content, thinking) of all candidates; the first becomes the reply."""
    (content, thinking), *rest = replies
    others = [{"content": other, "thinking": thought} for other, thought in rest]
    reply = {"role": "assistant", "content": content, "thinking": thinking, "others": others}
    return _with(conversation, [*conversation["messages"], reply])


def note(conversation: Conversation, text: str) -> Conversation:
    """Add a message from the page."""
    return _with(conversation, [*conversation["messages"], {"role": "note", "content": text}])


def before_last_reply(conversation: Conversation) -> Conversation:
    """Drop what follows the user's last message, so that it can be answered again."""
    messages = conversation["messages"]
    while messages and messages[-1]["role"] != "user":
        messages = messages[:-1]
    return _with(conversation, messages)


def undo(conversation: Conversation) -> tuple[Conversation, str]:
    """Drop the user's last message and what follows it; returns the rest and the message's text."""
    messages = before_last_reply(conversation)["messages"]
    text = messages[-1]["content"] if messages else ""
    return _with(conversation, messages[:-1]), text


def edit(conversation: Conversation, index: int, text: str) -> Conversation:
    """Replace the user's message at `index` and drop what follows it."""
    return ask(_with(conversation, conversation["messages"][:index]), text)


def pick(conversation: Conversation, which: int) -> Conversation:
    """Swap the last reply with another of its candidates: `which` is an index into "others"."""
    *earlier, last = conversation["messages"]
    others = list(last["others"])
    picked = others[which]
    others[which] = {"content": last["content"], "thinking": last["thinking"]}
    return _with(conversation, [*earlier, {**last, **picked, "others": others}])


# -- As shown on the page ----------------------------------------------------------------------------------------------


def to_chatbot(
    conversation: Conversation, footers: list[str], options: list[tuple[str, int]] = ()
) -> tuple[list[Message], list[int]]:
    """Messages for gr.Chatbot, and for each of them the index of the conversation's message it comes from.

    Texts from users and models are escaped, so that the page shows every character and runs nothing. They are content
    blocks because Gradio removes the indentation of plain strings. `footers` are the lines below the replies, in order;
    `options`, (label, index into "others"), go below the last reply.
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
        content = [block(message["content"])]
        if message["role"] == "user":
            add(index, role="user", content=content)
        elif message["role"] == "note":
            add(index, role="assistant", content=content, metadata={"title": "no reply"})
        else:
            if message["thinking"]:
                metadata = {"title": "Thinking", "status": "done" if message["content"] else "pending"}
                add(index, role="assistant", content=[block(message["thinking"])], metadata=metadata)
            if footer := next(footers_left, ""):
                small = f'<small class="footer">{html.escape(footer, quote=False)}</small>'
                content.append({"type": "text", "text": small})
            choices = [{"label": label, "value": str(which)} for label, which in options] if index == last else []
            add(index, role="assistant", content=content, options=choices)
    return messages, indices


def rank_of(index: int, rewards: list[float]) -> int:
    """1 for the highest reward; equal rewards share the better rank."""
    return 1 + sum(reward > rewards[index] for reward in rewards)


def ordinal(number: int) -> str:
    """1 -> '1st', 12 -> '12th'."""
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ORDINAL_SUFFIXES.get(number % 10, 'th')}"


def reward_footers(rewards: list[float]) -> list[str]:
    """For each reply its reward and its rank in the conversation."""
    count, footers = len(rewards), []
    for index, reward in enumerate(rewards):
        rank = f" · {ordinal(rank_of(index, rewards))} of this chat's {count} replies" if count > 1 else ""
        footers.append(f"reward {reward:+.3f}{rank}")
    return footers


def candidate_options(contents: list[str], rewards: list[float] | None) -> list[tuple[str, int]]:
    """Labels for all candidates except the first, which is the one shown, each with its index into "others"."""
    labels = []
    for index, content in enumerate(contents[1:], 1):
        rank = f"{ordinal(rank_of(index, rewards))} of {len(rewards)}, {rewards[index]:+.3f}: " if rewards else ""
        labels.append((rank + shortened(content, 60), index - 1))
    return labels
