"""Scores as they come: in memory as plain numbers, on disk a line a row, so that a killed evaluation can go on.

The first line of the file says whose scores these are; the others are [position, rewards, reply lengths] or
[position, why it was left out], in any order. A line that a kill or a full disk cut off is cut away.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.parsing import LEFT_OUT


class ScoreLog:
    """The scores of one model on one set of rows, which `key` names."""

    def __init__(self, folder: Path, key: str):
        self._start, self._count = array("q"), array("i")  # by position; count -1: unknown, -2 and below: left out
        self._rewards, self._lengths = array("f"), array("i")
        self._reasons = list(LEFT_OUT)
        self.path = folder / f".partial-{key[:24]}.jsonl"
        self.found = 0  # rows that were there when it was opened
        header = json.dumps({"key": key}).encode() + b"\n"
        whole = self._read(header)
        if whole is None:
            self.path.write_bytes(header)
        elif whole < self.path.stat().st_size:
            os.truncate(self.path, whole)
        self._file = self.path.open("ab")

    def _read(self, header: bytes) -> int | None:
        """Take in what is there; returns the bytes up to the last whole line, None if it is not our file."""
        try:
            with self.path.open("rb") as file:
                if file.readline() != header:
                    return None
                whole = len(header)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    position, *rest = json.loads(line)
                    self._remember(position, *rest)
                    self.found += 1
                    whole += len(line)
                return whole
        except (OSError, ValueError, TypeError):
            self.__dict__.update(_start=array("q"), _count=array("i"), _rewards=array("f"), _lengths=array("i"))
            self.found = 0
            return None

    def __len__(self) -> int:
        return len(self._count) - self._count.count(-1)

    def __contains__(self, position: int) -> bool:
        return position < len(self._count) and self._count[position] != -1

    def __getitem__(self, position: int) -> tuple[list[float], list[int]] | str:
        start, count = self._start[position], self._count[position]
        if count < -1:
            return self._reasons[-2 - count]
        return list(self._rewards[start : start + count]), list(self._lengths[start : start + count])

    def add(self, position: int, rewards: Sequence[float], lengths: Sequence[int]) -> None:
        # the shortest text that is the same number in fp32
        texts = ", ".join(str(np.float32(reward)) for reward in rewards)
        self._file.write(f"[{position}, [{texts}], {json.dumps(list(lengths))}]\n".encode())
        self._remember(position, rewards, lengths)

    def leave_out(self, position: int, reason: str) -> None:
        self._file.write(json.dumps([position, reason]).encode() + b"\n")
        self._remember(position, reason)

    def _remember(self, position: int, rewards: Any, lengths: Any = ()) -> None:
        while len(self._count) <= position:
            self._count.append(-1)
            self._start.append(0)
        if isinstance(rewards, str):
            self._count[position] = -2 - self._reasons.index(rewards)
            return
        self._start[position], self._count[position] = len(self._rewards), len(rewards)
        self._rewards.extend(rewards)
        self._lengths.extend(lengths)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def delete(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
