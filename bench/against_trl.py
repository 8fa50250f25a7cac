"""Training speed and peak memory compared with TRL's `RewardTrainer`, both measured on this machine.

    QWEN3_DIR=... HH_RLHF_DIR=... python bench/against_trl.py

Both sides train the same model (Qwen3's architecture and vocabulary, by default 4 layers of width 256) from the same
weights on the same token ids: the pairs of the project's first steps at its default settings, 128 real HH-RLHF pairs
per step, untruncated. Both use AdamW at the same learning rate, fp32 weights, bf16 autocast where the hardware
computes in bf16, the same clipping norm and, on a CPU, the same settings of the C library's heap. Gradient
checkpointing is off unless --gradient_checkpointing turns it on for both sides.

TRL runs twice: at the project's default sizes (32 pairs × 4 accumulated), and at the batch size at which it is fastest
here, which is searched for first, with as much accumulation as makes the step equally large. Each side is a separate
process, and they take turns, one step each. The first step is a warm-up, and its losses are compared. A step is timed
from start to end, including loading, collating and logging. Ratios are ratios of medians.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import harness
import needed_arithmetic
import project_worker
import trl_worker
from harness import Goal, Side, median
from modeling import devices

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
LOSS_TOLERANCE = 0.01  # bf16 has 8 bits: rewards around 1 are off by up to 0.004 on either side


def main() -> None:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ.setdefault("RL_WITH_RM_CACHE", str(work / "cache"))
        compared = Comparison(arguments, work)
        where = harness.machine()
        print(f"{harness.describe(where)}\n\n{compared.described()}\n", flush=True)
        found = compared.search_their_best()
        best = arguments.their_best or max(found, key=lambda batch_size: found[batch_size]["pairs_per_second"])
        measured = compared.measure(best) if arguments.steps else {}
    harness.write_json(arguments.json, {"machine": where, "search": found, "best": best, **measured})


def read_arguments() -> Any:
    parser = harness.parser(__doc__)
    harness.add_model_flags(parser)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per side (default 3; 0: only the search)")
    parser.add_argument("--their_best", type=int, default=0, help="TRL's best batch size, if known (0: search)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=BATCH_SIZES, help="TRL's batch sizes to try")
    parser.add_argument(
        "--batch_size", type=int, default=project_worker.defaults().batch_size,
        help="pairs in each of TRL's batches in the first comparison (32, which wants 40 GB with a real model)",
    )  # fmt: skip
    parser.add_argument(
        "--grad_accum", type=int, default=project_worker.defaults().grad_accum, help="steps of batch size × this (4)"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides; four steps warm up")
    parser.add_argument("--sorted", action="store_true", help="give TRL the pairs of each step sorted by length")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.hidden, arguments.steps = 1, 128, 1
        arguments.batch_size, arguments.grad_accum = 4, 2
    return arguments


class Comparison:
    """One comparison: its model and pairs, on disk, and the two sides that train on them."""

    def __init__(self, arguments: Any, work: Path):
        self.arguments, self.work = arguments, work
        self.base, self.dataset, self.model = harness.base_model(arguments, work)
        self.key = harness.CLOCKS[arguments.clock]
        self.examples_per_step = arguments.batch_size * arguments.grad_accum
        self.pairs, _ = project_worker.load_pairs(self.dataset, self.base)
        self.warm_up = 4 if arguments.compile else 1  # new shapes: guards of compiled code fail once or twice more
        self.steps = self.warm_up + max(1, arguments.steps)
        if self.steps * self.examples_per_step > len(self.pairs):
            sys.exit(
                f"{self.steps} steps of {self.examples_per_step} pairs are more than the {len(self.pairs)} there are"
            )
        self.indices = project_worker.pairs_of_steps(len(self.pairs), self.examples_per_step, self.steps)
        lengths = self.pairs.longest_sides()
        order = [step[lengths[step].argsort()] if arguments.sorted else step for step in self.indices]
        self.ids = str(trl_worker.write_ids(self.pairs, np.concatenate(order), work / "ids.json"))

    def described(self) -> str:
        a = self.arguments
        checkpointing = "with" if a.gradient_checkpointing else "without"
        order = ", sorted by length within a step for TRL" if a.sorted else ""
        return (
            f"{self.model}, {self.examples_per_step} pairs a step{order}, "
            f"{devices.fastest_precision(devices.pick_device())}, {checkpointing} gradient checkpointing, "
            f"{'with' if a.compile else 'without'} torch.compile, "
            f"{a.steps} timed steps of each side in turn after {self.warm_up} to warm up, {a.clock} time"
        )

    def ours(self) -> Side:
        a = self.arguments
        sizes = ("--batch_size", str(a.batch_size), "--grad_accum", str(a.grad_accum))
        compiled = ("--compile",) if a.compile else ()
        return project_worker.side(
            "train", self.base, self.dataset, self.work, a.gradient_checkpointing, *sizes, *compiled
        )

    def theirs(self, batch_size: int) -> Side:
        accumulated = self.examples_per_step // batch_size
        a = self.arguments
        switches = a.gradient_checkpointing, a.compile
        return trl_worker.side("train", self.base, self.ids, self.work, batch_size, accumulated, *switches)

    def search_their_best(self) -> dict[int, dict[str, float]]:
        """TRL's pairs per second and peak memory by batch size, on the same two steps; the second one is timed."""
        if self.arguments.their_best:
            return {}
        found, rows = {}, []
        sizes = [size for size in self.arguments.batch_sizes if size <= self.arguments.batch_size]
        for batch_size in sizes[-2:] if self.arguments.quick else sizes:
            with self.theirs(batch_size) as side:
                answer = harness.in_turn({f"TRL at {batch_size}": side}, 2, do="step")[f"TRL at {batch_size}"][-1]
                side.end()
            rate = self.examples_per_step / answer[self.key]
            found[batch_size] = {"pairs_per_second": rate, "peak_gib": answer["peak_gib"]}
            accumulated = f"{batch_size} × {self.examples_per_step // batch_size}"
            rows.append([accumulated, f"{rate:.1f}", f"{answer['cpu_seconds']:.1f} s", f"{answer['peak_gib']:.2f} GiB"])
        columns = ("TRL, batch × accumulated", "pairs/s", "processor time", "peak memory")
        print(harness.table(columns, rows) + "\n", flush=True)
        return found

    def measure(self, best: int) -> dict[str, Any]:
        """The project, TRL at the defaults and TRL at its best take turns; prints tables and returns their content."""
        default = self.arguments.batch_size
        sides = {"ours": self.ours(), "TRL": self.theirs(default)}
        if best != default:
            sides["TRL at its best"] = self.theirs(best)
        try:
            answers = harness.in_turn(sides, self.steps, do="step")
            ends = {name: side.end() for name, side in sides.items()}
        finally:
            for side in sides.values():
                side.__exit__()
        timed = {name: found[self.warm_up :] for name, found in answers.items()}
        for name in ("TRL", "TRL at its best"):
            timed.setdefault(name, timed["TRL"])
            ends.setdefault(name, ends["TRL"])
        goals = self.goals(timed, ends, best)
        difference = abs(ends["ours"]["loss"][0] - ends["TRL"]["loss"][0])
        agrees = difference <= LOSS_TOLERANCE
        print(harness.goal_table(goals))
        print(
            f"\nloss of the first step: {ends['ours']['loss'][0]:.5f}, TRL {ends['TRL']['loss'][0]:.5f}: "
            + (f"agree to bf16's {LOSS_TOLERANCE}" if agrees else f"differ by {difference:.5f}")
        )
        arithmetic = self.arithmetic(timed)
        measured = {"steps": answers, "ends": ends, "goals": goals, "arithmetic": arithmetic}
        if not agrees:
            harness.write_json(self.arguments.json, measured)
            sys.exit("the two sides did not compute the same: nothing above counts")
        return measured

    def goals(self, timed: dict[str, Any], ends: dict[str, Any], best: int) -> list[Goal]:
        default, pairs = self.arguments.batch_size, self.examples_per_step

        def rate(name: str) -> str:
            return f"{pairs / median(timed[name], self.key):.1f} pairs/s"

        def faster(name: str) -> float:
            return median(timed[name], self.key) / median(timed["ours"], self.key)

        def peak(name: str) -> float:
            return max(answer["peak_gib"] for answer in timed[name])

        # needed in both: a prompt read once, nothing padded
        needed = sum(int(self.pairs.packed_lengths[step].sum()) for step in self.indices)
        useful = {
            name: needed / (len(self.indices) * pairs) * ends[name]["pairs"] / ends[name]["tokens"]
            for name in ("TRL", "TRL at its best")
        }
        useful["ours"] = sum(ends["ours"]["useful"]) / len(ends["ours"]["useful"])
        at_default, at_best = f"TRL at {default} × {pairs // default}", f"TRL at its best, {best} × {pairs // best}"
        return [
            Goal(f"training against {at_default}", rate("ours"), rate("TRL"), faster("TRL"), 8),
            Goal(f"training against {at_best}", rate("ours"), rate("TRL at its best"), faster("TRL at its best"), 3.3),
            Goal(
                f"peak memory against {at_default}", f"{peak('ours'):.2f} GiB", f"{peak('TRL'):.2f} GiB",
                peak("ours") / peak("TRL"), 0.25, at_least=False,
            ),
            Goal(
                f"tokens needed of those computed ({at_default})", f"{useful['ours']:.1%}", f"{useful['TRL']:.1%}",
                useful["ours"], 0.97, form="{:.3f}",
            ),
            Goal(
                f"the same ({at_best})", f"{useful['ours']:.1%}", f"{useful['TRL at its best']:.1%}",
                useful["ours"], 0.97, form="{:.3f}",
            ),
        ]  # fmt: skip

    def arithmetic(self, timed: dict[str, Any]) -> dict[str, Any]:
        """Print processor time, memory and useful arithmetic of each side; return the latter."""
        import torch

        device = devices.pick_device()
        lengths = self.pairs.lengths
        model = needed_arithmetic.skeleton(self.base)
        flops = [needed_arithmetic.needed_flops(model, lengths[step]) for step in self.indices[self.warm_up :]]
        quick = ((256,), 0.05) if self.arguments.quick else ()
        product = harness.matmul_tflops(device, torch.bfloat16, *quick, key=self.key)
        peak = harness.PEAK_TFLOPS.get(harness.machine()["device_name"])
        found, rows = {"matmul_tflops": product, "peak_tflops": peak}, []
        for name, answers in timed.items():
            achieved = sum(flops) / sum(answer[self.key] for answer in answers) / 1e12
            found[name] = achieved
            of_peak = f"{achieved / peak:.1%}" if peak else "–"
            rows.append([
                name, f"{median(answers):.2f} s", f"{median(answers, 'cpu_seconds'):.2f} s",
                f"{answers[-1]['peak_gib']:.2f} GiB", f"{1000 * achieved:.1f}", f"{achieved / product:.1%}", of_peak,
            ])  # fmt: skip
        columns = ("side", "step", "processor time", "peak memory", "useful GFLOP/s",
                   f"of this machine's own matrix product, {1000 * product:.0f}", "MFU")  # fmt: skip
        print("\n" + harness.table(columns, rows), flush=True)
        return found


if __name__ == "__main__":
    main()
