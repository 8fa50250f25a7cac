"""What a policy training opens beside the policy and its prompts: judges and the reference, by names that stay.

`config` is train_grpo.py's.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import models
from checkpointing import resolve
from common import hub
from data_pipeline.tokenization import tokenize_groups
from modeling import fused, scorer, speedups
from utils import UserError

PROMPTS_TO_COMPARE = 1000  # for how many tokens of one tokenizer are one of another


def with_fixed_models(config: Any, resumed_from: Path | None) -> Any:
    """A run's folder stands for its newest step now, and not for what is trained there later."""
    if resumed_from and hub.looks_like_a_path(config.model) and not Path(config.model).exists():
        raise UserError(
            "the policy that this run began from is missing, and its replies are compared with that policy's",
            where=config.model, safe="the checkpoints are untouched",
            next="put it back, or --model its new place, with --allow_data_change",
        )  # fmt: skip
    names = {name: getattr(config, name) for name in ("model", "reward_model", "gold_reward_model")}
    local = {name: path for name, path in names.items() if path and Path(path).exists()}
    fixed = {name: str(resolve.sound_checkpoint(path)) for name, path in local.items()}
    return dataclasses.replace(config, **fixed, max_length=config.prompt_max_length + config.max_new_tokens)


def open_judges(config: Any) -> dict[str, Any]:
    """The reward model that is trained against, and the one that only judges if there is one, each in a Scorer."""
    judges = {}
    for name, given in (("reward_model", config.reward_model), ("gold_reward_model", config.gold_reward_model)):
        if given:
            folder = resolve.find_model(given, f"--{name}")
            stored = resolve.training_settings(folder).get("max_length")
            longest = stored if isinstance(stored, int) else scorer.ScoringConfig.max_length
            needed = config.prompt_max_length + config.max_new_tokens
            judges[name] = scorer.Scorer(
                models.RewardModel.restore(folder), scorer.ScoringConfig(max_length=max(longest, 2 * needed))
            )
    return judges


def check_positions(judges: dict[str, Any], config: Any, parts: Any) -> None:
    """Raise UserError if a judge has too few positions for a prompt with its completion, by the judge's own tokenizer.

    What a policy will write is not known: its tokens are taken to become as many there as those of the prompts do.
    """
    needed = config.prompt_max_length + config.max_new_tokens
    prompts = [*parts.train_data.prompts, *parts.eval_data.prompts]
    tools = [*parts.train_data.tools, *parts.eval_data.tools]
    texts = [prompt[-1]["content"] for prompt in prompts[:PROMPTS_TO_COMPARE]]
    for name, judge in judges.items():
        limit, tokenizer = judge.model.most_positions(), judge.model.tokenizer
        if limit is None or limit >= 2 * needed:
            continue
        dialogues = [[[*prompt, {"role": "assistant", "content": "."}]] for prompt in prompts]
        groups = tokenize_groups(dialogues, tokenizer, sys.maxsize, tools)
        longest = max((len(group.ids[0]) for group in groups if not isinstance(group, str)), default=0)
        written, read = _count_tokens(texts, parts.model.tokenizer), _count_tokens(texts, tokenizer)
        reply = round(config.max_new_tokens * read / max(written, 1))
        if longest + reply > limit:
            raise UserError(
                f"--{name} has {limit:,} positions, too few for the longest prompt with a completion",
                where=getattr(config, name),
                found=f"{longest:,} tokens of its tokenizer, and about {reply:,} for {config.max_new_tokens:,} of the "
                "policy's",
                safe="nothing was trained", next="a smaller --prompt_max_length or --max_new_tokens",
            )  # fmt: skip


def _count_tokens(texts: list[str], tokenizer: Any) -> int:
    return sum(len(each.ids) for each in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))


def open_reference(run: Any) -> Any:
    """The policy before its first step, frozen; None where it is the policy without its adapters."""
    if run.config.lora:
        return None
    reference = models.PolicyModel.create(run.config.model, tokenizer=run.model.tokenizer)
    reference.requires_grad_(False)
    reference.to(run.model.device).eval()
    reference.autocast_dtype, reference.temperature = run.model.autocast_dtype, run.model.temperature
    reference.use_attention(run.config.attention, backward=False)
    speedups.narrow_last_layer(reference)
    if reference.device.type == "cpu":
        fused.fuse_layers(reference)
    return reference
