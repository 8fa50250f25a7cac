"""The page's comparison: two replies to one prompt, their rewards, the words behind them, and the visitor's vote."""

from __future__ import annotations

import html
import itertools
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from chat_app import conversation as talk
from chat_app import votes
from chat_app.chat_tab import AT_ONCE, QUIET, WRITING, ChatTab, reasons
from chat_app.engine import Settings, Stage, dialogue_with
from data_pipeline import parsing
from data_pipeline.parsing import Messages

SAME_WRITER = "the model that talks"


class CompareTab:
    """Two replies to one prompt, side by side: their rewards, the words behind them, and the visitor's own vote."""

    def __init__(self, stage: Stage, votes_file: Path, chat: ChatTab):
        self.stage, self.votes_file = stage, votes_file
        prompt = gr.Textbox(
            label="Prompt", lines=3, max_lines=12, elem_id="prompt",
            info='a question, or a dialogue as "Human: … Assistant: … Human: …", with an empty line before each turn',
        )  # fmt: skip
        with gr.Row():
            writer_b = gr.Dropdown(
                [SAME_WRITER], value=SAME_WRITER, label="Reply B is written by", elem_id="writer-b", scale=2
            )
            with gr.Column(min_width=200):
                write = gr.Button("Write both", size="md", elem_id="write-both")
                stop = gr.Button("Stop", size="md", variant="stop", visible=False, elem_id="stop-writing")
                from_chat = gr.Button("Take the chat's last reply", size="md", elem_id="from-chat")
        told = gr.HTML(elem_id="told")
        replies, liked = [], []
        with gr.Row():
            for letter in "AB":
                with gr.Column(min_width=280):
                    replies.append(
                        gr.Textbox(label=f"Reply {letter}", lines=5, max_lines=16, elem_id=f"reply-{letter}")
                    )
                    liked.append(gr.HighlightedText(label=f"Reward of {letter} by token: red raises it, violet lowers"))
        compare = gr.Button("Compare", variant="primary", elem_id="compare")
        verdict = gr.HTML(elem_id="verdict")
        plot = gr.LinePlot(
            x="token", y="reward", color="reply", tooltip=["text", "reward", "reply"], height=260, visible=False,
            title="The reward as each reply grows", elem_id="growth",
        )  # fmt: skip
        with gr.Row(elem_classes="votes"):
            buttons = {vote: gr.Button(label, size="md", elem_id=f"vote-{vote}") for vote, label in votes.VOTES.items()}
        saved = gr.HTML(elem_id="saved")
        last_vote = gr.State()
        taken = gr.State()  # (text, messages) of a prompt that came from the chat, whatever its words look like

        # the chat's settings hold here too, its system prompt above all
        inputs = [chat.system_prompt, taken, prompt, *replies]
        results = [verdict, plot, *liked]
        judged = {"fn": self.judge, "inputs": inputs, "outputs": results, **QUIET}
        compare.click(**judged)
        from_chat.click(self.take, chat.conversation, [taken, prompt, *replies], **AT_ONCE)
        gr.on(
            [prompt.input, *(reply.input for reply in replies), from_chat.click], nothing_yet, None, results, **AT_ONCE
        )
        chat.system_prompt.change(system_prompt_note, chat.system_prompt, told, **AT_ONCE)

        # while both are being written, nobody may vote on half of them
        controls = [write, stop, *buttons.values()]
        begun = write.click(lambda: [*nothing_yet(), *self.controls(True)], None, [*results, *controls], **AT_ONCE)
        writing = begun.then(
            self.write_both, [taken, prompt, writer_b, *chat.settings], replies, show_progress="minimal", **WRITING
        )
        writing.then(lambda: self.controls(False), None, controls, **AT_ONCE)
        writing.success(**judged)
        stop.click(None, None, None, cancels=[writing], **QUIET).then(
            lambda: self.controls(False), None, controls, **AT_ONCE
        )
        writer_b.focus(self.list_writers, writer_b, writer_b, **AT_ONCE)
        for vote, button in buttons.items():
            button.click(
                lambda *values, vote=vote: self.vote(vote, *values), [last_vote, *inputs], [saved, last_vote], **QUIET
            )

    def controls(self, is_busy: bool) -> list[gr.Button]:
        """The values of Write both, Stop and the votes."""
        return [
            gr.Button(visible=not is_busy),
            gr.Button(visible=is_busy),
            *(gr.Button(interactive=not is_busy) for _ in votes.VOTES),
        ]

    def take(self, kept: talk.Conversation) -> list[Any]:
        """The chat's last prompt, its reply as A, and as B the next best candidate if there were several."""
        dialogue = talk.dialogue(kept)
        if not dialogue or dialogue[-1]["role"] != "assistant":
            raise reasons(self.stage, ValueError("the chat has no reply yet"))
        others = kept["messages"][-1].get("others") or [{"content": ""}]
        text = transcript_of(dialogue[:-1])
        return [(text, dialogue[:-1]), text, dialogue[-1]["content"], others[0]["content"]]

    def list_writers(self, chosen: str) -> gr.Dropdown:
        talkers, _ = self.stage.choices()
        choices = [SAME_WRITER, *((choice.label, choice.name) for choice in talkers)]
        return gr.Dropdown(choices, value=chosen)

    def write_both(self, taken: Any, prompt: str, writer_b: str, *values: Any) -> Iterator[list[str]]:
        """Write both replies, at once if one model does it; with the chat's settings, but always drawn at random."""
        settings = Settings(*values)
        try:
            dialogue = asked("", prompt, taken)
            if writer_b in (SAME_WRITER, self.stage.talker):
                for replies in self.stage.write(dialogue, replace(settings, candidates=2)):
                    yield [reply.content for reply in replies]
                return
            first = ""
            for (reply,) in self.stage.write(dialogue, replace(settings, candidates=1)):
                first = reply.content
                yield [first, ""]
            for (reply,) in self.stage.write(dialogue, replace(settings, candidates=1), self.stage.guest(writer_b)):
                yield [first, reply.content]
        except Exception as error:
            raise reasons(self.stage, error) from error

    def judge(self, system_prompt: str, taken: Any, prompt: str, reply_a: str, reply_b: str) -> list[Any]:
        """The values of verdict, plot and the two coloured texts."""
        try:
            found = self.stage.compare(asked(system_prompt, prompt, taken), (reply_a, reply_b))
        except Exception as error:
            raise reasons(self.stage, error) from error
        if found["p_a"] == 0.5:
            preferred = "the reward model sees no difference"
        else:
            letter, share = ("A", found["p_a"]) if found["p_a"] > 0.5 else ("B", 1 - found["p_a"])
            shown = f"{share:.1%}" if share < 0.9995 else "over 99.9%"  # certain it never is
            preferred = f"the reward model prefers <b>{letter}</b> with probability <b>{shown}</b>"
        verdict = (
            f"reward of A <b>{found['reward_a']:+.3f}</b> · of B <b>{found['reward_b']:+.3f}</b> · {preferred}"
            f" · P(A preferred) = {found['p_a']:.3g}"
        )
        return [verdict, growth_plot(found), *(coloured(found[f"tokens_{letter}"]) for letter in "ab")]

    def vote(self, vote: str, last_vote: Any, system_prompt: str, taken: Any, prompt: str, *replies: str) -> list[Any]:
        """Append a vote to the file; the same vote twice in a row is one."""
        values = [vote, system_prompt, prompt, *replies]
        try:
            if values == last_vote:
                raise ValueError("this vote is saved already")
            count = votes.append(self.votes_file, votes.row_of(asked(system_prompt, prompt, taken), *replies, vote))
        except Exception as error:
            raise reasons(self.stage, error) from error
        name, quoted = (html.escape(text) for text in (str(self.votes_file), shlex.quote(str(self.votes_file))))
        return [
            f"“{votes.VOTES[vote]}” is saved, row {count:,} of {name}. "
            f"Train on it: <code>python train_rm.py --dataset {quoted}</code>",
            values,
        ]


def asked(system_prompt: str, prompt: str, taken: tuple[str, Messages] | None = None) -> Messages:
    """What the two replies answer, as messages; ValueError if it is nothing that could be answered.

    A text that was `taken` from the chat stands for the messages that it came from.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    messages = taken[1] if taken and taken[0] == prompt else parsing.parse_prompt(prompt)
    if messages[-1]["role"] != "user":
        raise ValueError('the prompt ends in the assistant\'s turn: the two replies need a "Human:" turn to answer')
    return dialogue_with(system_prompt, list(messages))


def nothing_yet() -> list[Any]:
    """The values of verdict, plot and the two coloured texts before a comparison, or when it is one of other texts."""
    return ["", gr.LinePlot(visible=False), [], []]


def system_prompt_note(system_prompt: str) -> str:
    text = html.escape(system_prompt.strip())
    return f"The chat's system prompt holds here too, and goes into votes: <i>{text}</i>" if text else ""


def transcript_of(dialogue: Messages) -> str:
    """A dialogue as `rows.parse_prompt` reads it back; a single question stays as it is."""
    if len(dialogue) == 1 and dialogue[0]["role"] == "user":
        return dialogue[0]["content"]
    names = {"user": "Human", "assistant": "Assistant"}
    return "\n\n".join(f"{names[message['role']]}: {message['content']}" for message in dialogue)


def growth_plot(found: dict[str, Any]) -> gr.LinePlot:
    """The reward after each token of both replies; hidden where the architecture has none."""
    import pandas

    points = [
        {"token": number, "reward": reward, "reply": letter.upper(), "text": text}
        for letter in "ab"
        for number, (text, reward) in enumerate(found[f"tokens_{letter}"], 1)
    ]
    columns = ["token", "reward", "reply", "text"]
    return gr.LinePlot(pandas.DataFrame(points, columns=columns), visible=bool(points))


def coloured(tokens: list[list[Any]]) -> list[tuple[str, float | None]]:
    """Each token with how much the reward rose or fell at it, from -1 to 1 in shares of the largest change."""
    if len(tokens) < 2:
        return [(text, None) for text, _ in tokens]
    changes = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(tokens)]
    largest = max(map(abs, changes)) or 1.0
    shares = [None, *(change / largest for change in changes)]
    # the later tokens of one character have no text of their own
    return [(text or "·", share) for (text, _), share in zip(tokens, shares, strict=True)]
