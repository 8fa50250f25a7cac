"""The page: status, tabs and the choice of models; and an API that offers the same to programs."""

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from chat_app import conversation, model_list
from chat_app.chat_tab import ChatTab, load_button
from chat_app.compare_tab import CompareTab
from chat_app.engine import ChatEngine, Settings
from chat_app.events import AT_ONCE, errors_shown
from chat_app.rollouts_tab import RolloutsTab
from data_pipeline.messages import Messages

SECONDS_BETWEEN_STATUS_UPDATES = 10


def build_page(engine: ChatEngine, votes_file: Path, policy_dir: Path) -> gr.Blocks:
    with gr.Blocks(title="rl-with-rm", fill_height=True, analytics_enabled=False) as page:
        with gr.Row():
            status = gr.HTML(elem_id="status")
            switch = gr.Button("Switch models", size="sm", scale=0, min_width=140, elem_id="switch-models")
        with gr.Tabs() as tabs:
            with gr.Tab("Chat") as chat_tab:
                chat = ChatTab(engine, page)
            with gr.Tab("Compare") as compare_tab:
                CompareTab(engine, votes_file, compare_tab, chat.conversation, chat.settings)
            with gr.Tab("Rollouts") as rollouts_tab:
                RolloutsTab(engine, rollouts_tab, policy_dir)
            with gr.Tab("Models", id="models") as models_tab:
                build_models_tab(engine, page, models_tab, status)
        timer = gr.Timer(SECONDS_BETWEEN_STATUS_UPDATES)  # another visitor may load other models
        for event in (page.load, timer.tick, chat_tab.select, chat.loaded.then):
            event(lambda: [status_list(engine), gr.Button(**load_button(engine))], None, [status, chat.load], **AT_ONCE)
        switch.click(lambda: gr.Tabs(selected="models"), None, tabs, **AT_ONCE)
        add_api(engine)
    return page


def status_list(engine: ChatEngine) -> str:
    lines = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in engine.status())
    return f"<dl>{lines}</dl>"


def build_models_tab(engine: ChatEngine, page: gr.Blocks, tab: gr.Tab, status: gr.HTML) -> None:
    info = "writes the replies; the base models of your reward models are listed too"
    policy = gr.Dropdown(label="Policy", elem_id="policy", info=info)
    info = "scores the replies; each run's newest and best checkpoint are marked"
    reward_model = gr.Dropdown(label="Reward model", elem_id="reward-model", info=info)
    load = gr.Button("Load", variant="primary", elem_id="load")
    problem = gr.HTML(elem_id="load-problem")

    def refresh() -> list[gr.Dropdown]:
        loaded = engine.policy_name, engine.reward_model_name
        return [
            gr.Dropdown([(label, name) for name, label in offered.items()], value=chosen)
            for offered, chosen in zip(engine.choices(), loaded, strict=True)
        ]

    def load_chosen(policy_name: str, reward_model_name: str | None) -> list[Any]:
        message = ""
        try:
            engine.load(policy_name, reward_model_name or model_list.NONE)
        except Exception as error:  # shown on the page, whatever it is
            remaining = "The previous models are still loaded." if engine.policy else "No model is loaded."
            message = f"<p>{remaining}</p><pre>{html.escape(engine.explain(error))}</pre>"
        return [status_list(engine), message, *refresh()]

    gr.on([page.load, tab.select], refresh, None, [policy, reward_model], **AT_ONCE)
    outputs = [status, problem, policy, reward_model]
    load.click(load_chosen, [policy, reward_model], outputs, show_progress="minimal", api_visibility="private")


# -- API ---------------------------------------------------------------------------------------------------------------


def add_api(engine: ChatEngine) -> None:
    """The endpoints /chat, /score and /compare. Their docstrings are the API's documentation on the page."""

    def chat(
        message: str,
        history: list[dict[str, str]] | None = None,
        system_prompt: str = "",
        temperature: float = Settings.temperature,
        top_p: float = Settings.top_p,
        max_new_tokens: int = Settings.max_new_tokens,
        thinking: bool = Settings.thinking,
        candidates: int = Settings.candidates,
    ) -> Iterator[str]:
        """Reply to a message after a history of {"role", "content"} messages; streams the reply so far.

        With `candidates` above 1, that many replies are generated at once, and the last text is the reply with the
        highest reward.
        """
        with errors_shown(engine, as_html=False):
            if not isinstance(message, str) or not message.strip():
                raise ValueError("the message is empty, or no text")
            dialogue = [*checked_dialogue(history or []), {"role": "user", "content": message}]
            settings = Settings(system_prompt, temperature, top_p, max_new_tokens, thinking, candidates)
            for replies in engine.generate(dialogue, settings):
                yield replies[0].content
            if candidates > 1:
                yield engine.rank(dialogue, replies, system_prompt)[0][0].content

    def score(messages: list[dict[str, str]]) -> float:
        """The reward of a dialogue: a list of {"role", "content"} messages, the last of which is a reply."""
        with errors_shown(engine, as_html=False):
            dialogue = checked_dialogue(messages)
            if not dialogue or dialogue[-1]["role"] != "assistant" or not dialogue[-1]["content"].strip():
                raise ValueError("only a reply has a reward: the last message must be the assistant's, and not empty")
            return engine.rewards_of([dialogue])[0]

    def compare(prompt: str, reply_a: str, reply_b: str) -> dict[str, Any]:
        """Compare two replies to a prompt, which is a question or a transcript.

        Returns "reward_a", "reward_b"; "p_a", the probability that A is preferred, sigmoid(reward_a - reward_b); and
        "tokens_a", "tokens_b": [text, reward after it] of each of the reply's tokens.
        """
        with errors_shown(engine, as_html=False):
            if not all(isinstance(text, str) for text in (prompt, reply_a, reply_b)):
                raise ValueError("expected three texts: prompt, reply_a, reply_b")
            return engine.compare(conversation.prompt_messages(prompt), (reply_a, reply_b))

    gr.api(chat, api_name="chat", concurrency_id="generation", concurrency_limit=1)
    gr.api(score, api_name="score", concurrency_limit=2)
    gr.api(compare, api_name="compare", concurrency_limit=2)


def checked_dialogue(messages: Any) -> Messages:
    """The messages that a program sent; ValueError if they are not a dialogue. Content may be a list of text blocks."""
    wanted = 'expected a list of {"role": "user" or "assistant" or "system", "content": text}'
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{wanted}, got {str(messages)[:80]}")
    dialogue = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        blocks = content if isinstance(content, list) else [content]
        texts = [block.get("text") if isinstance(block, dict) else block for block in blocks]
        if role not in ("user", "assistant", "system") or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{wanted}, got {str(message)[:80]}")
        dialogue.append({"role": role, "content": "".join(texts)})
    return dialogue
