"""Evaluating the whole test split, and scoring its file, compared with TRL's `RewardTrainer.evaluate`.

    QWEN3_DIR=... HH_RLHF_DIR=... python bench/evaluation_against_trl.py

Both sides score the same pairs with the same model, in fp32, and report loss and accuracy. TRL is tried at
several batch sizes (8 is its default). Then it takes turns with the project at its fastest, one whole evaluation each;
the first of each is a warm-up. Evaluating is what training does, from token ids in memory to the final metrics, on
both sides. Scoring is what `eval_rm.py` does, starting from the file, so only this project reads and tokenizes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import harness
import project_worker
import trl_worker
from harness import Goal, median

JUDGED = (8, 32)  # the goal is against the better of these
LOSS_TOLERANCE = 0.01  # as in against_trl.py


def main() -> None:
    parser = harness.parser(__doc__)
    harness.add_model_flags(parser)
    parser.add_argument("--rounds", type=int, default=3, help="timed evaluations of each side (default 3)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[2, 4, 8, 32], help="TRL's batch sizes to try")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ.setdefault("RL_WITH_RM_CACHE", str(work / "cache"))
        if arguments.quick:
            arguments.layers, arguments.hidden, arguments.rounds, arguments.batch_sizes = 1, 128, 1, [8]
        where = harness.machine()
        print(f"{harness.describe(where)}\n", flush=True)
        base, dataset, described = harness.base_model(arguments, work)
        if arguments.quick:
            dataset = harness.first_rows(dataset, work / "few", 16)
        _, pairs = project_worker.load_pairs(dataset, base)
        ids = str(trl_worker.write_ids(pairs, np.arange(len(pairs)), work / "ids.json"))
        print(f"{described}, {len(pairs)} test pairs, {arguments.clock} time\n", flush=True)
        found = try_batch_sizes(arguments, base, ids, work)
        judged = min((size for size in found if size in JUDGED), key=found.get, default=min(found, key=found.get))
        sides = {
            "ours": project_worker.side("evaluate", base, dataset, work),
            "ours, from a file": project_worker.side("score_file", base, dataset, work, False, "--run_name", "scored"),
            **{f"TRL at {size}": trl_worker.side("evaluate", base, ids, work, size)
               for size in dict.fromkeys((judged, min(found, key=found.get)))},
        }  # fmt: skip
        answers = compare(sides, 1 + arguments.rounds)
    goals = report(answers, len(pairs), judged, harness.CLOCKS[arguments.clock])
    harness.write_json(arguments.json, {"machine": where, "search": found, "answers": answers, "goals": goals})
    losses = {name: found[-1]["loss"] for name, found in answers.items()}
    found = (f"{name}: loss {losses[name]:.5f}, accuracy {answers[name][-1]['accuracy']:.4f}" for name in answers)
    print("\n" + "; ".join(found))
    if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE:
        sys.exit("the sides did not compute the same: nothing above counts")


def try_batch_sizes(arguments: Any, base: str, ids: str, work: Path) -> dict[int, float]:
    """Seconds of TRL's second evaluation at each batch size."""
    sizes = arguments.batch_sizes
    if len(sizes) == 1:
        return {sizes[0]: 0.0}
    found = {}
    for size in sizes:
        answers = compare({f"TRL at {size}": trl_worker.side("evaluate", base, ids, work, size)}, 2)
        found[size] = answers[f"TRL at {size}"][-1][harness.CLOCKS[arguments.clock]]
    rows = [[str(size), f"{seconds:.2f} s"] for size, seconds in found.items()]
    print(harness.table(("TRL's batch size", "one evaluation"), rows) + "\n", flush=True)
    return found


def compare(sides: dict[str, harness.Side], rounds: int) -> dict[str, Any]:
    """The answers of `rounds` evaluations of each side, taking turns."""
    try:
        answers = harness.in_turn(sides, rounds, do="evaluate")
        for side in sides.values():
            side.end()
        return answers
    finally:
        for side in sides.values():
            side.__exit__()


def report(answers: dict[str, Any], pairs: int, judged: int, key: str) -> list[Goal]:
    """Print and return the comparison; only TRL at batch size `judged` counts towards the goals."""
    timed, goals = {name: found[1:] for name, found in answers.items()}, []
    for name in [name for name in timed if not name.startswith("ours")]:
        other, peak = median(timed[name], key), max(answer["peak_gib"] for answer in timed[name])
        wanted = 5 if name == f"TRL at {judged}" else None
        for what, mine in (("evaluation", "ours"), ("scoring a file", "ours, from a file")):
            seconds, my_peak = median(timed[mine], key), max(answer["peak_gib"] for answer in timed[mine])
            rates = f"{pairs / seconds:.1f} pairs/s", f"{pairs / other:.1f} pairs/s"
            goals += [
                Goal(f"{what} against {name}", *rates, other / seconds, wanted),
                Goal("its peak memory", f"{my_peak:.2f} GiB", f"{peak:.2f} GiB", my_peak / peak, None),
            ]
    print(harness.goal_table(goals))
    return goals


if __name__ == "__main__":
    main()
