"""One evaluation: each model in turn scores the data, the scores are analysed, and the report is written.

One model is on the device at a time. Scores are kept as they come, so a killed evaluation continues where it was.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import utils
from checkpointing.resolve import training_settings
from checkpointing.run_folder import best_step, step_folders, step_of
from common import file_locks, hub
from data_pipeline import sources
from data_pipeline.sources import DataSpec
from evaluation import analysis, eval_data, html_report, metrics, plots, report
from evaluation.scores import ScoreTable, score_dataset
from modeling import devices
from modeling.pretrained import base_of_adapter, is_adapter
from modeling.scorer import Scorer, ScoringConfig
from modeling.tokenizers import UNKNOWN_DATE, load_tokenizer
from models import RewardModel
from utils import DiskOrNetworkError, UserError


@dataclass(frozen=True)
class ModelSource:
    """A model's name in the report, and how to open it."""

    name: str
    open: Callable[[], RewardModel]
    step: int | None = None  # of a checkpoint


@dataclass(frozen=True)
class EvalJob:
    """What to evaluate on which data, and where to write the results."""

    model: ModelSource
    data: eval_data.Data
    report_dir: Path
    tensorboard_dir: Path
    scoring: ScoringConfig
    against: ModelSource | None = None
    untrained: ModelSource | None = None
    scores_out: Path | None = None
    notes: tuple[str, ...] = ()


def evaluate_model(job: EvalJob, check_stop: Callable[[], None]) -> dict[str, Any]:
    """Score, analyse and write the report; returns the content of report.json.

    `check_stop` is called before each micro-batch, and may raise `utils.Stopped`.
    """
    dataset, notes = sources.seen_from_here(job.data.dataset), [*job.data.notes, *job.notes]
    tables: list[ScoreTable] = []

    def score(source: ModelSource) -> ScoreTable:
        tables.append(_score(source, job, check_stop))
        return tables[-1]

    try:
        table = score(job.model)
        if not len(table.positions):
            table.log.delete()
            raise UserError(
                "no row could be scored, so there is nothing to report", where=f"{dataset}, {job.data.split}",
                found="; ".join(line.strip() for line in table.counts.lines()) or "no rows",
                safe="no earlier report was touched", next="other --dataset or --split, or a larger --max_length",
            )  # fmt: skip
        content = analysis.measure(table)
        other = score(job.against) if job.against else None
        if other:
            content["against"] = {"model": job.against.name} | analysis.compare(table, other)
        if job.untrained:
            try:
                margins = score(job.untrained).reward_margins
            except UserError as error:  # a missing comparison is no reason to lose the report
                notes.append(f"no untrained baseline: {error.what}")
            else:
                content["baselines"]["untrained model"] = metrics.accuracy(margins)
        content = {
            "model": job.model.name, "dataset": dataset, "split": job.data.split, "step": job.model.step, **content,
            "reading": analysis.readings(job.data, table, other, job.scores_out), "notes": notes,
            "settings": dataclasses.asdict(job.scoring), "made": utils.timestamp(),
        }  # fmt: skip
        drawn = plots.plots(content, table.rewards, table.lengths)
        report.write_json(job.report_dir, content)
        html_report.write(job.report_dir, content, drawn)
        report.write_tensorboard(job.tensorboard_dir, content, drawn, job.model.step or 0)
        for scored in tables:
            scored.log.delete()
        for log_of_old_version in job.report_dir.glob(".partial-*.jsonl"):
            log_of_old_version.unlink()
        return content
    finally:
        for scored in tables:
            scored.log.close()


def _score(source: ModelSource, job: EvalJob, check_stop: Callable[[], None]) -> ScoreTable:
    """One model's scores; the model is off the device again when this returns."""
    scorer = Scorer(source.open(), job.scoring)
    device = scorer.model.device
    try:
        return score_dataset(scorer, job.data, job.report_dir, check_stop, source.name)
    finally:
        del scorer
        devices.free(device)


# -- What a model's folder says about it -------------------------------------------------------------------------------


def saved_model(given: str, folder: Path, base_model: str | None = None) -> ModelSource:
    """The reward model in a folder, called by its path, or by the hub id that was given.

    UserError if it is a LoRA checkpoint whose base model is a missing folder.
    """
    name = utils.seen_from_here(str(folder)) if Path(given).expanduser().exists() else given
    if is_adapter(folder):
        base = base_model or base_of_adapter(folder)
        if hub.looks_like_a_path(base) and not Path(base).expanduser().exists():
            raise UserError(
                "the base model of a LoRA checkpoint is missing", where=base, found=f"the checkpoint {folder}",
                safe="nothing was scored", next="--base_model FOLDER, where the base model is now",
            )  # fmt: skip
    return ModelSource(name, functools.partial(RewardModel.restore, folder, base_model), step_of(folder.absolute()))


def untrained_model(folder: Path) -> tuple[ModelSource | None, str]:
    """The model as it was before a checkpoint's training, or None and the reason."""
    settings = training_settings(folder)
    base, seed = settings.get("model"), settings.get("seed", 0)
    if not isinstance(base, str) or not isinstance(seed, int):
        return None, "no untrained baseline: nothing says which model this one was trained from"
    # a hub id is looked up when it is opened; a missing folder is known now
    if not Path(base).exists() and hub.looks_like_a_path(base):
        return None, f"no untrained baseline: the base model is no longer at {base}"

    def open_untrained() -> RewardModel:
        return RewardModel.create(base, load_tokenizer(str(folder), UNKNOWN_DATE), seed)

    return ModelSource("untrained model", open_untrained), ""


def output_folders(folder: Path, given: str | None = None) -> tuple[Path, Path]:
    """The folders for the report and for TensorBoard's files: in `given`, or for a checkpoint beside its run's.

    A report inside the checkpoint would contradict its manifest. TensorBoard's files join the training's own, so that
    it shows one run. Not while that is being trained: of the files of a folder TensorBoard follows only the newest.
    """
    path = folder.absolute()
    if given or step_of(path) is None or not (path / "manifest.json").is_file():
        return Path(given or "report"), Path(given or "report") / "tensorboard"
    report_dir, log_dir = folder.parent / "reports" / folder.name, training_settings(folder).get("log_dir")
    if isinstance(log_dir, str):  # relative to output_dir
        logs = path.parent.parent / log_dir / path.parent.name
        if logs.is_dir() and not file_locks.is_locked(path.parent / file_locks.RunLock.FILE):
            return report_dir, logs
    return report_dir, report_dir / "tensorboard"


# -- Where results go --------------------------------------------------------------------------------------------------


def check_writable(folder: Path, name: str, flag: str) -> None:
    """Raise DiskOrNetworkError now, not after hours of scoring, if no file can be created in `folder`."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise DiskOrNetworkError(
            f"{name} cannot be written: {error.strerror}", where=existing.absolute(), safe="nothing was scored",
            next=f"{flag} with a place that you can write to",
        ) from error  # fmt: skip


def find_scores_file(name: str, data: eval_data.Data, report_dir: Path) -> Path:
    """Where --scores_out points to, through symbolic links. UserError if that would overwrite data or report."""
    path = Path(name).expanduser().resolve()
    if path.exists() and not path.is_file():
        raise UserError("--scores_out is not a regular file", where=name, next="name a file; it is written at the end")
    inputs = [path.resolve() for part in data.parts for path in part.source.files]
    reports = [(report_dir / file).resolve() for file in (report.JSON, html_report.PAGE)]
    if path in (*inputs, *reports):
        what = "the data that is scored" if path in inputs else "the report itself"
        raise UserError(f"--scores_out names {what}", where=path, safe="it was not touched", next="name another file")
    check_writable(path.parent, "--scores_out", "--scores_out FILE")
    return path


# -- At the end of a training ------------------------------------------------------------------------------------------


def report_run(run_folder: Path, spec: DataSpec, places: Iterable[tuple[int, int]]) -> None:
    """Report on a run's newest and best checkpoints, on those `places` of the test data that training evaluates on.

    The training is over and saved, so whatever goes wrong here is printed and does not fail the run.
    """
    folders = dict.fromkeys(filter(None, [*step_folders(run_folder)[-1:], best_step(run_folder)]))
    try:
        data = eval_data.of_training(spec, places)
        for folder in folders:
            settings = training_settings(folder)
            own = {name: settings[name] for name in ("max_length", "batch_size") if name in settings}
            report_dir, tensorboard_dir = output_folders(folder)
            job = EvalJob(
                saved_model(str(folder), folder), data, report_dir, tensorboard_dir, ScoringConfig(**own),
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
