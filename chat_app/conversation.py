"""A conversation as plain data that a browser can store, and its changes. Independent of models and components.

A conversation is {"id": …, "system_prompt": …, "messages": [message, …]}, and "is_busy": true while a reply is being
generated. A message is one of

    {"role": "user", "content": …}
    {"role": "assistant", "content": …, "thinking": …, "ending": …, "number": …, "others": [version, …]}
    {"role": "note", "content": …}                                      from the page: why there is no reply

where "others" are the other replies to the same prompt: the candidates that best-of-N did not pick and what a retry
replaced, each {"content", "thinking", "ending", "number"}, numbered in the order of writing. "ending" is "" for a reply
that the model ended itself, STOPPED or CUT. While a retry writes, "versions" holds what it may replace. Every function
returns a new conversation and leaves the old one unchanged.
"""

import html
import json
import math
import re
import uuid
from collections.abc import Sequence
from typing import Any

from data_pipeline import parsing
from data_pipeline.messages import Messages

Conversation = dict[str, Any]
Message = dict[str, Any]
STOPPED, CUT = "stopped", "cut"
ENDINGS = {STOPPED: "stopped early", CUT: "cut off at max new tokens"}
ORDINAL_SUFFIXES = {1: "st", 2: "nd", 3: "rd"}


def new(system_prompt: str = "") -> Conversation:
    return {"id": uuid.uuid4().hex, "system_prompt": system_prompt, "messages": []}


# what a page starts with; the first question gives it an id, because Gradio makes one initial value for all visitors
EMPTY: Conversation = {"id": "", "system_prompt": "", "messages": []}


def checked(value: Any) -> Conversation:
    """The conversation that a browser stored; a new one if the value is not a conversation."""
    try:
        messages = [_checked_message(message) for message in value["messages"]]
        chat = {"id": str(value["id"]), "system_prompt": str(value["system_prompt"]), "messages": messages}
        kept = [_checked_version(version, number) for number, version in enumerate(value.get("versions", []), 1)]
        return settled({**chat, "versions": kept})
    except (AttributeError, KeyError, TypeError, ValueError):
        return new()


def _checked_message(message: Message) -> Message:
    role, content = message["role"], message["content"]
    if role not in ("user", "assistant", "note") or not isinstance(content, str):
        raise ValueError("not a message of a conversation")
    if role != "assistant":
        return {"role": role, "content": content}
    others = [_checked_version(other, number) for number, other in enumerate(message.get("others", []), 2)]
    return {"role": role, **_checked_version(message, 1), "others": others}


def _checked_version(version: Message, number: int) -> Message:
    """A reply as kept; earlier versions of the page kept neither its ending nor its number."""
    ending = version.get("ending", "")
    if ending not in ("", *ENDINGS):
        raise ValueError("not the ending of a reply")
    texts = {"content": str(version["content"]), "thinking": str(version.get("thinking", ""))}
    return {**texts, "ending": ending, "number": int(version.get("number", number))}


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


def export(kept: list[dict[str, Any]]) -> str:
    """All kept conversations as JSON lines that `eval_rm.py --score` reads, one for each reply and its versions.

    `kept` are {"title": …, "conversation": …}, as the browser stores them; "endings" are those of the replies.
    """
    lines = []
    for entry in kept:
        chat = checked(entry.get("conversation"))
        replies = [message for message in chat["messages"] if message["role"] == "assistant"]
        for dialogue, reply in zip(dialogues_to_score(chat), replies, strict=True):
            versions = versions_of(reply)
            row = {
                "prompt": with_system_prompt(chat["system_prompt"], dialogue[:-1]),
                # as messages: the edges of a text would be stripped, and its reward would be another
                "replies": [with_reply([], version["content"]) for version in versions],
                "endings": [version["ending"] for version in versions],
                "chat": str(entry.get("title", "")),
            }
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


# -- Changes -----------------------------------------------------------------------------------------------------------


def _with(conversation: Conversation, messages: list[Message]) -> Conversation:
    return {**conversation, "messages": messages}


def ask(conversation: Conversation, text: str) -> Conversation:
    """Add a message from the user; the first one gives an empty conversation its id."""
    identified = {**conversation, "id": conversation["id"] or uuid.uuid4().hex}
    return _with(identified, [*conversation["messages"], {"role": "user", "content": text}])


def answer(conversation: Conversation, replies: Sequence[Sequence[str]]) -> Conversation:
    """Add a reply. `replies` are (content, thinking, ending) of all candidates; the first becomes the reply.

    The versions that a retry has set aside stay among the others.
    """
    earlier = conversation.get("versions", [])
    first_number = 1 + max((version["number"] for version in earlier), default=0)
    written = [
        {"thinking": "", "ending": "", **dict(zip(("content", "thinking", "ending"), reply, strict=False)), "number": n}
        for n, reply in enumerate(replies, first_number)
    ]
    return _with_versions(conversation, [*written, *earlier])


def _with_versions(conversation: Conversation, versions: list[Message]) -> Conversation:
    """Add a reply with all its versions, of which the first is shown."""
    reply = {"role": "assistant", **versions[0], "others": versions[1:]}
    rest = {key: value for key, value in conversation.items() if key != "versions"}
    return _with(rest, [*conversation["messages"], reply])


def versions_of(reply: Message) -> list[Message]:
    """All replies to one prompt, the one shown first."""
    keys = ("content", "thinking", "ending", "number")
    return [{key: reply[key] for key in keys}, *reply["others"]]


def note(conversation: Conversation, text: str) -> Conversation:
    """Add a message from the page."""
    return _with(conversation, [*conversation["messages"], {"role": "note", "content": text}])


def before_last_reply(conversation: Conversation) -> Conversation:
    """Drop what follows the user's last message, so that it can be answered again."""
    messages = conversation["messages"]
    while messages and messages[-1]["role"] != "user":
        messages = messages[:-1]
    return _with(conversation, messages)


def retry(conversation: Conversation) -> Conversation:
    """Set the last reply aside with its other versions, so that another one can be written beside them."""
    earlier = before_last_reply(conversation)
    replaced = conversation["messages"][len(earlier["messages"]) :]
    versions = [version for reply in replaced if reply["role"] == "assistant" for version in versions_of(reply)]
    return {**earlier, "versions": versions}


def settled(conversation: Conversation) -> Conversation:
    """A conversation in which nothing is being written: versions that a retry did not add to are shown again."""
    rest = {key: value for key, value in conversation.items() if key not in ("is_busy", "versions")}
    versions = conversation.get("versions")
    return _with_versions(rest, versions) if versions and not is_answered(conversation) else rest


def is_answered(conversation: Conversation) -> bool:
    return bool(conversation["messages"]) and conversation["messages"][-1]["role"] != "user"


def undo(conversation: Conversation) -> tuple[Conversation, str]:
    """Drop the user's last message and what follows it; returns the rest and the message's text."""
    messages = before_last_reply(conversation)["messages"]
    text = messages[-1]["content"] if messages else ""
    return _with(conversation, messages[:-1]), text


def edit(conversation: Conversation, index: int, text: str) -> Conversation:
    """Replace the user's message at `index` and drop what follows it."""
    return ask(_with(conversation, conversation["messages"][:index]), text)


def pick(conversation: Conversation, number: int) -> Conversation:
    """Show another version of the last reply instead."""
    *earlier, last = conversation["messages"]
    picked = next(version for version in versions_of(last) if version["number"] == number)
    others = sorted((v for v in versions_of(last) if v["number"] != number), key=lambda version: version["number"])
    return _with_versions(_with(conversation, earlier), [picked, *others])


# -- Texts as Gradio's Markdown ----------------------------------------------------------------------------------------

# Characters that no text holds (Unicode's noncharacters). page_head.html takes them out of what the page shows and of
# what is copied, so they hide nothing: a model's text is shown and copied as it was written.
MARK, MATH_START, MATH_END = "\ufdd0", "\ufdd1", "\ufdd2"
FORMULA_MARK = "\t"  # TeX would show the others; after "<", "&" or "!" page_head.html takes this one out too
LATEX_DELIMITERS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": r"\[", "right": r"\]", "display": True},
    {"left": r"\(", "right": r"\)", "display": False},
    {"left": MATH_START, "right": MATH_END, "display": False},
]
# $x$ is a formula, "$5 or $6" is none: no space inside the dollars, no letter or digit outside
DOLLARS = re.compile(r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*[^\s$\\])\$(?![$\w])")
# where a tag, an entity, an image or a diagram would begin, or what looks like a mark was written by the model
ACTIVE = re.compile(r"<(?=[A-Za-z/!?\t])|&(?=[#A-Za-z\t])|!(?=[\[\t])|```(?=mermaid)")


def verbatim(text: str) -> str:
    """A text that Gradio shows character by character."""
    return f'<pre class="raw">\n{html.escape(text, quote=False)}</pre>'


def markdown(text: str) -> str:
    """A reply as Markdown for Gradio: with code, tables and formulas, but without HTML, images and diagrams.

    A mark breaks what would be one of these. Formulas are found in just the way Gradio finds them.
    """
    text = DOLLARS.sub(rf"{MATH_START}\1{MATH_END}", re.sub("[\ufdd0-\ufdd2]", "\ufffd", text))
    formulas: list[str] = []

    def set_aside(match: re.Match[str]) -> str:
        formulas.append(match[0])
        return f"{MARK}{len(formulas) - 1}{MARK}"

    for delimiters in LATEX_DELIMITERS:
        left, right = (re.escape(delimiters[side]) for side in ("left", "right"))
        text = re.sub(rf"{left}[\s\S]+?{right}", set_aside, text)
    text = ACTIVE.sub(rf"\g<0>{MARK}", text)
    while formulas:  # the later ones may hold earlier ones
        formula = ACTIVE.sub(rf"\g<0>{FORMULA_MARK}", formulas[-1])
        text = text.replace(f"{MARK}{len(formulas) - 1}{MARK}", formula)
        formulas.pop()
    return text


# -- As shown on the page ----------------------------------------------------------------------------------------------


def to_chatbot(
    conversation: Conversation, footers: list[str], options: list[tuple[str, int]] = ()
) -> tuple[list[Message], list[int]]:
    """Messages for gr.Chatbot, and for each of them the index of the conversation's message it comes from.

    Replies are Markdown (see `markdown`), everything else is shown character by character. All are content blocks
    because Gradio removes the indentation of plain strings. `footers` are the lines below the replies, in order;
    `options`, (label, number of a version), go below the last reply.
    """
    messages, indices = [], []
    footers_left = iter(footers)

    def add(index: int, **message: Any) -> None:
        messages.append(message)
        indices.append(index)

    def block(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    last = len(conversation["messages"]) - 1
    for index, message in enumerate(conversation["messages"]):
        content = [block((markdown if message["role"] == "assistant" else verbatim)(message["content"]))]
        if message["role"] == "user":
            add(index, role="user", content=content)
        elif message["role"] == "note":
            add(index, role="assistant", content=content, metadata={"title": "no reply"})
        else:
            if message["thinking"]:
                metadata = {"title": "Thinking", "status": "done" if message["content"] else "pending"}
                add(index, role="assistant", content=[block(verbatim(message["thinking"]))], metadata=metadata)
            if footer := next(footers_left, ""):
                content.append(block(f'<small class="footer">{html.escape(footer, quote=False)}</small>'))
            choices = [{"label": label, "value": str(which)} for label, which in options] if index == last else []
            add(index, role="assistant", content=content, options=choices)
    return messages, indices


def rank_of(index: int, rewards: list[float]) -> int:
    """1 for the highest reward; equal rewards share the better rank."""
    return 1 + sum(reward > rewards[index] for reward in rewards)


def ordinal(number: int) -> str:
    """1 -> '1st', 12 -> '12th'."""
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ORDINAL_SUFFIXES.get(number % 10, 'th')}"


def percent(probability: float) -> str:
    """A probability that is below 1 is never shown as 100 %."""
    if 0.005 <= probability < 0.995:
        return f"{probability:.0%}"
    return "over 99%" if probability > 0.5 else "under 1%"


def footer(rewards: list[float] | None, ending: str = "", below: float | None = None) -> str:
    """The line below a reply: its reward, how it stands among all replies to its prompt, and whether it is whole.

    `rewards` are those of its versions, its own first; None without a reward model. `below` is the share of held-out
    replies, to other prompts, with a lower reward.
    """
    parts = [f"reward {rewards[0]:+.3f}"] if rewards else []
    if rewards and below is not None:
        parts.append(f"higher than {percent(below)} of held-out replies")
    if rewards and len(rewards) > 1:
        rank = rank_of(0, rewards)
        # Bradley & Terry (1952): P(1 is preferred to 2) = sigmoid(r_1 - r_2)
        p = 1 / (1 + math.exp(min(max(rewards[1:]) - rewards[0], 700)))
        rival = "the runner-up" if rank == 1 else "the best"
        parts += [f"{ordinal(rank)} of {len(rewards)} replies to this prompt", f"P(better than {rival}) = {percent(p)}"]
    return " · ".join([*parts, *filter(None, [ENDINGS.get(ending)])])


def version_options(versions: list[Message], rewards: list[float] | None) -> list[tuple[str, int]]:
    """Labels for all versions with their numbers, the best first; the first of `versions` is the one shown."""
    order = sorted(range(len(versions)), key=lambda at: (-rewards[at] if rewards else 0, versions[at]["number"]))
    options = []
    for at in order:
        rank = f"{ordinal(rank_of(at, rewards))} of {len(rewards)}, {rewards[at]:+.3f}" if rewards else ""
        notes = [rank, "shown" if at == 0 else "", versions[at]["ending"] and ENDINGS[versions[at]["ending"]]]
        label = ", ".join(filter(None, notes))
        text = shortened(versions[at]["content"], 60)
        options.append((f"{label}: {text}" if label else text, versions[at]["number"]))
    return options
