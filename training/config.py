"""The settings that every training has: a dataclass behind the command line, `--config` files and `train_config.json`.

Each script subclasses it with flags, defaults and words of its own. A flag's `on_resume` says what happens to it when a
run is resumed:

    fixed        another value would be another run
    exact        another value needs --allow_data_change, and the run is then no longer exact
    not stored   belongs to one command, not to the run
    (none)       may change
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import utils
from checkpointing import manifest, resolve
from checkpointing.run_folder import run_name_problem
from common import flags
from common.flags import flag
from data_pipeline import shapes, sources
from utils import UserError

AUTO = "auto"


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of a run. The command line, `--config` files and `train_config.json` use the same names."""

    unit: ClassVar[str] = "examples"  # what is counted
    eval_metric: ClassVar[str] = "accuracy"  # what evaluations measure; higher is better
    lora_settings: ClassVar[dict[str, Any]] = {}  # what --lora sets where the user did not
    demo_settings: ClassVar[dict[str, Any]] = {}  # and --demo, which goes before

    # fmt: off
    model: str = flag("Qwen/Qwen3-0.6B", "base model: hub id or local folder", group="model and data", on_resume="fixed")
    dataset: str = flag("Anthropic/hh-rlhf", "hub id, data file (JSON lines, JSON, parquet, CSV) or folder, such as a copy of a hub repository; several as A,B or repeated; NAME:SUBSET for --subset", is_list=True, group="model and data")
    subset: str | None = flag(None, "a configuration or folder of the dataset, such as harmless-base (default: that of preferences, else all)", group="model and data")
    split: str | None = flag(None, "split to train on (default: the one named train, of preferences first)", group="model and data")
    test_split: str | None = flag(None, "split to evaluate on (default: test, validation, …; without one, 1 prompt in 20 is held out)", group="model and data")
    columns: str | None = flag(None, "names of the data's columns, as prompt=NAME,chosen=NAME,rejected=NAME,margin=NAME", group="model and data", on_resume="exact")
    max_length: int = flag(2048, "longest sequence in tokens; rows with a longer one are skipped and counted, in training and evaluation alike", minimum=8, below=2**31, group="model and data", on_resume="exact")
    bad_rows: str = flag("stop", "what to do if more than 10 % of the rows would be skipped", choices=("stop", "skip"), group="model and data", on_resume="exact")

    epochs: int = flag(1, "times through the training data", minimum=1, below=10**6, group="optimization")
    batch_size: int = flag(32, "most examples in a micro-batch, if --tokens_per_batch is a number", minimum=1, below=10**6, group="optimization", on_resume="exact")
    grad_accum: int = flag(4, "an optimizer step takes batch_size x grad_accum examples", minimum=1, below=10**6, group="optimization", on_resume="exact")
    lr: float = flag(1e-5, "learning rate of AdamW", above=0, group="optimization")
    lr_schedule: str = flag("constant", "learning rate after the warm-up", choices=("constant", "linear", "cosine"), group="optimization")
    warmup_steps: int = flag(0, "steps over which the learning rate rises from zero", minimum=0, below=10**9, group="optimization")
    weight_decay: float = flag(0.0, "AdamW's decoupled weight decay", minimum=0, below=1000, group="optimization")
    max_grad_norm: float = flag(10.0, "clip the gradient to this norm; 0 disables", minimum=0, below=1e30, group="optimization")
    max_steps: int = flag(0, "stop after this many optimizer steps; 0 = after the epochs", minimum=0, below=10**12, group="optimization")
    seed: int = flag(0, "seed of new weights, of the order of the data and of dropout", minimum=0, below=2**63, group="optimization", on_resume="exact")

    tokens_per_batch: int | str = flag(AUTO, "token budget of a micro-batch; auto is the largest that fits a GPU's memory, and 1,536 on a CPU, where more is hardly faster; changes speed and memory, not the result (except which activations dropout drops)", word=AUTO, minimum=1, below=2**31, group="speed and memory")
    gradient_checkpointing: bool | str = flag(AUTO, "recompute activations in the backward pass: a third slower, far less memory; auto does if they would not fit", word=AUTO, group="speed and memory")
    offload_optimizer: bool | str = flag(AUTO, "keep AdamW's two moments in main memory and pass them through the GPU at each step: the same result and 8 bytes less for each trained parameter, some tenths of a second slower; auto does if a GPU would have too little room for activations", word=AUTO, group="speed and memory")
    precision: str = flag("auto", "precision of matrix products in training; auto is bf16 where the hardware computes with it, else fp32; weights, loss and evaluation are fp32 either way", choices=("auto", "bf16", "fp32"), group="speed and memory")

    attention: str = flag("auto", "attention over packed rows: flex (CUDA) and pieces (CPU) skip most masked blocks, sdpa computes everything; auto takes the fastest", choices=("auto", "flex", "pieces", "sdpa"), group="speed and memory")
    compile: bool | str = flag(AUTO, "compile the decoder layers (torch.compile): the first steps are slow, later ones faster; auto does on CUDA, in one process, if it works there", word=AUTO, group="speed and memory")
    fsdp: bool = flag(False, "with several processes: shard weights, gradients and optimizer state over them (FSDP2)", group="speed and memory")

    lora: bool = flag(False, "train low-rank adapters instead of every parameter", group="LoRA", on_resume="fixed")
    lora_r: int = flag(16, "rank of the adapters", minimum=1, below=65537, group="LoRA", on_resume="fixed")
    lora_alpha: int = flag(32, "scale of the adapters: their output is multiplied by alpha / r", minimum=1, below=10**6, group="LoRA", on_resume="fixed")
    lora_dropout: float = flag(0.05, "dropout on the adapters' input", minimum=0, below=1, group="LoRA", on_resume="fixed")
    lora_target_modules: str = flag("q_proj,k_proj,v_proj,o_proj", "names of the linear layers to adapt, separated by commas, or all-linear for every one but the head", group="LoRA", on_resume="fixed")

    eval_steps: int = flag(50, "evaluate every N optimizer steps; 0 = at the end only", minimum=0, below=10**12, group="evaluation and output")
    save_steps: int = flag(500, "save a checkpoint every N optimizer steps; 0 = at the end only", minimum=0, below=10**12, group="evaluation and output")
    keep_checkpoints: int = flag(0, "keep the newest N checkpoints and the best by evaluation; 0 = all", minimum=0, below=10**9, group="evaluation and output")
    output_dir: str = flag("./checkpoints", "checkpoints go to OUTPUT_DIR/RUN_NAME/step-N", group="evaluation and output")
    log_dir: str = flag("./logs", "TensorBoard's files go to LOG_DIR/RUN_NAME", group="evaluation and output")
    run_name: str | None = flag(None, "name of the run (default: date and time, such as 20240115_143022)", group="evaluation and output")
    resume_from: str | None = flag(None, "checkpoint folder, or a run's folder for its newest checkpoint", group="evaluation and output", on_resume="not stored")

    config: str | None = flag(None, "JSON file with any of these settings; flags take precedence", group="other", on_resume="not stored")
    allow_data_change: bool = flag(False, "resume although data, seed or step size changed; the run is then no longer exact", group="other", on_resume="not stored")
    demo: bool = flag(False, "train a tiny built-in model on built-in pairs, offline", group="other", on_resume="not stored")
    debug: bool = flag(False, "show the traceback of an error", group="other", on_resume="not stored")
    # fmt: on

    def problems(self) -> list[str]:
        """What is wrong with settings that each look right alone."""
        found = []
        if self.run_name is not None and (why := run_name_problem(self.run_name)):
            found.append(f"--run_name: {self.run_name!r} {why}")
        for name in ("output_dir", "log_dir"):
            if Path(getattr(self, name)).is_file():
                found.append(f"--{name}: {getattr(self, name)} is a file, expected a folder")
        found += shapes.column_problems(self.columns)
        if not all(name.strip() for name in self.lora_target_modules.split(",")):
            found.append(f"--lora_target_modules: got {self.lora_target_modules!r}, expected names separated by commas")
        if self.demo and self.resume_from:
            found.append("--demo: cannot be combined with --resume_from; a demo run resumes like any other")
        return found

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.grad_accum

    def learning_rate(self, step: int, total_steps: int) -> float:
        """The rate of one step (from 1): a linear warm-up, then constant, linear or cosine decay towards 0."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        done = (step - 1 - self.warmup_steps) / max(1, total_steps - self.warmup_steps)  # 0 ... <1
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.lr * shape[self.lr_schedule]

    def stored(self) -> dict[str, Any]:
        """The settings as a checkpoint and run.json keep them: valid from any folder, and after the tree was moved."""
        fields = [field.name for field in dataclasses.fields(self) if field.metadata.get("on_resume") != "not stored"]
        stored = {name: getattr(self, name) for name in fields}
        if Path(stored["model"]).exists():
            stored["model"] = str(Path(stored["model"]).absolute())
        stored["dataset"] = sources.from_anywhere(stored["dataset"])
        stored["log_dir"] = utils.relative_path(stored["log_dir"], stored["output_dir"])
        return stored


Config = TypeVar("Config", bound=TrainingConfig)


def read_config(config_class: type[Config], argv: list[str], description: str) -> tuple[Config, Path | None]:
    """The run's settings and, for a resumed run, the checkpoint to go on from.

    Layers, later ones win: defaults, `--lora`'s settings, the checkpoint's `train_config.json`, `--demo`'s settings,
    `--config`, flags.
    """
    given, problems = flags.read_flags(config_class, argv, description)
    config = flags.build_config(config_class, given, problems)
    if config.resume_from:
        folder = manifest.find(config.resume_from)
        manifest.check_resumable(folder)
        stored = resolve.training_settings(folder)
        wrong = [f"no {name!r}" for name in ("model", "dataset", "log_dir") if name not in stored]
        if wrong := wrong + flags.wrong_types(config_class, stored):
            raise utils.CheckpointError(
                "the checkpoint's settings are not what a training wrote",
                where=folder / manifest.SETTINGS,
                found="; ".join(wrong),
                next="restore the file from a copy, or resume from another step",
            )
        root = folder.parent.parent
        check_run_name(folder, given)
        log_dir = os.path.normpath(root / stored["log_dir"])  # stored relative to output_dir
        stored |= {"output_dir": str(root), "run_name": folder.parent.name, "log_dir": log_dir}
        check_changed_settings(config_class, stored, given, config.allow_data_change)
        return flags.build_config(config_class, {**stored, **given}, []), folder
    settings = dict(config.lora_settings) if config.lora else {}
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
        settings |= {**config.demo_settings, "model": str(model), "dataset": str(dataset)}
    return flags.build_config(config_class, {**settings, **given}, []), None


def check_run_name(folder: Path, given: dict[str, Any]) -> None:
    """A checkpoint that was copied or set aside may be in a folder whose name no run can have."""
    if "run_name" not in given and (why := run_name_problem(folder.parent.name)):
        raise UserError(
            "this checkpoint is not in a run's folder, so the resumed run needs a name",
            where=folder,
            found=f"{folder.parent.name!r} {why}",
            safe="the checkpoint is untouched, and stays so",
            next="add --run_name NAME" + ("" if "output_dir" in given else " and, if you like, --output_dir"),
        )


def check_changed_settings(
    config_class: type[TrainingConfig], stored: dict[str, Any], given: dict[str, Any], allow_data_change: bool
) -> None:
    """Print which settings of a resumed run changed; UserError for those that would make it another run."""
    changed = {name: value for name, value in given.items() if name in stored and not _is_same(stored[name], value)}
    rules = {field.name: field.metadata.get("on_resume") for field in dataclasses.fields(config_class)}
    fixed = [name for name in changed if rules[name] == "fixed" and not (name == "model" and stored.get("lora"))]
    inexact = [name for name in changed if rules[name] == "exact" and not allow_data_change]
    if changed:
        print(f"{'setting':<24} {'stored':<24} {'requested':<24} used")
        for name, value in changed.items():
            used = "rejected" if name in fixed + inexact else value
            print(f"{name:<24} {stored[name]!s:<24} {value!s:<24} {used}")
    if fixed:  # (an adapter's base may have moved: its weights are compared, see run.go_back_to)
        raise UserError(
            f"a checkpoint's {', '.join('--' + name for name in fixed)} cannot change",
            safe="the checkpoint is untouched",
            next="leave it out to go on as before, or start a new run without --resume_from",
        )
    if inexact:
        raise UserError(
            f"with another {', '.join('--' + name for name in inexact)} the run would not continue where it stopped",
            safe="the checkpoint is untouched",
            next="leave it out, or add --allow_data_change to continue with other examples from here",
        )


def _is_same(stored: Any, given: Any) -> bool:
    """Whether two settings mean the same: equal, or two paths to one file or folder."""
    if stored == given or not (isinstance(stored, str) and isinstance(given, str)):
        return stored == given
    return Path(stored).exists() and Path(given).exists() and Path(stored).samefile(given)
