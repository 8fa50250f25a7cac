"""train_rm.py: the loss, accumulation, equality with TRL, resuming, the logs, and the script run as a user runs it."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
import eval_rm
import models
import train_rm
import utils
from checkpointing import checkpoint, manifest, run_folder
from checkpointing.run_folder import best_step, step_folders
from common import file_locks
from data_pipeline import packing
from tests.conftest import ROOT
from training import distributed, setup
from training.config import read_config

TINY = ["--no_report", "--eval_num_batches", "1", "--save_steps", "0", "--eval_steps", "0", "--lr", "1e-3"]


def loaded(folder, name):
    from safetensors.torch import load_file

    return load_file(Path(folder) / name)


def same_bytes(one, other, *names):
    return all((Path(one) / name).read_bytes() == (Path(other) / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def pairs(small_dataset, tokenizer):
    return data.load_pairs(small_dataset, tokenizer)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def test_loss_is_the_negative_log_of_the_preference_probability():
    chosen, rejected = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.0, 0.0, 3.0])
    loss = train_rm.bradley_terry_loss(chosen, rejected, torch.zeros(3))
    wanted = [-math.log(1 / (1 + math.exp(-difference))) for difference in (1, 0, -5)]
    assert loss.tolist() == pytest.approx(wanted, abs=1e-6)


def test_margin_moves_the_point_of_indifference():
    loss = train_rm.bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1.5]))
    assert loss.item() == pytest.approx(math.log(2))


def test_centering_adds_the_squared_sum_of_rewards():
    chosen, rejected = torch.tensor([3.0]), torch.tensor([-1.0])
    plain = train_rm.bradley_terry_loss(chosen, rejected, torch.zeros(1))
    centered = train_rm.bradley_terry_loss(chosen, rejected, torch.zeros(1), center_rewards=0.1)
    assert (centered - plain).item() == pytest.approx(0.1 * (3 - 1) ** 2)


def test_loss_survives_huge_differences():
    loss = train_rm.bradley_terry_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]), torch.zeros(2))
    assert loss.tolist() == [2e4, 0.0]


def test_learning_rate_warms_up_and_decays():
    config = train_rm.RewardTrainingConfig(lr=1.0, warmup_steps=2, lr_schedule="linear")
    assert [config.learning_rate(step, 6) for step in range(1, 7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    config = train_rm.RewardTrainingConfig(lr=1.0, lr_schedule="cosine")
    assert [config.learning_rate(step, 4) for step in (1, 3)] == pytest.approx([1.0, 0.5])
    config = train_rm.RewardTrainingConfig(lr=1.0)
    assert {config.learning_rate(step, 4) for step in range(1, 5)} == {1.0}


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------


def accumulate(model, pairs, plans):
    """Forward and backward of a step of one process; the losses, in the order of the plans."""
    world = distributed.World()
    turns = world.assign(plans, is_training=True)
    batches = [(turn, packing.build(pairs, turn.plan, model.tokenizer.pad_token_id)) for turn in turns]
    margins = train_rm.label_margins(pairs, plans, model.device)
    return train_rm.accumulate_gradients(world, model, batches, margins, 0.0, utils.StopRequest())[:, 0]


def one_pair_a_row(pairs, part):
    lengths = pairs.packed_lengths[part]
    rows = [[position] for position in range(len(part))]
    width = int(lengths.max())
    computed = len(part) * width
    return packing.MicroBatchPlan(part, rows, True, width, int(lengths.sum()), computed, cost=float(computed))


def step_with(base, tokenizer, pairs, indices, cuts, make_optimizer):
    """The losses of one step over `indices`, cut into micro-batches at `cuts`, and the weights after it."""
    model = models.RewardModel.create(base, tokenizer, seed=0).train()
    optimizer = make_optimizer(model.hf_model.parameters())
    parts = np.split(np.array(indices), cuts)
    losses = accumulate(model, pairs, [one_pair_a_row(pairs, part) for part in parts])
    optimizer.step()
    return losses, model.hf_model.state_dict()


# At the default rate Adam moves a weight by 1e-5; plain SGD at this rate moves weights by up to 0.1 and shows more.
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=train_rm.RewardTrainingConfig().lr, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cuts", [list(range(1, 8)), [4], [1, 3], [7]], ids=["8x1", "2x4", "uneven", "7+1"])
def test_the_cutting_of_a_step_does_not_change_it(base, tokenizer, pairs, cuts, optimizer):
    whole_losses, whole = step_with(base, tokenizer, pairs, range(8), [], OPTIMIZERS[optimizer])
    losses, cut = step_with(base, tokenizer, pairs, range(8), cuts, OPTIMIZERS[optimizer])
    torch.testing.assert_close(losses, whole_losses, rtol=0, atol=1e-6)
    # Adam divides by the size of the gradient, so of one that is almost 0 the rounding shows: 1.2e-6 on some processors
    atol = 2e-6 if optimizer == "adamw" else 1e-6
    for name, weights in whole.items():
        torch.testing.assert_close(cut[name], weights, rtol=0, atol=atol, msg=name)
    untouched = models.RewardModel.create(base, tokenizer, seed=0).hf_model.state_dict()
    moved = max((whole[name] - weights).abs().max().item() for name, weights in untouched.items())
    assert moved > (5e-6 if optimizer == "adamw" else 5e-3), "the step changed next to nothing"


def test_first_step_equals_trl(base, tokenizer, pairs, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    ours = models.RewardModel.create(base, tokenizer, seed=0).train()
    ours.save(tmp_path / "start")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    sides = [pairs.sequences(index) for index in range(8)]
    rows = {"chosen_ids": [c.tolist() for c, _ in sides], "rejected_ids": [r.tolist() for _, r in sides]}
    settings = RewardConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, max_steps=1, optim="sgd", learning_rate=0.1,
        lr_scheduler_type="constant", max_grad_norm=0.0, bf16=False, use_cpu=True, report_to="none",
        logging_steps=1, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    trainer = RewardTrainer(theirs, settings, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
    trainer.train()
    their_loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)

    plans = packing.plan_step(pairs, np.arange(8), 512, 32, 4096)
    assert len(plans) > 1
    losses = accumulate(ours, pairs, plans)
    torch.optim.SGD(ours.hf_model.parameters(), lr=0.1).step()
    assert losses.mean().item() == pytest.approx(their_loss, abs=1e-5)
    their_weights = trainer.model.state_dict()
    moved = 0.0
    for name, weights in ours.hf_model.state_dict().items():
        torch.testing.assert_close(weights, their_weights[name].cpu(), rtol=0, atol=1e-5, msg=name)
        moved += (weights - loaded(tmp_path / "start", "model.safetensors")[name]).abs().sum().item()
    assert moved > 1, "the step changed nothing"


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }, events


def test_a_run_logs_every_tag_once_a_step_and_says_what_to_type_next(run_script, base, small_dataset, tmp_path):
    result = run_script(
        "train_rm.py", "--model", base, "--dataset", small_dataset, "--batch_size", 8, "--grad_accum", 3,
        "--epochs", 2, "--run_name", "full", "--eval_steps", 2, "--save_steps", 4, "--lr", "1e-3",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # 64 pairs in steps of 24: 24, 24, 16, twice
    values, events = scalars(tmp_path / "logs/rm/full")
    steps = list(range(1, 7))
    for name in ("loss", "accuracy", "grad_norm", "lr", "step_time", "margin", "reward_chosen", "reward_rejected",
                 "pairs_per_second", "tokens_per_second", "useful_tokens", "peak_memory_gib"):  # fmt: skip
        assert [step for step, _ in values[f"train/{name}"]] == steps, name
    for name in ("loss", "accuracy"):
        by_examples = values[f"train/{name}_by_examples"]
        assert [step for step, _ in by_examples] == [24, 48, 64, 88, 112, 128]
        assert [value for _, value in by_examples] == [value for _, value in values[f"train/{name}"]]
        assert [step for step, _ in values[f"eval/{name}_by_examples"]] == [48, 88, 128]
    for name in ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected"):
        assert [step for step, _ in values[f"eval/{name}"]] == [2, 4, 6]
    assert set(events.Tags()["histograms"]) == {"eval/rewards_chosen", "eval/rewards_rejected", "train/rewards"}
    assert "max_grad_norm" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    # the first step's loss and accuracy are those of its whole 24 pairs, not of its last micro-batch
    assert values["train/accuracy"][0][1] * 24 == pytest.approx(round(values["train/accuracy"][0][1] * 24), abs=1e-4)

    run = tmp_path / "checkpoints/rm/full"
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("step")) == ["step-4", "step-6"]
    assert manifest.problem(run / "step-6") is None
    position = json.loads((run / "step-6/training_state.json").read_text())
    assert (position["step"], position["examples_seen"]) == (6, 128)
    assert "train: kept 64 of 64 rows" in result.stdout
    assert re.search(r"held-out accuracy [\d.]+% \(95 % interval [\d.]+% to [\d.]+%\)", result.stdout)
    assert "tensorboard --logdir ./logs/rm" in result.stdout
    assert "python chat.py --model checkpoints/rm/full/step-6" in result.stdout
    assert "step 6/6" in result.stdout


@pytest.fixture(scope="module")
def trained(script_server, base, small_dataset, tmp_path_factory):
    """The folder of a run named "one", of a single step, with periodic work switched off."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["train_rm.py", "--model", base, "--dataset", small_dataset, "--run_name", "one", *TINY]
    result = script_server.run(words, folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def run_one(trained, tmp_path, monkeypatch):
    """A copy of that run in a folder of its own, which is the working folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkpoints/rm/one"


def test_switched_off_periodic_work_still_happens_at_the_end(trained):
    assert [path.name for path in (trained / "checkpoints/rm/one").glob("step-*")] == ["step-1"]
    assert [step for step, _ in scalars(trained / "logs/rm/one")[0]["eval/accuracy"]] == [1]


@pytest.mark.parametrize("switches", [[], ["--lora", "--lora_dropout", "0.2"]], ids=["full", "lora"])
def test_killed_and_resumed_equals_straight_bitwise(script_server, run_script, base, small_dataset, tmp_path, switches):
    common = ["--model", base, "--dataset", small_dataset, "--batch_size", 4, "--grad_accum", 2, "--lr", "1e-3",
              "--lr_schedule", "cosine", "--eval_steps", 3, "--no_report", *switches]  # fmt: skip
    straight = run_script("train_rm.py", *common, "--run_name", "straight", "--save_steps", 0)
    assert straight.returncode == 0, straight.stderr

    script = script_server.start(["train_rm.py", *common, "--run_name", "killed", "--save_steps", 3], tmp_path)
    script.wait_for("step 5/")  # past the checkpoint of step 3, short of that of step 6
    script.send_signal(signal.SIGKILL)
    assert script.wait().returncode == -signal.SIGKILL
    run = tmp_path / "checkpoints/rm/killed"
    assert [path.name for path in run.glob("step-*")] == ["step-3"]

    resumed = run_script("train_rm.py", "--resume_from", run)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 3 of 8" in resumed.stdout
    weights = "adapter_model.safetensors" if switches else "model.safetensors"
    names = [weights, "optimizer.safetensors", "random_state.safetensors", "training_state.json"]
    assert same_bytes(tmp_path / "checkpoints/rm/straight/step-8", run / "step-8", *names)
    straight_log, killed_log = (scalars(tmp_path / "logs/rm" / name)[0] for name in ("straight", "killed"))
    for tag in ("train/loss", "train/loss_by_examples", "eval/accuracy", "eval/loss_by_examples"):
        assert killed_log[tag] == straight_log[tag], tag


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_its_last_completed_step_and_goes_on_exactly(
    script_server, run_script, base, small_dataset, tmp_path, number, code
):
    common = ["--model", base, "--dataset", small_dataset, "--batch_size", 4, "--grad_accum", 2, "--lora",
              "--lora_dropout", "0.2", *TINY]  # fmt: skip
    script = script_server.start(["train_rm.py", *common, "--run_name", "stopped"], tmp_path)
    script.wait_for("step 2/")
    script.send_signal(number)
    stopped = script.wait()
    assert stopped.returncode == code, stopped.stderr
    assert "the last completed step" in stopped.stdout and "Traceback" not in stopped.stderr
    saved = manifest.find(str(tmp_path / "checkpoints/rm/stopped"))
    assert 2 <= checkpoint.read_training_state(saved).step < 8
    command = f"python train_rm.py --resume_from {Path('checkpoints/rm/stopped')}"
    assert f"\n{saved.name} of 8 is saved; to go on from there:\n  {command}\nstopped\n" in stopped.stderr
    assert run_script(*shlex.split(command)[1:]).returncode == 0
    assert run_script("train_rm.py", *common, "--run_name", "straight").returncode == 0
    names = ["adapter_model.safetensors", "optimizer.safetensors", "random_state.safetensors"]
    assert same_bytes(tmp_path / "checkpoints/rm/straight/step-8", tmp_path / "checkpoints/rm/stopped/step-8", *names)


def test_a_run_stopped_before_its_first_step_says_how_to_start_it_again_and_resuming_it_too(
    run_script, base, small_dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", base, "--dataset", small_dataset, "--max_steps", "1", "--lora", "--lr", "0.001", "--no_report"]

    def stop(*arguments):
        raise utils.Stopped(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(train_rm, "accumulate_gradients", stop)
        with pytest.raises(utils.Stopped):
            train_rm.main([*flags, "--run_name", "early", "--log_dir", "my logs"])
    assert "no step is saved; the same command starts again" in capsys.readouterr().err
    refused = run_script("train_rm.py", "--resume_from", Path("checkpoints/rm/early"))
    assert refused.returncode == 2, "nothing is damaged"
    assert "has not saved any step" in refused.stderr and "it was stopped before its first checkpoint" in refused.stderr
    command = re.search(r"next: +(.*)", refused.stderr).group(1)
    assert "--lora" in command and "--lr 0.001" in command and "'my logs'" in command and "--epochs" not in command
    again = run_script(*shlex.split(command)[1:])
    assert again.returncode == 0 and "done: 1 step," in again.stdout, again.stderr
    assert run_folder.read_record(tmp_path / "checkpoints/rm/early").config["lr"] == 0.001
    assert list((tmp_path / "my logs/early").iterdir())


def test_resuming_a_finished_run_under_another_name_leaves_nothing_of_it(run_script, base, small_dataset, tmp_path):
    flags = ["--model", base, "--dataset", small_dataset, "--max_steps", "1", "--lora", "--no_report"]
    assert run_script("train_rm.py", *flags, "--run_name", "whole").returncode == 0
    before = sorted(path for path in tmp_path.rglob("*"))
    result = run_script("train_rm.py", "--resume_from", "checkpoints/rm/whole", "--run_name", "other")
    assert result.returncode == 0 and "nothing to do" in result.stdout, result.stderr
    assert sorted(path for path in tmp_path.rglob("*")) == before
    for root in ("checkpoints/rm", "logs/rm"):
        assert [path.name for path in (tmp_path / root).iterdir()] == ["whole"]


def test_a_crash_saves_the_last_completed_step_and_names_the_cause(base, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    original = train_rm.accumulate_gradients

    def fail_in_third_step(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the cat pulled the plug")
        return original(*arguments)

    monkeypatch.setattr(train_rm, "accumulate_gradients", fail_in_third_step)
    with pytest.raises(RuntimeError, match="the cat"):
        train_rm.main(["--model", base, "--dataset", small_dataset, "--batch_size", "4", "--run_name", "crash", *TINY])
    assert checkpoint.read_training_state(manifest.find("checkpoints/rm/crash")).step == 2


def test_a_finished_run_says_so_and_goes_on_with_more_epochs(run_script, run_one):
    again = run_script("train_rm.py", "--resume_from", run_one)
    assert again.returncode == 0 and "nothing to do: step 1 of 1 is done" in again.stdout
    again = run_script("train_rm.py", "--resume_from", run_one, "--max_steps", 400)
    assert again.returncode == 0 and "to train further: more --epochs" in again.stdout  # no larger number would help
    more = run_script("train_rm.py", "--resume_from", run_one, "--epochs", 3, "--lr", "2e-3")
    assert more.returncode == 0, more.stderr
    assert re.search(r"setting +stored +requested +used\n", more.stdout)
    assert re.search(r"epochs +1 +3 +3", more.stdout) and re.search(r"lr +0.001 +0.002 +0.002", more.stdout)
    assert json.loads((run_one / "step-3/train_config.json").read_text())["lr"] == 0.002


def test_resuming_from_an_older_step_sets_later_ones_aside(run_script, base, small_dataset, tmp_path):
    run = tmp_path / "checkpoints/rm/one"
    flags = ["--model", base, "--dataset", small_dataset, "--batch_size", 8, "--grad_accum", 2, "--eval_num_batches", 1,
             "--no_report"]  # fmt: skip
    assert run_script("train_rm.py", *flags, "--run_name", "one", "--save_steps", 2).returncode == 0
    result = run_script("train_rm.py", "--resume_from", run / "step-2")
    assert result.returncode == 0, result.stderr
    (aside,) = run.glob("superseded-*/step-4")
    names = ["model.safetensors", "optimizer.safetensors", "random_state.safetensors"]
    assert same_bytes(aside, run / "step-4", *names)


def test_resuming_with_other_data_or_model_is_refused(run_script, run_one, demo_folder):
    for flags, word in ((["--seed", 1], "--seed"), (["--batch_size", 3], "--batch_size"), (["--lora"], "--lora")):
        result = run_script("train_rm.py", "--resume_from", run_one, "--epochs", 2, *flags)
        assert result.returncode == 2 and word in result.stderr, result.stderr
    result = run_script("train_rm.py", "--resume_from", run_one, "--epochs", 2, "--dataset", demo_folder[1])
    assert result.returncode == 2 and "--allow_data_change" in result.stderr
    result = run_script(
        "train_rm.py", "--resume_from", run_one, "--max_steps", 2, "--dataset", demo_folder[1], "--allow_data_change"
    )
    assert result.returncode == 0, result.stderr


def test_a_rewritten_data_file_is_noticed_on_resuming(run_script, base, write_rows, tmp_path):
    rows = [json.loads(line) for line in (Path(base).parent / "pairs/train.jsonl").read_text().splitlines()][:40]
    path = write_rows(rows)
    arguments = ["--model", base, "--dataset", path, "--run_name", "one", *TINY]
    assert run_script("train_rm.py", *arguments).returncode == 0
    write_rows(rows[1:])
    result = run_script("train_rm.py", "--resume_from", tmp_path / "checkpoints/rm/one", "--epochs", 2)
    assert result.returncode == 2 and "not what this run was started with" in result.stderr


def test_a_run_name_in_use_is_refused_and_nothing_is_touched(run_script, base, small_dataset, tmp_path):
    (tmp_path / "checkpoints/rm/mine").mkdir(parents=True)
    (tmp_path / "checkpoints/rm/mine/notes.txt").write_text("keep me")
    result = run_script("train_rm.py", "--model", base, "--dataset", small_dataset, "--run_name", "mine")
    assert result.returncode == 2 and "already" in result.stderr and "--resume_from" in result.stderr
    assert [path.name for path in (tmp_path / "checkpoints/rm/mine").iterdir()] == ["notes.txt"]


def poison(monkeypatch, steps):
    """Make the losses of the given steps NaN, gradients included."""
    original = train_rm.accumulate_gradients
    calls = []

    def poisoned(world, model, *rest):
        results = original(world, model, *rest)
        calls.append(1)
        if len(calls) in steps:
            results[0, 0] = math.nan
            model.hf_model.score.weight.grad.fill_(math.nan)
        return results

    monkeypatch.setattr(train_rm, "accumulate_gradients", poisoned)


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(base, small_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    poison(monkeypatch, {2, 4})
    flags = ["--model", base, "--dataset", small_dataset, "--batch_size", "4", "--grad_accum", "2", "--run_name", "nan"]
    train_rm.main([*flags, *TINY])
    assert len(re.findall(r"step [24] skipped: .* \(rows \d+, 1 of them\)", capsys.readouterr().out)) == 2
    assert [value for _, value in scalars("logs/rm/nan")[0]["train/skipped_steps"]] == [0, 1, 1, 2, 2, 2, 2, 2]
    saved = manifest.find("checkpoints/rm/nan")
    assert checkpoint.read_training_state(saved).skipped_steps == 2
    assert all(tensor.isfinite().all() for tensor in loaded(saved, "model.safetensors").values())
    moments = loaded(saved, "optimizer.safetensors")
    assert {value.item() for key, value in moments.items() if key.startswith("step/")} == {6.0}


def test_ten_skipped_steps_in_a_row_stop_the_run_and_name_the_last_good_step(
    base, small_dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    poison(monkeypatch, set(range(4, 100)))
    flags = ["--model", base, "--dataset", small_dataset, "--batch_size", "4", "--grad_accum", "1", "--run_name", "nan"]
    with pytest.raises(utils.UserError, match=r"10 steps in a row(.|\n)*the last one at step 13(.|\n)*of step 3"):
        train_rm.main([*flags, *TINY])
    saved = manifest.find("checkpoints/rm/nan")
    assert all(tensor.isfinite().all() for tensor in loaded(saved, "model.safetensors").values())


def test_out_of_memory_halves_the_budget_and_gives_the_same_gradient(
    base, small_dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--model",
        base,
        "--dataset",
        small_dataset,
        "--batch_size",
        "8",
        "--grad_accum",
        "2",
        "--precision",
        "fp32",
    ]
    train_rm.main([*flags, *TINY, "--run_name", "roomy", "--lr", "1e-5"])
    original = train_rm.score

    def little_memory(model, batch):
        if batch.input_ids.numel() > 400:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return original(model, batch)

    monkeypatch.setattr(train_rm, "score", little_memory)
    train_rm.main([*flags, *TINY, "--run_name", "tight", "--lr", "1e-5"])
    output = capsys.readouterr().out
    assert output.count("out of memory at") in (1, 2, 3), output
    budget = checkpoint.read_training_state(manifest.find("checkpoints/rm/tight")).tokens_per_batch
    assert f"going on with {budget:,}" in output and budget <= 800
    roomy, tight = (loaded(f"checkpoints/rm/{name}/step-4", "model.safetensors") for name in ("roomy", "tight"))
    for name, weights in roomy.items():
        torch.testing.assert_close(tight[name], weights, rtol=0, atol=4e-6, msg=name)

    train_rm.main(["--resume_from", "checkpoints/rm/tight", "--epochs", "2"])
    assert "out of memory" not in capsys.readouterr().out, "the smaller budget was forgotten"


def test_running_out_of_memory_in_an_evaluation_cuts_the_batches_and_gives_the_same_figures(
    base, small_dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", base, "--dataset", small_dataset, "--precision", "fp32", "--max_steps", "1", "--no_report"]
    train_rm.main([*flags, "--run_name", "roomy"])
    roomy = re.search(r"held-out.*", capsys.readouterr().out).group()
    original = train_rm.score

    def little_memory(model, batch):
        if batch.input_ids.numel() > 300 and not model.training:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")
        return original(model, batch)

    monkeypatch.setattr(train_rm, "score", little_memory)
    train_rm.main([*flags, "--run_name", "tight"])
    output = capsys.readouterr().out
    assert "out of memory at" in output and roomy in output


@pytest.mark.parametrize("switches", [[], ["--lora"]], ids=["full", "lora"])
def test_a_reply_has_one_reward_in_training_in_the_report_and_on_the_page(
    switches, base, small_dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    evaluations, original = [], train_rm.evaluate
    monkeypatch.setattr(
        train_rm, "evaluate", lambda *arguments: evaluations.append(original(*arguments)) or evaluations[-1]
    )
    flags = ["--model", base, "--dataset", small_dataset, "--precision", "bf16", "--batch_size", "8",
             "--max_steps", "2", "--lr", "1e-2", "--no_report"]  # fmt: skip
    train_rm.main([*flags, *switches, "--run_name", "rough", "--eval_num_batches", "0"])
    folder = tmp_path / "checkpoints/rm/rough/step-2"
    eval_rm.main(["--model", str(folder), "--dataset", small_dataset, "--scores_out", "scores.jsonl"])
    rows = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    reported = [[row["reward_chosen"], row["reward_rejected"]] for row in rows]
    np.testing.assert_allclose(sorted(evaluations[-1].rewards.tolist()), sorted(reported), rtol=1e-5, atol=1e-5)
    model = models.RewardModel.restore(folder).eval()  # as the page opens it
    on_the_page = model.score_dialogues([row[reply] for row in rows for reply in ("chosen", "rejected")])
    np.testing.assert_allclose(np.reshape(on_the_page, (-1, 2)), reported, rtol=1e-5, atol=1e-5)


def test_a_pair_that_fits_no_memory_says_what_to_change(base, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def no_memory(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_rm, "score", no_memory)
    with pytest.raises(utils.UserError, match=r"a single example of \d+ tokens(.|\n)*--max_length"):
        train_rm.main(["--model", base, "--dataset", small_dataset, *TINY])


def test_the_newest_and_the_best_checkpoints_are_kept(base, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    correct_of_ten = iter([6, 9, 7, 9, 5, 6, 7, 8])
    original = train_rm.evaluate

    def with_accuracy(*arguments):
        return dataclasses.replace(original(*arguments), correct=next(correct_of_ten), pairs=10)

    monkeypatch.setattr(train_rm, "evaluate", with_accuracy)
    train_rm.main(
        ["--model", base, "--dataset", small_dataset, "--batch_size", "8", "--grad_accum", "1", "--eval_steps", "1",
         "--no_report", "--eval_num_batches", "1", "--save_steps", "1", "--keep_checkpoints", "2", "--run_name", "kept"]
    )  # fmt: skip
    run = tmp_path / "checkpoints/rm/kept"
    assert [path.name for path in step_folders(run)] == ["step-4", "step-7", "step-8"]
    assert best_step(run) == run / "step-4", "of equals, the newest"
    assert not list(run.glob(".tmp-*"))


def test_an_adapter_on_another_base_of_the_same_shape_is_refused(run_script, base, small_dataset, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    flags = ["--model", tmp_path / "base", "--dataset", small_dataset, "--lora", "--run_name", "one", *TINY]
    assert run_script("train_rm.py", *flags).returncode == 0
    weights = loaded(tmp_path / "base", "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.01
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    result = run_script("train_rm.py", "--resume_from", tmp_path / "checkpoints/rm/one", "--epochs", 2)
    assert result.returncode == 3, result.stderr
    assert str(tmp_path / "base") in result.stderr and "step-1" in result.stderr


def test_a_resume_with_nothing_to_do_moves_nothing(run_script, base, small_dataset, tmp_path):
    run = tmp_path / "checkpoints/rm/one"
    flags = ["--model", base, "--dataset", small_dataset, "--batch_size", 8, "--grad_accum", 4, "--eval_num_batches", 1,
             "--no_report"]  # fmt: skip
    assert run_script("train_rm.py", *flags, "--run_name", "one", "--save_steps", 1).returncode == 0
    before = sorted(path.name for path in run.iterdir())
    result = run_script("train_rm.py", "--resume_from", run / "step-1", "--max_steps", 1)
    assert result.returncode == 0 and "nothing to do" in result.stdout, result.stderr
    assert sorted(path.name for path in run.iterdir()) == before


def test_examples_seen_go_on_after_the_step_size_changed(run_script, base, small_dataset, tmp_path):
    flags = ["--model", base, "--dataset", small_dataset, "--batch_size", 16, "--grad_accum", 1, *TINY]
    assert run_script("train_rm.py", *flags, "--max_steps", 2, "--run_name", "one").returncode == 0
    more = ["--batch_size", 8, "--allow_data_change", "--max_steps", 4]
    result = run_script("train_rm.py", "--resume_from", tmp_path / "checkpoints/rm/one", *more)
    assert result.returncode == 0, result.stderr
    points = scalars(tmp_path / "logs/rm/one")[0]["train/loss_by_examples"]
    assert [examples for examples, _ in points] == [16, 32, 40, 48]


def test_moved_data_and_a_moved_base_of_an_adapter_are_known_by_their_content(
    base, small_dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_dataset, "pairs")
    shutil.copytree(base, "base")
    flags = ["--model", "base", "--dataset", "pairs", "--lora", "--run_name", "one", *TINY]
    train_rm.main(flags)
    os.rename("pairs", "pairs2")
    os.rename("base", "base2")
    with pytest.raises(utils.UserError, match="base2"):
        train_rm.main(["--resume_from", "checkpoints/rm/one", "--epochs", "2", "--dataset", "pairs2"])
    train_rm.main(["--resume_from", "checkpoints/rm/one", "--epochs", "2", "--dataset", "pairs2", "--model", "base2"])
    capsys.readouterr()
    train_rm.main(["--resume_from", "checkpoints/rm/one", "--epochs", "3"])  # the new places are stored
    assert (tmp_path / "checkpoints/rm/one/step-3").is_dir()


def test_a_step_named_inside_its_runs_folder_resumes(run_one, tmp_path, monkeypatch):
    monkeypatch.chdir(run_one)
    train_rm.main(["--resume_from", "step-1", "--epochs", "2"])
    assert (run_one / "step-2").is_dir() and (tmp_path / "logs/rm/one").is_dir()


def test_a_copied_checkpoint_goes_on_under_a_new_name(run_one, tmp_path):
    shutil.copytree("checkpoints/rm/one", "checkpoints/rm/one (copy)")
    with pytest.raises(utils.UserError, match="add --run_name NAME"):
        train_rm.main(["--resume_from", "checkpoints/rm/one (copy)", "--epochs", "2"])
    train_rm.main(["--resume_from", "checkpoints/rm/one (copy)", "--epochs", "2", "--run_name", "two"])
    assert (tmp_path / "checkpoints/rm/two/step-2").is_dir()


def test_a_finished_run_names_the_setting_that_ends_it(base, small_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", base, "--dataset", small_dataset, "--batch_size", "8", "--run_name", "one", *TINY]
    train_rm.main([*flags, "--max_steps", "1"])
    train_rm.main(["--resume_from", "checkpoints/rm/one", "--epochs", "8"])
    assert "a larger --max_steps, or 0 for no limit" in capsys.readouterr().out


def test_what_stands_in_the_way_of_a_folder_is_named_before_the_model_is_loaded(
    base, small_dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.RewardModel, "create", None)
    for path in ("checkpoints/rm/afile", "logs/rm/blocked"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    flags = ["--model", base, "--dataset", small_dataset, *TINY]
    for name, flag in (("afile", "--output_dir with --run_name"), ("blocked", "--log_dir")):
        with pytest.raises(utils.UserError, match=f"{flag} names a folder that cannot be made"):
            train_rm.main([*flags, "--run_name", name])
    assert not (tmp_path / "checkpoints/rm/blocked").exists()


def test_a_file_at_a_checkpoints_place_is_seen_before_training(run_one):
    (run_one / "step-2").touch()
    with pytest.raises(utils.UserError, match="something that is not a folder is in the place of a checkpoint"):
        train_rm.main(["--resume_from", "checkpoints/rm/one", "--epochs", "2"])


def test_weights_that_are_not_finite_are_refused_at_the_start_and_never_saved(
    base, small_dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "base")
    weights = loaded(tmp_path / "base", "model.safetensors")
    weights["model.embed_tokens.weight"][200] = math.nan
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    flags = ["--dataset", small_dataset, "--batch_size", "8", *TINY]
    with pytest.raises(utils.UserError, match="weights are not all finite numbers"):
        train_rm.main(["--model", "base", *flags])
    original = torch.optim.AdamW.step

    def overflow(optimizer, *arguments):
        original(optimizer, *arguments)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0][200] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(utils.UserError, match="not finite after step 1, so it is not saved"):
        train_rm.main(["--model", base, *flags, "--max_steps", "1", "--run_name", "one"])
    assert not step_folders(tmp_path / "checkpoints/rm/one")


def test_skipped_steps_stand_in_the_summary(base, small_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    original = train_rm.bradley_terry_loss

    def sometimes_nan(*arguments):
        return original(*arguments) * math.nan

    monkeypatch.setattr(train_rm, "bradley_terry_loss", sometimes_nan)
    train_rm.main(["--model", base, "--dataset", small_dataset, "--max_steps", "2", "--batch_size", "4", *TINY])
    assert "2 of these steps were skipped" in capsys.readouterr().out


def test_a_run_resumes_from_another_folder(script_server, run_script, base, small_dataset, tmp_path):
    shutil.copytree(small_dataset, tmp_path / "pairs")
    assert run_script("train_rm.py", "--model", base, "--dataset", "pairs", "--run_name", "one", *TINY).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    words = ["train_rm.py", "--resume_from", "../checkpoints/rm/one", "--epochs", "2"]
    moved = script_server.run(words, tmp_path / "elsewhere")
    assert moved.returncode == 0, moved.stderr
    assert (tmp_path / "checkpoints/rm/one/step-2").is_dir()
    assert [step for step, _ in scalars(tmp_path / "logs/rm/one")[0]["train/loss"]] == [1, 2]


def test_a_sequence_beyond_the_models_positions_is_refused_before_training(
    run_script, tokenizer, small_dataset, tmp_path
):
    from transformers import AutoModelForSequenceClassification, GPT2Config

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 1024, "n_positions": 40}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    flags = ["--model", tmp_path / "gpt2", "--dataset", small_dataset, *TINY]
    refused = run_script("train_rm.py", *flags)
    assert refused.returncode == 2 and "--max_length 40" in refused.stderr, refused.stderr


def test_unnamed_runs_of_one_second_get_names_of_their_own(base, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "timestamp", lambda: "20240115_143022")
    config = train_rm.RewardTrainingConfig(output_dir=str(tmp_path))
    claims = [setup.claim_run_folder(config, None) for _ in range(3)]
    assert [folder.name for folder, _ in claims] == ["20240115_143022", "20240115_143022-2", "20240115_143022-3"]


def test_a_log_that_cannot_be_written_does_not_stop_training(run_script, base, small_dataset, tmp_path):
    flags = ["--model", base, "--dataset", small_dataset, "--run_name", "one", *TINY]
    program = (
        "import sys, torch.utils.tensorboard as t, train_rm, utils\n"
        "def full(self, *a, **k): raise OSError(28, 'No space left on device')\n"
        "t.SummaryWriter.add_scalar = full\n"
        "sys.exit(utils.run_script(train_rm.main))\n"
    )
    (tmp_path / "full_log.py").write_text(program)
    result = run_script(tmp_path / "full_log.py", *flags, env={"PYTHONPATH": ROOT})
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("training goes on without") == 1
    assert (tmp_path / "checkpoints/rm/one/step-1").is_dir()


def test_the_head_of_any_architecture_comes_from_the_seed(tokenizer, tmp_path):
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

    bert = BertConfig(vocab_size=1024, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    distilbert = DistilBertConfig(vocab_size=1024, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    for name, backbone in (("bert", BertModel(bert)), ("distilbert", DistilBertModel(distilbert))):
        backbone.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        heads = [
            models.RewardModel.create(str(tmp_path / name), tokenizer, seed).hf_model.classifier.weight
            for seed in (1, 1, 2)
        ]
        assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2]), name


def test_two_processes_cannot_train_one_run(run_script, run_one):
    lock = file_locks.RunLock(run_one)
    held = run_script("train_rm.py", "--resume_from", run_one, "--epochs", 2)
    assert held.returncode == 2 and f"process {os.getpid()} on" in held.stderr, held.stderr
    lock.release()
    free = run_script("train_rm.py", "--resume_from", run_one, "--epochs", 2)
    assert free.returncode == 0, free.stderr


def hub_at(address, folder):
    return {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://{address}", "HF_HOME": str(folder / "hf")}


@pytest.mark.parametrize("kind", ["refuses", "stays silent"])
def test_an_unreachable_hub_is_said_within_ten_seconds(run_script, tmp_path, kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}" if kind == "stays silent" else "127.0.0.1:9"
        started = time.monotonic()
        # what importing alone takes on this machine just now
        run_script("train_rm.py", "--model", "./nowhere", env=hub_at(address, tmp_path))
        importing = time.monotonic() - started
        started = time.monotonic()
        result = run_script(
            "train_rm.py", "--model", "Qwen/Qwen3-0.6B", "--run_name", "hub", env=hub_at(address, tmp_path)
        )
    assert time.monotonic() - started - importing < 10
    assert result.returncode == 4, result.stderr
    assert "cannot be reached" in result.stderr and "--demo" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "checkpoints/rm/hub").exists(), "a run that never began left a folder"


def test_a_dataset_on_an_unreachable_hub_is_said_too(run_script, base, tmp_path):
    result = run_script("train_rm.py", "--model", base, env=hub_at("127.0.0.1:9", tmp_path))
    assert result.returncode == 4 and "Anthropic/hh-rlhf" in result.stderr, result.stderr


def test_too_many_useless_rows_stop_before_the_model_is_loaded(run_script, base, write_rows):
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    rows = [dict(good, chosen=f"\n\nHuman: a\n\nAssistant: b{number}") for number in range(8)]
    path = write_rows([*rows, {"chosen": "plain", "rejected": "text"}])
    stopped = run_script("train_rm.py", "--model", base, "--dataset", path, *TINY)
    assert stopped.returncode == 2 and "no dialogue" in stopped.stderr and "--bad_rows skip" in stopped.stderr
    assert "model:" not in stopped.stdout
    skipped = run_script("train_rm.py", "--model", base, "--dataset", path, "--bad_rows", "skip", *TINY)
    assert skipped.returncode == 0, skipped.stderr


def test_an_encoder_trains_one_sequence_a_row(run_script, tokenizer, small_dataset, tmp_path):
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(
        vocab_size=1024, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=1
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    result = run_script("train_rm.py", "--model", tmp_path / "bert", "--dataset", small_dataset, *TINY)
    assert result.returncode == 0, result.stderr
    assert "one sequence per row" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Real pairs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_qwen3(real_tokenizer_folder, tmp_path_factory):
    """A small random Qwen3 with the real tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

    config = AutoConfig.from_pretrained(real_tokenizer_folder)
    config.update({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                   "head_dim": 32, "intermediate_size": 128, "layer_types": ["full_attention"] * 2})  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(real_tokenizer_folder).save_pretrained(folder)
    return folder


def test_64_real_pairs_are_learned_by_heart(run_script, small_qwen3, real_data, write_rows, tmp_path):
    from data_pipeline.reading import rows_of

    rows = [row for _, row in rows_of(Path(real_data) / "train.jsonl.gz")][:72]
    write_rows(rows[:64])
    write_rows(rows[64:], "test.jsonl")
    result = run_script(
        "train_rm.py", "--model", small_qwen3, "--dataset", tmp_path, "--epochs", 20, "--batch_size", 16, "--lr", 2e-3,
        "--grad_accum", 1, "--eval_steps", 0, "--no_gradient_checkpointing", "--run_name", "heart", timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last_epoch = [accuracy for _, accuracy in scalars(tmp_path / "logs/rm/heart")[0]["train/accuracy"][-4:]]
    assert sum(last_epoch) / 4 >= 0.98, last_epoch


def test_real_pairs_are_counted_and_evaluated_to_the_end(run_script, small_qwen3, real_data, tmp_path):
    result = run_script(
        "train_rm.py", "--model", small_qwen3, "--dataset", real_data, "--max_steps", 1, "--eval_num_batches", 0,
        "--run_name", "real", timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "kept 1,199 of 1,200 rows" in result.stdout and "skipped 1: no reply" in result.stdout
    assert "kept 300 of 300 rows" in result.stdout and "300 pairs" in result.stdout.split("done:")[1]
    assert scalars(tmp_path / "logs/rm/real")[0]["train/useful_tokens"][0][1] >= 0.95


@pytest.mark.skipif(
    os.environ.get("REAL_SHAPE") != "1", reason="REAL_SHAPE=1 runs the full 0.6B shape, 15 GB and minutes"
)
@pytest.mark.parametrize("switch", ["--no_lora", "--lora"])
def test_a_step_of_the_full_06b_shape_fits_in_24_gb(run_script, real_tokenizer_folder, real_data, tmp_path, switch):
    import real_shape

    real_shape.write_random_base(real_tokenizer_folder, tmp_path / "base")
    flags = [switch, "--batch_size", "8", "--grad_accum", "1"]
    found = real_shape.last_of_steps(tmp_path / "base", real_data, tmp_path, "run", flags, steps=1)
    assert found["train/peak_memory_gib"] < 24


@pytest.mark.parametrize(
    "words, lr",
    [
        ([], 1e-5),
        (["--lora"], 2e-4),
        (["--lora", "--lr", "3e-5"], 3e-5),
        (["--config", "lora.json"], 2e-4),
        (["--config", "lora.json", "--no_lora"], 1e-5),
        (["--demo", "--lora"], 1e-3),
    ],
)
def test_lora_has_a_learning_rate_of_its_own_unless_one_is_given(words, lr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.json").write_text('{"lora": true}')
    config, _ = read_config(train_rm.RewardTrainingConfig, words, "A test.")
    assert config.lr == lr


def evaluation_of(rewards):
    rewards = torch.tensor(rewards)  # (N, 2)
    correct = int((rewards[:, 0] > rewards[:, 1]).sum())
    return train_rm.Evaluation({}, correct, len(rewards), rewards, {})


def test_a_run_that_learned_nothing_or_is_too_sure_says_what_to_try():
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    assert evaluation_of([right] * 70 + [wrong] * 30).warning(1e-5) == ""
    for count in (20, 55):
        warning = evaluation_of([right] * count + [wrong] * (100 - count)).warning(1e-5)
        assert warning.startswith("no better than guessing") and "--lr than 1e-05" in warning
    too_sure = evaluation_of([right] * 70 + [[0.0, 9.0]] * 30).warning(1e-3)
    assert too_sure.startswith("surer than it is right: its loss without margins is 2.9") and "--epochs" in too_sure
