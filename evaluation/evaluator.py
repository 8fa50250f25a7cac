"""Judge one reward model: score the data with it and with whatever it is compared to, measure, and write the report.

One model is on the device at a time. Scores are kept as they come, so a judging that is killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import utils
from checkpointing import resolve
from checkpointing.run_folder import best_step, step_folders, step_of
from evaluation import analysis, eval_data, html_report, metrics, plots, report
from evaluation.scores import ScoreLog, ScoreTable, score_dataset
from modeling import devices
from modeling import scorer as scoring


@dataclass(frozen=True)
class Contender:
    """A model that has its name and can be opened."""

    name: str
    open: Callable[[], models.RewardModel]


@dataclass(frozen=True)
class Limits:
    """How to score: what training calls by the same names."""

    max_length: int = 2048
    batch_size: int = 64
    tokens_per_batch: int = 8192
    precision: str = "bf16"


@dataclass(frozen=True)
class Task:
    """What to judge and where to write of it."""

    model: Contender
    data: eval_data.Data
    dataset: str
    split: str
    report_dir: Path
    board_folder: Path
    limits: Limits = field(default_factory=Limits)
    step: int = 0
    against: Contender | None = None
    untrained: Contender | None = None
    scores_out: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # as the report shows them
    notes: tuple[str, ...] = ()


def judge(task: Task, between: Callable[[], None]) -> dict[str, Any]:
    """Score, measure and write; returns the content of report.json."""
    notes = [*task.data.notes, *task.notes]
    table, log = _score(task.model, task, between)
    logs, other = [log], None
    if not len(table.positions):
        log.delete()
        raise utils.UserError(
            "no row could be scored, so there is nothing to report", where=f"{task.dataset}, {task.split}",
            found="; ".join(line.strip() for line in table.counts.lines()) or "no rows",
            safe="no earlier report was touched", next="other --dataset or --split, or a larger --max_length",
        )  # fmt: skip
    content = analysis.measure(table)
    if task.against:
        other, its_log = _score(task.against, task, between)
        logs.append(its_log)
        content["against"] = {"model": task.against.name} | analysis.compare(table, other)
    if task.untrained:
        try:
            before, its_log = _score(task.untrained, task, between)
        except utils.UserError as error:  # a comparison less is no reason to lose the report
            notes.append(f"the untrained model is not beside it: {error.what}")
        else:
            logs.append(its_log)
            content["baselines"]["untrained model"] = dataclasses.asdict(metrics.share(before.reward_margins))
    against = (other, logs[1]) if other is not None else None
    content = {
        "model": task.model.name, "dataset": task.dataset, "split": task.split, "step": task.step or None, **content,
        "reading": analysis.readings(task.data, table, log, against, task.scores_out), "notes": notes,
        "settings": {**task.settings, **dataclasses.asdict(task.limits)}, "made": utils.timestamp(),
    }  # fmt: skip
    drawn = plots.plots(content, table.rewards[:, 0] - table.rewards[:, 1], table.lengths[:, 0] - table.lengths[:, 1])
    report.write_json(task.report_dir, content)
    html_report.write(task.report_dir, content, drawn)
    report.write_board(task.board_folder, content, drawn, task.step)
    for finished in logs:
        finished.delete()
    return content


def _score(contender: Contender, task: Task, between: Callable[[], None]) -> tuple[ScoreTable, ScoreLog]:
    """One model's scores; it is off the device again when this returns."""
    model = contender.open()
    limits = task.limits
    scorer = scoring.Scorer.of(model, limits.max_length, limits.batch_size, limits.tokens_per_batch, limits.precision)
    device = model.device
    try:
        return score_dataset(scorer, task.data, task.report_dir, between, contender.name)
    finally:
        del model, scorer
        devices.free(device)


# ---------------------------------------------------------------------------------------------------------------------
# What a model's folder says of itself
# ---------------------------------------------------------------------------------------------------------------------


def own_settings(folder: Path) -> dict[str, Any]:
    """The training's settings that lie in a checkpoint of ours; {} for any other model."""
    return resolve.read_settings(folder / "train_config.json")


def report_folder(folder: Path) -> Path:
    """`reports/step-N` beside a run's checkpoints; the checkpoint itself stays as its manifest says."""
    if step_of(folder.absolute()) is None or not (folder / "manifest.json").is_file():
        return Path("report")
    return folder.parent / "reports" / folder.name


def board_folder(folder: Path, report_dir: Path) -> Path:
    """Beside the training's own logs where they are; TensorBoard then shows both."""
    log_dir = own_settings(folder).get("log_dir")
    if step_of(folder.absolute()) is not None and isinstance(log_dir, str):
        run = folder.absolute().parent
        logs = run.parent / log_dir / run.name  # log_dir is stored as seen from output_dir
        if logs.is_dir():
            return logs / "report"
    return report_dir / "tensorboard"


def untrained(folder: Path, settings: dict[str, Any]) -> tuple[Contender | None, str]:
    """The model as it was before the training of a checkpoint, or why there is none."""
    base, seed = settings.get("model"), settings.get("seed", 0)
    if not isinstance(base, str) or not isinstance(seed, int):
        return None, "the untrained model is not beside it: nothing says what this model was trained from"
    if not Path(base).exists():
        # a hub id is asked for when it is opened; a folder that is gone is known now
        from common import hub

        if hub.looks_like_a_path(base):
            return None, f"the untrained model is not beside it: its base is no longer at {base}"

    def open_base() -> models.RewardModel:
        return models.RewardModel.create(base, models.load_tokenizer(str(folder)), seed)

    return Contender("untrained model", open_base), ""


# ---------------------------------------------------------------------------------------------------------------------
# At the end of a training
# ---------------------------------------------------------------------------------------------------------------------


def report_run(run_folder: Path, dataset: str, rows: Iterable[int]) -> None:
    """Report on a run's newest checkpoint and its best: on `rows` of the test split, those that training evaluates on.

    The training is over and saved, so whatever goes wrong here is said, and is no failure of the run.
    """
    newest, best = step_folders(run_folder)[-1:], best_step(run_folder)
    folders = dict.fromkeys([*newest, *([best] if best else [])])
    try:
        data = eval_data.find(dataset, "test", None)
        data = dataclasses.replace(data, chosen_rows=frozenset((0, int(row)) for row in rows), notes=())
        for folder in folders:
            settings = own_settings(folder)
            own = {name: settings[name] for name in ("max_length", "batch_size", "precision") if name in settings}
            with utils.StopRequest() as stop:
                task = Task(
                    Contender(utils.seen_from_here(str(folder)), functools.partial(models.RewardModel.restore, folder)),
                    data, utils.seen_from_here(dataset), "test", report_folder(folder),
                    board_folder(folder, report_folder(folder)), Limits(**own), step_of(folder) or 0,
                    notes=("the pairs that training evaluates on",),
                )  # fmt: skip
                judge(task, stop.check)
            print(f"report: {task.report_dir / html_report.PAGE}", flush=True)
    except (utils.UserError, OSError, RuntimeError) as error:
        utils.say_if_heard(
            f"the training is saved, but there is no report of it: {utils.first_line(error)}\n"
            f"  python eval_rm.py --model {run_folder}   writes one"
        )
