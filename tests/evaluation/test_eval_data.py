"""Which rows are scored, how they are broken down, benchmarks, and broken data."""

import gzip
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest

import train_rm
from checkpointing import manifest
from data_pipeline import sources
from tests.data_pipeline.rows import read_part
from tests.evaluation.conftest import FP32, lines_of
from tests.reward_models import save_length_model
from utils import DiskOrNetworkError, UserError

# -- Which rows --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_folders_is_broken_down_by_folder(evaluate, constant_model, tmp_path, capsys):
    """The layout of HH-RLHF's own repository."""
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
    (tmp_path / "hh" / "red-team-attempts" / "red_team_attempts.jsonl").write_text('{"transcript": "no pair"}')
    found = evaluate(constant_model, dataset=tmp_path / "hh")
    assert {name: one["n"] for name, one in found["by_subset"].items()} == {"harmless-base": 3, "helpful-online": 2}
    assert ": red-team-attempts (--subset takes one)" in capsys.readouterr().out
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
def test_published_forms_are_compared_as_they_are_trained_on(evaluate, length_model, write_rows):
    """The longer reply is better throughout, and so it is for this model."""
    rows = [
        {"prompt": "Hello", "response_0": "no", "response_1": "a long reply", "better_response_id": 1},
        {"question": {"full_text": "Hello"}, "answer_0": "a long reply", "answer_1": "no", "score_0": 1, "score_1": -1},
        {"context": "Hello", "response1": "no", "response2": "no, no", "overall_preference": 0},
        {"prompt": "Hello", "answers": [{"answer": "a long, long reply", "rank": 1}, {"answer": "no", "rank": 2},
                                        {"answer": "a reply", "rank": 3}]},
    ]  # fmt: skip
    found = evaluate(length_model, "--split", "all", dataset=write_rows(rows))
    assert (found["n"], found["accuracy"], found["rows"]["why"]) == (3, 1.0, {"no_preference": 1})
    assert found["pairs"] == 4  # the third compares one reply with two
    assert "1 row read as PKU-SafeRLHF: better_response_id picks chosen" in found["rows"]["in_words"]


def trained_on(model, folder, dataset, **settings):
    """A copy of a model that says it was trained on a dataset."""
    shutil.copytree(model, folder)
    (folder / "train_config.json").write_text(json.dumps({"dataset": str(dataset), **settings}))
    return folder


@pytest.mark.usefixtures("undrawn")
def test_of_a_file_that_was_trained_on_only_the_held_out_part_is_scored(
    evaluate, length_model, demo_folder, tmp_path, capsys
):
    file = demo_folder[1] / "train.jsonl"
    model = trained_on(length_model, tmp_path / "trained", file)
    held_out = evaluate(model, dataset=file)["rows"]["read"]
    assert "1 in 20 is held out, as in train_rm.py; --split all takes every row" in capsys.readouterr().out
    copy = shutil.copy(file, tmp_path / "another name.jsonl")
    assert evaluate(model, dataset=copy)["rows"]["read"] == held_out
    trained = evaluate(model, "--split", "train", "--max_pairs", 50, dataset=file)
    assert trained["n"] == 50
    everything = evaluate(model, "--split", "all", "--max_pairs", 10**6, dataset=file)["rows"]["read"]
    assert 40 < held_out < 120 and everything == 1600


@pytest.mark.usefixtures("undrawn")
def test_a_file_that_was_not_trained_on_is_scored_whole(evaluate, length_model, demo_folder, tmp_path, capsys):
    model = trained_on(length_model, tmp_path / "trained", demo_folder[1] / "train.jsonl")
    assert evaluate(model, dataset=demo_folder[1] / "test.jsonl")["n"] == 400
    assert "scored whole, but for what was trained on" in capsys.readouterr().out
    assert evaluate(length_model, dataset=demo_folder[1] / "test.jsonl")["n"] == 400
    assert "scored whole, because no training on it is known" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_what_was_trained_on_whole_is_never_scored_as_test(evaluate, length_model, demo_folder, tmp_path):
    model = trained_on(length_model, tmp_path / "trained", demo_folder[1])  # which has a test file
    with pytest.raises(UserError, match="what the model was trained on"):
        evaluate(model, dataset=demo_folder[1] / "train.jsonl")
    found = evaluate(model, "--split", "train", "--max_pairs", 10**6, dataset=demo_folder[1] / "train.jsonl")
    assert found["rows"]["read"] == 1600
    (tmp_path / "shards").mkdir()
    shutil.copy(demo_folder[1] / "train.jsonl", tmp_path / "shards" / "train-00000-of-00001.jsonl")
    with pytest.raises(UserError, match="what the model was trained on"):
        evaluate(model, dataset=tmp_path / "shards")
    with pytest.raises(UserError, match="what the model was trained on"):
        evaluate(length_model, "--against", model, dataset=demo_folder[1] / "train.jsonl")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("is_split", [True, False], ids=["split by hash", "beside a test file"])
def test_single_rows_that_were_trained_on_are_skipped_under_whatever_name_they_come(
    evaluate, length_model, tmp_path, is_split
):
    rows = [{"prompt": f"Hello {n}?", "chosen": "a long reply", "rejected": "no"} for n in range(60)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(lines[:40]))
    if not is_split:
        (tmp_path / "set" / "val.jsonl").write_text("".join(lines[40:50]))
    model = trained_on(length_model, tmp_path / "trained", tmp_path / "set")
    trained = evaluate(model, "--split", "train", dataset=None)["rows"]["read"]
    assert (trained < 40) == is_split
    # the file grew, and is now one of messages
    as_messages = [
        {side: [{"role": "human", "content": row["prompt"]}, {"role": "gpt", "content": row[side]}]
         for side in ("chosen", "rejected")}
        for row in rows
    ]  # fmt: skip
    (tmp_path / "grown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_messages))
    found = evaluate(model, dataset=tmp_path / "grown.jsonl")
    assert found["rows"]["why"] == {"trained_on": trained} and found["n"] == 60 - trained
    assert any("a model was trained on it" in line for line in found["rows"]["in_words"])
    assert evaluate(model, "--split", "all", dataset=tmp_path / "grown.jsonl")["n"] == 60


@pytest.mark.usefixtures("undrawn")
def test_what_was_trained_on_is_known_when_its_files_have_moved_or_changed(evaluate, base, tmp_path):
    """Trained on rows 0 to 7, resumed with rows 8 to 11, and a second run begun from that with 12 to 15."""
    rows = [{"prompt": f"Hello {n}?", "chosen": f"a long reply {n}", "rejected": "no"} for n in range(24)]

    def write(name, *chosen):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text("".join(json.dumps(rows[n]) + "\n" for n in chosen))

    common = ["--dataset", "set", "--batch_size", "2", "--grad_accum", "1", "--eval_num_batches", "1", "--no_report"]
    write("test.jsonl", 22, 23)
    write("train.jsonl", *range(8))
    train_rm.main(["--model", base, "--run_name", "first", *common])
    write("train.jsonl", *range(8, 12))
    resume = ["--resume_from", "checkpoints/rm/first", "--allow_data_change", "--epochs", "4"]
    train_rm.main([*resume, "--run_name", "second", "--no_report"])
    second = manifest.find("checkpoints/rm/second")
    write("train.jsonl", *range(12, 16))
    train_rm.main(["--model", str(second), "--run_name", "third", *common])
    third = manifest.find("checkpoints/rm/third")
    (tmp_path / "set").rename(tmp_path / "moved")
    for name in ("anything.jsonl", "train.jsonl", "test.jsonl"):
        file = tmp_path / "moved" / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
        for model, trained in ((second, 12), (third, 16)):
            found = evaluate(model, "--no_untrained_baseline", dataset=file)
            assert (found["rows"]["why"], found["n"]) == ({"trained_on": trained}, 24 - trained), (name, model)
    found = evaluate(third, "--max_pairs", "6", "--no_untrained_baseline", dataset=file)
    assert found["n"] == 6, "of a sample, all can be scored"
    assert evaluate(third, "--split", "all", "--no_untrained_baseline", dataset=file)["n"] == 24


@pytest.fixture
def trained_sets(base, tmp_path, monkeypatch, capsys):
    """Runs trained on rows `first` (0 to 29), and from there on `second` (30 to 49, tested on 20 to 59)."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Hello {n}?", "chosen": f"a long reply {n}", "rejected": "no"} for n in range(80)]

    def write(name, numbers):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(rows[n]) + "\n" for n in numbers))
        return path

    common = ["--batch_size", "8", "--grad_accum", "1", "--eval_num_batches", "0", "--no_report"]
    write("first/train.jsonl", range(30))
    write("first/test.jsonl", range(70, 80))
    train_rm.main(["--model", base, "--dataset", "first", "--run_name", "first", *common])
    write("second/train.jsonl", range(30, 50))
    write("second/test.jsonl", range(20, 60))
    train_rm.main(["--model", "checkpoints/rm/first", "--dataset", "second", "--run_name", "second", *common])
    resume = ["--resume_from", "checkpoints/rm/first", "--dataset", "second", "--allow_data_change", "--epochs", "9"]
    train_rm.main([*resume, "--run_name", "resumed", "--no_report"])
    assert capsys.readouterr().out.count("skipped 30: a model was trained on it") == 2
    return rows, write, {name: manifest.find(f"checkpoints/rm/{name}") for name in ("first", "second", "resumed")}


@pytest.mark.usefixtures("undrawn")
def test_a_test_split_of_ones_own_is_scored_without_what_was_trained_on_before(evaluate, trained_sets):
    """Ten of its rows were of the run that this one began from, twenty are of its own training file."""
    _, write, runs = trained_sets
    for name in ("second", "resumed"):
        found = evaluate(runs[name], "--no_untrained_baseline", dataset=None)
        assert (found["n"], found["rows"]["why"]) == (10, {"trained_on": 30}), name
    for pair in (("second", "first"), ("first", "second")):
        found = evaluate(runs[pair[0]], "--against", runs[pair[1]], "--no_untrained_baseline", dataset="second")
        assert (found["n"], found["rows"]["why"]) == (10, {"trained_on": 30}), pair
    write("first/test.jsonl", range(10, 40))  # the split was drawn again
    found = evaluate(runs["first"], "--no_untrained_baseline", dataset=None)
    assert (found["n"], found["rows"]["why"]) == (10, {"trained_on": 20})


@pytest.mark.usefixtures("undrawn")
def test_a_pair_is_known_in_whatever_form_and_split_it_comes(evaluate, trained_sets, tmp_path, capsys):
    rows, write, runs = trained_sets

    def as_messages(row, **more):
        prompt = {"role": "user", "content": row["prompt"], **more}
        return {side: [prompt, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}

    system = {"role": "system", "content": ""}
    forms = {
        "an empty system turn": lambda row: {side: [system, *turns] for side, turns in as_messages(row).items()},
        "a weight": lambda row: as_messages(row, weight=1),
        "no calls": lambda row: as_messages(row, tool_calls=[]),
        "the other way round": lambda row: {**row, "chosen": row["rejected"], "rejected": row["chosen"]},
    }
    for number, (form, change) in enumerate(forms.items()):
        file = tmp_path / f"form{number}" / "validation.jsonl"
        file.parent.mkdir()
        file.write_text("".join(json.dumps(change(row)) + "\n" for row in rows[20:40]))
        for split in ("test", "validation"):
            found = evaluate(runs["first"], "--no_untrained_baseline", "--split", split, dataset=file.parent)
            assert (found["n"], found["rows"]["why"]) == (10, {"trained_on": 10}), (form, split)
        with pytest.raises(UserError, match="what the model was trained on"):
            evaluate(runs["first"], "--against", runs["second"], dataset=file.parent)
        assert evaluate(runs["first"], "--split", "all", "--no_untrained_baseline", dataset=file.parent)["n"] == 20
    found = evaluate(runs["first"], "--no_untrained_baseline", "--max_pairs", "5", dataset=file.parent)
    assert found["n"] == 5 and "10 rows that a model was trained on cannot be drawn" in capsys.readouterr().out
    bare = tmp_path / "bare"
    shutil.copytree(runs["first"], bare)
    for name in ("train_config.json", "training_state.json", "manifest.json"):
        (bare / name).unlink()
    assert evaluate(bare, "--no_untrained_baseline", dataset=file.parent)["n"] == 10, "as one would share a model"
    write("first/train.jsonl", range(60, 70))  # other rows in the place of those that were trained on
    assert evaluate(runs["first"], "--no_untrained_baseline", dataset="first/train.jsonl")["n"] == 10


@pytest.mark.usefixtures("undrawn")
def test_of_a_file_that_has_changed_since_neither_old_nor_new_training_rows_are_scored(evaluate, base, tmp_path):
    """Prompts were held out; with what was added most rows share one, and rows are held out."""
    rows = [{"prompt": f"Hello {n}?", "chosen": f"a long reply {n}", "rejected": "no"} for n in range(200)]
    added = [{"prompt": "The same?", "chosen": f"a long reply {n}", "rejected": "no"} for n in range(400)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--batch_size", "16", "--eval_num_batches", "1", "--no_report", "--run_name", "one"]
    train_rm.main(["--model", base, "--dataset", str(file), *common])
    held_out = {row for row, _ in read_part(sources.find_sources(sources.DataSpec(str(file))).test[0])}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows + added))
    found = evaluate(manifest.find("checkpoints/rm/one"), "--no_untrained_baseline", "--scores_out", "s.jsonl",
                     dataset=None)  # fmt: skip
    scored = {line["row"] for line in lines_of("s.jsonl") if "reward_chosen" in line}
    assert {row for row in scored if row <= 200} == held_out and len(scored) == len(held_out) + 400
    assert found["rows"]["read"] == len(scored), "the rest of the file is not of its test split"


@pytest.mark.usefixtures("undrawn")
def test_what_was_held_out_is_not_decided_anew_for_one_of_several_files_or_for_other_columns(
    evaluate, length_model, tmp_path
):
    (tmp_path / "set").mkdir()
    many = [{"prompt": f"Hello {n}?", "other": "Hi", "chosen": "a long reply", "rejected": "no"} for n in range(100)]
    one = [{"prompt": "The same?", "other": "Hi", "chosen": f"a long reply {n}", "rejected": "no"} for n in range(60)]
    for name, rows in (("many", many), ("one", one)):
        (tmp_path / "set" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = trained_on(length_model, tmp_path / "trained", tmp_path / "set")
    held_out = {}
    for name in ("many", "one"):
        for columns in ("", "prompt=other"):
            flags = ["--columns", columns] if columns else []
            try:
                found = evaluate(model, *flags, "--scores_out", "s.jsonl", dataset=tmp_path / "set" / f"{name}.jsonl")
                held_out[name, columns] = found["rows"]["read"]
            except UserError as error:
                assert "nothing to score" in str(error) or "no row" in str(error), error
                held_out[name, columns] = 0
    (test,) = sources.find_sources(sources.DataSpec(str(tmp_path / "set"))).test
    assert held_out["many", ""] == held_out["many", "prompt=other"] == len(read_part(test)) > 0
    assert held_out["one", ""] == held_out["one", "prompt=other"] == 0, "all of its rows were trained on"


@pytest.mark.usefixtures("undrawn")
def test_the_data_of_a_checkpoint_is_its_own_with_subset_split_and_columns(evaluate, length_model, tmp_path):
    rows = [{"question": f"Hello {n}", "good": "a long reply", "bad": "no"} for n in range(15)]
    places = {"train_prefs": (0, 6), "train_sft": (0, 6), "test_prefs": (6, 10), "test_sft": (10, 15)}
    for name, (start, end) in places.items():
        (tmp_path / "set" / "inner").mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows[start:end])
        (tmp_path / "set" / "inner" / f"{name}.jsonl").write_text(text)
    columns = "prompt=question,chosen=good,rejected=bad"
    settings = {"subset": "inner", "split": "train_sft", "columns": columns}
    model = trained_on(length_model, tmp_path / "trained", tmp_path / "set", **settings)
    found = evaluate(model, dataset=None)
    assert (found["n"], found["accuracy"]) == (5, 1.0)
    assert evaluate(model, "--columns", columns, dataset=tmp_path / "set")["n"] == 4


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
        with pytest.raises(UserError, match="not a regular file"):
            evaluate(reward_checkpoint, "--scores_out", "pipe")
    with pytest.raises(DiskOrNetworkError, match="--scores_out cannot be written: Not a directory"):
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


# -- Benchmarks --------------------------------------------------------------------------------------------------------


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


# -- Broken data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wanted",
    [
        ('{"chosen": "a"', "the data is not JSON"),
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


@pytest.mark.usefixtures("undrawn")
def test_a_bad_row_costs_itself_and_is_counted_with_its_reason(evaluate, constant_model, tmp_path):
    rows = {
        '{"prompt": "a", "chosen": "b"}': "no column 'rejected'",
        '{"prompt": "a", "chosen": 3, "rejected": "b"}': "'chosen' is a number",
        '{"prompt": "a", "chosen": [], "rejected": ["b"]}': "'chosen' is an empty list",
        '{"prompt": "a", "chosen": ["c"], "rejected": ["b", 3]}': "'rejected' is a number",
        '{"prompt": "a", "chosen": null, "rejected": "b"}': "'chosen' is null",
        "[1]": "it is a list, not an object",
    }
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
    for row, words in rows.items():
        (tmp_path / "rows.jsonl").write_text(f"{good}\n{row}\n")
        found = evaluate(constant_model, dataset=tmp_path / "rows.jsonl")["rows"]
        (line,) = found["in_words"]
        assert (found["read"], found["left_out"]) == (2, 1) and "(row 2; " in line and words in line


def test_missing_splits_and_folders_are_named(evaluate, constant_model, tmp_path, demo_folder):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="a folder without data files"):
        evaluate(constant_model, dataset=tmp_path / "none")
    with pytest.raises(UserError, match="--split filtered: a single file has train, test and all"):
        evaluate(constant_model, "--split", "filtered", dataset=demo_folder[1] / "test.jsonl")
    with pytest.raises(UserError, match=r"--split filtered: no such split(.|\n)*test, train"):
        evaluate(constant_model, "--split", "filtered", dataset=demo_folder[1])
