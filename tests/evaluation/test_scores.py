"""evaluation/scores.py: what is written comes back bit for bit, whatever happened to the process or the file."""

import shutil
import sqlite3

import numpy as np
import pytest

from evaluation.scores import Scored, ScoreLog


def test_scores_come_back_bit_for_bit_and_in_any_order(tmp_path):
    draw = np.random.default_rng(0)
    rewards = {at: draw.normal(scale=10.0**size, size=2).astype(np.float32) for at, size in ((7, -30), (2, 0), (0, 20))}
    log = ScoreLog(tmp_path, "key")
    for at, values in rewards.items():
        log.add([(at, Scored(values.tolist(), [3, at]))])
    log.add([(4, "too_long"), (5, Scored([1.0, 2.0], [1, 1], False))])
    log.close()
    again = ScoreLog(tmp_path, "key")
    assert again.found == len(again) == 5
    for at, values in rewards.items():
        found, lengths, is_whole = again[at]
        assert is_whole
        assert np.array_equal(np.array(found, dtype=np.float32), values) and lengths == [3, at]
    assert again[4] == "too_long" and not again[5].is_whole, "what was left out is known after a kill too"
    assert [at in again for at in range(9)] == [True, False, True, False, True, True, False, True, False]
    assert list(again.items()) == [(at, again[at]) for at in (0, 2, 4, 5, 7)]


def test_a_kill_in_the_middle_of_writing_costs_only_what_was_being_written(tmp_path):
    log = ScoreLog(tmp_path, "key")
    log.add([(0, Scored([1.5, 2.5], [1, 1]))])
    writer = sqlite3.connect(log.path, isolation_level=None)
    writer.execute("PRAGMA cache_size = 1")  # so that half a transaction is in the file before it is committed
    writer.execute("BEGIN")
    for at in range(1, 5000):
        writer.execute("INSERT INTO scores VALUES (?, ?)", (at, "[[1.5, 2.5], [10, 10]]"))
    assert log.path.stat().st_size > 50_000
    shutil.copytree(tmp_path, tmp_path / "killed")
    writer.close()
    again = ScoreLog(tmp_path / "killed", "key")
    assert again.found == 1 and 5 not in again
    again.add([(5, Scored([3.0, 4.0], [1, 1]))])
    again.close()
    last = ScoreLog(tmp_path / "killed", "key")
    assert last.found == 2 and last[5] == Scored([3.0, 4.0], [1, 1])
    last.delete()
    assert not list((tmp_path / "killed").iterdir())


def damage_start(path):
    with path.open("r+b") as file:
        file.write(b"junk" * 30)


def damage_page(path):
    with path.open("r+b") as file:
        file.seek(-5000, 2)
        file.write(b"junk" * 1000)


def cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def junk(path):
    path.write_bytes(b'{"key": "key"}\n[0, [1.0, 2.0], [1, 1]]\n')


def other_key(path):
    with sqlite3.connect(path) as database:
        database.execute("UPDATE evaluation SET key = 'key of another model'")


def other_program(path):
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE recipes (bread TEXT)")


def unknown_reason(path):
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO scores VALUES (9999, '\"no such reason\"')")


@pytest.mark.parametrize(
    "damage", [damage_start, damage_page, cut, empty, junk, other_key, other_program, unknown_reason]
)
def test_a_damaged_or_foreign_file_is_noticed_and_replaced(damage, tmp_path):
    log = ScoreLog(tmp_path, "key")
    log.add((at, Scored([1.0, 2.0], [1, 1])) for at in range(1000))
    log.close()
    damage(log.path)
    again = ScoreLog(tmp_path, "key")
    assert again.found == len(again) == 0 and 0 not in again
    again.add([(5, Scored([3.0, 4.0], [1, 1]))])
    again.close()
    last = ScoreLog(tmp_path, "key")
    assert last.found == 1 and last[5] == Scored([3.0, 4.0], [1, 1])


def test_scores_that_cannot_be_written_are_an_error_of_the_disk(tmp_path):
    log = ScoreLog(tmp_path, "key")
    log._database.execute("PRAGMA query_only = 1")
    with pytest.raises(OSError, match="readonly") as raised:
        log.add([(0, Scored([1.0, 2.0], [1, 1]))])
    assert raised.value.filename == str(log.path)
    log.close()
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(OSError, match="unable to open"):
        ScoreLog(tmp_path, "key")
