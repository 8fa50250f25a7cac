"""What a pretrained model learns from real pairs: recipes, each with several seeds, beside TRL's, in one table.

    python bench/recipes.py --model real-model [--recipes full lora] [--trl] [--seeds 0 1 2] [--work FOLDER]

Each run is one epoch over HH_RLHF_DIR with 16 × 2 pairs a step, and at its end every test pair is scored by
`eval_rm.py`. A recipe is a name and words of `train_rm.py`'s command line, such as `--recipes full lora
"lora 5e-4: --lora --lr 5e-4"`; `full` and `lora` are the documented defaults. `head=0.02` among the words draws the new
head with that fraction of the default's deviation.

With `--trl` TRL's `RewardTrainer` follows each run: the same token ids in the same order, the same steps, learning rate
and adapters, 1 × 32 pairs at a time (where it is fastest with this model), and a head as transformers draws it.

Runs that are finished in FOLDER (default ./recipes) are not made again, so a stopped comparison goes on where it was.
`--plot FILE` draws the training loss of each recipe and side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import harness
import project_worker
import trl_worker

DEFAULTS = {"full": "", "lora": "--lora"}
COMMON = "--batch_size 16 --grad_accum 2 --eval_num_batches 0 --eval_steps 0 --save_steps 0 --no_report"
PAIRS_PER_STEP = 32
SMOOTHED_STEPS = 5  # in the plot
START = """
import sys
sys.path.insert(0, {root!r})
import models, train_rm, utils
models.HEAD_SCALE = {head}
sys.exit(utils.run_script(train_rm.main))
"""


def parse(recipe: str) -> tuple[str, float | None, list[str]]:
    """A recipe's name, the scale of its head and its words."""
    name, _, words = recipe.partition(":")
    parts = shlex.split(words or DEFAULTS.get(name, ""))
    heads = [float(word.removeprefix("head=")) for word in parts if word.startswith("head=")]
    return name.strip(), heads[0] if heads else None, [word for word in parts if not word.startswith("head=")]


class Learning:
    """The runs of a comparison, each made once."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.work = options, options.work.resolve()
        self.model = str(options.model.resolve())
        self.dataset = os.environ.get("HH_RLHF_DIR") or sys.exit("set HH_RLHF_DIR to the folder of HH-RLHF's files")
        self.work.mkdir(parents=True, exist_ok=True)

    def result(self, side: str, recipe: str, seed: int) -> dict[str, Any]:
        """One run's figures: from its file, or trained and scored now."""
        train: Callable[..., tuple[Path, dict[str, Any]]] = {"ours": self.train, "TRL": self.train_trl}[side]
        name, head, words = parse(recipe)
        run = re.sub(r"[^\w.-]+", "-", f"{name}-{side}-seed{seed}")
        figures = self.work / f"{run}.json"
        if not figures.is_file():
            print(f"{run}: {' '.join(words) or 'defaults'}", flush=True)
            folder, found = train(run, seed, words, head)
            found |= {"recipe": name, "side": side, "seed": seed, **self.score(folder, run)}
            figures.write_text(json.dumps(found, indent=1))
        return json.loads(figures.read_text())

    def train(self, run: str, seed: int, words: list[str], head: float | None) -> tuple[Path, dict[str, Any]]:
        start = START.format(root=str(harness.ROOT), head="models.HEAD_SCALE" if head is None else head)
        # the evaluation at its end is of one batch: all pairs are scored afterwards
        flags = [*shlex.split(COMMON.replace("batches 0", "batches 1")), *self.flags(run, seed), *words]
        self.call([sys.executable, "-c", start, *flags], run)
        scalars = project_worker.scalars_of(self.work / "logs/rm" / run)
        times = scalars["train/step_time"]
        step = self.work / "checkpoints/rm" / run / f"step-{len(times)}"
        return step, {"times": times, "losses": scalars["train/loss"], "peak_gib": scalars["train/peak_memory_gib"][-1]}

    def train_trl(self, run: str, seed: int, words: list[str], head: float | None) -> tuple[Path, dict[str, Any]]:
        config = project_worker.config_of([*shlex.split(COMMON), *self.flags(run, seed), *words])
        train_pairs, _ = project_worker.load_pairs(self.dataset, self.model)
        indices = project_worker.pairs_of_run(config, len(train_pairs))
        ids = str(trl_worker.write_ids(train_pairs, indices, self.work / f"{run}.ids"))
        with trl_worker.side(
            "learn", self.model, ids, self.work, 1, PAIRS_PER_STEP, lr=config.lr, seed=seed,
            folder=str(self.work / run), lora=project_worker.lora_settings(config),
        ) as side:  # fmt: skip
            answer = side.end()
        Path(ids).unlink()
        found = {"times": answer["times"], "losses": answer["loss"][: len(answer["times"])]}
        return self.work / run, found | {"peak_gib": answer["peak_gib"]}

    def flags(self, run: str, seed: int) -> list[str]:
        limit = ["--max_steps", str(self.options.max_steps)] if self.options.max_steps else []
        return ["--model", self.model, "--dataset", self.dataset, "--seed", str(seed), "--run_name", run, *limit]

    def score(self, folder: Path, run: str) -> dict[str, Any]:
        """Accuracy and loss on every test pair, by eval_rm.py, for both sides."""
        out = self.work / f"{run}-report"
        words = [
            "--model",
            str(folder),
            "--dataset",
            self.dataset,
            "--split",
            "test",
            "--report_dir",
            str(out),
            "--no_untrained_baseline",
        ]
        self.call([sys.executable, str(harness.ROOT / "eval_rm.py"), *words], f"{run}-report")
        report = json.loads((out / "report.json").read_text())
        return {
            "accuracy": report["accuracy"], "pairs": report["n"],
            "loss": report["calibration"]["log_loss"], "prefers_longer": report["length"]["model_prefers_longer"],
        }  # fmt: skip

    def call(self, command: list[str], name: str) -> None:
        with open(self.work / f"{name}.log", "w") as log:
            done = subprocess.run(command, cwd=self.work, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"{name} ended with {done.returncode}; see {log.name}")


def grouped(results: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault((result["recipe"], result["side"]), []).append(result)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """One line for each recipe and side: means over the seeds, and the accuracy of each."""
    lines = [
        "| recipe | side | steps | accuracy | by seed | loss | prefers the longer | training | pairs/s | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (recipe, side), runs in grouped(results).items():
        seeds = ", ".join(f"{run['accuracy']:.1%}" for run in runs)
        accuracy, loss, longer, peak = (
            statistics.mean(run[key] for run in runs) for key in ("accuracy", "loss", "prefers_longer", "peak_gib")
        )
        seconds = statistics.mean(sum(run["times"]) for run in runs)
        rate = PAIRS_PER_STEP / statistics.median(itertools.chain.from_iterable(run["times"] for run in runs))
        lines.append(
            f"| {recipe} | {side} | {len(runs[0]['times'])} | {accuracy:.1%} | {seeds} | {loss:.3f} | {longer:.0%} "
            f"| {seconds:.0f} s | {rate:.2f} | {peak:.1f} GiB |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """The training loss by step, the mean over the seeds, smoothed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (recipe, side), runs in grouped(results).items():
        shortest = min(len(run["losses"]) for run in runs)
        mean = np.mean([run["losses"][:shortest] for run in runs], axis=0)
        width = min(SMOOTHED_STEPS, shortest)
        smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(width, shortest + 1), smooth, label=f"{recipe}, {side}", ls="-" if side == "ours" else "--")
    axes.axhline(math.log(2), color="grey", lw=1, ls=":", label="guessing")
    axes.set(xlabel=f"step of {PAIRS_PER_STEP} pairs", ylabel=f"training loss, mean of {SMOOTHED_STEPS} steps")
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained model")
    parser.add_argument("--recipes", nargs="+", default=list(DEFAULTS), help="names, or NAME: WORDS")
    parser.add_argument("--trl", action="store_true", help="TRL's RewardTrainer beside each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=0, help="0 = one epoch")
    parser.add_argument("--work", type=Path, default=Path("recipes"), help="where runs and figures are kept")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the training losses into a PNG file")
    options = parser.parse_args()
    learning, results = Learning(options), []
    print(harness.describe(harness.machine()), flush=True)
    for seed in options.seeds:
        for recipe in options.recipes:
            for side in ("ours", "TRL") if options.trl else ("ours",):
                results.append(learning.result(side, recipe, seed))
                print(table(results), flush=True)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
