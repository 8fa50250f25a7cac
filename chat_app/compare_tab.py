"""The Compare tab: two replies to one prompt, the visitor's vote, and which one the reward model prefers."""

import functools
import html
import itertools
import shlex
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pandas

from chat_app import conversation, votes
from chat_app.conversation import Conversation
from chat_app.engine import ChatEngine, Settings
from chat_app.events import AT_ONCE, GENERATION, QUIET, errors_shown
from data_pipeline.messages import Messages

SAME_POLICY = "the loaded policy"
END = "■"  # the end of a reply, where its reward is read
CAVEAT = f"""
<p>How the reward changes over each word: <mark class="up">blue</mark> raises it, <mark class="down">orange</mark>
lowers it, {END} is the end of the reply. <b>Only the reward at the end was trained.</b> What the model says in the
middle of a reply is a by-product: take the colours as hints, not as reasons.</p>
"""
CopiedPrompt = tuple[str, Messages]  # a prompt copied from the chat: its text and its messages


class CompareTab:
    """The tab's components and what each click does. The chat's `settings`, system prompt first, apply here too."""

    def __init__(self, engine: ChatEngine, votes_file: Path, chat: gr.State, settings: list[gr.components.Component]):
        self.engine, self.votes_file = engine, votes_file
        system_prompt = settings[0]
        prompt = gr.Textbox(
            label="Prompt", lines=3, max_lines=12, elem_id="prompt",
            info='a question, or a dialogue "Human: … Assistant: … Human: …" with an empty line before each turn',
        )  # fmt: skip
        with gr.Row():
            policy_b = gr.Dropdown([SAME_POLICY], label="Reply B is written by", elem_id="policy-b", scale=2)
            with gr.Column(min_width=200):
                write = gr.Button("Write both", size="md", elem_id="write-both")
                stop = gr.Button("Stop", size="md", variant="stop", visible=False, elem_id="stop-writing")
                from_chat = gr.Button("Copy the chat's last reply", size="md", elem_id="from-chat")
        system_prompt_note = gr.HTML(visible=False)
        with gr.Row():
            replies = [
                gr.Textbox(label=f"Reply {letter}", lines=5, max_lines=16, elem_id=f"reply-{letter}", min_width=280)
                for letter in "AB"
            ]
        with gr.Row(elem_classes="votes"):
            buttons = {vote: gr.Button(label, size="md", elem_id=f"vote-{vote}") for vote, label in votes.VOTES.items()}
        compare = gr.Button("Compare", variant="primary", elem_id="compare")
        saved = gr.HTML(elem_id="saved")
        verdict = gr.HTML(elem_id="verdict")
        with gr.Accordion("Reward word by word", open=False, elem_id="by-word"):
            gr.HTML(CAVEAT)
            with gr.Row():
                texts = [gr.HTML(elem_id=f"words-{letter}", min_width=280) for letter in "AB"]
            plot = gr.LinePlot(
                x="word", y="reward", color="reply", tooltip=["text", "reward", "reply"], height=260, visible=False,
                title="Reward after each word", elem_id="growth",
            )  # fmt: skip
        last_vote, copied = gr.State(), gr.State()

        inputs = [system_prompt, copied, prompt, *replies]
        results = [saved, verdict, plot, *texts]
        comparison = {"fn": self.show_comparison, "inputs": inputs, "outputs": results[1:], **QUIET}
        compare.click(**comparison)
        from_chat.click(self.copy_from_chat, chat, [copied, prompt, *replies], **AT_ONCE)
        changes = [prompt.input, *(reply.input for reply in replies), from_chat.click]
        gr.on(changes, no_results, None, results, **AT_ONCE)
        system_prompt.change(note_on, system_prompt, system_prompt_note, **AT_ONCE)

        # no votes while the replies are being written
        controls = [write, stop, *buttons.values()]
        started = write.click(lambda: [*no_results(), *set_controls(True)], None, [*results, *controls], **AT_ONCE)
        inputs_of_writing = [copied, prompt, policy_b, *settings]
        writing = started.then(self.write_both, inputs_of_writing, replies, show_progress="minimal", **GENERATION)
        writing.success(**comparison)
        stopped = stop.click(None, None, None, cancels=[writing], **QUIET)
        for end in (writing, stopped):
            end.then(lambda: set_controls(False), None, controls, **AT_ONCE)
        policy_b.focus(self.list_policies, policy_b, policy_b, **AT_ONCE)
        for vote, button in buttons.items():
            button.click(functools.partial(self.vote, vote), [last_vote, *inputs], [saved, last_vote], **QUIET)

    def copy_from_chat(self, chat: Conversation) -> list[Any]:
        """The chat's last prompt, its reply as A, and as B the best of the other candidates, if there are any."""
        dialogue = conversation.dialogue(chat)
        with errors_shown(self.engine):
            if not dialogue or dialogue[-1]["role"] != "assistant":
                raise ValueError("the chat has no reply yet")
        others = chat["messages"][-1].get("others") or [{"content": ""}]
        text = conversation.transcript(dialogue[:-1])
        return [(text, dialogue[:-1]), text, dialogue[-1]["content"], others[0]["content"]]

    def list_policies(self, chosen: str) -> gr.Dropdown:
        policies, _ = self.engine.choices()
        return gr.Dropdown([SAME_POLICY, *((label, name) for name, label in policies.items())], value=chosen)

    def write_both(self, copied: CopiedPrompt | None, prompt: str, policy_b: str, *values: Any) -> Iterator[list[str]]:
        """Write both replies: in one batch if one policy writes both, otherwise one after the other."""
        with errors_shown(self.engine):
            dialogue = conversation.prompt_messages(prompt, copied)
            if policy_b in (SAME_POLICY, self.engine.policy_name):
                for replies in self.engine.generate(dialogue, replace(Settings(*values), candidates=2)):
                    yield [reply.content for reply in replies]
                return
            settings = replace(Settings(*values), candidates=1)
            for (reply_a,) in self.engine.generate(dialogue, settings):
                yield [reply_a.content, ""]
            for (reply_b,) in self.engine.generate(dialogue, settings, self.engine.second_policy(policy_b)):
                yield [reply_a.content, reply_b.content]

    def show_comparison(self, system_prompt: str, copied: CopiedPrompt | None, prompt: str, *replies: str) -> list[Any]:
        """New values for the verdict, the plot and the two coloured texts."""
        with errors_shown(self.engine):
            messages = conversation.prompt_messages(prompt, copied)
            found = self.engine.compare(conversation.with_system_prompt(system_prompt, messages), replies)
        words = [reward_by_word(found[f"tokens_{letter}"], reply) for letter, reply in zip("ab", replies, strict=True)]
        return [verdict_of(found), reward_plot(words), *map(coloured, "AB", words)]

    def vote(
        self, vote: str, last_vote: Any, system_prompt: str, copied: CopiedPrompt | None, prompt: str, *replies: str
    ) -> list[Any]:
        """Append a vote to the file, unless it repeats the last one."""
        values = [vote, system_prompt, prompt, *replies]
        with errors_shown(self.engine):
            if values == last_vote:
                raise ValueError("this vote is saved already")
            messages = conversation.prompt_messages(prompt, copied)
            row = votes.row_of(conversation.with_system_prompt(system_prompt, messages), *replies, vote)
            count = votes.append(self.votes_file, row)
        name, quoted = (html.escape(text) for text in (str(self.votes_file), shlex.quote(str(self.votes_file))))
        message = f"“{votes.VOTES[vote]}” is saved as row {count:,} of {name}. "
        return [f"{message}Train on it: <code>python train_rm.py --dataset {quoted}</code>", values]


def set_controls(is_busy: bool) -> list[gr.Button]:
    """New states for Write both, Stop and the votes."""
    vote_buttons = [gr.Button(interactive=not is_busy) for _ in votes.VOTES]
    return [gr.Button(visible=not is_busy), gr.Button(visible=is_busy), *vote_buttons]


def no_results() -> list[Any]:
    """Values for the note on the vote and for what a comparison shows, until the current texts are compared."""
    return ["", "", gr.LinePlot(visible=False), "", ""]


def note_on(system_prompt: str) -> gr.HTML:
    text = html.escape(system_prompt.strip())
    note = f"The chat's system prompt applies here too, and is saved with votes: <i>{text}</i>"
    return gr.HTML(note, visible=bool(text))


def verdict_of(found: dict[str, Any]) -> str:
    """Which reply the reward model prefers, then the two rewards."""
    rewards = f"reward of A {found['reward_a']:+.3f} · of B {found['reward_b']:+.3f}"
    if found["p_a"] == 0.5:
        return f"<b>The reward model sees no difference</b><br>{rewards}"
    letter, p = ("A", found["p_a"]) if found["p_a"] > 0.5 else ("B", 1 - found["p_a"])
    percent = f"{p:.1%}" if p < 0.9995 else "over 99.9%"  # a probability below 1 is never shown as 100 %
    return f"<b>The reward model prefers {letter}</b> with probability <b>{percent}</b><br>{rewards}"


def reward_by_word(tokens: list[list[Any]], reply: str) -> list[tuple[str, float]]:
    """The words of a reply, each with the space before it and the reward after it.

    Words smooth what the tokens say: the change of the reward over a word is the sum of the changes at its tokens. What
    the chat template puts behind the reply is one word, END. Where a language has no spaces, each token is a word.
    """
    text = "".join(piece for piece, _ in tokens)
    length = len(reply if text.startswith(reply) else reply.strip())
    words: list[tuple[str, float]] = []
    position = 0
    for piece, reward in tokens:
        is_end = position >= length and bool(words)
        piece_shown = END if is_end else piece[: length - position]
        position += len(piece)
        before = words[-1][0] if words else ""
        if words and (before == END if is_end else continues(before, piece_shown)):
            words[-1] = (before if is_end else before + piece_shown, reward)
        else:
            words.append((piece_shown, reward))
    return words


def continues(before: str, piece: str) -> bool:
    """Whether a piece of a reply belongs to the word before it."""
    if not before or not piece:
        return True  # of the tokens of one character, only one has a text
    is_wide = unicodedata.east_asian_width(piece[0]) in "WF"
    return not (piece[0].isspace() or before[-1].isspace() or is_wide)


def reward_plot(words: list[list[tuple[str, float]]]) -> gr.LinePlot:
    """The reward after each word of both replies; hidden for architectures that give no rewards before the end."""
    points = [
        (number, reward, letter, text.strip())
        for letter, its_words in zip("AB", words, strict=True)
        for number, (text, reward) in enumerate(its_words, 1)
    ]
    table = pandas.DataFrame(points, columns=["word", "reward", "reply", "text"])
    return gr.LinePlot(table, visible=bool(points))


def coloured(letter: str, words: list[tuple[str, float]]) -> str:
    """A reply whose words are coloured by how much the reward changes over them; the largest change is the strongest.

    The first word has no reward before it and stays plain. The end does not count as the largest change: at many
    models it would leave the words pale.
    """
    if not words:
        return f"<p>{letter}: this model has no reward before the end of a reply.</p>"
    changes = [after - before for (_, before), (_, after) in itertools.pairwise(words)]
    largest = max((abs(c) for c, (text, _) in zip(changes, words[1:], strict=True) if text != END), default=0.0) or 1.0
    pieces = [html.escape(words[0][0])]
    for change, (text, _) in zip(changes, words[1:], strict=True):
        side, share = "up" if change > 0 else "down", min(1.0, abs(change) / largest)
        pieces.append(
            f'<mark class="{side}" style="--share: {share:.2f}" title="{change:+.3f}">{html.escape(text)}</mark>'
        )
    return (
        f'<div class="label">{letter}, {words[-1][1]:+.3f} at its end</div><div class="words">{"".join(pieces)}</div>'
    )
