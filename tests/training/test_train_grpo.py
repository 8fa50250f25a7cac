"""train_grpo.py: steps that do not depend on how they are cut, exact resuming with the same replies, what stops it."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import models
import train_grpo
import train_sft
import utils
from checkpointing import manifest, run_folder
from common import file_locks
from grpo import evaluation, opening, report
from tests.training.test_train_rm import same_bytes, scalars
from utils import UserError

TINY = ["--batch_size", "4", "--group_size", "3", "--max_new_tokens", "10", "--eval_num_prompts", "8",
        "--eval_steps", "2", "--save_steps", "2", "--max_steps", "4", "--lr", "1e-3", "--precision",
        "fp32"]  # fmt: skip
FILES = ("model.safetensors", "optimizer.safetensors", "random_state.safetensors", "trained_examples.safetensors")


@pytest.fixture(scope="module")
def spoken(base, small_dataset, tmp_path_factory):
    """A policy that has learned to end its replies: (folder, reward model)."""

    folder, before = tmp_path_factory.mktemp("spoken"), Path.cwd()
    os.chdir(folder)
    try:
        train_sft.main(["--model", base, "--dataset", small_dataset, "--replies", "both", "--batch_size", "16",
                        "--grad_accum", "1", "--epochs", "6", "--lr", "6e-3", "--run_name", "sft"])  # fmt: skip
    finally:
        os.chdir(before)
    model = models.RewardModel.create(base, models.load_tokenizer(base), 3)
    model.save(folder / "reward")
    return str(manifest.find(str(folder / "checkpoints/sft/sft"))), str(folder / "reward")


@pytest.fixture
def train(spoken, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name, *flags):
        policy, reward = spoken
        common = ["--model", policy, "--reward_model", reward, "--dataset", small_dataset]
        train_grpo.main([*common, *TINY, "--run_name", name, *map(str, flags)])
        return manifest.find(f"checkpoints/grpo/{name}")

    return run


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal to one process alone")
def test_a_signal_to_the_demo_alone_ends_the_training_that_it_began_too(script_server, tmp_path):
    script = script_server.start(["train_grpo.py", "--demo", "--run_name", "better"], tmp_path)
    script.wait_for("step 17/350")  # of the reward model
    script.send_signal(signal.SIGINT)
    stopped = script.wait(60)
    assert stopped.returncode == 130 and "(the last completed step)" in stopped.stdout, stopped.stderr
    run = tmp_path / "checkpoints/rm/demo"
    assert run_folder.read_record(run).state == "stopped" and manifest.find(str(run))
    assert not file_locks.is_locked(run / file_locks.RunLock.FILE), "nobody trains it any more"


def rollouts_of(folder, table="rollouts"):
    with contextlib.closing(sqlite3.connect(folder.parent / "rollouts.sqlite")) as database:
        return database.execute(f"SELECT * FROM {table} ORDER BY step, prompt, completion").fetchall()


@pytest.mark.parametrize("lora", [False, True])
def test_a_stopped_run_goes_on_bitwise_replies_included(train, tmp_path, capsys, lora):
    more = ["--lora"] * lora
    straight = train("straight", *more)
    out = capsys.readouterr().out
    assert re.search(r"step 4: held-out reward .* win rate .* KL .*, 8 prompts", out)
    assert "python chat.py --model" in out and "report: " in out
    train("stopped", *more, "--max_steps", 3)
    train_grpo.main(["--resume_from", "checkpoints/grpo/stopped", "--max_steps", "4"])
    stopped = manifest.find("checkpoints/grpo/stopped")
    names = ("adapter_model.safetensors", *FILES[1:]) if lora else FILES
    assert straight.name == stopped.name == "step-4" and same_bytes(straight, stopped, *names)
    rows = rollouts_of(straight)
    assert rows == rollouts_of(stopped) and len(rows) == 4 * 4 * 3
    rows = rollouts_of(straight, "held_out")
    assert [row for row in rows if row[0] != 3] == [row for row in rollouts_of(stopped, "held_out") if row[0] != 3]
    history = json.loads((straight.parent / evaluation.HISTORY).read_text())
    assert [one["step"] for one in history] == [0, 2, 4] and len(rows) == 3 * 8
    for one in history:
        kept = [row for row in rows if row[0] == one["step"]]
        assert np.mean([row[5] for row in kept]) == pytest.approx(one["reward"])
        assert np.mean([row[7] for row in kept]) == pytest.approx(one["kl"], abs=1e-6)
    assert (straight.parent / "reports" / report.PLOT).read_text().count("<svg") == 1
    values, _ = scalars(tmp_path / "logs/grpo/straight")
    assert abs(values["train/kl"][0][1]) < 1e-4 and values["train/logprob_gap"][0][1] < 1e-4
    for name in ("reward", "reward_std_in_group", "kl_k3", "entropy", "clip_fraction", "reply_tokens", "truncated",
                 "groups_without_spread", "distinct_3", "grad_norm", "rollout_seconds", "update_seconds"):  # fmt: skip
        assert len(values[f"train/{name}"]) == 4, name
    assert [step for step, _ in values["eval/win_rate"]] == [0, 2, 4]
    assert [prompts for prompts, _ in values["train/reward_by_examples"]] == [4, 8, 12, 16]
    policy = models.PolicyModel.restore(straight)
    assert next(policy.stream_candidates([{"role": "user", "content": "Hi"}], 1, max_new_tokens=2))


def test_how_a_step_is_cut_changes_nothing(train):
    whole = train("whole", "--max_steps", 2, "--tokens_per_batch", 4096)
    for name, flags in {
        "cut": ["--tokens_per_batch", 96], "waves": ["--generation_tokens", 100], "plain": ["--attention", "sdpa"],
        "recomputed": ["--gradient_checkpointing"],
    }.items():  # fmt: skip
        other = train(name, "--max_steps", 2, *flags)
        assert [row[4] for row in rollouts_of(other)] == [row[4] for row in rollouts_of(whole)], name
        weights, wanted = (load_file(folder / "model.safetensors") for folder in (other, whole))
        for path, tensor in wanted.items():
            assert torch.allclose(weights[path], tensor, atol=3e-5), (name, path)


def test_several_processes_write_and_learn_what_one_does(train, spoken, small_dataset, script_server, tmp_path):
    from tests.training.test_distributed import free_port

    alone = train("alone", "--max_steps", 2)
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = ["train_grpo.py", "--model", spoken[0], "--reward_model", spoken[1], "--dataset", small_dataset, *TINY,
                 "--max_steps", 2, "--run_name", "two"]  # fmt: skip
    started = [
        script_server.start(arguments, tmp_path, place | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(2)
    ]
    for result in [script.wait() for script in started]:
        assert result.returncode == 0, result.stderr
    two = manifest.find("checkpoints/grpo/two")
    assert [row[4] for row in rollouts_of(two)] == [row[4] for row in rollouts_of(alone)]
    held_out, wanted = (rollouts_of(folder, "held_out") for folder in (two, alone))
    assert [row[4] for row in held_out] == [row[4] for row in wanted] and len(wanted) == 2 * 8
    assert np.allclose([row[7] for row in held_out], [row[7] for row in wanted], atol=1e-4)
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (two, alone))
    for path, tensor in wanted.items():
        assert torch.allclose(weights[path], tensor, atol=3e-5), path


def test_out_of_memory_halves_the_budget_and_the_step_is_the_same(train, monkeypatch, capsys):
    whole = train("whole", "--max_steps", 1, "--no_gradient_checkpointing")
    forward, calls = models.PolicyModel.forward, []

    def fail_once(self, *tensors):
        if torch.is_grad_enabled() and not calls:
            calls.append(1)
            raise RuntimeError("CUDA out of memory (made up)")
        return forward(self, *tensors)

    monkeypatch.setattr(models.PolicyModel, "forward", fail_once)
    other = train("again", "--max_steps", 1, "--no_gradient_checkpointing")
    assert calls and "out of memory at" in capsys.readouterr().out
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (other, whole))
    assert all(torch.allclose(weights[path], tensor, atol=3e-5) for path, tensor in wanted.items())


def test_a_policy_too_far_from_its_start_stops_the_run(train, capsys):
    folder = train("far", "--max_kl", 1e-9, "--lr", "1e-2", "--eval_steps", 1, "--save_steps", 0)
    assert folder.name == "step-1" and "Try a larger --kl_coef" in capsys.readouterr().out


def test_a_gold_reward_model_judges_and_is_not_trained_on(train, spoken, base, tmp_path, capsys):
    models.RewardModel.create(base, models.load_tokenizer(base), 9).save(tmp_path / "gold")
    folder = train("judged", "--gold_reward_model", tmp_path / "gold")
    history = json.loads((folder.parent / evaluation.HISTORY).read_text())
    assert [one["step"] for one in history] == [0, 2, 4]
    assert all(0 <= one["judge_win_rate"] <= 1 and one["judge"] != one["reward"] for one in history)
    judged = [row[-1] for row in rollouts_of(folder, "held_out") if row[0] == 4]
    assert np.mean(judged) == pytest.approx(history[-1]["judge"], abs=1e-5)
    assert "the judge" in capsys.readouterr().out


def test_a_run_stands_for_its_newest_step_and_not_for_later_ones(run_folder, train, spoken, tmp_path):
    config = train_grpo.PolicyTrainingConfig(model=spoken[0], reward_model=str(run_folder))
    fixed = opening.with_fixed_models(config, None)
    assert fixed.reward_model == str(run_folder / "step-2") and fixed.max_length == 512 + 256
    folder = train("pinned", "--reward_model", run_folder, "--max_steps", 1)
    stored = json.loads((folder / "train_config.json").read_text())
    assert stored["reward_model"] == str((run_folder / "step-2").absolute()) and "max_length" not in stored


def test_a_moved_start_can_be_named_anew(train, spoken, tmp_path, monkeypatch):
    shutil.copytree(spoken[0], tmp_path / "start")
    straight = train("straight", "--model", tmp_path / "start")
    train("stopped", "--model", tmp_path / "start", "--max_steps", 2)
    (tmp_path / "start").rename(tmp_path / "moved")
    resume = ["--resume_from", "checkpoints/grpo/stopped", "--max_steps", "4"]
    with pytest.raises(UserError, match=r"began from is missing(.|\n)*--allow_data_change"):
        train_grpo.main(resume)
    train_grpo.main([*resume, "--model", str(tmp_path / "moved"), "--allow_data_change"])
    assert same_bytes(straight, manifest.find("checkpoints/grpo/stopped"), *FILES[:3])


def test_longer_test_prompts_count_for_the_positions(train, write_rows):
    rows = [{"prompt": f"tea {n}"} for n in range(8)]
    folder = write_rows(rows).parent
    write_rows([{"prompt": "tea " * 400}], "test.jsonl")
    with pytest.raises(UserError, match="2,048 positions"):
        train("refused", "--dataset", folder, "--max_new_tokens", 1500, "--prompt_max_length", 1000)


def test_beyond_max_kl_a_resumed_run_does_not_go_on(train, capsys):
    train("far", "--max_kl", 1e-9, "--lr", "1e-2", "--eval_steps", 1, "--save_steps", 0)
    train_grpo.main(["--resume_from", "checkpoints/grpo/far"])
    assert "is further from the reference than --max_kl 1e-09: raise it" in capsys.readouterr().out
    assert manifest.find("checkpoints/grpo/far").name == "step-1"


def test_the_same_text_is_a_tie_whatever_rounding_says():
    same = torch.tensor([True, True, False, False])
    rate, *_ = evaluation.win_rate(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.1, 1.9, 2.0, 5.0]), same)
    assert rate == 0.5


def test_what_overoptimizes_is_said_with_the_step_to_use():
    def one(step, wins, judge):
        return evaluation.Evaluation(step, 9, float(step), 0, 0, wins, 0, 1, step / 10, 5, 0, judge, judge, 0, 1)

    history = [one(0, 0.5, 0.5), one(10, 0.7, 0.66), one(20, 0.9, 0.4)]
    text = report.peak(history, saved=set())
    assert "overoptimized" in text and "from 66.0% at step-10" in text and "40.0%" in text
    assert "--save_steps" in text, "that step was not saved"
    assert "Use step-10" in report.peak(history, saved={"step-10"})
    text = report.peak(history[:2], saved=set())
    assert "likes step-10 best" in text and "overoptimized" not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reward_model", "./nowhere"], "--reward_model: no such file"),
        (["--fsdp"], "--fsdp: not for policies"),
        (["--lora", "--lora_dropout", "0.1"], "must be 0"),
        (["--group_size", "1"], "--group_size"),
        (["--max_new_tokens", "5000"], "2,048 positions"),
        (["--max_length", "8"], "--max_length: here --prompt_max_length"),
    ],
)
def test_what_cannot_work_is_said_at_once(train, flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        train("refused", *flags)


def test_a_language_model_is_no_reward_model(train, spoken):
    with pytest.raises(UserError, match="--reward_model does not name a reward model"):
        train("refused", "--reward_model", spoken[0])
    assert np.isfinite(train_grpo.PolicyTrainingConfig().lr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_killed_or_stopped_run_loses_at_most_its_last_steps_and_no_reply(
    train, spoken, small_dataset, script_server, tmp_path, number
):
    straight = train("straight", "--max_steps", 6, "--save_steps", 2)
    words = ["train_grpo.py", "--model", spoken[0], "--reward_model", spoken[1], "--dataset", small_dataset, *TINY,
             "--max_steps", 6, "--save_steps", 2, "--run_name", "hit"]  # fmt: skip
    script = script_server.start(words, tmp_path)
    script.wait_for(r"step 3/6")
    script.send_signal(getattr(signal, number))
    result = script.wait()
    if number == "SIGKILL":
        assert result.returncode == -signal.SIGKILL
    else:
        assert result.returncode == 128 + getattr(signal, number), result.stderr
        assert "the last completed step" in result.stdout
    resumed = script_server.run(["train_grpo.py", "--resume_from", "checkpoints/grpo/hit"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    hit = manifest.find("checkpoints/grpo/hit")
    assert hit.name == straight.name == "step-6" and same_bytes(straight, hit, *FILES)
    assert rollouts_of(hit) == rollouts_of(straight)
    evaluated = [row for row in rollouts_of(hit, "held_out") if row[0] in (0, 2, 4, 6)]
    assert evaluated == rollouts_of(straight, "held_out") and len(evaluated) == 4 * 8


def test_a_step_whose_loss_is_not_finite_is_skipped_and_named(train, monkeypatch, capsys):
    from grpo import loss

    original, calls = loss.token_loss, []

    def poisoned(*tensors):
        calls.append(1)
        losses, clipped = original(*tensors)
        return (losses * float("nan") if len(calls) == 2 else losses), clipped

    monkeypatch.setattr(loss, "token_loss", poisoned)
    folder = train("poisoned", "--max_steps", 3)
    out = capsys.readouterr().out
    assert re.search(r"step \d skipped: its loss or gradient is not finite", out) and "1 of these steps were" in out
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("record", [None, "{", '{"state": "finished"}'])
def test_the_demo_trains_what_is_not_there_whatever_a_broken_run_left(record, tmp_path, monkeypatch):
    started = []

    def trained(command):
        started.append(command[1:])
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "run_child", trained)
    if record is not None:
        (tmp_path / "checkpoints/rm/demo").mkdir(parents=True)
        (tmp_path / "checkpoints/rm/demo/run.json").write_text(record)
    config = train_grpo.PolicyTrainingConfig(demo=True, model="demo/model")
    assert evaluation.demo_models(config) == {"reward_model": "checkpoints/rm/demo", "model": "checkpoints/sft/demo"}
    assert [Path(words[0]).name for words in started] == ["train_rm.py", "train_sft.py"]
    assert all("--demo" in words for words in started)


def test_the_report_shows_replies_before_and_after_and_escapes_them(train, monkeypatch, capsys):
    from grpo import rollouts

    original = rollouts.kept_rows

    def hostile(*arguments):
        return [(*row[:3], "<script>x</script>", "</div><img src=x>", *row[5:]) for row in original(*arguments)]

    monkeypatch.setattr(rollouts, "kept_rows", hostile)
    folder = train("seen").parent / "reports"
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == page.count("<figcaption") == 3 and "default-src 'none'" in page
    assert "<script" not in page and "<img" not in page and "&lt;img src=x&gt;" in page
    for heading in ("Whose reward rose most", "Whose reward fell most"):
        assert heading in page
    assert page.count('class="reply rejected"') == page.count('class="reply chosen"') == 8
    (folder.parent / "rollouts.sqlite").unlink()
    history = [evaluation.Evaluation(**one) for one in json.loads((folder.parent / evaluation.HISTORY).read_text())]
    report.write(folder, folder.parent, history, [])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Replies cannot be shown: no replies are kept here" in page and "reply chosen" not in page


def test_the_reports_findings_name_what_moved():
    def one(step, reward, tokens, **more):
        return evaluation.Evaluation(
            step, 100, reward, reward - 0.1, reward + 0.1, 0.6, 0.5, 0.7, 0.5, tokens, 0, **more
        )

    rose = report.findings([one(0, 0, 50), one(9, 0.5, 20)], set())
    assert "rose from 0.000 to 0.500" in rose[0] and "became shorter, from 50 to 20" in rose[1]
    assert "--gold_reward_model" in rose[2]
    assert "within the intervals" in report.findings([one(0, 0, 50), one(9, 0.1, 50)], set())[0]
    assert "fell from" in report.findings([one(0, 0, 50), one(9, -0.5, 50)], set())[0]
    assert report.findings([one(0, 0, 50)], set()) == ["It was evaluated once: there is nothing to compare."]
