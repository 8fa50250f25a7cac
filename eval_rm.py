"""How good is a reward model, and what has it really learned?

python eval_rm.py --model ./checkpoints/rm/RUN/step-1000              accuracy, length bias, calibration: a report
python eval_rm.py --model A --against B --dataset pairs.jsonl         two models on the same pairs
python eval_rm.py --model HUB_ID --dataset reward-bench-2.jsonl       RewardBench and RewardBench 2 files
python eval_rm.py --model FOLDER --score replies.jsonl > scored.jsonl   rewards as a step of a pipeline (or --score -)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import utils
from checkpointing import resolve
from common import flags
from common.flags import flag
from utils import UserError

with utils.lazy_imports():  # --help must not wait for torch
    from checkpointing import checkpoint
    from data_pipeline import parsing, shapes, sources
    from evaluation import eval_data, evaluator, html_report, report, score_stream
    from modeling import pretrained, scorer

DEFAULT_DATASET = "Anthropic/hh-rlhf"


@dataclass(frozen=True)
class EvalConfig:
    """Every setting of an evaluation."""

    # fmt: off
    model: str | None = flag(None, "reward model: a checkpoint, a run's folder for its newest one, any folder or hub id with one label", group="model and data")
    base_model: str | None = flag(None, "where a LoRA checkpoint's base model is now, if it has moved", group="model and data")
    dataset: str | None = flag(None, "hub id, file or folder as for train_rm.py, or a folder of files or folders (default: what the checkpoint was trained on, else Anthropic/hh-rlhf)", is_list=True, group="model and data")
    subset: str | None = flag(None, "a configuration or folder of the dataset, such as harmless-base", group="model and data")
    columns: str | None = flag(None, "names of the data's columns, as prompt=NAME,chosen=NAME,rejected=NAME (with --score prompt=NAME,reply=NAME)", group="model and data")
    split: str = flag("test", "train, test, all, or the name of another split or file; test is never what the model was trained on: of a single file what train_rm.py held out", group="model and data")
    subset_column: str | None = flag(None, "column to break the accuracy down by (default: subset, else kind, else the file)", group="model and data")
    max_pairs: int = flag(0, "score only this many rows, spread over the data and always the same; 0 = all", minimum=0, below=10**12, group="model and data")
    against: str | None = flag(None, "another reward model, compared on the same pairs", group="model and data")
    untrained_baseline: bool = flag(True, "also score with the model as it was before training, if that is known; takes a second pass", group="model and data")

    report_dir: str | None = flag(None, "folder for report.json, report.html and TensorBoard's files (default: for a checkpoint reports/step-N in the run's folder, with TensorBoard's files among the training's; else ./report)", group="output")
    scores_out: str | None = flag(None, "JSONL file for the rewards of every pair, with the dialogue", group="output")
    score: str | None = flag(None, "instead of a report: read prompts and replies from this JSONL file (- for standard input) and write them with their rewards to standard output", group="output")
    best_of: bool = flag(False, "with --score: pick the reply with the highest reward in each row", group="output")

    max_length: int | None = flag(None, "longest sequence in tokens; longer ones are skipped and counted (default: the checkpoint's, else 2048)", minimum=8, below=2**31, group="speed and memory")
    batch_size: int = flag(64, "maximum number of pairs per batch", minimum=1, below=10**6, group="speed and memory")
    tokens_per_batch: int = flag(8192, "token budget of one forward; changes speed and memory only", minimum=1, below=2**31, group="speed and memory")
    precision: str = flag("fp32", "precision of matrix products: fp32 gives transformers' own rewards to 1e-5, bf16 is faster and coarser", choices=("fp32", "bf16"), group="speed and memory")

    debug: bool = flag(False, "show the traceback of an error", group="other")
    # fmt: on

    def problems(self) -> list[str]:
        """Settings that do not go together."""
        found = []
        if self.model is None:
            found.append("--model: expected a reward model, such as ./checkpoints/rm/RUN")
        found += shapes.column_problems(self.columns)
        if self.best_of and self.score is None:
            found.append("--best_of: needs --score")
        if self.score is not None:
            of_reports = (
                "dataset",
                "subset",
                "split",
                "subset_column",
                "max_pairs",
                "against",
                "report_dir",
                "scores_out",
            )
            given = [name for name in of_reports if getattr(self, name) != getattr(EvalConfig, name)]
            found += [f"--{name}: cannot be combined with --score, which writes no report" for name in given]
        if self.report_dir and Path(self.report_dir).is_file():
            found.append(f"--report_dir: {self.report_dir} is a file, expected a folder")
        if self.scores_out and Path(self.scores_out).is_dir():
            found.append(f"--scores_out: {self.scores_out} is a folder, expected a file")
        return found


def main(argv: list[str]) -> None:
    given, problems = flags.read_flags(EvalConfig, argv, __doc__.split("\n\n")[0])
    config = flags.build_config(EvalConfig, given, problems)
    if config.score is not None:
        score_lines(config)
        return
    job = make_job(config)
    with utils.StopRequest() as stop:
        content = evaluator.evaluate_model(job, stop.check)
    show(content, job)


def make_job(config: EvalConfig) -> evaluator.EvalJob:
    """What the flags ask for. Every problem with names, folders and files is found here, before anything is scored."""
    folder = resolve.find_model(config.model)
    other = resolve.find_model(config.against, "--against") if config.against else None
    if other and other.resolve() == folder.resolve():
        raise UserError(
            "--against names the model itself", where=other, safe="nothing was scored",
            next="another one, such as an earlier step-N of the run",
        )  # fmt: skip
    check_base_model(config.base_model, *filter(None, (folder, other)))
    model = evaluator.saved_model(config.model, folder, config.base_model)
    against = other and evaluator.saved_model(config.against, other, config.base_model)
    settings = resolve.training_settings(folder)
    trained = [found for found in (trained_on(path) for path in (folder, other) if path) if found]
    spec = data_spec(config, settings)
    data = eval_data.sample(eval_data.find(spec, config.split, config.subset_column, trained), config.max_pairs)
    report_dir, tensorboard_dir = evaluator.output_folders(folder, config.report_dir)
    scores_out = evaluator.find_scores_file(config.scores_out, data, report_dir) if config.scores_out else None
    for place, name in ((report_dir, "the report's folder"), (tensorboard_dir, "TensorBoard's folder")):
        evaluator.check_writable(place, name, "--report_dir FOLDER")
    untrained, why_not = evaluator.untrained_model(folder) if config.untrained_baseline else (None, "")
    sampled = f"{config.max_pairs:,} rows asked for, spread over all" if config.max_pairs else ""
    notes = [note for note in (sampled, why_not) if note]
    for note in filter(None, [*data.notes, *notes, replacement_note(report_dir, data)]):
        print(note, flush=True)
    return evaluator.EvalJob(
        model, data, report_dir, tensorboard_dir, scoring_config(config, settings), against, untrained, scores_out,
        tuple(notes),
    )  # fmt: skip


def data_spec(config: EvalConfig, settings: dict[str, Any]) -> sources.DataSpec:
    """The data to evaluate on: what the flags say, else that of the training."""
    spec = spec_of_training(settings) or sources.DataSpec(DEFAULT_DATASET)
    if config.dataset:
        spec = sources.DataSpec(config.dataset)
    given = {"subset": config.subset, "columns": shapes.parse_columns(config.columns)}
    return dataclasses.replace(spec, **{name: value for name, value in given.items() if value})


def check_base_model(base_model: str | None, *folders: Path) -> None:
    if base_model and not any(pretrained.is_adapter(folder) for folder in folders):
        raise UserError(
            "--base_model is for LoRA checkpoints, and this is a whole model", where=folders[0], next="leave it out"
        )


def trained_on(folder: Path) -> eval_data.Trained | None:
    """What a checkpoint was trained on, as far as it says."""
    spec = spec_of_training(resolve.training_settings(folder))
    examples = checkpoint.read_examples(folder)
    pairs = frozenset(checkpoint.digests_of(examples).tolist()) if examples else None
    return eval_data.Trained(spec, pairs) if spec or pairs else None


def spec_of_training(settings: dict[str, Any]) -> sources.DataSpec | None:
    """The data that a checkpoint's settings name, if they are a training's."""
    if not isinstance(settings.get("dataset"), str):
        return None
    values = {name: settings.get(name) for name in ("dataset", "subset", "split", "test_split", "columns")}
    texts = {name: value if isinstance(value, str) else None for name, value in values.items()}
    return sources.DataSpec.of(SimpleNamespace(**texts))


def replacement_note(report_dir: Path, data: eval_data.Data) -> str | None:
    """A line if the report that is already there is about other data."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        old = utils.read_json(report_dir / report.JSON)
        if (old["dataset"], old["split"]) != (sources.seen_from_here(data.dataset), data.split):
            what = f"the report in {report_dir} is on {old['dataset']}, {old['split']}"
            return f"{what}, and will be replaced; to keep both, choose another --report_dir"
    return None


def scoring_config(config: EvalConfig, settings: dict[str, Any]) -> scorer.ScoringConfig:
    stored = settings.get("max_length")
    default = stored if isinstance(stored, int) and stored > 0 else scorer.ScoringConfig.max_length
    max_length = config.max_length or default
    return scorer.ScoringConfig(max_length, config.batch_size, config.tokens_per_batch, config.precision)


def show(content: dict[str, Any], job: evaluator.EvalJob) -> None:
    """Print the tables, and where the full report is."""
    rows = content["rows"]
    print(f"{content['model']} on {content['dataset']}, {content['split']}: {content['n']:,} of {rows['read']:,} rows")
    for line in rows["in_words"]:
        print(f"  {line}")
    report.show(content)
    print(f"\nreport: {job.report_dir / html_report.PAGE}\n        {job.report_dir / report.JSON}")
    if job.scores_out:
        print(f"scores: {job.scores_out}")
    logs = utils.seen_from_here(os.path.normpath(job.tensorboard_dir.parent))
    print(f"next:\n  tensorboard --logdir {logs}", flush=True)


def score_lines(config: EvalConfig) -> None:
    """`--score`: standard output gets data and nothing else."""
    with contextlib.redirect_stdout(sys.stderr):
        lines = score_stream.read(config.score, shapes.parse_columns(config.columns))
        folder = resolve.find_model(config.model)
        scoring = scoring_config(config, resolve.training_settings(folder))
        check_base_model(config.base_model, folder)
        ready = scorer.Scorer(evaluator.saved_model(config.model, folder, config.base_model).open(), scoring)
    counts = score_stream.score(ready, lines, config.best_of, config.score != "-", sys.stdout.buffer)
    skipped = f", {counts.skipped.total():,} skipped" if counts.skipped else ""
    print(f"{utils.counted(counts.scored, 'row')} scored{skipped}", file=sys.stderr)
    for reason, count in sorted(counts.skipped.items()):
        print(f"  {count:,} {parsing.SKIP_REASONS[reason]}", file=sys.stderr)
    for warning, count in sorted((+counts.warnings).items()):
        print(f"  {count:,} {parsing.WARNINGS[warning]}", file=sys.stderr)
    for column, count in sorted(counts.unused.items()):
        what = f"column {column!r} of {utils.counted(count, 'row')} looks like part of the dialogue"
        print(f"  not used: {what} (--columns says what columns are)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
