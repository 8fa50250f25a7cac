"""The page's comparison: two replies to one prompt, their rewards, the words behind them, and the visitor's vote."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

import conversation as talk
import rows
import votes
from page_chat import AT_ONCE, QUIET, WRITING, ChatTab, reasons
from stage import Settings, Stage, dialogue_with

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
                from_chat = gr.Button("Take the chat's last reply", size="md", elem_id="from-chat")
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

        # the chat's settings hold here too, its system prompt above all
        inputs = [chat.system_prompt, prompt, *replies]
        judged = {"fn": self.judge, "inputs": inputs, "outputs": [verdict, plot, *liked], **QUIET}
        compare.click(**judged)
        from_chat.click(self.take, chat.conversation, [prompt, *replies], **AT_ONCE)
        writing = write.click(
            self.write_both, [prompt, writer_b, *chat.settings], replies, show_progress="minimal", **WRITING
        )
        writing.success(**judged)
        writer_b.focus(self.list_writers, writer_b, writer_b, **AT_ONCE)
        for vote, button in buttons.items():
            button.click(
                lambda *values, vote=vote: self.vote(vote, *values), [last_vote, *inputs], [saved, last_vote], **QUIET
            )

    def take(self, kept: talk.Conversation) -> list[str]:
        """The chat's last prompt, its reply as A, and as B the next best candidate if there were several."""
        dialogue = talk.dialogue(kept)
        if not dialogue or dialogue[-1]["role"] != "assistant":
            raise reasons(self.stage, ValueError("the chat has no reply yet"))
        others = kept["messages"][-1].get("others") or [{"content": ""}]
        return [transcript_of(dialogue[:-1]), dialogue[-1]["content"], others[0]["content"]]

    def list_writers(self, chosen: str) -> gr.Dropdown:
        talkers, _ = self.stage.choices()
        choices = [SAME_WRITER, *((choice.label, choice.name) for choice in talkers)]
        return gr.Dropdown(choices, value=chosen)

    def write_both(self, prompt: str, writer_b: str, *values: Any) -> Iterator[list[str]]:
        """Write both replies, at once if one model does it; with the chat's settings, but always drawn at random."""
        settings = Settings(*values)
        try:
            dialogue = asked("", prompt)
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

    def judge(self, system_prompt: str, prompt: str, reply_a: str, reply_b: str) -> list[Any]:
        """The values of verdict, plot and the two coloured texts."""
        try:
            found = self.stage.compare(asked(system_prompt, prompt), (reply_a, reply_b))
        except Exception as error:
            raise reasons(self.stage, error) from error
        if found["p_a"] == 0.5:
            preferred = "the reward model sees no difference"
        else:
            letter, share = ("A", found["p_a"]) if found["p_a"] > 0.5 else ("B", 1 - found["p_a"])
            preferred = f"the reward model prefers <b>{letter}</b> with probability <b>{share:.1%}</b>"
        verdict = (
            f"reward of A <b>{found['reward_a']:+.3f}</b> · of B <b>{found['reward_b']:+.3f}</b> · {preferred}"
            f" · P(A preferred) = {found['p_a']:.4f}"
        )
        return [verdict, growth_plot(found), *(coloured(found[f"tokens_{letter}"]) for letter in "ab")]

    def vote(self, vote: str, last_vote: Any, system_prompt: str, prompt: str, *replies: str) -> list[Any]:
        """Append a vote to the file; the same vote twice in a row is one."""
        values = [vote, system_prompt, prompt, *replies]
        try:
            if values == last_vote:
                raise ValueError("this vote is saved already")
            count = votes.append(self.votes_file, votes.row_of(asked(system_prompt, prompt), *replies, vote))
        except Exception as error:
            raise reasons(self.stage, error) from error
        name = html.escape(str(self.votes_file))
        return [
            f"“{votes.VOTES[vote]}” is saved, row {count:,} of {name}. "
            f"Train on it: <code>python train_rm.py --dataset {name}</code>",
            values,
        ]


def asked(system_prompt: str, prompt: str) -> list[dict[str, str]]:
    """What the two replies answer, as messages; ValueError if it is nothing."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return dialogue_with(system_prompt, rows.parse_prompt(prompt))


def transcript_of(dialogue: list[dict[str, str]]) -> str:
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
    return [
        (tokens[0][0], None),
        *((text, change / largest) for (text, _), change in zip(tokens[1:], changes, strict=True)),
    ]
