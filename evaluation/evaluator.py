"""One evaluation: each model in turn scores the data, the scores are analysed, and the report is written.

One model is on the device at a time. Scores are kept as they come, so a killed evaluation goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import utils
from checkpointing import resolve
from checkpointing.run_folder import best_step, step_folders, step_of
from common import hub
from evaluation import analysis, eval_data, html_report, metrics, plots, report
from evaluation.scores import ScoreLog, ScoreTable, score_dataset
from modeling import devices
from modeling.pretrained import base_of_adapter, is_adapter, load_tokenizer
from modeling.scorer import Scorer
from models import RewardModel
from utils import DiskOrNetworkError, UserError


@dataclass(frozen=True)
class ModelSource:
    """A model as the report calls it, and how to open it."""

    name: str
    open: Callable[[], RewardModel]


@dataclass(frozen=True)
class ScoringConfig:
    """How to score; the names are those of the flags."""

    max_length: int = 2048
    batch_size: int = 64
    tokens_per_batch: int = 8192
    precision: str = "bf16"

    def scorer(self, model: RewardModel) -> Scorer:
        return Scorer.create(model, **dataclasses.asdict(self))


@dataclass(frozen=True)
class EvalJob:
    """What to evaluate on which data, and where to write the results."""

    model: ModelSource
    data: eval_data.Data
    dataset: str
    split: str
    report_dir: Path
    tensorboard_dir: Path
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    step: int = 0
    against: ModelSource | None = None
    untrained: ModelSource | None = None
    scores_out: Path | None = None
    notes: tuple[str, ...] = ()


def evaluate_model(job: EvalJob, check_stop: Callable[[], None]) -> dict[str, Any]:
    """Score, analyse and write the report; returns the content of report.json.

    `check_stop` is called before each micro-batch, and may raise `utils.Stopped`.
    """
    notes = [*job.data.notes, *job.notes]
    with contextlib.ExitStack() as open_logs:

        def score(source: ModelSource) -> tuple[ScoreTable, ScoreLog]:
            table, log = _score(source, job, check_stop)
            logs.append(log)
            open_logs.callback(log.close)
            return table, log

        logs: list[ScoreLog] = []
        table, log = score(job.model)
        if not len(table.positions):
            log.delete()
            raise UserError(
                "no row could be scored, so there is nothing to report", where=f"{job.dataset}, {job.split}",
                found="; ".join(line.strip() for line in table.counts.lines()) or "no rows",
                safe="no earlier report was touched", next="other --dataset or --split, or a larger --max_length",
            )  # fmt: skip
        content = analysis.measure(table)
        against = score(job.against) if job.against else None
        if against:
            content["against"] = {"model": job.against.name} | analysis.compare(table, against[0])
        if job.untrained:
            try:
                untrained, _ = score(job.untrained)
            except UserError as error:  # a missing comparison is no reason to lose the report
                notes.append(f"no untrained baseline: {error.what}")
            else:
                margins = untrained.reward_margins
                content["baselines"]["untrained model"] = dataclasses.asdict(metrics.accuracy(margins))
        content = {
            "model": job.model.name, "dataset": job.dataset, "split": job.split, "step": job.step or None, **content,
            "reading": analysis.readings(job.data, table, log, against, job.scores_out), "notes": notes,
            "settings": dataclasses.asdict(job.scoring), "made": utils.timestamp(),
        }  # fmt: skip
        drawn = plots.plots(content, table.rewards, table.lengths)
        report.write_json(job.report_dir, content)
        html_report.write(job.report_dir, content, drawn)
        report.write_tensorboard(job.tensorboard_dir, content, drawn, job.step)
        for finished in logs:
            finished.delete()
    return content


def _score(source: ModelSource, job: EvalJob, check_stop: Callable[[], None]) -> tuple[ScoreTable, ScoreLog]:
    """One model's scores; the model is off the device again when this returns."""
    scorer = job.scoring.scorer(source.open())
    device = scorer.model.device
    try:
        return score_dataset(scorer, job.data, job.report_dir, check_stop, source.name)
    finally:
        del scorer
        devices.free(device)


# ---------------------------------------------------------------------------------------------------------------------
# What a model's folder says about it
# ---------------------------------------------------------------------------------------------------------------------


def saved_model(name: str, folder: Path, base_model: str | None = None) -> ModelSource:
    """The reward model in a folder. UserError if it is a LoRA checkpoint whose base model is a missing folder."""
    if is_adapter(folder):
        base = base_model or base_of_adapter(folder)
        if hub.looks_like_a_path(base) and not Path(base).expanduser().exists():
            raise UserError(
                "the base model of a LoRA checkpoint is not there", where=base, found=f"the checkpoint {folder}",
                safe="nothing was scored", next="--base_model FOLDER, where the base model is now",
            )  # fmt: skip
    return ModelSource(name, functools.partial(RewardModel.restore, folder, base_model))


def untrained_model(folder: Path) -> tuple[ModelSource | None, str]:
    """The model as it was before a checkpoint's training, or None and the reason."""
    settings = training_settings(folder)
    base, seed = settings.get("model"), settings.get("seed", 0)
    if not isinstance(base, str) or not isinstance(seed, int):
        return None, "no untrained baseline: nothing says which model this one was trained from"
    # a hub id is looked up when it is opened; a missing folder is known now
    if not Path(base).exists() and hub.looks_like_a_path(base):
        return None, f"no untrained baseline: the base model is no longer at {base}"
    return ModelSource("untrained model", lambda: RewardModel.create(base, load_tokenizer(str(folder)), seed)), ""


def training_settings(folder: Path) -> dict[str, Any]:
    """The settings of the training that wrote a checkpoint; {} for any other model."""
    return resolve.read_settings(folder / "train_config.json")


def report_folder(folder: Path) -> Path:
    """`reports/step-N` beside a run's checkpoints; inside the checkpoint it would contradict the manifest."""
    if step_of(folder.absolute()) is None or not (folder / "manifest.json").is_file():
        return Path("report")
    return folder.parent / "reports" / folder.name


def tensorboard_folder(folder: Path, report_dir: Path) -> Path:
    """Beside the training's own logs if they exist, so that TensorBoard shows both."""
    log_dir = training_settings(folder).get("log_dir")
    if step_of(folder.absolute()) is not None and isinstance(log_dir, str):
        run = folder.absolute().parent
        logs = run.parent / log_dir / run.name  # log_dir is stored relative to output_dir
        if logs.is_dir():
            return logs / "report"
    return report_dir / "tensorboard"


# ---------------------------------------------------------------------------------------------------------------------
# Where results go
# ---------------------------------------------------------------------------------------------------------------------


def check_writable(folder: Path, name: str, flag: str) -> None:
    """DiskOrNetworkError if no file can be made in `folder`, before hours are spent on what would go there."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if existing.is_dir():
            tempfile.TemporaryFile(dir=existing).close()
            return
        problem = "it is no folder"
    except OSError as error:
        problem = error.strerror or str(error)
    raise DiskOrNetworkError(
        f"{name} cannot be written: {problem}", where=existing.absolute(), safe="nothing was scored",
        next=f"{flag}, in a place where you may write",
    )  # fmt: skip


def find_scores_file(name: str, data: eval_data.Data, report_dir: Path) -> Path:
    """Where --scores_out points to, through symbolic links. UserError unless it is a file of its own."""
    path = Path(name).expanduser().resolve()
    if path.exists() and not path.is_file():
        raise UserError("--scores_out is no regular file", where=name, next="name a file; it is written at the end")
    inputs = [part.source.path.resolve() for part in data.parts if part.source.path]
    reports = [(report_dir / file).resolve() for file in (report.JSON, html_report.PAGE)]
    if path in (*inputs, *reports):
        what = "the data that is scored" if path in inputs else "the report itself"
        raise UserError(f"--scores_out names {what}", where=path, safe="it was not touched", next="name another file")
    check_writable(path.parent, "--scores_out", "--scores_out FILE")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# At the end of a training
# ---------------------------------------------------------------------------------------------------------------------


def report_run(run_folder: Path, dataset: str, rows: Iterable[int]) -> None:
    """Report on a run's newest and best checkpoints, on `rows` of the test split: those that training evaluates on.

    The training is over and saved, so whatever goes wrong here is printed and does not fail the run.
    """
    newest, best = step_folders(run_folder)[-1:], best_step(run_folder)
    folders = dict.fromkeys([*newest, *([best] if best else [])])
    try:
        data = eval_data.find(dataset, "test", None)
        chosen = frozenset((0, int(row)) for row in rows)
        data = dataclasses.replace(data, chosen_rows=chosen, num_rows=len(chosen), notes=())
        for folder in folders:
            settings = training_settings(folder)
            own = {name: settings[name] for name in ("max_length", "batch_size", "precision") if name in settings}
            report_dir = report_folder(folder)
            job = EvalJob(
                saved_model(utils.seen_from_here(str(folder)), folder), data, utils.seen_from_here(dataset), "test",
                report_dir, tensorboard_folder(folder, report_dir), ScoringConfig(**own), step_of(folder) or 0,
                notes=("the pairs that training evaluates on",),
            )  # fmt: skip
            with utils.StopRequest() as stop:
                evaluate_model(job, stop.check)
            print(f"report: {report_dir / html_report.PAGE}", flush=True)
    except (UserError, OSError, RuntimeError) as error:
        utils.say_if_heard(
            f"the training is saved, but there is no report of it: {utils.first_line(error)}\n"
            f"  python eval_rm.py --model {run_folder}   writes one"
        )
