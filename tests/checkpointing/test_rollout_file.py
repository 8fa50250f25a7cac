"""checkpointing/rollout_file.py: what a run writes and a page reads at the same time; what is wrong is said."""

import sqlite3
import threading
import time

import pytest

from checkpointing import rollout_file
from checkpointing.rollout_file import (
    AT_LIMIT,
    BY_ITSELF,
    HELD_OUT,
    TRAINING,
    ReplyFilter,
    RolloutFile,
    RolloutReader,
    reading,
)
from utils import UserError


def row(step, prompt=7, completion=0, reply="yes", reward=1.0, kl=0.5, tokens=4, ended=BY_ITSELF, judge=None):
    return (step, prompt, completion, f"question {prompt}", reply, reward, reward / 2, kl, tokens, ended, judge)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a run?" / "rollouts.sqlite"  # what a URI must escape


@pytest.fixture
def file(path):
    path.parent.mkdir()
    opened = RolloutFile(path, 0)
    yield opened
    opened.close()


def read(path, what, table=TRAINING):
    with reading(path) as database:
        return what(RolloutReader(database, table))


def test_a_resumed_run_writes_its_steps_again(file, path, capsys):
    for step in (1, 2, 3):
        file.add(TRAINING, [row(step, reply=f"first {step}"), row(step, completion=1)])
        file.add(HELD_OUT, [row(step, judge=1.0)])
    file.close()
    again = RolloutFile(path, 1)
    again.add(TRAINING, [row(2, reply="second")])
    again.add(HELD_OUT, [row(1, judge=0.0)])
    again.close()
    database = sqlite3.connect(path)
    assert database.execute("SELECT step, reply FROM rollouts ORDER BY step, completion").fetchall() == [
        (1, "first 1"), (1, "yes"), (2, "second"),
    ]  # fmt: skip
    assert database.execute("SELECT * FROM held_out").fetchall() == [row(1, judge=0.0)]
    database.close()
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="rename or remove it"):
        RolloutFile(path, 0)
    path.unlink()
    RolloutFile(path, 3).close()
    assert "replies are kept from step 4 on" in capsys.readouterr().out


def test_replies_are_sorted_filtered_and_counted(file, path):
    file.add(TRAINING, [
        row(1, 7, 0, "Straße", 1.0, 0.1, 9), row(1, 7, 1, "no", 3.0, 0.3, 2, AT_LIMIT),
        row(1, 7, 2, "no", float("nan")), row(1, 8, 0, "other", 2.0), row(2, 7, 0, "later", 5.0),
    ])  # fmt: skip

    def numbers(prompt=7, **wanted):
        replies, count = read(path, lambda reader: reader.replies(1, prompt, ReplyFilter(**wanted)))
        assert len(replies) == min(count, wanted.get("limit", 50))
        return [(reply.prompt, reply.completion) for reply in replies]

    assert numbers() == [(7, 1), (7, 0), (7, 2)], "what is not finite comes last"
    assert numbers(is_descending=False) == [(7, 0), (7, 1), (7, 2)]
    assert numbers(sort="tokens")[0] == (7, 0) and numbers(sort="kl")[1] == (7, 1)
    assert numbers(None, limit=2) == [(7, 1), (8, 0)]
    assert numbers(text=" STRASSE ") == [(7, 0)] and numbers(text="%") == []
    assert numbers(ended=AT_LIMIT) == [(7, 1)] and numbers(low=1.5) == [(7, 1)] and numbers(high=1) == [(7, 0)]
    replies, _ = read(path, lambda reader: reader.replies(2, 7, ReplyFilter(), compared_with=1))
    assert replies[0].change == 3.0, "5 against the mean of 1 and 3"


def test_steps_prompts_and_curves_are_those_of_the_rows(file, path):
    steps = [step for step in range(1, 1500) if step % 3]
    file.add(TRAINING, [row(step, 7, 0, reward=step) for step in steps])
    file.add(TRAINING, [row(step, 100 + step, 1, reward=0.0, ended=AT_LIMIT) for step in steps])

    def check(reader):
        assert reader.steps() == steps
        assert reader.steps_of(101, steps) == [1] and reader.steps_of(7, [1, 2, 3]) == [1, 2]
        assert [(one.prompt, one.first_words, one.replies, one.reward) for one in reader.prompts(2)] == [
            (7, "question 7", 1, 2.0), (102, "question 102", 1, 0.0),
        ]  # fmt: skip
        curve = reader.curve(steps)
        assert len(curve) == rollout_file.MOST_POINTS and (curve[0].step, curve[-1].step) == (1, 1499)
        assert (curve[-1].reward, curve[-1].truncated, curve[-1].tokens) == (749.5, 0.5, 4.0)
        assert len(reader.curve(steps[:3])) == 3 and reader.curve([]) == []
        queries = []
        reader._database.set_trace_callback(queries.append)
        reader.curve(steps)
        plan = str(reader._database.execute(f"EXPLAIN QUERY PLAN {queries[0]}").fetchall())
        assert "COVERING INDEX rollouts_numbers" in plan, "no reply's text is read for a curve"

    read(path, check)


def test_a_file_without_replies_yet_or_of_an_older_run_is_read(path, tmp_path):
    path.parent.mkdir()
    path.touch()
    assert read(path, lambda reader: reader.steps()) == []
    old = sqlite3.connect(path)
    old.execute(f"CREATE TABLE rollouts ({rollout_file.COLUMNS}, PRIMARY KEY (step, prompt, completion))")
    with old:
        old.execute("INSERT INTO rollouts VALUES (?,?,?,?,?,?,?,?,?,?)", row(1)[:10])
    old.close()
    assert read(path, lambda reader: reader.replies(1, 7, ReplyFilter()))[0][0].judge is None
    assert read(path, lambda reader: (reader.exists, reader.steps()), HELD_OUT) == (False, [])


def test_what_cannot_be_read_is_said(file, path, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no replies are kept here(.|\n)*--no_save_rollouts"):
        read(tmp_path / "nowhere.sqlite", RolloutReader.steps)
    file.add(TRAINING, [row(step) for step in range(1, 1000)])
    with monkeypatch.context() as hurried:
        hurried.setattr(rollout_file, "LONGEST_READING", -1)
        with pytest.raises(UserError, match="took over"):
            read(path, RolloutReader.steps)
    monkeypatch.setattr(rollout_file, "READER_PATIENCE", 0.1)
    locking = sqlite3.connect(path)
    locking.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="locked by another program"):
        read(path, RolloutReader.steps)
    locking.close()
    content = path.read_bytes()
    path.write_bytes(content[:5000] + b"\xff" * 20_000)
    with pytest.raises(UserError, match="damaged"):
        read(path, lambda reader: reader.curve(reader.steps()))
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="damaged"):
        read(path, RolloutReader.steps)


def test_reading_changes_nothing(file, path):
    file.add(TRAINING, [row(1)])
    with pytest.raises(UserError, match="attempt to write a readonly database"), reading(path) as database:
        database.execute("DELETE FROM rollouts")
    assert read(path, RolloutReader.steps) == [1]


def test_a_writer_goes_on_while_others_read_without_pause(file, path):
    """Four readers in turn, as fast as they can: no step fails, none waits long, and each is seen."""
    is_over, problems, seen = threading.Event(), [], []

    def keep_reading():
        while not is_over.is_set():
            try:
                seen.append(read(path, lambda reader: reader.curve(reader.steps()))[-1:])
            except UserError as error:
                problems.append(error)

    file.add(TRAINING, [row(1, prompt) for prompt in range(128)])
    readers = [threading.Thread(target=keep_reading) for _ in range(4)]
    for reader in readers:
        reader.start()
    longest = 0.0
    for step in range(2, 40):
        before = time.monotonic()
        file.add(TRAINING, [row(step, prompt) for prompt in range(128)])
        longest = max(longest, time.monotonic() - before)
    is_over.set()
    for reader in readers:
        reader.join()
    assert problems == [] and longest < rollout_file.WRITER_PATIENCE / 4
    assert len(seen) > 4 and read(path, RolloutReader.steps) == list(range(1, 40))
