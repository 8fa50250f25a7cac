"""The settings of a training run: one dataclass behind the command line, `--config` files and `train_config.json`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from checkpointing import manifest
from checkpointing.run_folder import run_name_problem
from common import flags
from common.flags import flag
from utils import UserError

if TYPE_CHECKING:
    from checkpointing import checkpoint
else:  # it imports torch, and --help must not
    checkpoint = utils.lazy_import("checkpointing.checkpoint")


AUTO = "auto"


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. The command line, `--config` files and `train_config.json` all have these names."""

    # fmt: off
    model: str = flag("Qwen/Qwen3-0.6B", "base model: hub id or local folder", group="model and data")
    dataset: str = flag("Anthropic/hh-rlhf", "hub id, local .jsonl/.jsonl.gz/.json/.parquet file, or a folder with train.* and test.*", group="model and data")
    max_length: int = flag(2048, "longest sequence in tokens; longer pairs are skipped and counted, in training and evaluation alike", minimum=8, below=2**31, group="model and data")
    bad_rows: str = flag("stop", "what to do when more than 10 % of the rows would be skipped", choices=("stop", "skip"), group="model and data")

    epochs: int = flag(1, "times through the training pairs", minimum=1, below=10**6, group="optimization")
    batch_size: int = flag(32, "pairs per micro-batch at most", minimum=1, below=10**6, group="optimization")
    grad_accum: int = flag(4, "an optimizer step is batch_size x grad_accum pairs", minimum=1, below=10**6, group="optimization")
    lr: float = flag(1e-5, "learning rate of AdamW", above=0, group="optimization")
    lr_schedule: str = flag("constant", "learning rate after the warm-up", choices=("constant", "linear", "cosine"), group="optimization")
    warmup_steps: int = flag(0, "steps over which the learning rate rises from zero", minimum=0, below=10**9, group="optimization")
    weight_decay: float = flag(0.0, "AdamW's decoupled weight decay", minimum=0, below=1000, group="optimization")
    max_grad_norm: float = flag(10.0, "clip the gradient to this norm; 0 disables", minimum=0, below=1e30, group="optimization")
    max_steps: int = flag(0, "stop after so many optimizer steps; 0 = after the epochs", minimum=0, below=10**12, group="optimization")
    center_rewards: float = flag(0.0, "weight of the mean of (r_chosen + r_rejected)^2, which keeps rewards around zero (arXiv 2312.09244)", minimum=0, below=1000, group="optimization")
    seed: int = flag(0, "draws the head, the adapters, the order of the pairs and dropout", minimum=0, below=2**63, group="optimization")

    tokens_per_batch: int | str = flag(4096, "token budget of one forward, or auto for the largest that fits the memory; changes speed and memory, not the result (but for what dropout draws)", word=AUTO, minimum=1, below=2**31, group="speed and memory")
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass: slower by a third, far less memory", group="speed and memory")
    precision: str = flag("bf16", "arithmetic; weights, rewards and loss are fp32 either way", choices=("bf16", "fp32"), group="speed and memory")

    attention: str = flag("auto", "how packed rows attend: flex on CUDA and pieces on a CPU leave out most of what is hidden, sdpa computes all; auto takes what pays", choices=("auto", "flex", "pieces", "sdpa"), group="speed and memory")
    compile: bool = flag(False, "compile the decoder layers (torch.compile): the first steps are slow, the others may be faster", group="speed and memory")
    fsdp: bool = flag(False, "with several processes: spread weights, gradients and optimizer state over them (FSDP2)", group="speed and memory")

    lora: bool = flag(False, "train low-rank adapters and the head instead of every parameter", group="LoRA")
    lora_r: int = flag(16, "rank of the adapters", minimum=1, below=65537, group="LoRA")
    lora_alpha: int = flag(32, "the adapters' output is scaled by alpha / r", minimum=1, below=10**6, group="LoRA")
    lora_dropout: float = flag(0.05, "dropout in front of the adapters", minimum=0, below=1, group="LoRA")
    lora_target_modules: str = flag("q_proj,k_proj,v_proj,o_proj", "linear layers to adapt, by name, with commas", group="LoRA")

    eval_steps: int = flag(50, "evaluate every N optimizer steps; 0 = at the end only", minimum=0, below=10**12, group="evaluation and output")
    eval_num_batches: int = flag(32, "evaluation size in batches, the same pairs every time; 0 = the whole test split", minimum=0, below=10**12, group="evaluation and output")
    save_steps: int = flag(500, "save a checkpoint every N optimizer steps; 0 = at the end only", minimum=0, below=10**12, group="evaluation and output")
    keep_checkpoints: int = flag(0, "keep the newest N checkpoints and the best by evaluation accuracy; 0 = all", minimum=0, below=10**9, group="evaluation and output")
    output_dir: str = flag("./checkpoints/rm", "checkpoints go to OUTPUT_DIR/RUN_NAME/step-N", group="evaluation and output")
    log_dir: str = flag("./logs/rm", "TensorBoard's files go to LOG_DIR/RUN_NAME", group="evaluation and output")
    run_name: str | None = flag(None, "name of the run (default: date and time, as 20240115_143022)", group="evaluation and output")
    report: bool = flag(True, "write a report on the last and the best checkpoint at the end, as eval_rm.py does; --no_report skips it", group="evaluation and output")
    resume_from: str | None = flag(None, "checkpoint folder, or a run's folder for its newest checkpoint", group="evaluation and output")

    config: str | None = flag(None, "JSON file with any of these settings; flags win over it", group="other")
    allow_data_change: bool = flag(False, "resume even though data, seed or step size changed; the run is then no longer exact", group="other")
    demo: bool = flag(False, "train a tiny built-in model on built-in pairs, offline", group="other")
    debug: bool = flag(False, "show the traceback of an error", group="other")
    # fmt: on

    def problems(self) -> list[str]:
        """What no single field can tell is wrong."""
        found = []
        if self.run_name is not None and (why := run_name_problem(self.run_name)):
            found.append(f"--run_name: got {self.run_name!r}, {why}")
        for name in ("output_dir", "log_dir"):
            if Path(getattr(self, name)).is_file():
                found.append(f"--{name}: {getattr(self, name)} is a file, wants a folder")
        if not all(name.strip() for name in self.lora_target_modules.split(",")):
            found.append(f"--lora_target_modules: got {self.lora_target_modules!r}, wants names with commas between")
        if self.demo and self.resume_from:
            found.append("--demo: goes without --resume_from; a demo run resumes like any other")
        return found

    @property
    def pairs_per_step(self) -> int:
        return self.batch_size * self.grad_accum


# What --demo sets where the user did not: small enough for a laptop, large enough to learn.
DEMO_SETTINGS = {
    "batch_size": 32, "grad_accum": 1, "epochs": 7, "lr": 1e-3, "lr_schedule": "cosine", "warmup_steps": 20,
    "gradient_checkpointing": False, "eval_steps": 50, "eval_num_batches": 0,
}  # fmt: skip
# A resumed run with other values of these would not be the run it continues.
FIXED_BY_CHECKPOINT = ("model", "lora", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
# (the pairs themselves are compared by content, see runs.refuse_changed_data: a moved file is the same data)
EXACTNESS_NEEDS = ("max_length", "batch_size", "grad_accum", "seed", "bad_rows")
NOT_STORED = ("resume_from", "config", "demo", "debug", "allow_data_change")


def read_config(argv: list[str], description: str) -> tuple[TrainConfig, Path | None]:
    """The run's settings and, for a resumed run, the checkpoint to go on from.

    Layers, later ones win: defaults, the checkpoint's `train_config.json`, `--demo`'s settings, `--config`, flags.
    """
    given, problems = flags.read_flags(TrainConfig, argv, description)
    config = flags.build_config(TrainConfig, given, problems)
    if config.resume_from:
        folder = manifest.find(config.resume_from)
        checkpoint.refuse_missing_parts(folder)
        stored = checkpoint.read_config(folder)
        wrong = [f"no {name!r}" for name in ("model", "dataset", "log_dir") if name not in stored]
        if wrong := wrong + flags.wrong_types(TrainConfig, stored):
            raise utils.CheckpointError(
                "the checkpoint's settings are not what a training wrote",
                where=folder / "train_config.json",
                found="; ".join(wrong),
                next="bring the file back from a copy, or resume from another step",
            )
        root = folder.parent.parent
        refuse_nameless(folder, given)
        log_dir = os.path.normpath(root / stored["log_dir"])  # stored as seen from output_dir
        stored |= {"output_dir": str(root), "run_name": folder.parent.name, "log_dir": log_dir}
        resumed = {**stored, **given}
        compare_with_stored(stored, given, config.allow_data_change)
        return flags.build_config(TrainConfig, resumed, []), folder
    if config.demo:
        from data_pipeline import demo

        try:
            model, dataset = demo.write_demo(Path("demo"))
        except FileExistsError as error:
            raise UserError(
                "--demo writes its model and pairs to ./demo, and something else is there",
                where=Path("demo").absolute(),
                safe="nothing in it was touched",
                next="run --demo in another folder, or delete that one",
            ) from error
        given = {**DEMO_SETTINGS, "model": str(model), "dataset": str(dataset), **given}
        config = flags.build_config(TrainConfig, given, [])
    return config, None


def refuse_nameless(folder: Path, given: dict[str, Any]) -> None:
    """A checkpoint that was copied or set aside may lie in a folder whose name no run can have."""
    if "run_name" not in given and (why := run_name_problem(folder.parent.name)):
        raise UserError(
            "this checkpoint does not lie in a run's folder, so the run that goes on from it needs a name",
            where=folder,
            found=f"{folder.parent.name!r} {why}",
            safe="the checkpoint is untouched, and stays so",
            next="add --run_name NAME" + ("" if "output_dir" in given else " and, if you like, --output_dir"),
        )


def _is_same(stored: Any, given: Any) -> bool:
    """Whether two settings mean the same: equal, or two ways to one file or folder."""
    if stored == given or not (isinstance(stored, str) and isinstance(given, str)):
        return stored == given
    return Path(stored).exists() and Path(given).exists() and Path(stored).samefile(given)


def compare_with_stored(stored: dict[str, Any], given: dict[str, Any], allow_data_change: bool) -> None:
    """Say which settings of a resumed run changed; refuse those that would make it another run."""
    changed = {name: value for name, value in given.items() if name in stored and not _is_same(stored[name], value)}
    refused = {*FIXED_BY_CHECKPOINT, *([] if allow_data_change else EXACTNESS_NEEDS)}
    if stored.get("lora"):
        refused.discard("model")  # an adapter's base may have moved; its weights are compared, see runs.go_back_to
    if changed:
        print(f"{'setting':<24} {'stored':<24} {'asked':<24} used")
        for name, value in changed.items():
            used = "refused" if name in refused else value
            print(f"{name:<24} {stored[name]!s:<24} {value!s:<24} {used}")
    if fixed := [name for name in changed if name in refused and name in FIXED_BY_CHECKPOINT]:
        raise UserError(
            f"a checkpoint's {', '.join('--' + name for name in fixed)} cannot change",
            next="leave it out to go on as before, or start a new run without --resume_from",
        )
    if (inexact := [name for name in EXACTNESS_NEEDS if name in changed]) and not allow_data_change:
        raise UserError(
            f"with another {', '.join('--' + name for name in inexact)} the run would not go on where it stopped",
            safe="the checkpoint is untouched",
            next="leave it out, or add --allow_data_change to go on with other pairs from here",
        )
