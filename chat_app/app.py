"""The page as a whole: status, tabs, the choice of models, and the same for programs over the API."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from chat_app.chat_tab import AT_ONCE, ChatTab
from chat_app.compare_tab import CompareTab, asked
from chat_app.engine import Settings, Stage
from chat_app.model_list import NOBODY

SECONDS_BETWEEN_LOOKS = 10
# The theme's lighter greys are hard to read on white.
STYLE = """
.gradio-container { --body-text-color-subdued: #52525b; --block-info-text-color: #52525b; }
.dark .gradio-container { --body-text-color-subdued: #a1a1aa; --block-info-text-color: #a1a1aa; }
#status { font-size: var(--text-sm); }
#status dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1em; margin: 0; }
#status dd { margin: 0; overflow-wrap: anywhere; }
#status dt, small.footer { opacity: .8; }
small.footer { display: block; margin-top: .4em; }
#chat { min-height: 20em; }
#chat .message-markdown-disabled .md { white-space: pre-wrap; }
#chat .options { justify-content: start; margin-left: 0; }  /* candidates are the model's */
footer .divider:last-child { display: none; }
#verdict { font-size: var(--text-lg); }
"""


def build_page(stage: Stage, votes_file: Path) -> gr.Blocks:
    with gr.Blocks(title="rl-with-rm", fill_height=True, analytics_enabled=False) as page:
        status = gr.HTML(elem_id="status")
        with gr.Tabs():
            with gr.Tab("Chat"):
                chat = ChatTab(stage, page)
            with gr.Tab("Compare"):
                CompareTab(stage, votes_file, chat)
            with gr.Tab("Models") as models_tab:
                build_models_tab(stage, page, models_tab, status)
        page.load(lambda: status_list(stage), None, status, **AT_ONCE)
        add_api(stage)
    return page


def status_list(stage: Stage) -> str:
    lines = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in stage.status())
    return f"<dl>{lines}</dl>"


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def build_models_tab(stage: Stage, page: gr.Blocks, tab: gr.Tab, status: gr.HTML) -> None:
    talker = gr.Dropdown(label="Talks", elem_id="talker", info="a policy; of a reward checkpoint, its base model")
    scorer = gr.Dropdown(
        label="Scores", elem_id="scorer", info="a reward model; the newest and the best of a run are marked"
    )
    load = gr.Button("Load", variant="primary", elem_id="load")
    problem = gr.HTML(elem_id="load-problem")

    def refresh() -> list[gr.Dropdown]:
        current = stage.talker, stage.scorer
        return [
            gr.Dropdown([(choice.label, choice.name) for choice in offered], value=name)
            for offered, name in zip(stage.choices(), current, strict=True)
        ]

    def press_load(chosen_talker: str, chosen_scorer: str | None) -> list[Any]:
        said = ""
        try:
            stage.load(chosen_talker, chosen_scorer or NOBODY)
        except Exception as error:  # whatever it is, the visitor must hear of it, and what was loaded stays
            stays = "What was loaded before stays as it was." if stage.policy else "Nothing is loaded."
            said = f"<p>{stays}</p><pre>{html.escape(stage.explain(error))}</pre>"
        return [status_list(stage), said, *refresh()]

    for event in (page.load, tab.select):
        event(refresh, None, [talker, scorer], **AT_ONCE)
    shown = [status, problem, talker, scorer]
    load.click(press_load, [talker, scorer], shown, show_progress="minimal", api_visibility="private")
    # others may have loaded something since
    gr.Timer(SECONDS_BETWEEN_LOOKS).tick(lambda: status_list(stage), None, status, **AT_ONCE)


# ---------------------------------------------------------------------------------------------------------------------
# The same for programs
# ---------------------------------------------------------------------------------------------------------------------


def add_api(stage: Stage) -> None:
    def said_plainly(error: Exception) -> gr.Error:
        return gr.Error(stage.explain(error), print_exception=False)  # a program wants no HTML

    def chat(
        message: str,
        history: list[dict[str, str]] | None = None,
        system_prompt: str = "",
        temperature: float = 0.7,
        top_p: float = 0.9,
        max_new_tokens: int = 512,
        thinking: bool = False,
        candidates: int = 1,
    ) -> Iterator[str]:
        """Reply to a message after a history of {"role", "content"} messages; streams the reply so far.

        With `candidates` above 1 so many replies are written at once, and the last piece is the one with the highest
        reward.
        """
        try:
            if not isinstance(message, str) or not message.strip():
                raise ValueError("the message is empty, or no text")
            dialogue = [*checked_dialogue(history or []), {"role": "user", "content": message}]
            settings = Settings(system_prompt, temperature, top_p, max_new_tokens, thinking, candidates)
            replies = []
            for replies in stage.write(dialogue, settings):
                yield replies[0].content
            if candidates > 1:
                yield stage.ranked(dialogue, replies, system_prompt)[0][0].content
        except Exception as error:
            raise said_plainly(error) from error

    def score(messages: list[dict[str, str]]) -> float:
        """The reward of a dialogue: a list of {"role", "content"} messages that ends in a reply."""
        try:
            dialogue = checked_dialogue(messages)
            if not dialogue or dialogue[-1]["role"] != "assistant" or not dialogue[-1]["content"].strip():
                raise ValueError("a reward is of a reply: the last message must be the assistant's, and not empty")
            return stage.rewards_of([dialogue])[0]
        except Exception as error:  # the caller must hear what it is, and the server lives on
            raise said_plainly(error) from error

    def compare(prompt: str, reply_a: str, reply_b: str) -> dict[str, Any]:
        """Two replies to a prompt (a question or a transcript): "reward_a", "reward_b", "p_a", "tokens_a", "tokens_b".

        `p_a` is the probability that A is preferred, sigmoid(reward_a - reward_b); `tokens_…` are pairs of a token's
        text and the reward after it.
        """
        try:
            if not all(isinstance(text, str) for text in (prompt, reply_a, reply_b)):
                raise ValueError("wants three texts: prompt, reply_a, reply_b")
            return stage.compare(asked("", prompt), (reply_a, reply_b))
        except Exception as error:
            raise said_plainly(error) from error

    gr.api(chat, api_name="chat", concurrency_id="writing", concurrency_limit=1)
    gr.api(score, api_name="score", concurrency_limit=2)
    gr.api(compare, api_name="compare", concurrency_limit=2)


def checked_dialogue(messages: Any) -> list[dict[str, str]]:
    """A list of messages as it came over the API; ValueError if it is none. Content may come as Gradio's blocks."""
    wanted = 'wants a list of {"role": "user" or "assistant" or "system", "content": text}'
    if not isinstance(messages, list):
        raise ValueError(f"{wanted}, got {type(messages).__name__}")
    dialogue = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
            raise ValueError(f"{wanted}, got {str(message)[:80]}")
        content = message.get("content")
        blocks = content if isinstance(content, list) else [content]
        texts = [block.get("text") if isinstance(block, dict) else block for block in blocks]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{wanted}, got the content {str(content)[:80]}")
        dialogue.append({"role": message["role"], "content": "".join(texts)})
    return dialogue
