"""Peak memory and time of a real optimizer step of the full Qwen3-0.6B shape with random weights, full and LoRA.

    QWEN3_DIR=... HH_RLHF_DIR=... python bench/real_shape.py

QWEN3_DIR is a folder with Qwen3-0.6B's config and tokenizer. Its weights are not needed: random ones take the same
memory and time. HH_RLHF_DIR is a folder with `train.jsonl.gz` and `test.jsonl.gz`. Prints a Markdown table. Each run
is `train_rm.py` itself in a separate process, at its default settings plus any flags given here:

    python bench/real_shape.py --batch_size 4 --grad_accum 1
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_random_base(config_folder: str, folder: Path) -> None:
    """Write the architecture of `config_folder` with random bf16 weights, like those of the published model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(config_folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(config_folder).save_pretrained(folder)


def last_of_steps(
    base: Path, dataset: str, work: Path, name: str, flags: list[str], steps: int = 2
) -> dict[str, float]:
    """Run a few optimizer steps, the first of which also compiles; returns each TensorBoard scalar of the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [
        sys.executable, str(ROOT / "train_rm.py"), "--model", str(base), "--dataset", dataset,
        "--max_steps", str(steps), "--eval_num_batches", "1", "--output_dir", str(work / "out"),
        "--log_dir", str(work / "logs"), "--run_name", name, "--no_report", *flags,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    events = EventAccumulator(str(work / "logs" / name)).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def main() -> None:
    config_folder, dataset = os.environ.get("QWEN3_DIR"), os.environ.get("HH_RLHF_DIR")
    if not config_folder or not dataset:
        sys.exit("set QWEN3_DIR and HH_RLHF_DIR; see the top of this file")
    import torch

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    )
    print(f"torch {torch.__version__}, {device}\n")
    print("| training | peak memory | step | pairs/s | tokens/s | needed tokens |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work_name:
        work = Path(work_name)
        write_random_base(config_folder, work / "base")
        for name, flags in (("full", []), ("lora", ["--lora"])):
            found = last_of_steps(work / "base", dataset, work, name, [*flags, *sys.argv[1:]])
            print(
                f"| {name} | {found['train/peak_memory_gib']:.1f} GiB | {found['train/step_time']:.1f} s "
                f"| {found['train/pairs_per_second']:.2f} | {found['train/tokens_per_second']:.0f} "
                f"| {found['train/useful_tokens']:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
