"""The project's side of a benchmark: the only file here that knows train_rm.py and what it is made of.

As a script it is a child of `common.Side`. It opens a run as `train_rm.py` does and lets the real loop, evaluation,
logging and saving work, one piece for each message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import common
import numpy as np


def device() -> Any:
    import models

    return models.pick_device()


def load_pairs(dataset: str, base: str) -> tuple[Any, Any]:
    """The train and test pairs as the project tokenises them, cut by nothing but its default --max_length."""
    import data
    import models
    import train_config

    return data.load_pairs(dataset, models.load_tokenizer(base), train_config.TrainConfig().max_length)


def pairs_of_steps(num_pairs: int, pairs_per_step: int, steps: int) -> list[np.ndarray]:
    """Which pairs the first steps of a run take, in their order."""
    import packing
    import train_config

    plan = packing.StepPlan(num_pairs, pairs_per_step, 1, train_config.TrainConfig().seed)
    return [plan.pairs_of(step) for step in range(1, steps + 1)]


def defaults() -> Any:
    import train_config

    return train_config.TrainConfig()


def side(job: str, base: str, dataset: str, work: Path, checkpointing: bool = False, *flags: str) -> common.Side:
    """A child that works on `dataset`, at the project's default settings but for `flags`."""
    switch = "--gradient_checkpointing" if checkpointing else "--no_gradient_checkpointing"
    folders = ["--output_dir", str(work / "out"), "--log_dir", str(work / "logs")]
    return common.Side(
        "ours.py", job=job, flags=["--model", base, "--dataset", dataset, *folders, "--save_steps", "0",
                                   "--eval_steps", "0", switch, *flags],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The child
# ---------------------------------------------------------------------------------------------------------------------


class Ended(Exception):
    """The parent has seen enough."""


def open_run(flags: list[str]) -> Any:
    """A run as `train_rm.py` with these flags has it when its training begins."""
    import runs
    from train_config import read_config

    config, resumed_from = read_config(flags, "")
    run = runs.set_up(config, resumed_from)
    run.begin_record(resumed_from)
    return run


def train(run: Any, channel: common.Channel) -> None:
    """The real loop; at the end of each step it answers and waits for the next message."""
    import train_rm

    clock, seen = common.Clock(run.model.device), run.step

    def at_the_end_of_a_step() -> None:
        # `train` calls this between micro-batches as well, to see whether somebody wants to stop
        nonlocal seen
        if run.step == seen:
            return
        seen = run.step
        channel.answer(**clock.read(), peak_gib=common.peak_gib(run.model.device))
        if channel.receive()["do"] == "end":
            raise Ended
        clock.start()

    if channel.receive()["do"] == "end":
        raise SystemExit("asked to end before the first step")
    clock.start()
    try:
        train_rm.train(run, at_the_end_of_a_step)
    except Ended:
        scalars = logged_scalars(run)
        channel.answer(loss=scalars["train/loss"], useful=scalars["train/useful_tokens"])
    else:
        raise SystemExit("the training ended before the parent asked it to")


def evaluate(run: Any, channel: common.Channel) -> None:
    """The real evaluation of the whole test split, once for each message."""
    import train_rm

    indices, clock = np.arange(len(run.test_pairs)), common.Clock(run.model.device)
    while channel.receive()["do"] != "end":
        clock.start()
        evaluation = train_rm.evaluate(run, indices, lambda: None)
        channel.answer(
            **clock.read(), loss=evaluation.metrics["loss"], accuracy=evaluation.metrics["accuracy"],
            pairs=evaluation.pairs, peak_gib=common.peak_gib(run.model.device),
        )  # fmt: skip
    channel.answer()


def log_and_save(run: Any, channel: common.Channel) -> None:
    """Two real steps, then what their logging and saving takes, with the run's own board, bar and files."""
    import progress
    import train_rm

    message = channel.receive()
    steps, clock = message["steps"], common.Clock(run.model.device)
    seconds: list[float] = []
    seen = run.step

    def note_step() -> None:
        nonlocal seen
        if run.step > seen:
            seen = run.step
            seconds.append(clock.read()["seconds"])
            clock.start()
            if run.step == steps:
                raise Ended

    with contextlib.suppress(Ended):
        train_rm.train(run, note_step)
    metrics = {tag: values[-1] for tag, values in logged_scalars(run).items() if not tag.endswith("_by_examples")}
    board = progress.Board(Path(run.config.log_dir) / f"{run.folder.name}-again")
    shown = progress.Progress(message["times"], 0)
    started = time.perf_counter()
    for step in range(1, message["times"] + 1):
        board.scalars(metrics, step, 128 * step)
        shown.step(step, metrics)
    board.close()  # the file's thread works on while a training computes: its time counts as well
    log_seconds = (time.perf_counter() - started) / message["times"]
    shown.close()

    # what comes with an evaluation beside the forward passes, as in train_rm.evaluate_and_show
    board = progress.Board(Path(run.config.log_dir) / f"{run.folder.name}-evaluations")
    sample = min(len(run.test_pairs), run.config.eval_num_batches * run.config.batch_size)
    evaluation = train_rm.evaluate(run, np.arange(min(sample, message["eval_pairs"])), lambda: None)
    rewards = evaluation.rewards.repeat(-(-sample // evaluation.pairs), 1)[:sample]  # (sample, 2)
    started = time.perf_counter()
    for step in range(1, message["times"] + 1):
        board.histogram("train/rewards", rewards[: run.config.pairs_per_step], step)
        run.note_evaluation(evaluation.correct, evaluation.pairs)
        board.scalars({f"eval/{name}": value for name, value in evaluation.metrics.items()}, step, 128 * step)
        board.histogram("eval/rewards_chosen", rewards[:, 0], step)
        board.histogram("eval/rewards_rejected", rewards[:, 1], step)
    board.close()
    eval_log_seconds = (time.perf_counter() - started) / message["times"]

    saves = []
    for _ in range(message["saves"]):
        run.step += 1  # each checkpoint is a folder of its own
        started = time.perf_counter()
        folder = run.save()
        saves.append(time.perf_counter() - started)
    size = sum(file.stat().st_size for file in folder.iterdir())
    channel.answer(steps=seconds, log=log_seconds, eval_log=eval_log_seconds, saves=saves, checkpoint_bytes=size)
    channel.receive()
    channel.answer()


def logged_scalars(run: Any) -> dict[str, list[float]]:
    """What the run wrote for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(run.config.log_dir) / run.folder.name
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


JOBS = {"train": train, "evaluate": evaluate, "log_and_save": log_and_save}


def main() -> None:
    channel = common.Channel()
    settings = channel.receive()
    run = open_run(settings["flags"])
    channel.answer(peak_gib=common.peak_gib(run.model.device), config=dataclasses.asdict(run.config))
    JOBS[settings["job"]](run, channel)
    run.lock.release()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and taking gigabytes apart takes time


if __name__ == "__main__":
    main()
