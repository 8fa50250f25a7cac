"""Dataclasses read from JSON files, checked field by field, because a file may be cut, edited or not ours.

Standard library only.
"""

import dataclasses
import functools
import stat
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import utils

MAX_JSON_BYTES = 2**26  # a record of a million evaluations is smaller
Record = TypeVar("Record")


def load(record_class: type[Record], path: Path) -> Record | None:
    """The record in a JSON file, None if there is no such file; ValueError says what is wrong with it."""
    content = read_own_json(path)
    return None if content is None else from_json(record_class, content)


def read_own_json(path: Path) -> Any:
    """A JSON file's content, None if there is no such file; ValueError if this project cannot have written it."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would block, and a link leads anywhere
        raise ValueError("not an ordinary file")
    if found.st_size > MAX_JSON_BYTES:
        raise ValueError(f"it has {utils.format_bytes(found.st_size)}")
    try:
        return utils.read_json(path)
    except FileNotFoundError:
        return None
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def reject_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for json: a key given twice raises ValueError instead of losing its first value."""
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given more than once")
    return content


def from_json(record_class: type[Record], content: Any) -> Record:
    """A dataclass from a JSON object; ValueError names the first field that is missing or has another type.

    Field types may be plain types, Any, `X | None`, `list[X]`, `tuple[X, ...]`, `dict[str, X]` and dataclasses.
    Unknown keys are ignored: a later version may have written them.
    """
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    hints, values = _type_hints(record_class), {}
    for field in dataclasses.fields(record_class):
        if field.name in content:
            values[field.name] = _checked(hints[field.name], content[field.name], field.name)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{field.name!r} is missing")
    return record_class(**values)


_type_hints = functools.cache(typing.get_type_hints)


def _checked(hint: Any, value: Any, name: str) -> Any:
    """A value converted to a field's type; ValueError if it does not fit."""
    # type() and not isinstance(): True is an int to Python
    if hint is Any or type(value) is hint or (hint is float and type(value) is int):
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)  # dict[str, int] -> dict, (str, int)
    if origin is types.UnionType:  # X | None
        if value is None and types.NoneType in inner:
            return None
        return _checked(next(kind for kind in inner if kind is not types.NoneType), value, name)
    if origin in (list, tuple) and type(value) is list:
        if all(type(item) is inner[0] for item in value):
            return origin(value)  # quick for the evaluations of a thousand runs
        return origin(_checked(inner[0], item, f"{name}[{place}]") for place, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value)
    if origin is dict and type(value) is dict:
        if inner[1] is Any:
            return value
        return {key: _checked(inner[1], item, f"{name}[{key}]") for key, item in value.items()}
    raise ValueError(f"{name!r} is {value!r}, expected {getattr(hint, '__name__', hint)}")
