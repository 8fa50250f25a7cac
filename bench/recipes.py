"""What a pretrained model learns from real pairs: recipes, each with several seeds, in one table.

    python bench/recipes.py --model real-model [--recipes full lora] [--seeds 0 1 2] [--work FOLDER]

Each run is one epoch of `train_rm.py` over HH_RLHF_DIR with 16 × 2 pairs a step, and its report on every test pair at
the end. A recipe is a name and words of `train_rm.py`'s command line, such as `--recipes full lora
"lora 5e-4: --lora --lr 5e-4"`; `full` and `lora` are the documented defaults. `head=0.02` among the words draws the new
head with that fraction of the default's deviation.

Runs that are finished in FOLDER (default ./recipes) are not made again, so a stopped comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness

DEFAULTS = {"full": "", "lora": "--lora"}
COMMON = "--batch_size 16 --grad_accum 2 --eval_num_batches 0 --eval_steps 0 --save_steps 0"
FASTER = "--no_gradient_checkpointing --tokens_per_batch 1536"  # the same result
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


def train(recipe: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run's figures, from its report; trained now unless it is there."""
    name, head, words = parse(recipe)
    work = options.work.resolve()
    run = re.sub(r"[^\w.-]+", "-", name) + f"-seed{seed}"
    figures = work / f"{run}.json"
    if figures.is_file():
        return json.loads(figures.read_text())
    dataset = os.environ.get("HH_RLHF_DIR") or sys.exit("set HH_RLHF_DIR to the folder of HH-RLHF's files")
    start = START.format(root=str(harness.ROOT), head="models.HEAD_SCALE" if head is None else head)
    flags = [*shlex.split(f"{COMMON} {FASTER}"), "--model", str(options.model.resolve()), "--dataset", dataset,
             "--seed", str(seed), "--run_name", run, *words]  # fmt: skip
    if options.max_steps:
        flags += ["--max_steps", str(options.max_steps)]
    print(f"{run}: {' '.join(words) or 'defaults'}", flush=True)
    started = time.monotonic()
    with open(work / f"{run}.log", "w") as log:
        done = subprocess.run([sys.executable, "-c", start, *flags], cwd=work, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{run} ended with {done.returncode}; see {log.name}")
    record = json.loads((work / "checkpoints/rm" / run / "run.json").read_text())
    step = record["step"]
    report = json.loads((work / f"checkpoints/rm/{run}/reports/step-{step}/report.json").read_text())
    longer = report["length"]["model_prefers_longer"]
    found = {
        "recipe": name, "seed": seed, "steps": step, "accuracy": report["accuracy"], "pairs": report["pairs"],
        "loss": report["calibration"]["log_loss"], "prefers_longer": longer, "seconds": time.monotonic() - started,
    }  # fmt: skip
    figures.write_text(json.dumps(found, indent=1))
    return found


def table(results: list[dict[str, Any]]) -> str:
    """One line a recipe: the mean accuracy, that of each seed, and the mean loss."""
    lines = ["| recipe | steps | accuracy | by seed | loss | seconds |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(result["recipe"] for result in results):
        runs = [result for result in results if result["recipe"] == name]
        seeds = ", ".join(f"{run['accuracy']:.1%}" for run in runs)
        accuracy, loss, seconds = (statistics.mean(run[key] for run in runs) for key in ("accuracy", "loss", "seconds"))
        lines.append(f"| {name} | {runs[0]['steps']} | {accuracy:.1%} | {seeds} | {loss:.3f} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained model")
    parser.add_argument("--recipes", nargs="+", default=list(DEFAULTS), help="names, or NAME: WORDS")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=0, help="0 = one epoch")
    parser.add_argument("--work", type=Path, default=Path("recipes"), help="where runs and figures are kept")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in options.seeds:
        for recipe in options.recipes:
            results.append(train(recipe, seed, options))
            print(table(results), flush=True)


if __name__ == "__main__":
    main()
