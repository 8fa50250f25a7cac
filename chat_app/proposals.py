"""Which pairs are worth a vote: those whose rewards are closest.

Where the reward model is sure, a vote tells it little; where it gives both replies the same chance, it tells it most
(in the Bradley-Terry model, a vote's information is p (1 − p)).
"""

import functools
import itertools
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from chat_app.engine import ChatEngine, Reply, Settings
from checkpointing import resolve
from data_pipeline import parsing
from data_pipeline.messages import Messages, is_text
from data_pipeline.sources import DataSpec, find_sources
from utils import UserError

PROMPTS, CANDIDATES = 2, 4  # tried for a proposal; more would find closer pairs and take longer
ROWS_READ = 4000  # of each source: of a file without test split, one in 20 is held out

Scored = tuple[Reply, float]


@functools.lru_cache(maxsize=4)
def training_prompts(reward_model: str) -> list[Messages]:
    """Prompts that the training of a reward model held out, or trained on if it held out none; [] if it names no data.

    Prompts with system turns or tools are left out, because the page's own system prompt applies.
    Raises UserError if the data cannot be read.
    """
    settings = resolve.training_settings(Path(reward_model))
    if not isinstance(settings.get("dataset"), str):
        return []
    names = ("dataset", "subset", "split", "test_split", "columns")
    found = find_sources(DataSpec.of(SimpleNamespace(**{name: settings.get(name) for name in names})))
    for sources in (found.test, found.train):
        prompts = [
            row.pair.chosen[:-1]
            for source in sources
            for row in itertools.islice(parsing.read_pairs(source), ROWS_READ)
            if not isinstance(row.pair, str) and source.includes(*row.digests) and not row.pair.tools
        ]
        prompts = [prompt for prompt in prompts if is_answerable(prompt)]
        if prompts:
            return prompts
    return []


def is_answerable(prompt: Messages) -> bool:
    """Whether a prompt is a plain dialogue that ends in a question."""
    is_plain = all(message["role"] in ("user", "assistant") and is_text(message) for message in prompt)
    return is_plain and bool(prompt) and prompt[-1]["role"] == "user"


def chat_prompts(dialogue: Messages) -> list[Messages]:
    """Each of the user's turns with what came before it."""
    return [dialogue[:end] for end, message in enumerate(dialogue, 1) if message["role"] == "user"]


def prompts_to_try(engine: ChatEngine, chat: Messages, settings: Settings) -> list[Messages]:
    """A few prompts that the loaded policy can answer: of the reward model's own data, else of the visitor's chat."""
    reason = "the reward model does not say what it was trained on"
    try:
        prompts = training_prompts(engine.reward_model_name)
    except UserError as error:  # the data has moved, or cannot be reached
        prompts, reason = [], error.what
    prompts = prompts or chat_prompts(chat)
    if not prompts:
        raise ValueError(f"no prompts to propose: {reason}. Ask something in the chat: its questions are used then")
    fitting: list[Messages] = []
    for prompt in random.sample(prompts, len(prompts)):
        try:
            engine.check(prompt, settings)
        except ValueError as error:  # this one is too long, or none can be answered now
            problem = error
            continue
        fitting.append(prompt)
        if len(fitting) == PROMPTS:
            break
    if not fitting:
        raise problem
    return fitting


def propose(
    engine: ChatEngine, chat: Messages, settings: Settings, stop: threading.Event
) -> Iterator[tuple[str, tuple[Messages, list[Reply]] | None]]:
    """Yield (what is being written, None), at last ("", (prompt, the two replies)); nothing more once `stop` is set.

    Raises ValueError with the reason if there is no pair to propose.
    """
    if engine.reward_model is None:
        raise ValueError("no reward model is loaded to say which replies are close: choose one under Models")
    settings = replace(settings, candidates=max(CANDIDATES, settings.candidates))
    prompts, found = prompts_to_try(engine, chat, settings), []
    for number, prompt in enumerate(prompts, 1):
        yield f"Prompt {number} of {len(prompts)}: writing {settings.candidates} replies …", None
        *_, replies = engine.generate(prompt, settings, stop=stop)
        if stop.is_set():
            return
        if pair := closest_pair(engine.rank(prompt, replies, settings.system_prompt)):
            found.append((pair, prompt))
    if not found:
        raise ValueError("all replies say the same: raise the temperature, or press Next pair again")
    (_, *replies), prompt = min(found, key=lambda one: one[0][0])
    yield "", (prompt, replies)


def closest_pair(scored: list[Scored]) -> tuple[float, Reply, Reply] | None:
    """(difference of the rewards, two replies) of the two whose rewards are closest; None if all say the same.

    Replies that differ only in case, punctuation or spaces are the same. Unfinished replies are compared only if fewer
    than two are whole: a vote on them is about where they were cut.
    """
    whole = [(reply, reward) for reply, reward in scored if not reply.ending]
    pairs = [
        (abs(reward_a - reward_b), a, b)
        for (a, reward_a), (b, reward_b) in itertools.combinations(whole if len(whole) > 1 else scored, 2)
        if words(a) != words(b)
    ]
    return min(pairs, key=lambda pair: pair[0], default=None)


def words(reply: Reply) -> str:
    return "".join(filter(str.isalnum, reply.content.casefold()))
