"""training/logger.py: event files that a resumed run continues without a seam."""

import pytest

from modeling import devices
from training import logger


def points(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_resumed_log_has_one_point_a_step_on_both_axes(tmp_path):
    board = logger.TensorBoardLogger(tmp_path)
    for step in range(1, 8):
        board.scalars({"train/loss": step}, step, step * 128)
    board.close()
    board = logger.TensorBoardLogger(tmp_path, resumed_step=4, resumed_examples=4 * 128)
    for step in range(5, 10):
        board.scalars({"train/loss": step}, step, step * 128)
    board.close()
    assert points(tmp_path) == {
        "train/loss": list(range(1, 10)),
        "train/loss_by_examples": [step * 128 for step in range(1, 10)],
    }


def test_an_event_file_without_later_points_is_left_alone(tmp_path):
    board = logger.TensorBoardLogger(tmp_path)
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
