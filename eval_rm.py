"""How good is a reward model, and what has it really learned?

python eval_rm.py --model ./checkpoints/rm/RUN/step-1000              accuracy, length bias, calibration: a report
python eval_rm.py --model A --against B --dataset pairs.jsonl         two models on the same pairs
python eval_rm.py --model HUB_ID --dataset reward-bench-2.jsonl       RewardBench and RewardBench 2 files
python eval_rm.py --model FOLDER --score replies.jsonl > scored.jsonl   rewards as a step of a pipeline (or --score -)
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from checkpointing import resolve
from checkpointing.run_folder import step_of
from common import flags
from common.flags import flag
from utils import DiskOrNetworkError, UserError

if TYPE_CHECKING:
    import models
    from common import hub
    from evaluation import eval_data, evaluator, html_report, report
    from evaluation import score_stream as score_lines
    from modeling import scorer as scoring
else:  # loaded when first used, so that --help answers at once
    eval_data, html_report, report, hub, evaluator, models, score_lines, scoring = map(
        utils.lazy_import,
        (
            "evaluation.eval_data",
            "evaluation.html_report",
            "evaluation.report",
            "common.hub",
            "evaluation.evaluator",
            "models",
            "evaluation.score_stream",
            "modeling.scorer",
        ),
    )

DEFAULT_DATASET = "Anthropic/hh-rlhf"


@dataclass(frozen=True)
class EvalConfig:
    """Every setting of an evaluation."""

    # fmt: off
    model: str | None = flag(None, "reward model: a checkpoint, a run's folder for its newest one, any folder or hub id with one label", group="model and data")
    base_model: str | None = flag(None, "where a LoRA checkpoint's base model lies now, if not where it was", group="model and data")
    dataset: str | None = flag(None, "hub id, file or folder as for train_rm.py, or a folder of files or of folders (default: what the checkpoint was trained on, else Anthropic/hh-rlhf)", group="model and data")
    split: str = flag("test", "train, test, another split or file of that name, or all; of a single file test is what train_rm.py holds out", group="model and data")
    subset_column: str | None = flag(None, "column to break the accuracy down by (default: subset, else kind, else the file)", group="model and data")
    max_pairs: int = flag(0, "score so many rows, spread over the data, the same ones every time; 0 = all", minimum=0, below=10**12, group="model and data")
    against: str | None = flag(None, "another reward model, compared on the same pairs", group="model and data")
    untrained_baseline: bool = flag(True, "also score with the model as it was before training, where that is known: it costs a second pass", group="model and data")

    report_dir: str | None = flag(None, "folder of report.json, report.html and TensorBoard's files (default: reports/step-N in the run's folder for a checkpoint, with the figures beside the training's, else ./report)", group="output")
    scores_out: str | None = flag(None, "JSONL file for every pair's rewards, with the dialogue", group="output")
    score: str | None = flag(None, "no report: read prompts and replies from this JSONL file, or - for standard input, and write them with their rewards to standard output", group="output")
    best_of: bool = flag(False, "with --score: of each row's replies pick the one with the highest reward", group="output")

    max_length: int | None = flag(None, "longest sequence in tokens; longer ones are left out and counted (default: the checkpoint's, else 2048)", minimum=8, below=2**31, group="speed and memory")
    batch_size: int = flag(64, "pairs per batch at most", minimum=1, below=10**6, group="speed and memory")
    tokens_per_batch: int = flag(8192, "token budget of one forward; changes speed and memory only", minimum=1, below=2**31, group="speed and memory")
    precision: str = flag("bf16", "arithmetic, as in training; fp32 gives transformers' own rewards to 1e-5", choices=("bf16", "fp32"), group="speed and memory")

    debug: bool = flag(False, "show the traceback of an error", group="other")
    # fmt: on

    def problems(self) -> list[str]:
        """What no single field can tell is wrong."""
        found = []
        if self.model is None:
            found.append("--model: wants a reward model, such as ./checkpoints/rm/RUN")
        if self.best_of and self.score is None:
            found.append("--best_of: goes with --score")
        if self.score is not None:
            others = ("dataset", "subset_column", "against", "report_dir", "scores_out")
            given = [name for name in others if getattr(self, name) is not None] + ["max_pairs"] * bool(self.max_pairs)
            given += ["split"] * (self.split != "test")
            found += [f"--{name}: goes without --score, which writes no report" for name in given]
        if self.report_dir and Path(self.report_dir).is_file():
            found.append(f"--report_dir: {self.report_dir} is a file, wants a folder")
        if self.scores_out and Path(self.scores_out).is_dir():
            found.append(f"--scores_out: {self.scores_out} is a folder, wants a file")
        return found


def main(argv: list[str]) -> None:
    given, problems = flags.read_flags(EvalConfig, argv, __doc__.split("\n\n")[0])
    config = flags.build_config(EvalConfig, given, problems)
    if config.score is not None:
        score_stream(config)
        return
    task = plan(config)
    with utils.StopRequest() as stop:
        content = evaluator.judge(task, stop.check)
    show(content, task)


def plan(config: EvalConfig) -> evaluator.Task:
    """What to judge; everything that can be wrong with names, folders and rows' files is so here, before scoring."""
    folder = resolve.find_model(config.model)
    settings = evaluator.own_settings(folder)
    other = resolve.find_model(config.against, "--against") if config.against else None
    if other and other.resolve() == folder.resolve():
        raise UserError(
            "--against names the model itself", where=other, safe="nothing was scored",
            next="another one, such as an earlier step-N of the run",
        )  # fmt: skip
    for adapter in filter(None, (folder, other)):
        refuse_missing_base(adapter, config.base_model)
    dataset = config.dataset or settings.get("dataset") or DEFAULT_DATASET
    data = eval_data.find(dataset, config.split, config.subset_column)
    data = eval_data.sample(data, config.max_pairs)
    report_dir = Path(config.report_dir) if config.report_dir else evaluator.report_folder(folder)
    # beside the training's own only what is this checkpoint's own report
    board_folder = report_dir / "tensorboard" if config.report_dir else evaluator.board_folder(folder, report_dir)
    scores_out = scores_file(config.scores_out, data, report_dir) if config.scores_out else None
    for place, name in ((report_dir, "the report's folder"), (board_folder, "TensorBoard's folder")):
        refuse_unwritable(place, name, "--report_dir FOLDER, where you may write")
    before, why_not = evaluator.untrained(folder, settings) if config.untrained_baseline else (None, "")
    notes = [f"{config.max_pairs:,} rows asked for, spread over all"] * bool(config.max_pairs) + [why_not] * bool(
        why_not
    )
    for note in [*data.notes, *notes, *replaced_report(report_dir, utils.seen_from_here(dataset), config)]:
        print(note, flush=True)
    return evaluator.Task(
        model=evaluator.Contender(
            shown(config.model, folder), lambda: models.RewardModel.restore(folder, config.base_model)
        ),
        data=data,
        dataset=utils.seen_from_here(dataset),
        split=config.split,
        report_dir=report_dir,
        board_folder=board_folder,
        limits=limits(config, settings),
        step=step_of(folder.absolute()) or 0,
        against=other
        and evaluator.Contender(
            shown(config.against, other), lambda: models.RewardModel.restore(other, config.base_model)
        ),
        untrained=before,
        scores_out=scores_out,
        notes=tuple(notes),
    )


def refuse_missing_base(folder: Path, base_model: str | None) -> None:
    """UserError if a LoRA checkpoint's base model is a folder that is not there."""
    if not models.is_adapter(folder):
        return
    base = base_model or models.base_of_adapter(folder)
    if hub.looks_like_a_path(base) and not Path(base).expanduser().exists():
        raise UserError(
            "the base model of a LoRA checkpoint is not there", where=base, found=f"the checkpoint {folder}",
            safe="nothing was scored", next="--base_model FOLDER, where the base model lies now",
        )  # fmt: skip


def refuse_unwritable(folder: Path, name: str, instead: str) -> None:
    """DiskOrNetworkError if no file can be made in `folder`, before hours are spent on what would go there."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        if there.is_dir():
            tempfile.TemporaryFile(dir=there).close()
            return
        problem = "it is no folder"
    except OSError as error:
        problem = error.strerror or str(error)
    raise DiskOrNetworkError(
        f"{name} cannot be written: {problem}", where=there.absolute(), safe="nothing was scored", next=instead
    )


def scores_file(name: str, data: eval_data.Data, report_dir: Path) -> Path:
    """Where --scores_out really goes: through symbolic links, into a regular file that is nobody's input or report."""
    path = Path(name).expanduser().resolve()
    if path.exists() and not path.is_file():
        raise UserError("--scores_out is no regular file", where=name, next="name a file; it is written at the end")
    inputs = [part.source.path.resolve() for part in data.parts if part.source.path]
    reports = [(report_dir / file).resolve() for file in (report.JSON, html_report.PAGE)]
    if path in (*inputs, *reports):
        what = "the data that is scored" if path in inputs else "the report itself"
        raise UserError(f"--scores_out names {what}", where=path, safe="it was not touched", next="name another file")
    refuse_unwritable(path.parent, "--scores_out", "--scores_out FILE, where you may write")
    return path


def replaced_report(report_dir: Path, dataset: str, config: EvalConfig) -> list[str]:
    """A line if the report that is there is on other data."""
    try:
        old = json.loads((report_dir / report.JSON).read_text(encoding="utf-8"))
        of = old["dataset"], old["split"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if of == (dataset, config.split):
        return []
    return [f"the report in {report_dir} is on {of[0]}, {of[1]}, and will be replaced; --report_dir keeps both"]


def shown(name: str, folder: Path) -> str:
    """A model as the report calls it: its folder, a run's newest step included; a hub id as it was given."""
    return utils.seen_from_here(str(folder)) if Path(name).expanduser().exists() else name


def limits(config: EvalConfig, settings: dict[str, Any]) -> evaluator.Limits:
    stored = settings.get("max_length")
    max_length = config.max_length or (
        stored if isinstance(stored, int) and stored > 0 else evaluator.Limits.max_length
    )
    return evaluator.Limits(max_length, config.batch_size, config.tokens_per_batch, config.precision)


def show(content: dict[str, Any], task: evaluator.Task) -> None:
    """The tables, and where the rest lies."""
    rows = content["rows"]
    print(f"{content['model']} on {content['dataset']}, {content['split']}: {content['n']:,} of {rows['read']:,} rows")
    print(*(f"  {line}" for line in rows["in_words"]), sep="\n", end="\n" * bool(rows["in_words"]))
    report.show(content)
    print(f"\nreport: {task.report_dir / html_report.PAGE}\n        {task.report_dir / report.JSON}")
    if task.scores_out:
        print(f"scores: {task.scores_out}")
    logs = utils.seen_from_here(os.path.normpath(task.board_folder.parent))
    print(f"next:\n  tensorboard --logdir {logs}", flush=True)


def score_stream(config: EvalConfig) -> None:
    """`--score`: standard output gets data and nothing else."""
    with contextlib.redirect_stdout(sys.stderr):
        lines = score_lines.read(config.score)
        folder = resolve.find_model(config.model)
        model = models.RewardModel.restore(folder, config.base_model)
        how = limits(config, evaluator.own_settings(folder))
        scorer = scoring.Scorer.of(model, how.max_length, how.batch_size, how.tokens_per_batch, how.precision)
    counts = score_lines.score(scorer, lines, config.best_of, config.score != "-", sys.stdout.buffer)
    left_out = counts.total() - counts["scored"]
    print(f"{counts['scored']:,} rows scored" + f", {left_out:,} left out" * bool(left_out), file=sys.stderr)
    for reason, count in sorted(counts.items()):
        if reason != "scored":
            print(f"  {count:,} {score_lines.parsing.LEFT_OUT[reason]}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
