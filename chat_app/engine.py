"""The loaded policy and reward model, and the operations that the page offers on them.

Independent of the page: texts and message lists in, texts and numbers out. What a visitor can fix is a ValueError.
"""

import contextlib
import json
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

import models
import utils
from chat_app import model_list
from chat_app.conversation import CUT, STOPPED, with_reply, with_system_prompt
from checkpointing import resolve
from common import hub
from data_pipeline.messages import Messages
from modeling import devices

MAX_CANDIDATES = 16
MAX_CACHED_REWARDS = 4096
SECONDS_BETWEEN_UPDATES = 0.03  # a tiny model generates faster than a page can show
THINK, END_OF_THINKING = "<think>", "</think>"


@dataclass(frozen=True)
class Settings:
    """How to generate a reply."""

    system_prompt: str = ""
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    thinking: bool = False
    candidates: int = 1

    def check(self) -> None:
        """Raise ValueError if a setting is bad, with its name, its value and the allowed values."""
        limits = [
            ("temperature", self.temperature, float, 0, 2),
            ("top-p", self.top_p, float, 0.05, 1),
            ("max new tokens", self.max_new_tokens, int, 1, 1_000_000),
            ("candidates", self.candidates, int, 1, MAX_CANDIDATES),
        ]
        for name, value, kind, low, high in limits:
            is_number = type(value) in (int, float) and (kind is float or value % 1 == 0)
            if not is_number or not low <= value <= high:
                what = "a whole number from " if kind is int else ""
                raise ValueError(f"{name}: got {value!r}, expected {what}{low} to {high:,}")
        if not isinstance(self.system_prompt, str) or not isinstance(self.thinking, bool):
            raise ValueError("system prompt must be text, and thinking must be true or false")
        if self.candidates > 1 and self.temperature == 0:
            raise ValueError("several replies at temperature 0 would all be the same: raise the temperature")


class Reply(NamedTuple):
    """A generated reply, the thinking before it, and why it is not whole: STOPPED, CUT or ""."""

    content: str
    thinking: str = ""
    ending: str = ""

    @classmethod
    def of(cls, text: str, may_think: bool, ending: str = "") -> Self:
        """Split a generated text, finished or still growing. Some chat templates already end in `THINK`."""
        if text.startswith(THINK) or (may_think and END_OF_THINKING in text):
            thinking, _, content = text.removeprefix(THINK).partition(END_OF_THINKING)
            return cls(content.lstrip("\n"), thinking.strip(), ending)
        return cls("" if may_think and THINK.startswith(text) else text, ending=ending)


class ChatEngine:
    """`policy` and `reward_model` are None until they are loaded; the page also works without a reward model."""

    def __init__(
        self, policy_name: str, reward_model_folder: Path | None = None, output_dir: Path = Path(), debug: bool = False
    ):
        self.policy_name = str(Path(policy_name).resolve()) if hub.looks_like_a_path(policy_name) else policy_name
        self.reward_model_name = str(reward_model_folder.resolve()) if reward_model_folder else model_list.NONE
        self.from_flags = self.policy_name, reward_model_folder  # always offered
        self.output_dir, self.debug = output_dir, debug
        self.policy: models.PolicyModel | None = None
        self.reward_model: models.RewardModel | None = None
        self._held_out: list[float] = []  # percentiles of rewards, if the reward model's checkpoint has a report
        self._rewards: OrderedDict[str, float] = OrderedDict()  # a cache: each turn needs those of all earlier ones
        self._second_policy: tuple[str, models.PolicyModel] | None = None
        self._stamps = "", ""  # of the two folders' content when they were loaded
        self._loading = threading.Lock()  # two visitors may press Load at once

    # -- Loading -------------------------------------------------------------------------------------------------------

    def choices(self) -> tuple[dict[str, str], dict[str, str]]:
        """(policies, reward models) that can be loaded, each as {name: label}."""
        return model_list.list_models(self.output_dir, *self.from_flags)

    def load(self, policy_name: str | None = None, reward_model_name: str | None = None) -> None:
        """Load the named models; None keeps the current choice. If loading fails, the old models stay loaded.

        A reply that is being generated keeps its model until it ends; then that model's memory is freed.
        """
        with self._loading:
            reward_model_name = self.reward_model_name if reward_model_name is None else reward_model_name
            names = policy_name or self.policy_name, reward_model_name
            for name, offered in zip(names, self.choices(), strict=True):
                check_offered(name, offered)
            device = devices.pick_device()
            stamps = model_list.stamp(names[0]), model_list.stamp(names[1])
            policy, reward_model, rewards = self.policy, self.reward_model, self._rewards
            held_out = self._held_out
            if reward_model is None or (names[1], stamps[1]) != (self.reward_model_name, self._stamps[1]):
                reward_model, rewards, held_out = None, OrderedDict(), []
                if names[1] != model_list.NONE:
                    checkpoint = resolve.sound_checkpoint(names[1])
                    reward_model = models.RewardModel.restore(checkpoint).to(device).eval()
                    held_out = held_out_percentiles(checkpoint)
            if policy is None or (names[0], stamps[0]) != (self.policy_name, self._stamps[0]):
                policy = self._open_policy(names[0], device)
            self.policy, self.reward_model, self._rewards = policy, reward_model, rewards
            self._held_out = held_out
            (self.policy_name, self.reward_model_name), self._stamps = names, stamps
            devices.free(device)

    def second_policy(self, name: str) -> models.PolicyModel:
        """Another policy beside the loaded one. It stays in memory until a different one is requested."""
        with self._loading:
            check_offered(name, self.choices()[0])
            if self._second_policy is None or self._second_policy[0] != name:
                self._second_policy = None  # frees the old one's memory first
                self._second_policy = name, self._open_policy(name, devices.pick_device())
            return self._second_policy[1]

    @staticmethod
    def _open_policy(name: str, device: torch.device) -> models.PolicyModel:
        if hub.looks_like_a_path(name):
            policy = models.PolicyModel.restore(resolve.sound_checkpoint(name))
        else:
            try:
                policy = models.PolicyModel.create(name)
            except utils.DiskOrNetworkError as error:
                advice = "choose a model of this machine under Models, or restart with --model FOLDER or --demo"
                raise utils.DiskOrNetworkError(error.what, where=name, found=error.found, next=advice) from error
        # generation does not need fp32 weights; on a CPU, bf16 is slower than fp32 for a single row
        return policy.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()

    def status(self) -> list[tuple[str, str]]:
        """What is loaded, as (name, value) pairs; what to do if no policy is."""
        if self.policy is None:
            policy = ("policy", f"{utils.seen_from_here(self.policy_name)}, not loaded yet: press Load")
            return [policy, ("reward model", utils.seen_from_here(self.reward_model_name) or "none")]
        policies, reward_models = self.choices()
        policy = f"{policies.get(self.policy_name, self.policy_name)} · {_described(self.policy)}"
        reward_model = "none: choose one under Models, or start with --reward_model"
        if self.reward_model is not None:
            name = reward_models.get(self.reward_model_name, self.reward_model_name)
            reward_model = f"{name} · {_described(self.reward_model)}"
        memory = f"{devices.in_use_gib(self.policy.device):.2f} GiB in use on {self.policy.device.type}"
        return [("policy", policy), ("reward model", reward_model), ("memory", memory)]

    def explain(self, error: Exception) -> str:
        """An error as text for the visitor. With --debug, its traceback is printed to the terminal."""
        if self.debug:
            traceback.print_exception(error)
        if utils.is_out_of_memory(error):
            return "out of memory: try a shorter dialogue, fewer candidates or a smaller model"
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    # -- Generating ----------------------------------------------------------------------------------------------------

    def check(self, dialogue: Messages, settings: Settings, policy: models.PolicyModel | None = None) -> None:
        """Raise ValueError with the reason if a dialogue cannot be answered."""
        settings.check()
        policy = policy or self.policy
        if policy is None:
            raise ValueError("no model is loaded yet: press Load")
        if not dialogue or dialogue[-1]["role"] != "user":
            raise ValueError("there is nothing to reply to")
        messages = with_system_prompt(settings.system_prompt, dialogue)
        check_length(messages, policy, settings.max_new_tokens)

    def generate(
        self,
        dialogue: Messages,
        settings: Settings,
        policy: models.PolicyModel | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[list[Reply]]:
        """Generate `settings.candidates` replies in one batch; yields their texts so far, several times a second.

        All but the last are marked as stopped, which they are if nobody goes on. Setting `stop` ends the generation at
        the next token; then the replies may be empty. Raises ValueError if the dialogue cannot be answered; errors of
        the generation are raised too.
        """
        policy = policy or self.policy  # loading another one in the meantime must not affect this reply
        self.check(dialogue, settings, policy)
        assert policy is not None
        texts = [""] * int(settings.candidates)
        are_whole: list[bool] = []
        stop = stop or threading.Event()

        def stream() -> Iterator[list[str]]:
            are_whole[:] = yield from policy.stream_candidates(
                with_system_prompt(settings.system_prompt, dialogue), int(settings.candidates),
                max_new_tokens=int(settings.max_new_tokens), enable_thinking=settings.thinking,
                temperature=settings.temperature, top_p=settings.top_p, stop=stop,
            )  # fmt: skip

        last_update = 0.0
        for pieces in stream():
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            if any(pieces) and time.monotonic() - last_update > SECONDS_BETWEEN_UPDATES:
                last_update = time.monotonic()
                yield [Reply.of(text, settings.thinking, STOPPED) for text in texts]
        was_stopped = stop.is_set() and not all(are_whole)
        ending = STOPPED if was_stopped else CUT
        replies = [
            Reply.of(text, settings.thinking, "" if is_whole else ending)
            for text, is_whole in zip(texts, are_whole, strict=True)
        ]
        if not was_stopped and not any(reply.content.strip() for reply in replies):
            if any(reply.thinking for reply in replies):
                raise ValueError("the model was still thinking when it reached max new tokens: raise max new tokens")
            raise ValueError("the model ended its reply without a word")
        yield replies

    def rank(
        self, dialogue: Messages, replies: list[Reply], system_prompt: str = ""
    ) -> list[tuple[Reply, float | None]]:
        """The replies that are not empty with their rewards, best first; without a reward model (reply, None)."""
        replies = [reply for reply in replies if reply.content.strip()]
        if self.reward_model is None:
            return [(reply, None) for reply in replies]
        prompt = with_system_prompt(system_prompt, dialogue)
        rewards = self.rewards_of([with_reply(prompt, reply.content) for reply in replies])
        return sorted(zip(replies, rewards, strict=True), key=lambda pair: -pair[1])

    # -- Scoring -------------------------------------------------------------------------------------------------------

    def rewards_of(self, dialogues: list[Messages]) -> list[float]:
        """The rewards of dialogues that each end in a reply. The latest ones are cached."""
        model, cache = self.reward_model, self._rewards  # loading another one in the meantime must not mix them
        if model is None:
            raise ValueError("no reward model is loaded")
        keys = [json.dumps(dialogue) for dialogue in dialogues]
        missing = {key: dialogue for key, dialogue in zip(keys, dialogues, strict=True) if key not in cache}
        for dialogue in missing.values():
            check_length(dialogue, model)
        computed = dict(zip(missing, model.score_dialogues(list(missing.values())), strict=True)) if missing else {}
        rewards = [computed[key] if key in computed else cache[key] for key in keys]
        cache.update(computed)
        while len(cache) > MAX_CACHED_REWARDS:
            cache.popitem(last=False)
        return rewards

    def share_below(self, reward: float) -> float | None:
        """The share of held-out replies with a lower reward; None if the reward model's checkpoint has no report."""
        known = self._held_out
        return float(np.interp(reward, known, np.linspace(0, 1, len(known)))) if known else None

    def compare(self, prompt: Messages, replies: tuple[str, str]) -> dict[str, Any]:
        """Two replies to a prompt: rewards, P(A preferred) = sigmoid(r_A - r_B) (Bradley & Terry 1952), and the reward
        after each token: {"reward_a", "reward_b", "p_a", "tokens_a": [[text, reward], ...], "tokens_b"}."""
        if not prompt:
            raise ValueError("the prompt is empty")
        for letter, reply in zip("AB", replies, strict=True):
            if not reply.strip():
                raise ValueError(f"reply {letter} is empty")
        dialogues = [with_reply(prompt, reply) for reply in replies]
        reward_a, reward_b = self.rewards_of(dialogues)
        p_a = torch.sigmoid(torch.tensor(reward_a - reward_b, dtype=torch.float64)).item()
        result = {"reward_a": reward_a, "reward_b": reward_b, "p_a": p_a}
        model = self.reward_model
        for letter, dialogue in zip("ab", dialogues, strict=True):
            result[f"tokens_{letter}"] = []
            with contextlib.suppress(ValueError):  # not every model has rewards token by token, at every length
                result[f"tokens_{letter}"] = [list(pair) for pair in zip(*model.token_rewards(dialogue), strict=True)]
        return result


def check_offered(name: str, offered: dict[str, str]) -> None:
    if name not in offered:
        raise ValueError(f"{Path(name).name} is not on offer here (any more): choose from the list")


def _described(model: models.PretrainedModel) -> str:
    weights = model.hf_model
    precision = str(weights.dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
    return f"{weights.num_parameters():,} parameters, {precision} on {model.device.type}"


def check_length(dialogue: Messages, model: models.PretrainedModel, new_tokens: int = 0) -> None:
    """Raise ValueError if a dialogue with that many new tokens is longer than the model allows."""
    limit, tokenizer = model.most_positions(), model.tokenizer
    text = tokenizer.apply_chat_template(
        dialogue, tokenize=False, add_generation_prompt=new_tokens > 0, enable_thinking=False
    )
    # without offsets, which take half of the time, because only the number of tokens is needed
    tokens = len(tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])
    if limit is not None and tokens + new_tokens > limit:
        new = f" and up to {new_tokens:,} new ones make {tokens + new_tokens:,}" if new_tokens else ""
        raise ValueError(f"too long: {tokens:,} tokens so far{new}; the model's limit is {limit:,}")


def held_out_percentiles(checkpoint: Path) -> list[float]:
    """The 0th to 100th percentile of the rewards in a checkpoint's report; empty without one that has them."""
    path = checkpoint.parent / "reports" / checkpoint.name / "report.json"
    try:
        found = utils.read_json(path)["reward_percentiles"]
        values = [float(value) for value in found]
    except (OSError, ValueError, TypeError, KeyError):  # no report, an earlier version's, or a damaged one
        return []
    return values if values == sorted(values) and np.isfinite(values).all() else []
