"""Who is on stage: the model that talks, the reward model that scores, and everything that may be asked of them.

Nothing here knows the page: text and message lists in, text and numbers out. A problem that a visitor can understand is
a ValueError.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from chat_app import model_list
from checkpointing import resolve
from common import hub
from data_pipeline.parsing import Messages

if TYPE_CHECKING:
    import torch

    import models
    from modeling import devices, generation
else:  # loaded when first used, so that --help answers at once
    devices, models, generation, torch = map(
        utils.lazy_import, ("modeling.devices", "models", "modeling.generation", "torch")
    )

MOST_CANDIDATES = 16
MOST_REWARDS_KEPT = 4096
SECONDS_BETWEEN_PIECES = 0.03  # a tiny model writes faster than a page can show
THINK, END_OF_THINKING = "<think>", "</think>"


@dataclass(frozen=True)
class Settings:
    """How a reply is to be written."""

    system_prompt: str = ""
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    thinking: bool = False
    candidates: int = 1

    def check(self) -> None:
        """Raise ValueError, naming the setting, what came and what is wanted."""
        limits = [
            ("temperature", self.temperature, float, 0, 2),
            ("top-p", self.top_p, float, 0.05, 1),
            ("max new tokens", self.max_new_tokens, int, 1, 1_000_000),
            ("candidates", self.candidates, int, 1, MOST_CANDIDATES),
        ]
        for name, value, kind, low, high in limits:
            is_number = type(value) in (int, float) and (kind is float or value == int(value))
            if not is_number or not low <= value <= high:
                what = "a whole number from " if kind is int else ""
                raise ValueError(f"{name}: got {value!r}, wants {what}{low} to {high:,}")
        if not isinstance(self.system_prompt, str) or not isinstance(self.thinking, bool):
            raise ValueError("system prompt wants text, and thinking wants true or false")
        if self.candidates > 1 and self.temperature == 0:
            raise ValueError("several replies at temperature 0 would all be the same one: raise the temperature")


@dataclass(frozen=True)
class Reply:
    """What a model wrote: the reply itself, and what it thought before."""

    content: str
    thinking: str = ""

    @classmethod
    def of(cls, text: str, may_think: bool) -> Reply:
        """Split a model's text, finished or still growing; a template may have opened the thinking already."""
        if text.startswith(THINK) or (may_think and END_OF_THINKING in text):
            thinking, _, content = text.removeprefix(THINK).partition(END_OF_THINKING)
            return cls(content.lstrip("\n"), thinking.strip())
        return cls("" if may_think and THINK.startswith(text) else text)


class Stage:
    """The models, once loaded, and what the page may ask of them."""

    def __init__(self, talker: str, scorer: Path | None = None, output_dir: Path = Path(), debug: bool = False):
        self.talker = str(Path(talker).resolve()) if hub.looks_like_a_path(talker) else talker
        self.scorer = str(scorer.resolve()) if scorer else model_list.NOBODY
        self.named = self.talker, scorer  # what the flags named stays on offer
        self.output_dir, self.debug = output_dir, debug
        self.policy: generation.PolicyModel | None = None
        self.reward: models.RewardModel | None = None
        self._rewards: OrderedDict[str, float] = OrderedDict()  # every turn asks again for those of all earlier ones
        self._guest: tuple[str, generation.PolicyModel] | None = None
        self._stamps = "", ""  # which content the two loaded folders had
        self._loading = threading.Lock()  # two visitors may press the button

    # -- Loading -----------------------------------------------------------------------------------------------------

    def choices(self) -> tuple[list[model_list.Choice], list[model_list.Choice]]:
        """(who may talk, who may score)."""
        return model_list.list_models(self.output_dir, *self.named)

    def load(self, talker: str | None = None, scorer: str | None = None) -> None:
        """Put models on stage: those named, or those that stand ready. A failure leaves the ones before.

        A reply that is being written keeps its model until it ends; then that model's memory is free.
        """
        with self._loading:
            talker = self.talker if talker is None else talker
            scorer = self.scorer if scorer is None else scorer
            for name, offered in zip((talker, scorer), self.choices(), strict=True):
                refuse_unless_offered(name, offered)
            device = models.pick_device()
            new_policy, new_reward = self.policy, self.reward
            stamps = model_list.stamp(talker), model_list.stamp(scorer)
            if self.reward is None or (scorer, stamps[1]) != (self.scorer, self._stamps[1]):
                new_reward = None
                if scorer:
                    new_reward = models.RewardModel.restore(resolve.sound_checkpoint(scorer)).to(device).eval()
            if self.policy is None or (talker, stamps[0]) != (self.talker, self._stamps[0]):
                new_policy = self._open_policy(talker, device)
            if new_reward is not self.reward:
                self._rewards = OrderedDict()
            self.policy, self.reward, self.talker, self.scorer = new_policy, new_reward, talker, scorer
            self._stamps = stamps
            del new_policy, new_reward
            devices.free(device)

    def guest(self, name: str) -> generation.PolicyModel:
        """Another model that writes, beside the one on stage; it stays until the next guest."""
        with self._loading:
            refuse_unless_offered(name, self.choices()[0])
            if self._guest is None or self._guest[0] != name:
                self._guest = None
                self._guest = name, self._open_policy(name, models.pick_device())
            return self._guest[1]

    @staticmethod
    def _open_policy(name: str, device: torch.device) -> generation.PolicyModel:
        if hub.looks_like_a_path(name):
            opened = generation.PolicyModel.restore(resolve.sound_checkpoint(name))
        else:
            opened = generation.PolicyModel.create(name)
        # writing needs no fp32 weights; on a CPU bf16 is slower than fp32 for a single row
        return opened.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()

    def status(self) -> list[tuple[str, str]]:
        """What is loaded, as (name, value) pairs; without a model, what is missing."""
        if self.policy is None:
            return [("talks", f"{self.talker}, not loaded yet: press Load")]
        talkers, scorers = ({choice.name: choice.label for choice in offered} for offered in self.choices())
        lines = [("talks", f"{talkers.get(self.talker, self.talker)} · {_described(self.policy)}")]
        if self.reward is None:
            lines.append(("scores", "nobody: choose a reward model, or start with --reward_model"))
        else:
            lines.append(("scores", f"{scorers.get(self.scorer, self.scorer)} · {_described(self.reward)}"))
        device = self.policy.device
        lines.append(("memory", f"{devices.in_use_gib(device):.2f} GiB in use on {device.type}"))
        return lines

    def explain(self, error: Exception) -> str:
        """An error in words for the visitor; the terminal gets the traceback with --debug."""
        if self.debug:
            traceback.print_exception(error)
        if utils.is_out_of_memory(error):
            return "out of memory: a shorter dialogue, fewer candidates or a smaller model would fit"
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    # -- Writing -----------------------------------------------------------------------------------------------------

    def refuse(self, dialogue: Messages, settings: Settings, writer: generation.PolicyModel | None = None) -> None:
        """Raise ValueError, saying why, for what cannot be answered."""
        settings.check()
        writer = writer or self.policy
        if writer is None:
            raise ValueError("no model is loaded yet: choose one under Models and press Load")
        if not dialogue or dialogue[-1]["role"] != "user":
            raise ValueError("there is nothing to reply to")
        whole = dialogue_with(settings.system_prompt, dialogue)
        refuse_too_long(whole, writer.tokenizer, writer.language_model.config, settings.max_new_tokens)

    def write(
        self, dialogue: Messages, settings: Settings, writer: generation.PolicyModel | None = None
    ) -> Iterator[list[Reply]]:
        """Write the next reply, `settings.candidates` of them in one batch: all of them so far, again and again.

        Raises ValueError for what cannot be answered; whatever goes wrong in the generation is raised too.
        """
        writer = writer or self.policy  # a switch in the meantime does not take it away
        self.refuse(dialogue, settings, writer)
        assert writer is not None
        dialogue = dialogue_with(settings.system_prompt, dialogue)
        texts = [""] * int(settings.candidates)
        last_shown = 0.0
        for pieces in writer.stream_candidates(
            dialogue,
            int(settings.candidates),
            int(settings.max_new_tokens),
            settings.temperature,
            settings.top_p,
            settings.thinking,
        ):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            if any(pieces) and time.monotonic() - last_shown > SECONDS_BETWEEN_PIECES:
                last_shown = time.monotonic()
                yield [Reply.of(text, settings.thinking) for text in texts]
        replies = [Reply.of(text, settings.thinking) for text in texts]
        if not any(reply.content.strip() for reply in replies):
            thought = any(reply.thinking for reply in replies)
            raise ValueError(
                "the length ran out while the model was thinking: raise max new tokens"
                if thought
                else "the model ended its reply before it said anything"
            )
        yield replies

    def ranked(
        self, dialogue: Messages, replies: list[Reply], system_prompt: str = ""
    ) -> list[tuple[Reply, float | None]]:
        """Replies with their rewards, best first; as they came, without rewards, if nobody scores."""
        said = [reply for reply in replies if reply.content.strip()]
        if self.reward is None:
            return [(reply, None) for reply in said]
        start = dialogue_with(system_prompt, dialogue)
        dialogues = [[*start, {"role": "assistant", "content": reply.content}] for reply in said]
        scored = zip(said, self.rewards_of(dialogues), strict=True)
        return sorted(scored, key=lambda pair: -pair[1])

    # -- Scoring -----------------------------------------------------------------------------------------------------

    def rewards_of(self, dialogues: list[Messages]) -> list[float]:
        """The rewards of whole dialogues, each ending in a reply; what was scored before is remembered."""
        scorer, known = self.reward, self._rewards  # a switch in the meantime changes neither
        if scorer is None:
            raise ValueError("no reward model is loaded")
        keys = [json.dumps(dialogue) for dialogue in dialogues]
        missing = {key: dialogue for key, dialogue in zip(keys, dialogues, strict=True) if key not in known}
        for dialogue in missing.values():
            refuse_too_long(dialogue, scorer.tokenizer, scorer.classifier.config)
        found = dict(zip(missing, scorer.score_dialogues(list(missing.values())), strict=True)) if missing else {}
        rewards = [found[key] if key in found else known[key] for key in keys]
        known.update(found)
        while len(known) > MOST_REWARDS_KEPT:
            known.popitem(last=False)
        return rewards

    def compare(self, prompt: Messages, replies: tuple[str, str]) -> dict[str, Any]:
        """Two replies to a prompt: rewards, P(A preferred) = sigmoid(r_A - r_B) (Bradley & Terry 1952), and the reward
        after each token: {"reward_a", "reward_b", "p_a", "tokens_a": [[text, reward], ...], "tokens_b"}."""
        if not prompt:
            raise ValueError("the prompt is empty")
        for letter, reply in zip("AB", replies, strict=True):
            if not reply.strip():
                raise ValueError(f"reply {letter} is empty")
        dialogues = [[*prompt, {"role": "assistant", "content": reply}] for reply in replies]
        reward_a, reward_b = self.rewards_of(dialogues)
        p_a = torch.sigmoid(torch.tensor(reward_a - reward_b, dtype=torch.float64)).item()
        result = {"reward_a": reward_a, "reward_b": reward_b, "p_a": p_a}
        scorer = self.reward
        for letter, dialogue in zip("ab", dialogues, strict=True):
            tokens = zip(*scorer.token_rewards(dialogue), strict=True) if scorer and scorer.can_pack else []
            result[f"tokens_{letter}"] = [list(pair) for pair in tokens]
        return result


def refuse_unless_offered(name: str, offered: list[model_list.Choice]) -> None:
    if name not in [choice.name for choice in offered]:
        raise ValueError(f"{Path(name).name} is not on offer here, or not any more: choose from the list")


def _described(model: Any) -> str:
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    precision = str(parameters[0].dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
    return f"{count:,} parameters, {precision} on {parameters[0].device.type}"


def dialogue_with(system_prompt: str, dialogue: Messages) -> Messages:
    """A dialogue behind its system prompt, if there is one."""
    prompt = system_prompt.strip()
    return [{"role": "system", "content": prompt}, *dialogue] if prompt else dialogue


def refuse_too_long(dialogue: Messages, tokenizer: Any, model_config: Any, new_tokens: int = 0) -> None:
    """Raise ValueError if a dialogue and the reply to come do not fit the positions that a model knows."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    text = tokenizer.apply_chat_template(
        dialogue, tokenize=False, add_generation_prompt=new_tokens > 0, enable_thinking=False
    )
    # the tokens are only counted: a megabyte takes half the time without the lists and offsets that come with them
    tokens = len(tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])
    if limit is not None and tokens + new_tokens > limit:
        new = f" and up to {new_tokens:,} new ones make {tokens + new_tokens:,}" if new_tokens else ""
        raise ValueError(f"too long: {tokens:,} tokens so far{new}; the model's limit is {limit:,}")
