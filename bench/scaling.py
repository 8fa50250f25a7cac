"""How time and memory grow with the length of the sequences, the pairs per step and the width of the model.

    QWEN3_DIR=... HH_RLHF_DIR=... python bench/scaling.py

Starting from 4 layers × 256 and 32 pairs per step, one quantity changes at a time. Pairs of a given length are made by
cutting and joining real HH-RLHF dialogues, so that both sides have about that many tokens and the same share of them is
in the prompt as in the real pairs. The other two sweeps use real pairs. TRL runs on the same ids at the given batch
size, until one of its steps would take longer than --their_seconds (estimated from its last step and the growth of its
padded tokens and of the weights).

The goal is that time grows no faster than the useful work (`needed_arithmetic.needed_flops`): from the smallest to the
largest size, the growth of a step's time divided by the growth of its work is at most 1. Draws docs/scaling.png, with
the useful work as a line starting at the first point. Sweeps can be measured separately: the other sweeps in
--json FILE are kept and drawn.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import harness
import needed_arithmetic
import project_worker
import trl_worker
from harness import Goal, Shape, median
from modeling import devices

SWEEPS = {
    "length": ("tokens a side", (128, 256, 512, 1024, 2048)),
    "pairs": ("pairs in a step", (32, 64, 128, 256, 512)),
    "width": ("width of the model", (128, 256, 512, 1024)),
}
LEAST_TEMPLATE = 24  # tokens of the chat template around a prompt and a reply
PICTURE = harness.ROOT / "docs" / "scaling.png"


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--sweeps", nargs="*", choices=SWEEPS, default=list(SWEEPS), help="sweeps to measure (default: all)"
    )
    parser.add_argument("--largest", type=int, default=2048, help="skip larger sizes (default 2048)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default 4)")
    parser.add_argument("--hidden", type=int, default=256, help="width in the other sweeps (default 256)")
    parser.add_argument("--pairs", type=int, default=32, help="pairs per step in the other sweeps (default 32)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one warm-up step (default 2)")
    parser.add_argument("--their_batch", type=int, default=4, help="TRL's batch size (default 4; 0: without TRL)")
    parser.add_argument("--their_seconds", type=float, default=20, help="skip longer steps of TRL (default 20)")
    parser.add_argument("--png", type=Path, default=PICTURE, help="where to draw (default docs/scaling.png)")
    arguments = parser.parse_args()
    qwen3, dataset = harness.inputs()
    if arguments.quick and arguments.png == PICTURE:
        parser.error("--quick would overwrite the real picture: name another file with --png")
    sizes = {name: tuple(size for size in SWEEPS[name][1] if size <= arguments.largest) for name in arguments.sweeps}
    if arguments.quick:
        arguments.layers, arguments.hidden, arguments.pairs, arguments.steps = 1, 128, 2, 1
        arguments.their_seconds, sizes = 0, {"length": (64, 128), "pairs": (2, 4)}  # TRL once in each
    where, found = harness.machine(), kept(arguments.json)
    print(f"{harness.describe(where)}\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ.setdefault("RL_WITH_RM_CACHE", str(work / "cache"))
        measuring = Measuring(arguments, qwen3, dataset, work) if sizes else None
        for sweep in sizes:
            points = measuring.sweep(sweep, sizes[sweep])
            found[sweep] = {"machine": where, "setting": setting(sweep, arguments), "points": points}
            print(points_table(sweep, points, measuring.product) + "\n", flush=True)
    if not found:
        parser.error("nothing was measured, and --json FILE has nothing to draw")
    goals = [growth(sweep, found[sweep]["points"]) for sweep in found]
    print(harness.table(("goal", "time grew", "useful work grew", "ratio", "wanted", "met"), [g.row() for g in goals]))
    harness.write_json(arguments.json, found)
    draw(found, arguments)
    print(f"\ndrawn: {arguments.png}")


def setting(sweep: str, arguments: Any) -> str:
    """What stays the same in a sweep, and which clock is used."""
    fixed = {
        "length": f"{arguments.pairs} pairs a step, width {arguments.hidden}",
        "pairs": f"real pairs, width {arguments.hidden}",
        "width": f"{arguments.pairs} real pairs a step",
    }
    return f"{fixed[sweep]}, {arguments.clock} time"


def kept(path: Path | None) -> dict[str, Any]:
    """The sweeps of an earlier measurement, from its JSON file."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


class Measuring:
    """Measures points; each is a model, pairs and a step size, in new processes."""

    def __init__(self, arguments: Any, qwen3: str, dataset: str, work: Path):
        import torch

        self.arguments, self.qwen3, self.dataset, self.work = arguments, qwen3, dataset, work
        self.key, self.bases = harness.CLOCKS[arguments.clock], {}
        quick = ((256,), 0.05) if arguments.quick else ()
        self.product = harness.matmul_tflops(devices.pick_device(), torch.bfloat16, *quick, key=self.key)
        self.real, _ = project_worker.load_pairs(dataset, self.base(arguments.hidden))

    def base(self, hidden: int) -> str:
        if hidden not in self.bases:
            shape = Shape(hidden, self.arguments.layers)
            self.bases[hidden] = str(harness.write_base(self.qwen3, self.work / f"base-{hidden}", shape))
        return self.bases[hidden]

    def sweep(self, sweep: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
        points: list[dict[str, Any]] = []
        for size in sizes:
            hidden = size if sweep == "width" else self.arguments.hidden
            pairs = size if sweep == "pairs" else self.arguments.pairs
            dataset = self.dataset
            if sweep == "length":
                rows = pairs * (1 + self.arguments.steps)
                dataset = pairs_of_length(self.real, self.base(hidden), size, rows, self.work / f"length-{size}")
            points.append({"size": size, **self.point(hidden, pairs, dataset, points[-1] if points else None)})
            print(f"{sweep} {size}: {points[-1]['ours']}", file=sys.stderr, flush=True)
        return points

    def point(self, hidden: int, pairs: int, dataset: str, before: dict[str, Any] | None) -> dict[str, Any]:
        a, base = self.arguments, self.base(hidden)
        known, _ = project_worker.load_pairs(dataset, base)
        steps = 1 + max(1, min(a.steps, len(known) // pairs - 1))
        if steps * pairs > len(known):
            sys.exit(
                f"two steps of {pairs} pairs (one warm-up, one timed) need more pairs than the {len(known)} available"
            )
        indices = project_worker.pairs_of_steps(len(known), pairs, steps)
        shape, timed = Shape(hidden, a.layers), [known.lengths[step] for step in indices[1:]]
        batch_size = min(pairs, project_worker.defaults().batch_size)
        sizes = ("--batch_size", str(batch_size), "--grad_accum", str(pairs // batch_size))
        flops = needed_arithmetic.needed_flops(needed_arithmetic.skeleton(base), np.concatenate(timed)) / len(timed)
        point = {
            "pairs": pairs, "needed_tokens": sum(int(n.sum()) for n in timed) / len(timed), "flops": flops,
            "padded": 2 * sum(int(known.longest_sides()[step].sum()) for step in indices[1:]) * shape.matrix_weights,
            "ours": self.run(project_worker.side("train", base, dataset, self.work, False, *sizes), steps),
        }  # fmt: skip
        if a.their_batch and (before is None or "TRL" in before):
            if before is not None:
                steps_before = max(1, min(a.steps, len(known) // before["pairs"] - 1))
                grown = (point["padded"] / (steps - 1)) / (before["padded"] / steps_before)
                if before["TRL"]["seconds"] * grown > a.their_seconds:
                    return point
            size = min(a.their_batch, pairs)
            ids = str(trl_worker.write_ids(known, np.concatenate(indices), self.work / "ids.json"))
            point["TRL"] = self.run(trl_worker.side("train", base, ids, self.work, size, pairs // size), steps)
        return point

    def run(self, side: harness.Side, steps: int) -> dict[str, float]:
        with side:
            answers = [side.ask(do="step") for _ in range(steps)][1:]
            side.end()
        return {"seconds": median(answers, self.key), "peak_gib": max(answer["peak_gib"] for answer in answers)}


def pairs_of_length(real: Any, base: str, length: int, count: int, folder: Path) -> str:
    """Write `count` pairs whose sides have about `length` tokens, cut and joined from real ones; returns the folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    shared = real.lengths[:, 0].sum() / real.longest_sides().sum()  # of a side, in its prompt
    prompt = int(shared * (length - LEAST_TEMPLATE))
    reply = length - LEAST_TEMPLATE - prompt
    texts = [stream(real, side, tokenizer) for side in (0, 0, 1)]  # prompts, chosen and rejected replies

    def row() -> dict[str, Any]:
        asked, chosen, rejected = (
            tokenizer.decode([next(text) for _ in range(tokens)]).strip()
            for text, tokens in zip(texts, (prompt, reply, reply), strict=True)
        )
        user = {"role": "user", "content": asked}
        return {
            name: [user, {"role": "assistant", "content": said}]
            for name, said in (("chosen", chosen), ("rejected", "Or: " + rejected))  # never the same reply twice
        }

    folder.mkdir()
    for name, rows in (("train", count), ("test", 1)):
        lines = [json.dumps(row()) + "\n" for _ in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder)


def stream(real: Any, side: int, tokenizer: Any) -> Iterator[int]:
    """The token ids of one side of the real pairs, joined and repeated, without the chat template's tokens."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    while True:
        for index in range(len(real)):
            yield from (token for token in real.sequences(index)[side].tolist() if token not in special)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and the picture
# ---------------------------------------------------------------------------------------------------------------------


def points_table(sweep: str, points: list[dict[str, Any]], product: float) -> str:
    rows = []
    for point in points:
        seconds, theirs_ = point["ours"]["seconds"], point.get("TRL")
        achieved = point["flops"] / seconds / 1e12
        rows.append([
            f"{point['size']:,}", f"{point['pairs'] / seconds:.2f}", f"{point['needed_tokens'] / seconds:,.0f}",
            f"{seconds:.2f} s", f"{point['ours']['peak_gib']:.2f} GiB", f"{1000 * achieved:.1f}",
            f"{achieved / product:.1%}", f"{point['pairs'] / theirs_['seconds']:.2f}" if theirs_ else "skipped",
            f"{theirs_['peak_gib']:.2f} GiB" if theirs_ else "skipped",
        ])  # fmt: skip
    columns = (SWEEPS[sweep][0], "pairs/s", "needed tokens/s", "step", "peak memory", "useful GFLOP/s",
               f"of a matrix product's {1000 * product:.0f}", "TRL, pairs/s", "TRL, peak memory")  # fmt: skip
    return harness.table(columns, rows)


def growth(sweep: str, points: list[dict[str, Any]]) -> Goal:
    """From the first to the last size: the growth of a step's time relative to the growth of its useful work."""
    first, last = points[0], points[-1]
    time, work = last["ours"]["seconds"] / first["ours"]["seconds"], last["flops"] / first["flops"]
    name = f"{SWEEPS[sweep][0]}, {first['size']:,} to {last['size']:,}"
    return Goal(name, f"{time:.1f} ×", f"{work:.1f} ×", time / work, 1.0, at_least=False)


def draw(found: dict[str, Any], arguments: Any) -> None:
    """Draw the time per step above and peak memory below, one column per sweep; both axes in powers of two."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [name for name in SWEEPS if name in found]
    figure, axes = pyplot.subplots(2, len(names), figsize=(4.2 * len(names), 6.6), squeeze=False, facecolor="white")
    for column, name in enumerate(names):
        points = found[name]["points"]
        for row, (key, title) in enumerate((("seconds", "seconds a step"), ("peak_gib", "peak memory, GiB"))):
            axis = axes[row, column]
            if key == "seconds":
                first = points[0]
                work = [first["ours"]["seconds"] * point["flops"] / first["flops"] for point in points]
                sizes = [point["size"] for point in points]
                axis.plot(sizes, work, "--", color="0.55", label="growth of the useful work")
            for side, color, marker in (("ours", "#0b6e4f", "o"), ("TRL", "#c8553d", "s")):
                some = [point for point in points if side in point]
                values = [point[side][key] for point in some]
                label = {"ours": "rl-with-rm", "TRL": f"TRL, batches of {arguments.their_batch}"}[side]
                axis.plot([p["size"] for p in some], values, marker=marker, color=color, label=label, linewidth=2)
            axis.set_xscale("log", base=2)
            if key == "seconds":
                axis.set_yscale("log", base=2)
                axis.yaxis.set_major_formatter("{x:g}")
            else:
                axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
            axis.set_xticks([point["size"] for point in points], [f"{point['size']:,}" for point in points])
            axis.set_xlabel(SWEEPS[name][0])
            if row == 0:
                axis.set_title(found[name]["setting"], fontsize=9)
            axis.grid(True, color="0.9")
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(title)
    axes[0, 0].legend(frameon=False, fontsize=9)
    where = found[names[0]]["machine"]
    figure.suptitle(
        f"{where['device_name']}, {where['threads']} torch threads, {arguments.layers} layers, bf16, "
        f"torch {where['versions']['torch']}, commit {where['commit']}", fontsize=9, color="0.35",
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(arguments.png, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
