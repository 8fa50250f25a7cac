"""The Compare tab: two replies to one prompt, the visitor's vote, and which one the reward model prefers."""

import contextlib
import functools
import html
import itertools
import random
import shlex
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pandas

import utils
from chat_app import conversation, proposals, votes
from chat_app.conversation import Conversation, with_reply
from chat_app.engine import ChatEngine, Reply, Settings
from chat_app.events import AT_ONCE, GENERATION, QUIET, errors_shown
from data_pipeline.messages import Messages

SAME_POLICY = "the loaded policy"
END = "■"  # the end of a reply, where its reward is read
CAVEAT = f"""
<p>How the reward changes over each word: <mark class="up">green</mark> raises it, <mark class="down">pink</mark>
lowers it, {END} is the end of the reply. <b>Only the reward at the end was trained.</b> What the model says in the
middle of a reply is a by-product: take the colours as hints, not as reasons.</p>
"""
BLIND_INFO = "sides are drawn at random; who wrote which, rewards and verdict come after the vote"
CopiedPrompt = tuple[str, Messages]  # a prompt copied from the chat, or proposed: its text and its messages
# {"sides": [{"text", "written_by", "ending"}, …] of A and B, "swapped": whether they changed places}; None if typed
Pair = dict[str, Any] | None


class CompareTab:
    """The tab's components and what each click does. The chat's `settings`, system prompt first, apply here too.

    While the page is blind, who wrote which reply, the rewards and the verdict are shown after the vote only.
    """

    def __init__(
        self, engine: ChatEngine, votes_file: Path, tab: gr.Tab, chat: gr.State,
        settings: list[gr.components.Component],
    ):  # fmt: skip
        self.engine, self.votes_file = engine, votes_file
        self.stops: dict[str | None, threading.Event] = {}  # by session: ends what the models write for it
        system_prompt = settings[0]
        prompt = gr.Textbox(
            label="Prompt", lines=3, max_lines=12, elem_id="prompt",
            info='a question, or a dialogue "Human: … Assistant: … Human: …" with an empty line before each turn',
        )  # fmt: skip
        with gr.Row():
            policy_b = gr.Dropdown([SAME_POLICY], label="The second reply is written by", elem_id="policy-b", scale=2)
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
        with gr.Row(elem_classes="votes"):
            next_pair = gr.Button("Next pair", size="md", variant="primary", elem_id="next-pair")
            compare = gr.Button("Show the verdict", size="md", elem_id="compare")
        blind = gr.Checkbox(True, label="Blind", info=BLIND_INFO, elem_id="blind")
        note = gr.HTML(elem_id="saved")
        verdict = gr.HTML(elem_id="verdict")
        agreement = gr.HTML(elem_id="agreement")
        with gr.Accordion("Reward word by word", open=False, elem_id="by-word"):
            gr.HTML(CAVEAT)
            with gr.Row():
                texts = []
                for letter in "AB":
                    with gr.Column(min_width=280):  # below one another on a phone
                        texts.append(gr.HTML(elem_id=f"words-{letter}"))
            plot = gr.LinePlot(
                x="word", y="reward", color="reply", tooltip=["text", "reward", "reply"], height=260, visible=False,
                title="Reward after each word", elem_id="growth",
            )  # fmt: skip
        # the last vote and the last comparison, each with its texts; a prompt copied from the chat; see `Pair`
        last_vote, seen, copied, pair = (gr.State() for _ in range(4))

        inputs = [pair, system_prompt, copied, prompt, *replies]
        results = [note, verdict, plot, *texts]
        shown = [verdict, plot, *texts, seen]
        compare.click(self.show_comparison, inputs, shown, **QUIET)
        show_unless_blind = {"fn": self.show_unless_blind, "inputs": [blind, *inputs], "outputs": shown, **QUIET}
        blind.input(**show_unless_blind)
        copying = from_chat.click(self.copy_from_chat, [chat, blind], [copied, prompt, *replies, pair, seen], **AT_ONCE)
        changes = [prompt.input, *(reply.input for reply in replies), from_chat.click]
        gr.on(changes, no_results, None, results, **AT_ONCE)
        copying.success(**show_unless_blind)
        system_prompt.change(note_on, system_prompt, system_prompt_note, **AT_ONCE)

        # no votes while the replies are being written
        controls = [write, stop, next_pair, compare, *buttons.values()]
        for button, function, its_inputs, outputs in (
            (write, self.write_both, [copied, prompt, policy_b, blind], [*replies, pair]),
            (next_pair, self.propose, [chat, blind], [note, copied, prompt, *replies, pair]),
        ):
            started = button.click(self.start, None, [*results, *controls], **AT_ONCE)
            writing = started.then(function, [*its_inputs, *settings], outputs, show_progress="minimal", **GENERATION)
            ended = writing.then(lambda: ["", *set_controls(False)], None, [note, *controls], **AT_ONCE)
            ended.then(**show_unless_blind)
        stop.click(self.stop, None, None, **AT_ONCE)
        tab.select(self.agreement_line, None, agreement, **AT_ONCE)
        policy_b.focus(self.list_policies, policy_b, policy_b, **AT_ONCE)
        for vote, button in buttons.items():
            arguments = [functools.partial(self.vote, vote), [last_vote, seen, *inputs], [note, last_vote, agreement]]
            voted = button.click(*arguments, **QUIET)
            voted.success(self.reveal, inputs, shown, **QUIET)

    # -- Where a pair comes from ---------------------------------------------------------------------------------------

    def copy_from_chat(self, chat: Conversation, is_blind: bool) -> list[Any]:
        """The chat's last prompt, its reply, and the best of that one's other versions, if there are any."""
        dialogue = conversation.dialogue(chat)
        with errors_shown(self.engine):
            if not dialogue or dialogue[-1]["role"] != "assistant":
                raise ValueError("the chat has no reply yet")
        versions = conversation.versions_of(chat["messages"][-1])[:2]
        replies = [Reply(version["content"], ending=version["ending"]) for version in versions]
        is_swapped = len(replies) == 2 and is_blind and random.random() < 0.5
        names = ["the chat's reply", "another version of it"]
        *texts, pair = sides([*replies, Reply("")][:2], names, is_swapped)
        text = conversation.transcript(dialogue[:-1])
        # the chat has shown the rewards
        return [(text, dialogue[:-1]), text, *texts, pair, [chat["system_prompt"], text, *texts]]

    def list_policies(self, chosen: str) -> gr.Dropdown:
        policies, _ = self.engine.choices()
        return gr.Dropdown([SAME_POLICY, *((label, name) for name, label in policies.items())], value=chosen)

    def start(self, request: gr.Request) -> list[Any]:
        self.stops[request.session_hash] = threading.Event()
        return [*no_results(), *set_controls(True)]

    def stop(self, request: gr.Request) -> None:
        if stop := self.stops.get(request.session_hash):
            stop.set()

    @contextlib.contextmanager
    def writing(self, request: gr.Request) -> Iterator[threading.Event]:
        """While models write: what ends it. An error becomes a hint; Gradio would cover the replies with its own."""
        try:
            yield self.stops.setdefault(request.session_hash, threading.Event())
        except Exception as error:
            gr.Warning(html.escape(self.engine.explain(error)), title="Not now")
        finally:
            self.stops.pop(request.session_hash, None)

    def write_both(
        self, copied: CopiedPrompt | None, prompt: str, policy_b: str, is_blind: bool, request: gr.Request, *values: Any
    ) -> Iterator[list[Any]]:
        """Write both replies: in one batch if one policy writes both, otherwise one after the other."""
        yield [gr.skip()] * 3  # where nothing can be written, what is there stays
        with self.writing(request) as stop:
            dialogue = conversation.prompt_messages(prompt, copied)
            is_swapped = is_blind and random.random() < 0.5
            first = self.engine.policy_name
            if policy_b in (SAME_POLICY, first):
                for replies in self.engine.generate(dialogue, replace(Settings(*values), candidates=2), stop=stop):
                    yield sides(replies, [first, first], is_swapped)
                return
            settings, written = replace(Settings(*values), candidates=1), [Reply(""), Reply("")]
            policies = [self.engine.policy, self.engine.second_policy(policy_b)]
            # which one is written first, and how fast it grows, would tell who writes it
            for at in random.sample((0, 1), 2) if is_blind else (0, 1):
                for replies in self.engine.generate(dialogue, settings, policies[at], stop):
                    written[at] = replies[0]
                    if not is_blind:
                        yield sides(written, [first, policy_b], is_swapped)
                if stop.is_set():
                    break
            yield sides(written, [first, policy_b], is_swapped)

    def propose(self, chat: Conversation, is_blind: bool, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Replace the pair by one whose rewards are close; until it is found, what is being written."""
        yield [gr.skip()] * 6
        with self.writing(request) as stop:
            name = self.engine.policy_name
            steps = proposals.propose(self.engine, conversation.dialogue(chat), Settings(*values), stop)
            for message, found in steps:
                if found is None:
                    yield [message, *[gr.skip()] * 5]
                    continue
                dialogue, replies = found
                text = conversation.transcript(dialogue)
                drawn = sides(replies, [name, name], is_blind and random.random() < 0.5)
                yield ["", (text, dialogue), text, *drawn]

    # -- Votes and verdicts --------------------------------------------------------------------------------------------

    def show_comparison(
        self, pair: Pair, system_prompt: str, copied: CopiedPrompt | None, prompt: str, *replies: str
    ) -> list[Any]:
        """New values for the verdict, the plot and the two coloured texts, and what has now been seen."""
        with errors_shown(self.engine):
            messages = conversation.prompt_messages(prompt, copied)
            found = self.engine.compare(conversation.with_system_prompt(system_prompt, messages), replies)
        words = [reward_by_word(found[f"tokens_{letter}"], reply) for letter, reply in zip("ab", replies, strict=True)]
        verdict = verdict_of(found) + self.authors(pair, replies)
        return [verdict, reward_plot(words), *map(coloured, "AB", words), [system_prompt, prompt, *replies]]

    def show_unless_blind(self, is_blind: bool, pair: Pair, *inputs: Any) -> list[Any]:
        """The comparison of a whole pair; nothing while the page is blind or a reply is missing."""
        *_, reply_a, reply_b = inputs
        if is_blind or not (reply_a.strip() and reply_b.strip()):
            return [*no_results()[1:], gr.skip()]
        return self.reveal(pair, *inputs)

    def reveal(self, pair: Pair, *inputs: Any) -> list[Any]:
        """The comparison; without rewards at least who wrote which."""
        if self.engine.reward_model is not None:
            return self.show_comparison(pair, *inputs)
        system_prompt, _, prompt, *replies = inputs
        verdict = "No verdict: no reward model is loaded." + self.authors(pair, replies)
        return [verdict, *no_results()[2:], [system_prompt, prompt, *replies]]

    def authors(self, pair: Pair, replies: Sequence[str]) -> str:
        """A line on who wrote which reply, and on replies that are not whole, as far as the page knows."""
        found = known_sides(pair, replies)
        labels = self.engine.choices()[0]
        names = [labels.get(side["written_by"], side["written_by"]) for side in found]
        parts = [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True) if name]
        if names[0] == names[1] and names[0]:
            parts = [f"both: {names[0]}"]
        parts += [f"{letter} was {conversation.ENDINGS[side['ending']]}"
                  for letter, side in zip("AB", found, strict=True) if side["ending"]]  # fmt: skip
        return f"<br>{html.escape(' · '.join(parts))}" if parts else ""

    def vote(
        self, vote: str, last_vote: Any, seen: Any, pair: Pair, system_prompt: str, copied: CopiedPrompt | None,
        prompt: str, *replies: str,
    ) -> list[Any]:  # fmt: skip
        """Append a vote to the file, unless it repeats the last one."""
        values = [system_prompt, prompt, *replies]
        with errors_shown(self.engine):
            if [vote, *values] == last_vote:
                raise ValueError("this vote is saved already")
            messages = conversation.with_system_prompt(system_prompt, conversation.prompt_messages(prompt, copied))
            row = votes.row_of(messages, *replies, vote)
            rewards, problem = self.rewards(messages, replies)
            shown = [
                {**side, "reward": reward} for side, reward in zip(known_sides(pair, replies), rewards, strict=True)
            ]
            row |= {
                "blind": seen != values,
                "swapped": bool(pair and pair["swapped"]),
                "reward_model": self.engine.reward_model_name if self.engine.reward_model else None,
                "shown": dict(zip("ab", shown, strict=True)),
            }
            count = votes.append(self.votes_file, row)
        name, quoted = (html.escape(text) for text in (str(self.votes_file), shlex.quote(str(self.votes_file))))
        message = f"“{votes.VOTES[vote]}” is saved as row {count:,} of {name}{problem}. "
        train = f"Train on it: <code>python train_rm.py --dataset {quoted}</code>"
        return [message + train, [vote, *values], self.agreement_line()]

    def rewards(self, prompt: Messages, replies: Sequence[str]) -> tuple[list[float | None], str]:
        """The rewards for a vote's row, or why it has none: a vote is worth saving without them too."""
        if self.engine.reward_model is None:
            return [None, None], ""
        try:
            return self.engine.rewards_of([with_reply(prompt, reply) for reply in replies]), ""
        except Exception as error:
            return [None, None], html.escape(f", without rewards ({self.engine.explain(error)})")

    def agreement_line(self) -> str:
        """How often the loaded reward model agreed with the blind votes."""
        if self.engine.reward_model is None:
            return ""
        found = votes.agreement(self.votes_file, self.engine.reward_model_name)
        ties = f"; apart from them {utils.counted(found.ties, 'tie')}" if found.ties else ""
        ties += f"; equal rewards: {found.no_difference:,}" if found.no_difference else ""
        if not found.decided:
            return f"No blind vote for one side yet: how often this reward model agrees is counted here{ties}."
        low, high = utils.wilson_interval(found.agreed, found.decided)
        share = f"<b>{found.agreed / found.decided:.0%}</b> (95% interval {low:.0%} to {high:.0%})"
        decided = utils.counted(found.decided, "blind vote")
        return f"This reward model agreed with {found.agreed:,} of {decided}: {share}{ties}."


def sides(replies: Sequence[Reply], names: Sequence[str], is_swapped: bool) -> list[Any]:
    """The texts of reply A and reply B, and what the page knows of them."""
    both = [
        {"text": reply.content, "written_by": name, "ending": reply.ending}
        for reply, name in zip(replies, names, strict=True)
    ]
    both = both[::-1] if is_swapped else both
    return [*(side["text"] for side in both), {"sides": both, "swapped": is_swapped}]


def known_sides(pair: Pair, replies: Sequence[str]) -> list[dict[str, str | None]]:
    """Who wrote the replies and how they ended; of a reply that was typed or changed, nothing is known."""
    return [
        {key: side[key] if side and side["text"] == reply else None for key in ("written_by", "ending")}
        for side, reply in zip(pair["sides"] if pair else [None, None], replies, strict=True)
    ]


def set_controls(is_busy: bool) -> list[gr.Button]:
    """New states for Write both, Stop, Next pair, the verdict's button and the votes."""
    others = [gr.Button(interactive=not is_busy) for _ in range(2 + len(votes.VOTES))]
    return [gr.Button(visible=not is_busy), gr.Button(visible=is_busy), *others]


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
