"""The project's side of a benchmark, and the only file here that knows how train_rm.py works.

As a script it is a child process of `harness.Side`. It opens a run as `train_rm.py` does, and for each message it lets
the real code do one piece of work: a step, an evaluation, or logging and saving.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import harness
import utils
from modeling import tokenizers


def load_pairs(dataset: str, base: str) -> tuple[Any, Any]:
    """The train and test pairs as the project tokenizes them, with its default --max_length."""
    import data
    import train_rm

    return data.load_pairs(dataset, tokenizers.load_tokenizer(base), train_rm.RewardTrainingConfig().max_length)


def pairs_of_steps(num_pairs: int, pairs_per_step: int, steps: int) -> list[np.ndarray]:
    """The pairs of a run's first steps, in order."""
    import train_rm
    from data_pipeline import sampler

    plan = sampler.StepSampler(num_pairs, pairs_per_step, 1, train_rm.RewardTrainingConfig().seed)
    return [plan.indices_for(step) for step in range(1, steps + 1)]


def defaults() -> Any:
    import train_rm

    return train_rm.RewardTrainingConfig()


def config_of(flags: list[str]) -> Any:
    """The settings of a run with these flags."""
    import train_rm
    from training.config import read_config

    return read_config(train_rm.RewardTrainingConfig, flags, "")[0]


def pairs_of_run(config: Any, num_pairs: int) -> np.ndarray:
    """All pairs of a run, in the order in which its steps take them."""
    from data_pipeline import sampler

    plan = sampler.StepSampler(num_pairs, config.examples_per_step, config.epochs, config.seed, config.max_steps)
    return np.concatenate([plan.indices_for(step) for step in range(1, plan.total_steps + 1)])


def lora_settings(config: Any) -> dict[str, Any] | None:
    from training import setup

    lora = setup.lora_settings(config)
    return dataclasses.asdict(lora) if lora else None


def side(job: str, base: str, dataset: str, work: Path, checkpointing: bool = False, *flags: str) -> harness.Side:
    """A child process that works on `dataset`, at the project's default settings except for `flags`."""
    switch = ["--gradient_checkpointing"] if checkpointing else []
    folders = ["--output_dir", str(work / "out"), "--log_dir", str(work / "logs")]
    return harness.Side(
        "project_worker.py", job=job, flags=["--model", base, "--dataset", dataset, *folders, "--save_steps", "0",
                                   "--eval_steps", "0", *switch, *flags],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The child process
# ---------------------------------------------------------------------------------------------------------------------


class Ended(Exception):
    """The parent has seen enough."""


def open_run(flags: list[str]) -> Any:
    """A run as it is in `train_rm.py` with these flags when training begins."""
    import train_rm
    from training import distributed, setup
    from training.config import read_config

    config, resumed_from = read_config(train_rm.RewardTrainingConfig, flags, "")
    run = setup.set_up(config, resumed_from, distributed.World(), train_rm.open_parts, "train_rm.py")
    run.begin_record(resumed_from)
    return run


class Watching(utils.StopRequest):
    """A stop request that never asks to stop; it calls `check` between micro-batches and after each step."""

    def __init__(self, check: Callable[[], None]):
        super().__init__()
        self.check = check


def train(run: Any, channel: harness.Channel) -> None:
    """Run the real loop; after each step, answer and wait for the next message."""
    import train_rm

    clock, seen = harness.Clock(run.model.device), run.step

    def at_the_end_of_a_step() -> None:
        # `train` also calls this between micro-batches, to see whether it should stop
        nonlocal seen
        if run.step == seen:
            return
        seen = run.step
        channel.answer(**clock.read(), peak_gib=harness.peak_gib(run.model.device))
        if channel.receive()["do"] == "end":
            raise Ended
        clock.start()

    if channel.receive()["do"] == "end":
        raise SystemExit("asked to end before the first step")
    clock.start()
    try:
        train_rm.train(run, Watching(at_the_end_of_a_step))
    except Ended:
        scalars = logged_scalars(run)
        channel.answer(loss=scalars["train/loss"], useful=scalars["train/useful_tokens"])
    else:
        raise SystemExit("the training ended before the parent asked it to")


def evaluate(run: Any, channel: harness.Channel) -> None:
    """Run the real evaluation of the whole test split, once per message."""
    import train_rm

    indices, clock = np.arange(len(run.eval_data)), harness.Clock(run.model.device)
    while channel.receive()["do"] != "end":
        clock.start()
        evaluation = train_rm.evaluate(run, indices, utils.StopRequest())
        channel.answer(
            **clock.read(), loss=evaluation.metrics["loss"], accuracy=evaluation.metrics["accuracy"],
            pairs=evaluation.pairs, peak_gib=harness.peak_gib(run.model.device),
        )  # fmt: skip
    channel.answer()


def score_file(run: Any, channel: harness.Channel) -> None:
    """What `eval_rm.py` does with the test file, from its bytes to all metrics, but without drawing the report."""
    from data_pipeline.sources import DataSpec
    from evaluation import analysis, eval_data, scores
    from modeling.scorer import Scorer, ScoringConfig

    clock = harness.Clock(run.model.device)
    data = eval_data.find(DataSpec(run.config.dataset), "test", None)
    scorer = Scorer(run.model, ScoringConfig())
    while channel.receive()["do"] != "end":
        clock.start()
        table = scores.score_dataset(scorer, data, run.folder / "report", lambda: None, "the test file")
        figures = analysis.measure(table)
        channel.answer(
            **clock.read(), loss=figures["calibration"]["log_loss"], accuracy=figures["accuracy"],
            pairs=figures["n"], peak_gib=harness.peak_gib(run.model.device),
        )  # fmt: skip
        table.log.delete()  # otherwise the next round would find everything scored
    channel.answer()


def log_and_save(run: Any, channel: harness.Channel) -> None:
    """Time a few real steps, then logging and saving with the run's own files; answers one message."""
    message = channel.receive()
    clock, key, times = harness.Clock(run.model.device), message["key"], message["times"]
    steps = time_steps(run, clock, message["steps"], key)
    clock.start()
    log_steps(run, times)
    log = clock.read()[key] / times
    rewards = sample_of_rewards(run, message["eval_pairs"])
    clock.start()
    note_evaluations(run, rewards, times)
    eval_log = clock.read()[key] / times
    saves = []
    for _ in range(message["saves"]):
        run.step += 1  # each checkpoint has its own folder
        clock.start()
        folder = run.save()
        saves.append(clock.read()[key])
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    channel.answer(steps=steps, log=log, eval_log=eval_log, saves=saves, checkpoint_bytes=size)
    channel.receive()
    channel.answer()


def time_steps(run: Any, clock: harness.Clock, count: int, key: str) -> list[float]:
    import train_rm

    times, first = [], run.step

    def note() -> None:
        if run.step > first + len(times):
            times.append(clock.read()[key])
            clock.start()
            if len(times) == count:
                raise Ended

    clock.start()
    with contextlib.suppress(Ended):
        train_rm.train(run, Watching(note))
    return times


def log_steps(run: Any, times: int) -> None:
    """Write and show the metrics of steps. Closing the logger makes its writing thread's work count."""
    import train_rm
    from common.progress import ProgressBar
    from training import logger

    metrics = {tag: values[-1] for tag, values in logged_scalars(run).items() if not tag.endswith("_by_examples")}
    board = logger.TensorBoardLogger(Path(run.config.log_dir) / f"{run.folder.name}-steps")
    shown = ProgressBar("step", times)
    for step in range(1, times + 1):
        board.scalars(metrics, step, run.config.examples_per_step * step)
        shown.update(step, *train_rm.figures(metrics))
    board.close()
    shown.close()


def sample_of_rewards(run: Any, pairs: int) -> Any:
    """Rewards (N, 2) of as many pairs as the run evaluates, repeated from a few: only their number matters here."""
    import train_rm

    wanted = run.config.eval_num_batches * run.config.batch_size
    rewards = train_rm.evaluate(run, np.arange(min(pairs, len(run.eval_data))), utils.StopRequest()).rewards
    return rewards.repeat(-(-wanted // len(rewards)), 1)[:wanted]


def note_evaluations(run: Any, rewards: Any, times: int) -> None:
    """Write everything that `train_rm.evaluate_and_show` writes, and the histogram of the step before."""
    from training import logger

    board = logger.TensorBoardLogger(Path(run.config.log_dir) / f"{run.folder.name}-evaluations")
    names = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected")
    for step in range(1, times + 1):
        board.histogram("train/rewards", rewards[: run.config.examples_per_step], step)
        run.record_evaluation(0.5, (0.4, 0.6), len(rewards))
        board.scalars(dict.fromkeys((f"eval/{name}" for name in names), 0.5), step, step)
        board.histogram("eval/rewards_chosen", rewards[:, 0], step)
        board.histogram("eval/rewards_rejected", rewards[:, 1], step)
    board.close()


def logged_scalars(run: Any) -> dict[str, list[float]]:
    """The scalars that the run wrote for TensorBoard, by tag."""
    return scalars_of(Path(run.config.log_dir) / run.folder.name)


def scalars_of(folder: Path) -> dict[str, list[float]]:
    """The scalars in TensorBoard's files of a folder, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


JOBS = {"train": train, "evaluate": evaluate, "score_file": score_file, "log_and_save": log_and_save}


def main() -> None:
    channel = harness.Channel()
    settings = channel.receive()
    run = open_run(settings["flags"])
    channel.answer(peak_gib=harness.peak_gib(run.model.device), config=dataclasses.asdict(run.config))
    JOBS[settings["job"]](run, channel)
    run.lock.release()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and freeing gigabytes takes time


if __name__ == "__main__":
    main()
