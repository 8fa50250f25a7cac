"""One side of `bench/grpo_against_trl.py`: steps of train_grpo.py, or of TRL's `GRPOTrainer`, timed by phase.

Both write completions of exactly `new` tokens, as nothing ends them, and score them with the same reward model.
"""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path
from typing import Any

import harness

PHASES = ("generation", "scoring", "reference", "update")


class Phases:
    """Seconds of each phase of a step; what is in none belongs to the update."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.read = {"wall": time.perf_counter, "processor": time.process_time}

    def timed(self, phase: str, function: Any, clock: str) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            before = self.read[clock]()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[phase] += self.read[clock]() - before

        return call

    def take(self, total: float) -> dict[str, float]:
        """The phases of a step that took `total` seconds."""
        found = dict(self.seconds)
        found["update"] = total - sum(found.values())
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return found


def ours(channel: harness.Channel, settings: dict[str, Any]) -> None:
    import numpy as np
    import torch

    import train_grpo
    from common import flags
    from grpo import opening, rollouts
    from modeling import tokenizers
    from training import distributed, setup
    from utils import StopRequest

    tokenizers.end_ids = lambda name, tokenizer: {10**9}  # nothing ends a completion
    chosen = {
        "model": settings["base"], "reward_model": settings["reward_model"], "dataset": settings["dataset"],
        "batch_size": settings["prompts"], "group_size": settings["group"], "max_new_tokens": settings["new"],
        "truncated": "keep", "output_dir": str(Path(settings["work"]) / "runs"), "run_name": "ours",
        "log_dir": str(Path(settings["work"]) / "logs"), "precision": settings["precision"], "bad_rows": "skip",
        "prompt_max_length": 256, "save_rollouts": False,
    }  # fmt: skip
    config = flags.build_config(train_grpo.PolicyTrainingConfig, chosen, [])
    judges = opening.open_judges(config)
    with contextlib.redirect_stdout(None):
        run = setup.set_up(config, None, distributed.World(), train_grpo.open_policy, "train_grpo.py")
    phases, clock, stop = Phases(), settings["clock"], StopRequest()
    rollouts.sample_groups = phases.timed("generation", rollouts.sample_groups, clock)
    rollouts.score = phases.timed("scoring", rollouts.score, clock)
    writer = rollouts.Writer(
        run.model, judges["reward_model"], run.train_data, run.world, seed=0, max_new_tokens=config.max_new_tokens,
        ends={10**9}, keys_at_once=config.generation_tokens,
    )  # fmt: skip
    policy = train_grpo.Policy(writer, opening.open_reference(run))
    policy.reference_logprobs = phases.timed("reference", policy.reference_logprobs, clock)
    parameters = list(run.model.trained_parameters().values())
    order = np.concatenate([run.sampler.indices_for(step) for step in range(1, settings["steps"] + 2)])
    channel.answer(prompts=[run.train_data.prompts[index] for index in order.tolist()])
    step = 0
    while channel.receive()["do"] != "end":
        step += 1
        before = phases.read[clock]()
        found = writer.write(run.sampler.indices_for(step), config.group_size, step, lambda: None)
        train_grpo.learn(run, policy, found, step, stop)
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        run.complete_step(step, is_finite=True)
        seconds = phases.read[clock]() - before
        channel.answer(
            seconds=seconds, phases=phases.take(seconds), tokens=int(found.lengths.sum()),
            peak_gib=harness.peak_gib(run.model.device),
        )  # fmt: skip
    run.lock.release()
    channel.answer()


def trls(channel: harness.Channel, settings: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from modeling import devices

    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32)
    model.generation_config.eos_token_id = None
    reward = AutoModelForSequenceClassification.from_pretrained(
        settings["reward_model"], num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
    )
    phases, clock = Phases(), settings["clock"]
    completions = settings["prompts"] * settings["group"]
    config = GRPOConfig(
        output_dir=str(Path(settings["work"]) / "trl"), per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=completions // settings["batch_size"], num_generations=settings["group"],
        max_completion_length=settings["new"], beta=0.05, bf16=settings["precision"] == "bf16", learning_rate=1e-6,
        gradient_checkpointing=False, use_cpu=True, lr_scheduler_type="constant", report_to="none", save_strategy="no",
        logging_steps=500, disable_tqdm=True, seed=0, shuffle_dataset=False, temperature=1.0, num_train_epochs=1,
        chat_template_kwargs={"enable_thinking": False}, dataloader_pin_memory=False, loss_type="dapo",
    )  # fmt: skip

    class InTurn(TrainerCallback):
        """After each step, answers and waits for the next message."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds = phases.read[clock]() - self.before
            channel.answer(
                seconds=seconds, phases=phases.take(seconds), tokens=completions * settings["new"],
                peak_gib=harness.peak_gib(torch.device("cpu")),
            )  # fmt: skip
            if channel.receive()["do"] == "end":
                control.should_training_stop = True
            self.before = phases.read[clock]()

    turn = InTurn()
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, reward_processing_classes=tokenizer, args=config, callbacks=[turn],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in settings["asked"]]),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer._generate_single_turn = phases.timed("generation", trainer._generate_single_turn, clock)
    trainer._calculate_rewards = phases.timed("scoring", trainer._calculate_rewards, clock)
    plain = trainer._get_per_token_logps_and_entropies
    reference = phases.timed("reference", plain, clock)
    trainer._get_per_token_logps_and_entropies = lambda *arguments, **options: (
        plain if torch.is_grad_enabled() else reference
    )(*arguments, **options)
    devices.keep_heap(torch.device("cpu"))  # as the project does
    channel.answer()
    channel.receive()
    turn.before = phases.read[clock]()
    trainer.train()
    channel.answer()


def main() -> None:
    channel = harness.Channel()
    settings = channel.receive()
    {"ours": ours, "TRL": trls}[settings["job"]](channel, settings)


if __name__ == "__main__":
    main()
