"""TRL's side of a benchmark: `RewardTrainer` on given token ids. As a script, a child process of `harness.Side`.

Its jobs: "train", a step for each message; "evaluate", an evaluation for each; "learn", the whole training, after which
the model is saved.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import harness
import project_worker
from modeling import devices


def write_ids(dataset: Any, indices: Any, path: Path) -> Path:
    """Write the token ids of pairs, in this order, under the names that `RewardTrainer` expects."""
    sides = [dataset.sequences(int(index)) for index in indices]
    rows = {"chosen_ids": [c.tolist() for c, _ in sides], "rejected_ids": [r.tolist() for _, r in sides]}
    path.write_text(json.dumps(rows))
    return path


def side(
    job: str, base: str, ids: str, work: Path, batch_size: int, grad_accum: int = 1, checkpointing: bool = False,
    compiled: bool = False, **others: Any,
) -> harness.Side:  # fmt: skip
    """A child process that works on `ids` in their order, with the project's defaults for shared settings.

    In the project's precision too: what is fast here for training, fp32 for evaluation.
    """
    config, device = project_worker.defaults(), devices.pick_device()
    settings = {
        "job": job, "base": base, "ids": ids, "folder": str(work / f"trl-{batch_size}"), "batch_size": batch_size,
        "grad_accum": grad_accum, "lr": config.lr, "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm, "gradient_checkpointing": checkpointing, "compiled": compiled,
        "precision": "fp32" if job == "evaluate" else devices.fastest_precision(device), "device": device.type,
        "lora": None, "seed": 0,
    }  # fmt: skip
    return harness.Side("trl_worker.py", **settings | others)


def adapters(lora: dict[str, Any] | None) -> Any:
    """PEFT's settings for the project's LoRA flags; None trains every parameter."""
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="SEQ_CLS", r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"],
        target_modules=list(lora["target_modules"]),
    )  # fmt: skip


def main() -> None:
    channel = harness.Channel()
    settings = channel.receive()

    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback, set_seed
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    set_seed(settings["seed"])  # for a head that the files lack
    model = AutoModelForSequenceClassification.from_pretrained(
        settings["base"], num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype="float32"
    )
    rows = Dataset.from_dict(json.loads(Path(settings["ids"]).read_text()))
    computed = {"tokens": 0, "pairs": 0}

    class Counting(DataCollatorForPreference):
        """TRL's collator, which also counts the tokens and pairs given to the model."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            computed["tokens"] += batch["input_ids"].numel()
            computed["pairs"] += len(examples)
            return batch

    times: list[float] = []

    class InTurn(TrainerCallback):
        """After each step, answers and waits for the next message."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if settings["job"] == "learn":
                times.append(clock.read()["seconds"])
                clock.start()
                return
            channel.answer(**clock.read(), peak_gib=harness.peak_gib(device))
            if channel.receive()["do"] == "end":
                control.should_training_stop = True
            clock.start()

    config = RewardConfig(
        output_dir=settings["folder"],
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["grad_accum"],
        per_device_eval_batch_size=settings["batch_size"],
        num_train_epochs=1,
        train_sampling_strategy="sequential",  # the order of the ids is the order of the project's steps
        max_length=None,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        gradient_checkpointing=settings["gradient_checkpointing"],
        bf16=settings["precision"] == "bf16",
        torch_compile=settings["compiled"],
        use_cpu=settings["device"] == "cpu",
        logging_first_step=True,
        logging_steps=1 if settings["job"] == "learn" else 500,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings["seed"],
    )
    is_training = settings["job"] != "evaluate"
    trainer = RewardTrainer(
        model, config, data_collator=Counting(tokenizer.pad_token_id), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, callbacks=[InTurn()] if is_training else [], peft_config=adapters(settings["lora"]),
    )  # fmt: skip
    device = trainer.args.device
    devices.keep_heap(device)  # as the project does
    if device.type != settings["device"]:
        raise SystemExit(f"TRL works on {device}, the project on {settings['device']}")
    clock = harness.Clock(device)
    channel.answer(peak_gib=harness.peak_gib(device), optimizer=str(config.optim))

    message = channel.receive()
    if is_training:
        clock.start()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        saved = {}
        if settings["job"] == "learn":
            trainer.save_model(settings["folder"])
            saved = {"times": times, "peak_gib": harness.peak_gib(device)}
        channel.answer(loss=losses, **saved, **computed)
    else:
        while message["do"] != "end":
            clock.start()
            metrics = trainer.evaluate()
            channel.answer(
                **clock.read(), loss=metrics["eval_loss"], accuracy=metrics["eval_accuracy"],
                peak_gib=harness.peak_gib(device),
            )  # fmt: skip
            message = channel.receive()
        channel.answer(**computed)
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and freeing gigabytes takes time


if __name__ == "__main__":
    main()
