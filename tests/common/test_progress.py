"""common/progress.py: plain lines, and the bar on a terminal."""

import io
import sys

from common import progress

FIGURES = ("loss 0.5000", "accuracy 75.0%", "12.0 pairs/s")


def test_a_long_run_prints_few_plain_lines(capsys):
    shown = progress.ProgressBar("step", 1000, done=0)
    for step in range(1, 1001):
        shown.update(step, *FIGURES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("step 1/1000  loss 0.5000  accuracy 75.0%  12.0 pairs/s")
    assert lines[-1].startswith("step 1000/1000") and lines[-1].endswith("0s left")


def test_a_resumed_run_counts_its_time_from_where_it_resumed(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.ProgressBar("step", 100, done=50)
    now[0] += 10.0  # one step took 10 s, 49 are left
    shown.update(51, *FIGURES)
    assert capsys.readouterr().out.strip().endswith("8m10s left")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = progress.ProgressBar("step", 10, done=2)
    shown.update(3, *FIGURES)
    shown.say("a line that stays")
    shown.close()
    assert "3/10" in terminal.getvalue() and "loss 0.5000, accuracy 75.0%" in terminal.getvalue()
    assert capsys.readouterr().out == "a line that stays\n"


def test_a_count_without_a_total_shows_its_rate_and_no_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.ProgressBar("tokenizing train.jsonl", None, unit="pairs", first_after=5, stream=sys.stderr)
    now[0] += 4.0
    shown.update(1000)
    now[0] += 4.0
    shown.update(2000)
    shown.update(2100)
    assert capsys.readouterr().err == "tokenizing train.jsonl: 2,000 pairs, 250 pairs/s\n"


def test_a_count_with_a_total_shows_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.ProgressBar("scoring first", 4000, done=1000, unit="rows", first_after=5)
    now[0] += 10.0
    shown.update(2000)
    assert capsys.readouterr().out == "scoring first: 2,000 of 4,000 rows, 100 rows/s, 20s left\n"


def test_a_bar_that_is_not_shown_prints_nothing_but_what_is_said(capsys):
    shown = progress.ProgressBar("step", 2, is_shown=False)
    shown.update(1)
    shown.say("a line that stays")
    assert capsys.readouterr().out == "a line that stays\n"
