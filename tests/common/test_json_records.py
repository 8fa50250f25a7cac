"""Dataclasses from JSON: every type a field may have, and a message that names the field that is wrong."""

import dataclasses
import os
from typing import Any

import pytest

from common import json_records


@dataclasses.dataclass
class Inner:
    number: int
    share: float = 0.5


@dataclasses.dataclass
class Outer:
    name: str
    is_good: bool
    inner: Inner
    rows: list[list[int]]
    path: tuple[str, ...]
    note: str | None = None
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    anything: Any = None


GOOD = {"name": "a", "is_good": True, "inner": {"number": 3}, "rows": [[1, 2], []], "path": ["x", "y"]}


def test_a_record_survives_being_written_and_read():
    record = json_records.from_json(Outer, {**GOOD, "limits": {"a": 1.5, "b": 2}, "anything": [1], "later_key": 0})
    assert record == Outer("a", True, Inner(3, 0.5), [[1, 2], []], ("x", "y"), None, {"a": 1.5, "b": 2}, [1])
    assert json_records.from_json(Outer, {**dataclasses.asdict(record), "path": ["x", "y"]}) == record


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"name": 1}, "'name' is 1, expected str"),
        ({"name": None}, "'name' is None, expected str"),
        ({"note": 1}, "'note' is 1, expected str"),
        ({"is_good": 1}, "'is_good' is 1, expected bool"),
        ({"inner": {"number": True}}, "'number' is True, expected int"),
        ({"inner": {}}, "'number' is missing"),
        ({"inner": [3]}, "expected a JSON object, got list"),
        ({"rows": [[1], [2, "3"]]}, r"'rows\[1\]\[1\]' is '3', expected int"),
        ({"rows": [1]}, r"'rows\[0\]' is 1, expected list"),
        ({"path": "xy"}, "'path' is 'xy', expected tuple"),
        ({"limits": {"a": "b"}}, r"'limits\[a\]' is 'b', expected float"),
    ],
)
def test_a_wrong_field_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        json_records.from_json(Outer, {**GOOD, **changed})


def test_a_missing_field_and_another_kind_of_content_are_named():
    with pytest.raises(ValueError, match="'rows' is missing"):
        json_records.from_json(Outer, {key: value for key, value in GOOD.items() if key != "rows"})
    for content in ([], "text", 1, None):
        with pytest.raises(ValueError, match="expected a JSON object"):
            json_records.from_json(Outer, content)


def test_a_file_that_this_project_cannot_have_written_is_a_value_error(tmp_path):
    path = tmp_path / "record.json"
    assert json_records.load(Inner, path) is None and json_records.load(Inner, path / "below_a_file") is None
    path.write_text('{"number": 3}')
    assert json_records.load(Inner, path) == Inner(3) and json_records.load(Inner, path / "below_a_file") is None
    for content in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            json_records.load(Inner, path)
    if hasattr(os, "mkfifo"):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ValueError, match="not an ordinary file"):
            json_records.load(Inner, path)
