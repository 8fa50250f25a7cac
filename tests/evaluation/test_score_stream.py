"""eval_rm.py --score: rewards as a step of a pipeline."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

import eval_rm
import models
from tests.conftest import ROOT
from utils import UserError

DIALOGUE = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}]


@pytest.fixture
def score(reward_checkpoint, write_rows, capfdbinary):
    """Score rows through --score; returns (lines of standard output, text of standard error)."""

    def run(rows, *flags):
        file = write_rows(rows, "in.jsonl")
        capfdbinary.readouterr()
        eval_rm.main(["--model", str(reward_checkpoint), "--score", str(file), "--precision", "fp32", *flags])
        sys.stdout.flush()
        captured = capfdbinary.readouterr()
        return [json.loads(line) for line in captured.out.decode().splitlines()], captured.err.decode()

    return run


@pytest.fixture(scope="module")
def own_rewards(reward_checkpoint):
    return models.RewardModel.restore(reward_checkpoint).eval().score_dialogues


def test_each_form_gets_the_models_own_reward_and_keeps_what_it_had(score, own_rewards):
    rows = [
        {"messages": DIALOGUE, "id": "é"},
        {"prompt": "Hello?", "reply": "Good day."},
        {"prompt": "\n\nHuman: Hello?\n\nAssistant:", "response": "Good day."},
        {"prompt": DIALOGUE[:1], "completion": "Good day."},
        {"prompt": "Hello?", "replies": ["Good day.", "No."]},
    ]
    found, errors = score(rows)
    other = [DIALOGUE[0], {"role": "assistant", "content": "No."}]
    wanted, less = own_rewards([DIALOGUE, other])
    for row, one in zip(rows[:4], found, strict=False):
        assert one == {**row, "reward": pytest.approx(wanted, abs=1e-5)}
    assert found[4] == {**rows[4], "rewards": pytest.approx([wanted, less], abs=1e-5)}
    assert "5 rows scored" in errors


def test_prompts_by_other_names_and_system_columns_are_read_as_in_training(score, own_rewards):
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"question": "Hello?", "reply": "Good day."},
        {"messages": DIALOGUE[:1], "reply": {"from": "gpt", "value": "Good day."}},
        {"system": "Be brief.", "prompt": "Hello?", "replies": ["Good day.", [DIALOGUE[1]]]},
        {"messages": [{"from": "human", "value": "Hello?"}, {"role": "Bot", "content": "Good day."}]},
    ]
    answers, _ = score(rows)
    plain, with_system = own_rewards([DIALOGUE, [system, *DIALOGUE]])
    assert [answers[at]["reward"] for at in (0, 1, 3)] == pytest.approx([plain] * 3, abs=1e-5)
    assert answers[2]["rewards"] == pytest.approx([with_system] * 2, abs=1e-5)


def test_columns_that_json_does_not_have_are_written_as_text(reward_checkpoint, tmp_path, capfdbinary):
    import datetime

    from tests.data_pipeline.rows import write_as

    row = {"prompt": "Hello?", "reply": "Good day.", "at": datetime.datetime(2024, 1, 2, 3, 4), "raw": b"ab"}
    file = write_as(tmp_path / "in.parquet", [row])
    eval_rm.main(["--model", str(reward_checkpoint), "--score", str(file)])
    sys.stdout.flush()
    answer = json.loads(capfdbinary.readouterr().out)
    assert answer["at"] == "2024-01-02 03:04:00" and isinstance(answer["reward"], float)


def test_what_comes_out_goes_in_again(score):
    """Half a character stays an escape, valid in UTF-8 and JSON; a number that JSON does not allow becomes text."""
    found, _ = score([{"prompt": "Hello?", "reply": "Good day.", "note": "\ud800"}, {"prompt": "a", "reply": "\ud800"}])
    assert found[0]["note"] == "\ud800" and found[0]["reward"] is not None
    assert found[1]["reward"] is None and "surrogate" in found[1]["left_out"]
    again, _ = score(found)
    assert again == found
    (found,), _ = score([{"prompt": "Hello?", "reply": "word " * 50}], "--max_length", "40")
    (again,), _ = score([found])
    assert "left_out" in found and again["reward"] is not None and "left_out" not in again
    (_, found), _ = score([{"prompt": "a", "reply": "b"}, {"prompt": "a", "reply": "b", "n": float("inf")}])
    assert found["n"] == "inf" and found["reward"] is None and "not finite" in found["left_out"]


def test_closed_standard_input_is_reported(monkeypatch, reward_checkpoint):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        eval_rm.main(["--model", str(reward_checkpoint), "--score", "-"])


def test_order_is_kept_whatever_the_lengths(score, own_rewards):
    rows = [{"prompt": f"Hello {n}?", "reply": "word " * (1 + n * 37 % 50)} for n in range(200)]
    found, _ = score(rows, "--tokens_per_batch", "300")
    assert [{key: one[key] for key in ("prompt", "reply")} for one in found] == rows
    dialogues = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["reply"].strip()}] for r in rows
    ]
    assert [one["reward"] for one in found] == pytest.approx(own_rewards(dialogues), abs=1e-4)


def test_best_of_picks_the_highest_and_the_first_of_equals(score, own_rewards):
    replies = ["No.", "Good day, what can I do for you?", "word word", "No."]
    (found,), _ = score([{"prompt": "Hello?", "replies": replies}], "--best_of")
    rewards = own_rewards([[DIALOGUE[0], {"role": "assistant", "content": reply}] for reply in replies])
    best = rewards.index(max(rewards))
    assert rewards[0] == pytest.approx(rewards[3]) and found["rewards"][0] == found["rewards"][3]
    assert found["best"] == (0 if best == 3 else best) and found["reply"] == replies[best]
    assert found["reward"] == found["rewards"][best] == max(found["rewards"])
    (found,), _ = score([{"prompt": "Hello?", "replies": ["No.", "No."]}], "--best_of")
    assert found["best"] == 0


def test_what_cannot_be_scored_keeps_its_place_and_is_counted(score):
    rows = [
        {"prompt": "Hello?", "reply": "Good day."},
        {"prompt": "Hello?", "reply": " "},
        {"prompt": "Hello?", "reply": "word " * 500},
        {"messages": DIALOGUE[:1]},
        {"prompt": "Hello?", "replies": ["yes", ""]},
        {"prompt": "Hello?", "reply": "Good day."},
    ]
    found, errors = score(rows, "--max_length", "100", "--best_of")
    assert [one.get("left_out") for one in found] == [
        None, "no reply (the last turn is empty)", "too long", "last turn not the assistant's",
        "no reply (the last turn is empty)", None,
    ]  # fmt: skip
    assert [one["reward"] is None for one in found] == [False, True, True, True, True, False]
    assert "2 rows scored, 4 skipped" in errors


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a", "replys": ["b"]}, "did you mean 'reply'"),
        ({"prompt": "a", "replies": []}, "a list with at least one reply"),
        ({"prompt": "a", "reply": 3}, "'reply' holds a number"),
        ({"prompt": "a", "reply": None}, "'reply' is null"),
        ({"messages": "hello"}, "'messages' is text"),
        ("hello", "it is text, not an object"),
    ],
)
def test_a_bad_line_keeps_its_place_and_says_why(row, words, score):
    good = {"prompt": "a", "reply": "b"}
    (first, bad, last), errors = score([good, row, good])
    assert first["reward"] == last["reward"] is not None
    assert bad["reward"] is None and words in bad["left_out"]
    assert bad.items() >= (row if isinstance(row, dict) else {"row": row}).items()
    assert "2 rows scored, 1 skipped" in errors


def test_lines_whose_columns_are_not_known_are_refused_with_the_flag(score):
    with pytest.raises(UserError, match=r"it has 'q', 'a'(.|\n)*--columns prompt=NAME,reply=NAME"):
        score([{"q": "Hello?", "a": "Good day."}])
    found, _ = score([{"q": "Hello?", "a": "Good day."}], "--columns", "prompt=q,reply=a")
    (plain,), _ = score([{"prompt": "Hello?", "reply": "Good day."}])
    assert found == [{"q": "Hello?", "a": "Good day.", "reward": plain["reward"]}]


def test_replies_may_have_another_name_and_are_read_as_in_training(score):
    rows = [{"question": "Hello?", "answers": ["Good day.", "no"]}]
    (found,), _ = score(rows, "--columns", "prompt=question,replies=answers", "--best_of")
    assert found["reply"] == found["answers"][found["best"]]
    replies = ["Hello", " Hello \n", "Hello<|im_end|>", "Assistant: Hello"]
    found, _ = score([{"prompt": "Hi", "reply": reply} for reply in replies])
    assert len({one["reward"] for one in found}) == 1


def test_a_column_like_a_dialogues_that_is_not_used_is_named_once(score):
    _, errors = score([{"prompt": "Hello?", "reply": "Good day.", "context": "At sea."}] * 3)
    assert errors.count("column 'context' of 3 rows looks like part of the dialogue") == 1
    _, errors = score([{"prompt": "Hello?", "reply": "Good day.", "question": "Hello?"}])
    assert "looks like" not in errors


def test_a_broken_line_is_named_after_those_before_it_are_answered(reward_checkpoint, tmp_path, capfdbinary):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"prompt": "a", "reply": "b"}\n\n{"prompt": "a"\n')
    with pytest.raises(UserError, match="the data is not JSON") as raised:
        eval_rm.main(["--model", str(reward_checkpoint), "--score", str(file)])
    assert "in.jsonl:3" in str(raised.value)
    sys.stdout.flush()
    assert len(capfdbinary.readouterr().out.splitlines()) == 1


def test_a_path_that_is_not_a_file_is_reported_before_the_model_is_loaded(reward_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(models.RewardModel, "restore", None)
    (tmp_path / "replies.jsonl").write_text("")
    with pytest.raises(UserError, match=r"--score names no file, did you mean 'replies.jsonl'"):
        eval_rm.main(["--model", str(reward_checkpoint), "--score", str(tmp_path / "reply.jsonl")])
    for name, what in ((str(tmp_path), "a folder"), (os.devnull, "not a regular file")):
        with pytest.raises(UserError, match=f"--score is {what}"):
            eval_rm.main(["--model", str(reward_checkpoint), "--score", name])


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_reported_before_the_model_is_loaded(content, reward_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(models.RewardModel, "restore", None)
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"--score found nothing to score(.|\n)*in\.jsonl") as raised:
        eval_rm.main(["--model", str(reward_checkpoint), "--score", str(tmp_path / "in.jsonl")])
    assert raised.value.exit_code == 2


def start(model, **pipes):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "eval_rm.py"), "--model", str(model), "--score", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **pipes,
    )  # fmt: skip


def test_standard_input_is_answered_line_by_line_and_ctrl_c_ends_it(reward_checkpoint):
    """A process that writes one line and waits for its reward gets it before the input ends."""
    with start(reward_checkpoint, env={**os.environ, "PYTHONIOENCODING": "ascii"}) as process:
        watchdog = threading.Timer(240, process.kill)
        watchdog.start()
        for number in range(3):
            row = {"prompt": "Hello?", "reply": f"Grüße {number}"}
            process.stdin.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            assert found == {**row, "reward": found["reward"]} and isinstance(found["reward"], float)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
        watchdog.cancel()
    assert process.returncode == 130, errors
    assert rest == b"" and b"Traceback" not in errors and b"Fatal" not in errors


def test_a_reader_that_leaves_ends_it_quietly(reward_checkpoint):
    with start(reward_checkpoint) as process:
        watchdog = threading.Timer(240, process.kill)
        watchdog.start()
        process.stdout.close()
        _, errors = process.communicate(b'{"prompt": "a", "reply": "b"}\n' * 50)
        watchdog.cancel()
    assert process.returncode == 1
    assert b"the reader of the output has gone" in errors and b"Traceback" not in errors


def test_standard_input_that_ends_without_a_line_exits_2(reward_checkpoint, monkeypatch, capfdbinary):
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(UserError, match=r"--score found nothing to score(.|\n)*standard input") as raised:
            eval_rm.main(["--model", str(reward_checkpoint), "--score", "-"])
    assert raised.value.exit_code == 2 and not capfdbinary.readouterr().out
