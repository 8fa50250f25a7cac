"""A step of train_grpo.py beside one of TRL's GRPOTrainer, in turn, by phase: the same model, prompts and rewards.

    QWEN3_DIR=... HH_RLHF_DIR=... python bench/grpo_against_trl.py [--model real-model] [--precision fp32]

Completions have exactly --new tokens on both sides. TRL trains with each of --their_batches completions at a time, and
its fastest is compared. The C library's heap is set alike on both sides.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import harness
from grpo_worker import PHASES
from modeling import devices


def write_models(arguments: Any, work: Path) -> tuple[str, str, str]:
    """(a policy, a reward model with a new head on the same base, HH-RLHF's folder)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import models

    source, dataset = harness.inputs(arguments.model)
    base = arguments.model and source
    if not base:
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(source)
        shape = harness.Shape(arguments.hidden, arguments.layers)
        settings = json.loads((Path(source) / "config.json").read_text()) | shape.settings()
        settings |= {"torch_dtype": "float32", "pad_token_id": tokenizer.pad_token_id}
        settings.pop("layer_types", None)
        base = str(work / "base")
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32).save_pretrained(base)
        tokenizer.save_pretrained(base)
    models.RewardModel.create(base, models.load_tokenizer(base), 0).save(work / "reward")
    return base, str(work / "reward"), dataset


def medians(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Of the steps after the first, which warms up: seconds of each phase and in all; and the peak of memory."""
    counted = answers[1:]
    found = {phase: statistics.median(answer["phases"][phase] for answer in counted) for phase in PHASES}
    found["step"] = statistics.median(answer["seconds"] for answer in counted)
    return found | {"peak GiB": max(answer["peak_gib"] for answer in answers)}


def main() -> None:
    parser = harness.parser(__doc__)
    harness.add_model_flags(parser)
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="completions of each")
    parser.add_argument("--new", type=int, default=64, help="tokens of each completion")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--their_batches", type=int, nargs="+", default=[8, 32], help="completions at a time in TRL")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=None, help="default: what is fast here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prompts, arguments.group, arguments.new, arguments.steps = 2, 2, 4, 1
        arguments.their_batches = [4]
    import torch

    precision = arguments.precision or devices.fastest_precision(torch.device("cpu"))
    print(harness.describe(harness.machine()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base, reward_model, dataset = write_models(arguments, work)
        common = {
            "base": base, "reward_model": reward_model, "dataset": dataset, "work": str(work), "precision": precision,
            "prompts": arguments.prompts, "group": arguments.group, "new": arguments.new, "steps": arguments.steps,
            "clock": arguments.clock,
        }  # fmt: skip
        with harness.Side("grpo_worker.py", job="ours", **common) as mine:
            asked = mine.opened["prompts"]
            sides = {"this project": mine}
            for size in arguments.their_batches:
                sides[f"TRL, {size} at a time"] = harness.Side(
                    "grpo_worker.py", job="TRL", batch_size=size, asked=asked, **common
                )
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
            for _ in range(arguments.steps + 1):
                for name, side in sides.items():
                    answers[name].append(side.ask(do="step"))
            for side in sides.values():
                side.end()
    found = {name: medians(each) for name, each in answers.items()}
    columns = [*PHASES, "step", "peak GiB"]
    shape = f"{arguments.prompts} x {arguments.group} completions of {arguments.new} tokens, {precision}"
    print(f"\n{arguments.clock} seconds, medians of {arguments.steps} steps, {shape}\n")
    print("| | " + " | ".join(columns) + " |\n| --- |" + " --- |" * len(columns))
    for name, values in found.items():
        print(f"| {name} | " + " | ".join(f"{values[column]:.3g}" for column in columns) + " |")
    best = min((name for name in found if name != "this project"), key=lambda name: found[name]["step"])
    ratios = {column: found[best][column] / max(1e-9, found["this project"][column]) for column in columns[:-1]}
    memory = found["this project"]["peak GiB"] / found[best]["peak GiB"]
    shown = " | ".join(f"{ratios[column]:.1f} x" for column in columns[:-1])
    print(f"| {best} / this project | {shown} | {memory:.2f} of TRL's |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"medians": found, "ratios": ratios, "memory": memory}, indent=1))


if __name__ == "__main__":
    main()
