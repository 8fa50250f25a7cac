"""votes.py: votes become rows of training data, even with several writers or a full disk."""

import json
import os
import subprocess
import sys
import threading

import pytest

import data
from chat_app import votes
from data_pipeline import parsing
from tests.conftest import ROOT
from utils import DiskOrNetworkError

PROMPT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Is bread <b>good</b>?"}]


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_vote_says_which_reply_was_preferred(tmp_path):
    path = tmp_path / "new" / "preferences.jsonl"
    counts = [votes.append(path, votes.row_of(PROMPT, " Yes. ", "No.", vote)) for vote in votes.VOTES]
    assert counts == [1, 2, 3, 4]
    rows = lines_of(path)
    assert [row["vote"] for row in rows] == ["a", "b", "tie", "both_bad"]
    assert [row["chosen"][0]["content"] for row in rows] == ["Yes.", "No.", "Yes.", "Yes."]
    assert all(row["prompt"] == PROMPT for row in rows)


def test_training_reads_the_file_as_it_is(tmp_path, tokenizer, own_cache):
    path = tmp_path / "preferences.jsonl"
    for number in range(30):
        vote = list(votes.VOTES)[number % 4]
        prompt = [{"role": "user", "content": f"Question {number}, é \U0001f642?"}]
        votes.append(path, votes.row_of(prompt, "Yes.", "No.", vote))
    train, test = data.load_pairs(str(path), tokenizer)
    for pairs in (train, test):
        pairs.check_skipped()
    assert len(train) + len(test) == 16  # 15 or 16 of the 30 are for one side
    assert train.counts.count["no_preference"] + test.counts.count["no_preference"] == 14
    yes, no = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Yes.", "No."))
    chosen, rejected = (side.tolist() for side in train.sequences(0))
    assert contains(chosen, yes) != contains(chosen, no) and contains(rejected, yes) != contains(rejected, no)


def blind_row(vote, reward_a, reward_b, **changes):
    rewards = {"a": reward_a, "b": reward_b}
    shown = {side: {"written_by": "p", "ending": "cut", "reward": reward} for side, reward in rewards.items()}
    more = {"blind": True, "swapped": False, "reward_model": "rm", "shown": shown, **changes}
    return {**votes.row_of(PROMPT, f"Yes {reward_a}.", "No.", vote), **more}


def test_what_a_row_says_of_its_vote_changes_nothing_in_training(tmp_path, tokenizer, own_cache):
    sequences = []
    for name, more in (("old", {}), ("new", blind_row("a", 1.0, 2.0))):
        path = tmp_path / f"{name}.jsonl"
        for number in range(30):
            prompt = [{"role": "user", "content": f"Question {number}?"}]
            row = votes.row_of(prompt, "Yes.", "No.", "ab"[number % 2])
            votes.append(path, {**more, **row})
        train, _ = data.load_pairs(str(path), tokenizer)
        train.check_skipped()
        assert not train.counts.unused
        sequences.append([side.tolist() for at in range(len(train)) for side in train.sequences(at)])
    assert sequences[0] == sequences[1] and len(sequences[0]) > 40


def test_agreement_counts_blind_votes_of_one_reward_model_and_ties_apart(tmp_path):
    path = tmp_path / "preferences.jsonl"
    assert votes.agreement(path, "rm") == (0, 0, 0, 0)
    for row in (
        votes.row_of(PROMPT, "An old vote.", "No.", "a"),
        blind_row("a", 2.0, 1.0), blind_row("b", 2.0, 1.0), blind_row("b", -1.0, 1.0),
        blind_row("a", 1.0, 1.0), blind_row("tie", 2.0, 1.0), blind_row("both_bad", 1.0, 1.0),
        blind_row("a", 2.0, 1.0, blind=False), blind_row("a", 2.0, 1.0, reward_model="another"),
        blind_row("a", None, None), blind_row("a", 2.0, 1.0, shown=None),
    ):  # fmt: skip
        votes.append(path, row)
    with path.open("a") as file:
        file.write("not JSON\n[]\n5\n")
    assert votes.agreement(path, "rm") == votes.Agreement(agreed=2, decided=3, no_difference=1, ties=2)


def contains(tokens, part):
    return any(tokens[start : start + len(part)] == part for start in range(len(tokens)))


def test_training_knows_the_votes_for_neither_reply():
    assert set(parsing.VOTES_FOR_NEITHER) == set(votes.VOTES) - {"a", "b"}


@pytest.mark.parametrize(
    "prompt, reply_a, reply_b, vote, reason",
    [
        (PROMPT, "Yes.", "No.", "c", "none of a, b, tie, both_bad"),
        ([], "Yes.", "No.", "a", "no prompt"),
        (PROMPT[:1], "Yes.", "No.", "a", "no prompt"),
        (PROMPT, " ", "No.", "a", "reply A is empty"),
        (PROMPT, "Yes.", "", "a", "reply B is empty"),
        (PROMPT, "Yes.", "Yes. ", "a", "both replies are the same"),
    ],
)
def test_a_vote_without_information_is_refused(prompt, reply_a, reply_b, vote, reason):
    with pytest.raises(ValueError, match=reason):
        votes.row_of(prompt, reply_a, reply_b, vote)


def test_two_processes_and_their_threads_append_whole_rows_only(tmp_path):
    path = tmp_path / "preferences.jsonl"
    code = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from chat_app import votes
def vote(name):
    for number in range(10):
        prompt = [{"role": "user", "content": f"{name} {number} " + "x" * 20_000}]
        votes.append(Path(sys.argv[2]), votes.row_of(prompt, "Yes.", "No.", "a"))
threads = [threading.Thread(target=vote, args=(f"{sys.argv[3]}{letter}",)) for letter in "ab"]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(path), name]) for name in "12"]
    assert [process.wait(60) for process in processes] == [0, 0]
    starts = [row["prompt"][0]["content"].split(" x")[0] for row in lines_of(path)]
    assert sorted(starts) == sorted(
        f"{name}{letter} {number}" for name in "12" for letter in "ab" for number in range(10)
    )


def test_a_file_whose_last_line_was_cut_by_hand_gets_its_newline(tmp_path):
    path = tmp_path / "preferences.jsonl"
    path.write_text('{"chosen": "x"}')
    assert votes.append(path, votes.row_of(PROMPT, "Yes.", "No.", "a")) == 2
    assert len(lines_of(path)) == 2


def test_half_a_character_does_not_lose_the_vote(tmp_path):
    path = tmp_path / "preferences.jsonl"
    votes.append(path, votes.row_of(PROMPT, "Yes \ud83d.", "No.", "a"))
    assert lines_of(path)[0]["chosen"][0]["content"] == "Yes ?."


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on file sizes, which this platform lacks")
def test_a_full_disk_leaves_earlier_votes_unchanged(tmp_path):
    import resource
    import signal

    path = tmp_path / "preferences.jsonl"
    votes.append(path, votes.row_of(PROMPT, "Yes.", "No.", "a"))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(DiskOrNetworkError, match="the vote was not saved"):
            votes.append(path, votes.row_of(PROMPT, "Yes. " * 100, "No.", "a"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert path.read_bytes() == before
    assert votes.append(path, votes.row_of(PROMPT, "Yes.", "No.", "b")) == 2


def test_a_folder_in_the_files_place_is_named(tmp_path):
    with pytest.raises(DiskOrNetworkError, match="the vote was not saved") as caught:
        votes.append(tmp_path, votes.row_of(PROMPT, "Yes.", "No.", "a"))
    assert str(tmp_path) in str(caught.value)


def test_writers_wait_for_each_other_but_not_forever(tmp_path):
    from common.file_locks import exclusive

    lock, order = tmp_path / ".lock", []

    def second():
        with exclusive(lock):
            order.append("second")

    with exclusive(lock):
        thread = threading.Thread(target=second)
        thread.start()
        with pytest.raises(TimeoutError, match="could not be acquired"), exclusive(lock, patience_seconds=0.1):
            pass
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
