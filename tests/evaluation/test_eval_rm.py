"""eval_rm.py: models whose behaviour is known, rewards against transformers' own, resuming, benchmarks, bad input."""

import contextlib
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_rm
import models
import train_rm
import utils
from checkpointing import resolve
from checkpointing.run_folder import best_step
from tests.conftest import ROOT
from tests.reward_models import save_constant_model, save_length_model
from utils import CheckpointError, DiskOrNetworkError, UserError

FP32 = ("--precision", "fp32")


@pytest.fixture(scope="module")
def length_model(tmp_path_factory, base):
    return save_length_model(tmp_path_factory.mktemp("models") / "length", base)


@pytest.fixture(scope="module")
def constant_model(tmp_path_factory, base, tokenizer):
    return save_constant_model(tmp_path_factory.mktemp("models") / "constant", base, tokenizer)


@pytest.fixture
def evaluate(tmp_path, monkeypatch, demo_folder):
    """Run eval_rm.main in an empty folder; returns the content of report.json."""
    monkeypatch.chdir(tmp_path)

    def run(model, *flags, dataset=demo_folder[1]):
        eval_rm.main(["--model", str(model), "--dataset", str(dataset), "--report_dir", "out", *map(str, flags)])
        return utils.read_json(Path("out/report.json"))

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without pictures, for tests of something else: drawing takes longer than scoring a few rows."""
    from evaluation import plots

    monkeypatch.setattr(plots, "svg", lambda plot: "<svg></svg>")
    monkeypatch.setattr(plots, "image", lambda plot: np.zeros((4, 4, 3), dtype=np.uint8))


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Models whose behaviour is known
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_that_rewards_length_is_exposed(evaluate, length_model):
    found = evaluate(length_model, "--scores_out", "scores.jsonl", *FP32)
    tokenizer = models.load_tokenizer(str(length_model))
    for one in lines_of("scores.jsonl")[:20]:  # it is what it is meant to be
        count = len(tokenizer.apply_chat_template(one["chosen"], return_dict=False))
        assert one["reward_chosen"] == pytest.approx(count - 1, abs=0.01)
    length = found["length"]
    assert length["model_prefers_longer"] > 0.99
    assert length["better_is_longer"]["accuracy"] > 0.99 and length["better_is_shorter"]["accuracy"] < 0.01
    assert length["within_prompts"]["pearson"] > 0.99
    assert length["length_controlled"]["accuracy"] == pytest.approx(0.5, abs=0.01)
    assert found["accuracy"] == pytest.approx(found["baselines"]["longer wins"]["accuracy"], abs=0.02)
    assert any("Its reward is length" in finding for finding in found["findings"])
    assert "Its reward is length" in Path("out/report.html").read_text(encoding="utf-8")


def test_a_constant_model_is_reported_as_all_ties(evaluate, constant_model):
    found = evaluate(constant_model)
    assert (found["ties"], found["right"], found["wrong"], found["accuracy"]) == (400, 0, 0, 0.0)
    assert found["calibration"]["temperature"] is None and found["calibration"]["brier"] == 0.25
    assert found["findings"] == [
        "Every pair is a tie: the model gives all replies the same reward, and has learned nothing."
    ]


def test_a_known_temperature_is_recovered(evaluate, tmp_path, base, write_rows):
    """People prefer by σ(0.2 · Δtokens) and the model says 0.8 · Δtokens: its rewards are to be divided by 4."""
    model = save_length_model(tmp_path / "four", base, scale=0.8)
    draw, pairs = random.Random(1), []
    for number in range(2500):
        lengths = draw.sample(range(1, 16), 2)
        if draw.random() > 1 / (1 + math.exp(-0.2 * (lengths[0] - lengths[1]))):
            lengths.reverse()
        chosen, rejected = (" ".join(["a"] * length) for length in lengths)
        pairs.append({"prompt": f"How many? {number}", "chosen": chosen, "rejected": rejected})
    dataset = write_rows(pairs, "labels.jsonl")
    found = evaluate(model, "--split", "all", *FP32, dataset=dataset)
    temperature = found["calibration"]["temperature"]
    assert temperature["low"] < 4 < temperature["high"]
    assert temperature["value"] == pytest.approx(4, rel=0.12)
    assert any("overconfident" in finding for finding in found["findings"])


def test_a_breakdown_by_kind_turns_and_length_loses_no_pair(evaluate, reward_checkpoint, demo_folder):
    found = evaluate(reward_checkpoint)
    assert set(found["by_subset"]) == {"complete", "harmless", "on topic", "polite"}
    for name in ("by_subset", "by_turns", "by_length"):
        assert sum(one["n"] for one in found[name].values()) == found["n"] == 400
        assert sum(one["right"] for one in found[name].values()) == found["right"]
    kinds = [row["kind"] for row in lines_of(demo_folder[1] / "test.jsonl")]
    assert {kind: one["n"] for kind, one in found["by_subset"].items()} == {k: kinds.count(k) for k in set(kinds)}


# ---------------------------------------------------------------------------------------------------------------------
# Rewards are transformers' own
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(base, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    model = models.RewardModel.create(base, tokenizer, 3, models.LoraSettings(r=4))
    with torch.no_grad():
        for name, parameter in model.hf_model.named_parameters():
            if "lora_B" in name:  # zero at first, so that an adapter that is not applied would not be noticed
                parameter.normal_(std=0.05)
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def bert(base, tmp_path_factory):
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert") / "bert"
    tokenizer = models.load_tokenizer(base)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("which", ["reward_checkpoint", "adapter", "bert"])
def test_rewards_equal_those_of_plain_transformers(which, request, evaluate, small_dataset):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = request.getfixturevalue(which)
    evaluate(folder, "--scores_out", "scores.jsonl", "--no_untrained_baseline", *FP32, dataset=small_dataset)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    ).eval()
    scores = lines_of("scores.jsonl")
    assert len(scores) == 16
    for one in scores:
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(one[side], tokenize=False)
            with torch.no_grad():
                wanted = plain(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]
            assert one[f"reward_{side}"] == pytest.approx(float(wanted), abs=1e-5)
        assert one["margin"] == pytest.approx(one["reward_chosen"] - one["reward_rejected"], abs=1e-6)


@pytest.mark.usefixtures("undrawn")
def test_out_of_memory_goes_on_with_a_smaller_budget_and_the_same_rewards(evaluate, reward_checkpoint, monkeypatch):
    wanted = evaluate(reward_checkpoint, *FP32)
    whole, budgets = models.RewardModel.score_packed, []

    def score_packed(self, input_ids, *rest):
        budgets.append(input_ids.numel())
        if input_ids.numel() > 1500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, input_ids, *rest)

    monkeypatch.setattr(models.RewardModel, "score_packed", score_packed)
    found = evaluate(reward_checkpoint, *FP32)
    assert max(budgets) > 1500 > min(budgets)
    assert found["accuracy"] == wanted["accuracy"] and found["n"] == 400
    assert found["mean_margin"] == pytest.approx(wanted["mean_margin"], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Which rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_folders_is_broken_down_by_folder(evaluate, constant_model, tmp_path, capsys):
    """As HH-RLHF's own repository lies on a disk."""
    dialogue = "\n\nHuman: Hello {}\n\nAssistant: {}"
    for name, count in (("harmless-base", 3), ("helpful-online", 2)):
        (tmp_path / "hh" / name).mkdir(parents=True)
        for split, extra in (("test", 0), ("train", 5)):
            rows = [
                {"chosen": dialogue.format(n, "good day"), "rejected": dialogue.format(n, "no")}
                for n in range(count + extra)
            ]
            with gzip.open(tmp_path / "hh" / name / f"{split}.jsonl.gz", "wt") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hh" / "red-team-attempts").mkdir()
    found = evaluate(constant_model, dataset=tmp_path / "hh")
    assert {name: one["n"] for name, one in found["by_subset"].items()} == {"harmless-base": 3, "helpful-online": 2}
    assert "skipped: red-team-attempts" in capsys.readouterr().out
    assert evaluate(constant_model, "--split", "train", dataset=tmp_path / "hh")["n"] == 15
    assert evaluate(constant_model, "--split", "all", dataset=tmp_path / "hh")["n"] == 20


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_files_is_broken_down_by_file(evaluate, reward_checkpoint, write_rows, tmp_path):
    rows = [{"prompt": f"Hello {n}", "chosen": "yes", "rejected": "no", "source": f"s{n % 2}"} for n in range(4)]
    (tmp_path / "files").mkdir()
    for name in ("first", "second"):
        shutil.move(write_rows(rows), tmp_path / "files" / f"{name}.jsonl")
    found = evaluate(reward_checkpoint, dataset=tmp_path / "files")
    assert {name: one["n"] for name, one in found["by_subset"].items()} == {"first": 4, "second": 4}
    found = evaluate(reward_checkpoint, "--subset_column", "source", dataset=tmp_path / "files")
    assert {name: one["n"] for name, one in found["by_subset"].items()} == {"s0": 4, "s1": 4}
    with pytest.raises(UserError, match=r"no column 'sourc' .*did you mean 'source'"):
        evaluate(reward_checkpoint, "--subset_column", "sourc", dataset=tmp_path / "files")


@pytest.mark.usefixtures("undrawn")
def test_a_single_files_held_out_part_is_scored_and_a_note_says_so(evaluate, length_model, demo_folder, capsys):
    file = demo_folder[1] / "train.jsonl"
    held_out = evaluate(length_model, dataset=file)["rows"]["read"]
    assert "1 in 20 is held out, as in train_rm.py; --split all takes every row" in capsys.readouterr().out
    trained = evaluate(length_model, "--split", "train", "--max_pairs", 50, dataset=file)
    assert trained["n"] == 50
    everything = evaluate(length_model, "--split", "all", "--max_pairs", 10**6, dataset=file)["rows"]["read"]
    assert 40 < held_out < 120 and everything == 1600


@pytest.mark.usefixtures("undrawn")
def test_every_row_is_kept_or_counted(evaluate, reward_checkpoint, write_rows):
    long_reply = "word " * 400
    rows = [
        {"prompt": "Hello", "chosen": "Good day", "rejected": "no"},
        {"prompt": "Hello", "chosen": "", "rejected": "no"},
        {"prompt": "Hello", "chosen": "same", "rejected": "same"},
        {"prompt": "Hello", "chosen": long_reply, "rejected": "no"},
        {"prompt": "Hello", "chosen": "a", "rejected": "b", "vote": "tie"},
    ]
    found = evaluate(
        reward_checkpoint, "--split", "all", "--max_length", 200, "--scores_out", "s.jsonl", dataset=write_rows(rows)
    )
    assert found["n"] == 1 and found["rows"]["read"] == 5 and found["rows"]["left_out"] == 4
    assert found["rows"]["why"] == {"no_reply": 1, "identical": 1, "too_long": 1, "no_preference": 1}
    assert [one.get("left_out") for one in lines_of("s.jsonl")] == [
        None, "no_reply", "identical", "too_long", "no_preference",
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_nothing_to_score_is_bad_input_and_keeps_the_earlier_report(evaluate, reward_checkpoint, write_rows):
    evaluate(reward_checkpoint, "--max_pairs", 5)
    before = Path("out/report.json").read_bytes()
    for rows in ([{"chosen": "x", "rejected": "y"}], []):
        with pytest.raises(UserError, match="no row could be scored") as caught:
            evaluate(reward_checkpoint, "--split", "all", dataset=write_rows(rows))
        assert "no earlier report was touched" in str(caught.value)
    assert Path("out/report.json").read_bytes() == before
    assert [path.name for path in Path("out").glob(".*")] == []


@pytest.mark.usefixtures("undrawn")
def test_a_report_on_other_data_says_what_it_replaces_and_stays_out_of_the_training_logs(
    evaluate, reward_checkpoint, write_rows, capsys
):
    evaluate(reward_checkpoint, "--max_pairs", 5)
    assert "will be replaced" not in capsys.readouterr().out
    evaluate(reward_checkpoint, "--split", "all", "--max_pairs", 5)
    assert re.search(r"the report in out is on \S+, test, and will be replaced", capsys.readouterr().out)
    assert len(list(Path("out/tensorboard").iterdir())) == 1


@pytest.mark.usefixtures("undrawn")
def test_scores_are_written_through_links_but_never_over_other_files(
    evaluate, reward_checkpoint, tmp_path, demo_folder
):
    target = tmp_path / "target.jsonl"
    target.touch()
    (tmp_path / "link.jsonl").symlink_to(target)
    evaluate(reward_checkpoint, "--max_pairs", 5, "--scores_out", "link.jsonl")
    assert len(lines_of(target)) == 5 and (tmp_path / "link.jsonl").is_symlink()
    data = shutil.copy(demo_folder[1] / "test.jsonl", tmp_path / "mine.jsonl")
    before = Path(data).read_bytes()
    for name, message in ((data, "names the data"), ("out/report.json", "the report itself"), ("out", "is a folder")):
        with pytest.raises(UserError, match=message):
            evaluate(reward_checkpoint, "--split", "all", "--scores_out", name, dataset=data)
    assert Path(data).read_bytes() == before
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
        with pytest.raises(UserError, match="no regular file"):
            evaluate(reward_checkpoint, "--scores_out", "pipe")
    with pytest.raises(DiskOrNetworkError, match="--scores_out cannot be written: it is no folder"):
        evaluate(reward_checkpoint, "--scores_out", "mine.jsonl/scores.jsonl")


def test_control_characters_in_the_data_do_not_reach_the_terminal(evaluate, reward_checkpoint, write_rows, capsys):
    asked = [{"role": "user", "content": "Bread?"}]
    rows = [
        {"prompt": asked, "chosen": f"Yes, {kind}.", "rejected": "No.", "kind": kind}
        for kind in ("\x1b[31mred", "\u202eback", "plain")
    ]
    found = evaluate(reward_checkpoint, "--split", "all", dataset=write_rows(rows))
    shown = capsys.readouterr().out
    assert "\\x1b[31mred" in shown and "\x1b" not in shown and "\u202e" not in shown
    assert set(found["by_subset"]) == {"\x1b[31mred", "\u202eback", "plain"}


def test_real_pairs_with_the_real_tokenizer(evaluate, real_data, real_tokenizer_folder, tmp_path):
    model = save_length_model(tmp_path / "long", real_tokenizer_folder, most_positions=4096)
    found = evaluate(model, "--max_pairs", 60, *FP32, dataset=real_data)
    assert found["n"] + found["rows"]["left_out"] == 60 and len(found["by_turns"]) > 2
    assert found["length"]["model_prefers_longer"] > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks
# ---------------------------------------------------------------------------------------------------------------------


def test_reward_bench_rows_are_aggregated_by_section(evaluate, length_model, write_rows):
    rows = [
        {"prompt": "a", "chosen": "a long reply to it", "rejected": "no", "subset": "math-prm", "id": 1},
        {"prompt": "b", "chosen": "no", "rejected": "a long reply to it", "subset": "hep-go", "id": 2},
        {"prompt": "c", "chosen": "a long reply to it", "rejected": "no", "subset": "alpacaeval-easy", "id": 3},
    ]
    found = evaluate(length_model, dataset=write_rows(rows, "reward-bench.jsonl"))
    assert found["n"] == 3, "a benchmark is taken whole, not one prompt in 20"
    benchmark = found["benchmark"]
    assert benchmark["name"] == "RewardBench"
    assert benchmark["parts"] == {"Chat": 1.0, "Reasoning": pytest.approx(984 / (984 + 164))}
    assert benchmark["score"] == pytest.approx((1 + 984 / 1148) / 2)


def test_reward_bench_2_rows_compare_one_with_several(evaluate, length_model, write_rows):
    reply = {length: " ".join(["word"] * length) for length in range(1, 12)}

    def row(subset, key, right, wrong):
        return {
            "prompt": f"Say {key}", "chosen": [reply[n] for n in right], "rejected": [reply[n] for n in wrong],
            "subset": subset, "id": key,
        }  # fmt: skip

    rows = [
        row("Math", "m1", [9], [1, 2, 3]),
        row("Math", "m2", [2], [1, 8, 3]),
        row("Focus", "f1", [5], [1, 2, 4]),
        row("Ties", "ref:1", [9], [3]),
        row("Ties", "tied:1", [8, 9, 10], [1, 2]),
    ]
    found = evaluate(length_model, "--scores_out", "s.jsonl", *FP32, dataset=write_rows(rows, "rb2.jsonl"))
    benchmark = found["benchmark"]
    assert benchmark["name"] == "RewardBench 2"
    # gap of tied:1 is 6 words, the spread 2, the gap of ref:1 6 words: accurate, and both margins exceed the spread
    ties = 1 + 0.01 * math.tanh(6 / 2 - 1)
    assert benchmark["parts"] == {"Focus": 1.0, "Math": 0.5, "Ties": pytest.approx(ties, abs=1e-4)}
    assert benchmark["score"] == pytest.approx((1 + 0.5 + ties) / 3, abs=1e-4)
    assert (found["n"], found["right"], found["pairs"]) == (5, 4, 3 + 3 + 3 + 1 + 2)
    # drawing lots: 1 in 4, 1 in 4, 1 in 4, 1 in 2, and of five replies the three right ones before both wrong ones
    assert found["guessing"] == pytest.approx((3 / 4 + 1 / 2 + 1 / 10) / 5)
    rules = found["baselines"]  # of rows, as the accuracy is: the reward is the length
    assert (rules["longer wins"]["n"], rules["longer wins"]["right"], rules["shorter wins"]["right"]) == (5, 4, 0)
    first = lines_of("s.jsonl")[0]
    assert len(first["reward_rejected"]) == 3 and first["chosen"][0][-1]["content"] == reply[9]
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "RewardBench 2" in page and "not in this data: Factuality" in page


# ---------------------------------------------------------------------------------------------------------------------
# Two models, the untrained one, where the report goes
# ---------------------------------------------------------------------------------------------------------------------


def test_two_models_on_the_same_pairs(evaluate, length_model, constant_model, capsys):
    found = evaluate(length_model, "--against", constant_model, "--scores_out", "s.jsonl")["against"]
    assert found["n"] == 400 and found["only_b_right"] == found["both_right"] == 0
    assert found["only_a_right"] + found["neither_right"] == 400
    assert found["accuracy_difference"] == found["only_a_right"] / 400 and found["low"] > 0
    assert found["mcnemar"]["p_value"] < 1e-10
    scores = lines_of("s.jsonl")
    assert {one["against"]["margin"] for one in scores} == {0.0}
    furthest = utils.read_json(Path("out/report.json"))["reading"]["disagreements"]
    assert len(furthest) == 10 and furthest[0]["margin"] == max(one["margin"] for one in scores)
    assert "McNemar" in capsys.readouterr().out


TWO_STEPS = ("--max_steps", "2", "--batch_size", "8", "--grad_accum", "1")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory, base, small_dataset):
    """A folder with a run of two steps and its logs."""
    folder = tmp_path_factory.mktemp("two_steps")
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        train_rm.main(["--model", base, "--dataset", small_dataset, *TWO_STEPS, "--run_name", "crumb"])
    assert printed.getvalue().endswith(f"report: {Path('checkpoints/rm/crumb/reports/step-2/report.html')}\n")
    return folder


@pytest.fixture
def trained_run(two_steps, tmp_path, monkeypatch):
    """A copy of that run in the working folder."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkpoints/rm/crumb"


def test_a_checkpoint_of_ours_knows_its_data_base_model_logs_and_report_folder(
    trained_run, monkeypatch, tmp_path, capsys
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import manage_runs

    step = trained_run / "step-2"
    before = {path.name: utils.sha256_of(path) for path in step.iterdir()}
    (point,) = utils.read_json(trained_run / "run.json")["evaluations"]["accuracy"]
    content = utils.read_json(trained_run / "reports/step-2/report.json")  # which training wrote, of what it evaluated
    assert (point["step"], round(point["value"] * point["count"]), point["count"]) == (
        2,
        content["right"],
        content["n"],
    )
    eval_rm.main(["--model", str(trained_run)])  # a second report takes the first one's place
    assert {path.name: utils.sha256_of(path) for path in step.iterdir()} == before
    assert resolve.sound_checkpoint(str(step)) == step
    reports = trained_run / "reports/step-2"
    assert sorted(path.name for path in reports.iterdir()) == ["report.html", "report.json"]
    content = utils.read_json(reports / "report.json")
    assert content["n"] == 16 and content["step"] == 2
    assert content["baselines"]["untrained model"]["n"] == 16
    (events,) = (tmp_path / "logs/rm/crumb/report").iterdir()
    board = EventAccumulator(str(events)).Reload()
    (point,) = board.Scalars("report/accuracy")
    assert (point.step, point.value) == (2, pytest.approx(content["accuracy"]))
    assert {"report/accuracy", "report/reliability", "report/length"} <= set(board.Tags()["images"])

    capsys.readouterr()
    manage_runs.main(["--show", "crumb"])  # and manage_runs.py takes the reports for a part of the run
    shown = capsys.readouterr().out
    assert "left alone" not in shown and "reports/step-2/report.html" in shown
    manage_runs.main(["--delete", "crumb/step-2", "--yes"])
    assert reports.is_dir()
    manage_runs.main(["--undo"])
    manage_runs.main(["--delete", "crumb", "--yes"])
    assert not trained_run.exists()
    manage_runs.main(["--undo"])
    assert (reports / "report.html").is_file()


@pytest.mark.usefixtures("undrawn")
def test_a_training_reports_on_its_best_checkpoint_too_or_not_at_all(base, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", base, "--dataset", small_dataset, *TWO_STEPS, "--max_steps", "3", "--eval_steps", "1",
             "--save_steps", "1", "--eval_num_batches", "1", "--lr", "1e-2"]  # fmt: skip
    train_rm.main([*flags, "--run_name", "quiet", "--no_report"])
    assert not (tmp_path / "checkpoints/rm/quiet/reports").exists()
    train_rm.main([*flags, "--run_name", "told"])
    run = tmp_path / "checkpoints/rm/told"
    wanted = {"step-3", best_step(run).name}
    assert {path.name for path in (run / "reports").iterdir()} == wanted
    for point in utils.read_json(run / "run.json")["evaluations"]["accuracy"]:
        if f"step-{point['step']}" in wanted:
            content = utils.read_json(run / f"reports/step-{point['step']}/report.json")
            assert (content["right"], content["n"]) == (round(point["value"] * point["count"]), point["count"])


def test_a_report_that_cannot_be_written_does_not_fail_the_training(trained_run, capsys):
    shutil.rmtree(trained_run / "reports")
    (trained_run / "reports").write_text("in the way")
    train_rm.main(["--resume_from", str(trained_run), "--max_steps", "3", "--report"])
    assert "the training is saved, but there is no report of it" in capsys.readouterr().err
    assert (trained_run / "step-3/manifest.json").is_file() and (trained_run / "reports").is_file()


def test_a_report_calls_a_hub_model_by_its_id_and_a_run_by_its_newest_step(reward_checkpoint, tmp_path):
    assert eval_rm.display_name("someone/reward-model", tmp_path / "snapshots/0f3a") == "someone/reward-model"
    assert eval_rm.display_name(str(reward_checkpoint.parent), reward_checkpoint).endswith("step-2")


def test_an_unwritable_folder_is_reported_before_scoring(reward_checkpoint, tmp_path, monkeypatch, demo_folder):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    with pytest.raises(DiskOrNetworkError, match="the report's folder cannot be written") as caught:
        eval_rm.main(
            ["--model", str(reward_checkpoint), "--dataset", str(demo_folder[1]), "--report_dir", "taken/report"]
        )
    assert "nothing was scored" in str(caught.value) and "--report_dir FOLDER" in str(caught.value)


@pytest.mark.usefixtures("undrawn")
def test_an_adapter_whose_base_model_has_moved_is_opened_with_base_model(evaluate, adapter, base, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    settings = utils.read_json(moved / "adapter_config.json")
    utils.write_json(moved / "adapter_config.json", settings | {"base_model_name_or_path": "/nowhere/base"})
    for models_given in ([moved], [adapter, "--against", moved]):
        with pytest.raises(UserError, match="--base_model FOLDER") as caught:
            evaluate(*models_given)
        assert "/nowhere/base" in str(caught.value) and not Path("out").exists()
    found = evaluate(adapter, "--against", moved, "--base_model", base, "--max_pairs", 20)
    assert found["against"]["only_a_right"] == found["against"]["only_b_right"] == 0


def test_a_missing_base_model_is_noted_in_the_report(trained_run, monkeypatch, tmp_path, base):
    monkeypatch.chdir(tmp_path)
    config = utils.read_json(trained_run / "step-2/train_config.json") | {"model": "/nowhere/base"}
    copy = tmp_path / "copy"
    shutil.copytree(trained_run / "step-2", copy)
    utils.write_json(copy / "train_config.json", config)
    (copy / "manifest.json").unlink()
    eval_rm.main(["--model", str(copy)])
    content = utils.read_json(tmp_path / "report/report.json")
    assert "untrained model" not in content["baselines"]
    assert content["notes"] == ["no untrained baseline: the base model is no longer at /nowhere/base"]


def test_the_page_is_complete_loads_nothing_and_escapes_replies(evaluate, constant_model, write_rows):
    rows = [
        {"prompt": "<script>alert(1)</script>", "chosen": '<img src="http://evil/x">', "rejected": "</p>",
         "kind": "<b>k"},
        {"prompt": "two", "chosen": "a", "rejected": "b", "kind": "[bold]plain"},
    ]  # fmt: skip
    evaluate(constant_model, "--split", "all", dataset=write_rows(rows))
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img" not in page and "<b>k" not in page
    assert "&lt;script&gt;alert(1)" in page and "default-src 'none'" in page
    tags = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    reader.feed(page)
    assert not {tag for tag, _ in tags} & {"script", "img", "link", "iframe", "object", "image", "a", "form"}
    pointers = [v for _, found in tags for k, v in found.items() if k.endswith(("href", "src", "action"))]
    assert all(pointer.startswith("#") for pointer in pointers), pointers  # a mark that is used again
    assert "url(h" not in page and "@import" not in page
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", page), "a stand-in colour was left"
    assert page.count("<svg") == page.count("</svg>") >= 4


# ---------------------------------------------------------------------------------------------------------------------
# Killed, stopped, no room
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_pairs(tmp_path_factory, demo_folder):
    file = tmp_path_factory.mktemp("many") / "many.jsonl"
    with (demo_folder[1] / "train.jsonl").open() as lines:
        file.write_text("".join(itertools.islice(lines, MANY)))
    return file


MANY, WITHOUT_BASELINE = 600, ("--split", "all", "--report_dir", "out", "--no_untrained_baseline")


@pytest.fixture(scope="module")
def uninterrupted(reward_checkpoint, many_pairs, tmp_path_factory):
    """The report on these pairs of an evaluation that nothing stopped."""
    with contextlib.chdir(tmp_path_factory.mktemp("uninterrupted")):
        eval_rm.main(["--model", str(reward_checkpoint), "--dataset", str(many_pairs), *WITHOUT_BASELINE])
        return utils.read_json(Path("out/report.json"))


def start(folder, model, dataset):
    """A slow evaluation in a process: one pair in each forward."""
    command = [sys.executable, ROOT / "eval_rm.py", "--model", model, "--dataset", dataset, *WITHOUT_BASELINE,
               "--tokens_per_batch", "32"]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kept_scores(folder):
    """How many rows the partial file of an evaluation holds."""
    for path in (folder / "out").glob(".partial-*.sqlite"):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as database:
            return database.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
    return 0


def wait_for_scores(process, folder, rows):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if kept_scores(folder) >= rows:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_evaluation_goes_on_where_it_was(
    number, tmp_path, reward_checkpoint, many_pairs, uninterrupted, evaluate, capsys
):
    process = start(tmp_path, reward_checkpoint, many_pairs)
    wait_for_scores(process, tmp_path, 100)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert "the same command goes on from there" in errors
    kept = kept_scores(tmp_path)
    assert 100 <= kept < MANY
    resumed = evaluate(reward_checkpoint, *WITHOUT_BASELINE, dataset=many_pairs)
    assert f"going on after {kept:,} rows that were scored before" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob(".*")), "the partial file goes when the report is there"
    assert resumed["n"] + resumed["rows"]["left_out"] == MANY
    assert resumed["right"] == pytest.approx(uninterrupted["right"], abs=2)
    assert resumed["mean_margin"] == pytest.approx(uninterrupted["mean_margin"], abs=1e-3)


@pytest.mark.usefixtures("undrawn")
def test_scores_of_another_model_or_of_other_rows_are_not_reused(
    evaluate, length_model, constant_model, demo_folder, monkeypatch
):
    from evaluation import report

    def no_room(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_json", no_room)
        with pytest.raises(OSError):
            evaluate(length_model, *FP32)
    assert len(list(Path("out").glob(".partial-*"))) == 1
    assert evaluate(constant_model, *FP32)["ties"] == 400
    assert evaluate(length_model, "--max_pairs", 30, *FP32)["n"] == 30
    assert len(list(Path("out").glob(".partial-*"))) == 1
    assert evaluate(length_model, *FP32)["n"] == 400
    assert not list(Path("out").glob(".partial-*"))


@pytest.mark.skipif(os.name == "nt", reason="ulimit is a shell's on Unix")
@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_exits_4_and_keeps_what_was_scored(tmp_path, reward_checkpoint, many_pairs, evaluate, capsys):
    command = shlex.join([sys.executable, str(ROOT / "eval_rm.py"), "--model", str(reward_checkpoint), "--dataset",
                          str(many_pairs), *WITHOUT_BASELINE])  # fmt: skip
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 20; exec {command}"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 4, result.stderr
    assert "writing to disk failed" in result.stderr and "are kept" in result.stderr
    assert "Traceback" not in result.stderr
    evaluate(reward_checkpoint, *WITHOUT_BASELINE, dataset=many_pairs)
    assert "going on after" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_anything_but_a_reward_model_is_rejected(evaluate, base, tmp_path, reward_checkpoint):
    with pytest.raises(UserError, match="--model names something that does not exist"):
        evaluate("./nowhere")
    with pytest.raises(UserError, match="--against names something that does not exist"):
        evaluate(reward_checkpoint, "--against", "./nowhere")
    with pytest.raises(UserError, match="--against names the model itself"):
        evaluate(reward_checkpoint, "--against", reward_checkpoint.parent)  # a run's folder is its newest step
    with pytest.raises(UserError, match=r"--model names no reward model(.|\n)*a model that writes"):
        evaluate(base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config.json of a model"):
        evaluate(tmp_path / "empty")
    with pytest.raises(DiskOrNetworkError, match="no local copy of some/where"):
        evaluate("some/where")
    with pytest.raises(UserError, match="--model: wants a reward model"):
        eval_rm.main([])


def test_a_model_with_two_labels_is_rejected(evaluate, base, tmp_path, constant_model):
    with pytest.raises(UserError, match="--against names no reward model"):
        evaluate(constant_model, "--against", base)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    model.save_pretrained(tmp_path / "two")
    models.load_tokenizer(base).save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="--model has 2 labels, and a reward model has one"):
        evaluate(tmp_path / "two")


def test_a_damaged_checkpoint_is_rejected(evaluate, reward_checkpoint, tmp_path):
    shutil.copytree(reward_checkpoint, tmp_path / "run/step-2")
    with (tmp_path / "run/step-2/model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="the checkpoint is damaged") as raised:
        evaluate(tmp_path / "run/step-2")
    assert raised.value.exit_code == 3
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "text, wanted",
    [
        ('{"chosen": "a"', "the data is not JSON"),
        ('{"prompt": "a", "chosen": "b"}', "no column 'rejected'"),
        ('{"prompt": "a", "chosen": 3, "rejected": "b"}', "'chosen' is a int"),
        ('{"prompt": "a", "chosen": [], "rejected": ["b"]}', "'chosen' is an empty list"),
        ('{"prompt": "a", "chosen": ["c"], "rejected": ["b", 3]}', "'rejected' is a int"),
        ("[1]", "it is a list, not an object"),
        ('{"prompt": "\xff", "chosen": "c", "rejected": "b"}', "not UTF-8"),
    ],
)
def test_a_broken_row_is_reported_with_its_place(text, wanted, evaluate, constant_model, tmp_path):
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "rows.jsonl").write_bytes(good.encode() + text.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=wanted) as raised:
        evaluate(constant_model, "--split", "all", dataset=tmp_path / "rows.jsonl")
    assert "rows.jsonl:2" in str(raised.value)
    assert not (tmp_path / "out/report.json").exists()


def test_missing_splits_and_folders_are_named(evaluate, constant_model, tmp_path, demo_folder):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="a folder without a test file"):
        evaluate(constant_model, dataset=tmp_path / "none")
    with pytest.raises(UserError, match="--split filtered: a single file has train, test and all"):
        evaluate(constant_model, "--split", "filtered", dataset=demo_folder[1] / "test.jsonl")
    with pytest.raises(UserError, match="--split filtered: no such file"):
        evaluate(constant_model, "--split", "filtered", dataset=demo_folder[1])


def test_a_reward_that_is_not_finite_is_an_error(evaluate, tmp_path, base, tokenizer, small_dataset):
    model = models.RewardModel.create(base, tokenizer, 0)
    with torch.no_grad():
        model.hf_model.score.weight.fill_(3e38)
    model.save(tmp_path / "inf")
    with pytest.raises(UserError, match="a reward that is not a finite number"):
        evaluate(tmp_path / "inf", dataset=small_dataset)


def test_all_bad_flags_are_reported_at_once():
    with pytest.raises(UserError) as raised:
        eval_rm.main(["--best_of", "--batch_size", "0", "--precision", "int8", "--scores_out", "/"])
    for name in ("--model", "--best_of", "--batch_size", "--precision", "--scores_out"):
        assert name in str(raised.value)
    with pytest.raises(UserError, match="--against: cannot be combined with --score"):
        eval_rm.main(["--model", "x", "--score", "-", "--against", "y"])
    with pytest.raises(UserError, match="--split: cannot be combined with --score"):
        eval_rm.main(["--model", "x", "--score", "-", "--split", "train"])
