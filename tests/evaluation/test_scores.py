"""score_log.py: what is written comes back bit for bit, whatever happened to the file."""

import numpy as np
import pytest

from evaluation.scores import ScoreLog


def test_scores_come_back_bit_for_bit_and_in_any_order(tmp_path):
    draw = np.random.default_rng(0)
    rewards = {at: draw.normal(scale=10.0**size, size=2).astype(np.float32) for at, size in ((7, -30), (2, 0), (0, 20))}
    log = ScoreLog(tmp_path, "key")
    for at, values in rewards.items():
        log.add(at, values.tolist(), [3, at])
    log.leave_out(4, "too_long")
    log.close()
    again = ScoreLog(tmp_path, "key")
    assert again.found == len(again) == 4
    for at, values in rewards.items():
        found, lengths = again[at]
        assert np.array_equal(np.array(found, dtype=np.float32), values) and lengths == [3, at]
        assert log[at] == again[at]
    assert again[4] == "too_long"
    assert [at in again for at in range(9)] == [True, False, True, False, True, False, False, True, False]


@pytest.mark.parametrize("end", [b"[5, [1.0", b"[5, [1.0, 2.0], [1, 1]]", b"\x00\x00"])
def test_a_torn_last_line_is_cut_away_and_written_again(end, tmp_path):
    log = ScoreLog(tmp_path, "key")
    log.add(0, [1.5, 2.5], [1, 1])
    log.close()
    with log.path.open("ab") as file:
        file.write(end)
    again = ScoreLog(tmp_path, "key")
    assert again.found == 1 and 5 not in again
    again.add(5, [3.0, 4.0], [1, 1])
    again.close()
    last = ScoreLog(tmp_path, "key")
    assert last.found == 2 and last[5] == ([3.0, 4.0], [1, 1])
    last.delete()
    assert not log.path.exists()


@pytest.mark.parametrize("content", [b"", b"junk\n", b'{"key": "another"}\n[0, [1.0, 2.0], [1, 1]]\n'])
def test_a_file_that_is_not_ours_is_begun_anew(content, tmp_path):
    path = ScoreLog(tmp_path, "key").path
    path.write_bytes(content)
    assert ScoreLog(tmp_path, "key").found == 0
    assert path.read_bytes() == b'{"key": "key"}\n'


def test_a_line_that_says_something_else_makes_the_file_begin_anew(tmp_path):
    log = ScoreLog(tmp_path, "key")
    log.add(0, [1.0, 2.0], [1, 1])
    log.close()
    with log.path.open("ab") as file:
        file.write(b'[1, "no such reason"]\n')
    again = ScoreLog(tmp_path, "key")
    assert again.found == len(again) == 0 and 0 not in again
