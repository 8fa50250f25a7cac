"""progress.py: plain lines, the bar, and event files that a resumed run continues without a seam."""

import io
import sys

import pytest

from modeling import devices
from training import logger

METRICS = {"train/loss": 0.5, "train/accuracy": 0.75, "train/pairs_per_second": 12.0}


def test_a_long_run_prints_few_plain_lines(capsys):
    shown = logger.Progress(1000, 0)
    for step in range(1, 1001):
        shown.step(step, METRICS)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("step 1/1000  loss 0.5000  accuracy 75.0%  12.0 pairs/s")
    assert lines[-1].startswith("step 1000/1000") and lines[-1].endswith("0s left")


def test_a_resumed_run_counts_its_time_from_where_it_resumed(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    shown = logger.Progress(100, 50)
    now[0] += 10.0  # one step took 10 s, 49 are left
    shown.step(51, METRICS)
    assert capsys.readouterr().out.strip().endswith("8m10s left")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = logger.Progress(10, 2)
    shown.step(3, METRICS)
    shown.say("a line that stays")
    shown.close()
    assert "3/10" in terminal.getvalue() and "loss 0.5000, accuracy 75.0%" in terminal.getvalue()
    assert capsys.readouterr().out == "a line that stays\n"


def points(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_resumed_log_has_one_point_a_step_on_both_axes(tmp_path):
    board = logger.Board(tmp_path)
    for step in range(1, 8):
        board.scalars({"train/loss": step}, step, step * 128)
    board.close()
    board = logger.Board(tmp_path, resumed_step=4, resumed_examples=4 * 128)
    for step in range(5, 10):
        board.scalars({"train/loss": step}, step, step * 128)
    board.close()
    assert points(tmp_path) == {
        "train/loss": list(range(1, 10)),
        "train/loss_by_examples": [step * 128 for step in range(1, 10)],
    }


def test_an_event_file_without_later_points_is_left_alone(tmp_path):
    board = logger.Board(tmp_path)
    board.scalars({"train/loss": 1.0}, 1, 128)
    board.close()
    (path,) = tmp_path.iterdir()
    before = path.read_bytes(), path.stat().st_ino
    logger.drop_events_after(tmp_path, 1, 128)
    assert (path.read_bytes(), path.stat().st_ino) == before


def test_peak_memory_is_that_of_this_process():
    import torch

    block = torch.ones(64 * 2**20)  # 256 MiB
    assert 0.25 < devices.peak_gib(torch.device("cpu")) < 24
    assert block.sum() == pytest.approx(64 * 2**20)
