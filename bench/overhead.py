"""Overhead of a training: the time `--help` takes, and the share of a run spent on logging and saving.

    QWEN3_DIR=... HH_RLHF_DIR=... python bench/overhead.py

At the default settings a run logs every step, evaluates every 50 and saves every 500. Because 500 steps would take
hours on a CPU, each of these is timed separately, with the run's own code and files: writing TensorBoard events, with
the file closed at the end so that its thread's work counts; the histograms and the record of an evaluation of the real
size; and whole checkpoints, which are written, read back, hashed and published. A step is timed in the real loop. Then

    share = extra / (step without its log + extra), where extra = log + evaluation / eval_steps + save / save_steps

The evaluations' forward passes are not overhead in this sense; `evaluation_against_trl.py` times them. A larger model
takes longer to save, but its steps grow even more. A GPU has shorter steps while the disk stays the same.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import project_worker
from harness import Goal


def main() -> None:
    parser = harness.parser(__doc__)
    harness.add_model_flags(parser)
    arguments = parser.parse_args()
    key, flags = harness.CLOCKS[arguments.clock], ()
    steps, times, saves, starts, eval_pairs = 3, 200, 3, 7, 32
    if arguments.quick:
        arguments.layers, arguments.hidden, flags = 1, 128, ("--batch_size", "4", "--grad_accum", "1")
        steps, times, saves, starts, eval_pairs = 2, 3, 1, 1, 4
    where = harness.machine()
    print(f"{harness.describe(where)}\n", flush=True)
    help_seconds = [time_help(key) for _ in range(starts)]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ.setdefault("RL_WITH_RM_CACHE", str(work / "cache"))
        base, dataset, _ = harness.base_model(arguments, work)
        with project_worker.side("log_and_save", base, dataset, work, False, *flags) as side:
            config = project_worker.defaults()
            found = side.ask(do="measure", key=key, steps=steps, times=times, saves=saves, eval_pairs=eval_pairs)
            side.end()
    step, save = statistics.median(found["steps"][1:]), statistics.median(found["saves"])
    log = found["log"]
    rows = [
        ["a step", f"{step:.2f} s", "1", f"{step:.4f} s"],
        ["its log: TensorBoard and the line", f"{1000 * log:.2f} ms", "1", f"{log:.4f} s"],
        ["noting an evaluation", f"{1000 * found['eval_log']:.1f} ms", f"1/{config.eval_steps}",
         f"{found['eval_log'] / config.eval_steps:.4f} s"],
        [f"a checkpoint of {found['checkpoint_bytes'] / 2**20:,.0f} MiB", f"{save:.2f} s", f"1/{config.save_steps}",
         f"{save / config.save_steps:.4f} s"],
    ]  # fmt: skip
    beside = log + found["eval_log"] / config.eval_steps + save / config.save_steps
    share = beside / (step - log + beside)  # a step of the real loop already includes its log
    started = statistics.median(help_seconds)
    goals = [
        Goal("train_rm.py --help", f"{started:.2f} s", "–", started, 1.0, at_least=False),
        Goal("share of a run in logging and saving", f"{share:.2%}", "–", share, 0.03, at_least=False, form="{:.4f}"),
    ]
    print(harness.goal_table(goals))
    print(f"\n{arguments.layers} layers × {arguments.hidden}, {arguments.clock} time; medians\n")
    print(harness.table(("what", "takes", "times a step", "in a step"), rows))
    harness.write_json(
        arguments.json, {"machine": where, "help_seconds": help_seconds, **found, "share": share, "goals": goals}
    )


def time_help(key: str) -> float:
    """Seconds of one `train_rm.py --help`, from start to end."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, str(harness.ROOT / "train_rm.py"), "--help"], check=True, stdout=subprocess.DEVNULL)
    passed, after = time.perf_counter() - started, os.times()
    if key == "seconds":
        return passed
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
