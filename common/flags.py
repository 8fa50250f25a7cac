"""Flags from a dataclass: every field is a flag and a key of a `--config` file. Defaults < file < flags.

Standard library only. One message names everything that is wrong.
"""

import argparse
import dataclasses
import itertools
import json
import math
import operator
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from common.json_records import reject_repeated_keys
from utils import UserError, counted, nearest

_WANTED = {int: "a whole number", float: "a number", bool: "True or False", str: "text", tuple: "a list of texts"}
_SWITCH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_LIMITS = {
    "minimum": (operator.ge, "at least"), "above": (operator.gt, "more than"), "below": (operator.lt, "less than"),
}  # fmt: skip


def flag(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that is also a flag. Limits: `minimum`, `above`, `below`, `choices`; `group` for `--help`.

    `word` is a text that is allowed in place of a number. With `is_list` a flag may be repeated, which joins its values
    with commas. `is_name_on_disk` marks texts that are only compared with
    names on disk, which can hold any bytes.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def read_flags(config_class: type, argv: list[str], description: str) -> tuple[dict[str, Any], list[str]]:
    """(values, problems) of the command line and its `--config` file: what could be converted, and what could not.

    Both are returned, so that `build_config` can report its own problems in the same message.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    parsed, unknown = _parser(config_class, description).parse_known_args(_join_negative_numbers(argv))
    # the word after an unknown flag is taken for its value, not for a second mistake
    values_of_unknown = {value for word, value in itertools.pairwise(unknown) if word.startswith("-")}
    problems = [_unknown_flag(w, fields) for w in unknown if w.startswith("-") or w not in values_of_unknown]
    texts, values = vars(parsed), {}
    if file_name := texts.get("config"):
        values, wrong = _read_config_file(config_class, Path(file_name))
        problems += [f"--config: {file_name}: {problem}" for problem in wrong]
    for name, text in texts.items():
        text = ",".join(text) if fields[name].metadata.get("is_list") else text
        try:
            kind = _type_of(config_class, name)
            if text == fields[name].metadata.get("word", object):
                values[name] = text
                continue
            # the words of a list are names, in which '~' is an ordinary character
            values[name] = tuple(text) if kind is tuple else _from_text(kind, os.path.expanduser(text))
        except ValueError as error:
            problems.append(f"--{name}: got {text!r}, expected {error}{_or_word(fields[name])}")
    return values, problems


def _join_negative_numbers(argv: list[str]) -> list[str]:
    """Turn `--lr -1e-5` into `--lr=-1e-5`, because argparse takes -1e-5 for a flag."""
    joined: list[str] = []
    for word in argv:
        is_value = joined and joined[-1].startswith("--") and "=" not in joined[-1]
        if is_value and re.fullmatch(r"-(\d|\.\d|inf|nan).*", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def build_config(config_class: type, values: dict[str, Any], problems: list[str]) -> Any:
    """The frozen config; raises one UserError that names every bad value with its flag and what is wanted."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    config = config_class(**{name: value for name, value in values.items() if name in fields})
    problems = problems + [text for field in fields.values() if (text := _broken_limit(field, config))]
    problems += config.problems()
    if problems:
        raise UserError(
            f"{counted(len(problems), 'setting')} cannot be used\n  " + "\n  ".join(problems),
            next=f"python {Path(sys.argv[0]).name} --help",
        )
    return config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"the command line cannot be read: {message}", next=f"python {self.prog} --help")


def _parser(config_class: type, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        group = parser
        if title := field.metadata.get("group"):
            group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        help_text = field.metadata["help"].replace("%", "%%")
        help_text += "" if field.default in (None, ()) else f" (default: {field.default})"
        kind = _type_of(config_class, field.name)
        if kind is tuple:
            group.add_argument(f"--{field.name}", nargs="+", action="extend", metavar="NAME", help=help_text)
        elif kind is bool:
            group.add_argument(f"--{field.name}", nargs="?", const="True", metavar="BOOL", help=help_text)
            group.add_argument(
                f"--no_{field.name}", dest=field.name, action="store_const", const="False", help=argparse.SUPPRESS
            )
        else:
            choices = field.metadata.get("choices")
            metavar = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
            metavar += f"|{field.metadata['word']}" if "word" in field.metadata else ""
            action = "append" if field.metadata.get("is_list") else "store"
            group.add_argument(f"--{field.name}", metavar=metavar, action=action, help=help_text)
    return parser


def _type_of(config_class: type, name: str) -> type:
    """The plain type of a field: `int` for both `int` and `int | None`, `tuple` for `tuple[str, ...]`."""
    hint = typing.get_type_hints(config_class)[name]
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return typing.get_origin(hint) or hint


def _or_word(field: dataclasses.Field) -> str:
    return f" or {field.metadata['word']}" if "word" in field.metadata else ""


def _from_text(kind: type, text: str) -> Any:
    """A flag's text as a value; ValueError says what was wanted."""
    try:
        value = _SWITCH[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(_WANTED[kind]) from None
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def _unknown_flag(word: str, fields: dict[str, Any]) -> str:
    if not word.startswith("-"):
        return f"{word!r}: not a flag, nor the value of one"
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    guess = nearest(name, fields)
    return f"{word.split('=')[0]}: no such flag" + guess.replace("'", "--", 1).replace("'", "")


def _read_config_file(config_class: type, path: Path) -> tuple[dict[str, Any], list[str]]:
    """(values, problems) of a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=reject_repeated_keys)
    except OSError as error:
        return {}, [error.strerror or str(error)]
    except UnicodeDecodeError as error:
        return {}, [f"not UTF-8 text (byte {error.start})"]
    except (ValueError, RecursionError) as error:
        return {}, [f"not JSON: {error}"]
    if not isinstance(content, dict):
        return {}, [f"expected one JSON object, got {type(content).__name__}"]
    # --debug must hold before any file is read
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.name not in ("config", "debug")}
    values, problems = {}, []
    for key, value in content.items():
        if key not in fields:
            problems.append(f"{key!r} is not a setting{nearest(key, fields)}")
            continue
        kind = _type_of(config_class, key)
        if kind is tuple and type(value) is list and all(type(item) is str for item in value):
            value = tuple(value)
        if wrong := _wrong_type(config_class, fields[key], value):
            problems.append(wrong)
        elif kind is str:
            values[key] = os.path.expanduser(value)  # as the shell does with flags
        else:
            values[key] = float(value) if kind is float and type(value) is int else value
    return values, problems


def _wrong_type(config_class: type, field: dataclasses.Field, value: Any) -> str | None:
    """What is wrong with a setting's type in JSON, or None."""
    kind = _type_of(config_class, field.name)
    # type() and not isinstance(): True is an int to Python, and `"batch_size": true` is a mistake
    is_number = type(value) in (int, float) and abs(value) < 1e300  # nan is not, nor an int too large for a float
    if value == field.metadata.get("word", object) or (is_number if kind is float else type(value) is kind):
        return None
    return f"{field.name!r}: got {value!r}, expected {_WANTED[kind]}{_or_word(field)}"


def wrong_types(config_class: type, values: dict[str, Any]) -> list[str]:
    """What is wrong with settings stored as JSON, in words. Missing and unknown names are allowed."""
    problems = []
    for field in dataclasses.fields(config_class):
        value = values.get(field.name, field.default)
        is_unset = value is None and field.default is None
        if not is_unset and (problem := _wrong_type(config_class, field, value)):
            problems.append(problem)
    return problems


def _broken_limit(field: dataclasses.Field, config: Any) -> str | None:
    """What is wrong with a setting's value, or None."""
    value, limits = getattr(config, field.name), field.metadata
    if value is None or value == limits.get("word", object):
        return None
    flag_name = f"--{field.name}"
    texts = value if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()
    for text in texts:
        # bytes of a path that are not UTF-8 reach Python as lone surrogates, which cannot be written to files
        if "is_name_on_disk" not in limits and re.search("[\ud800-\udfff]", text):
            return f"{flag_name}: got {text!a}, expected UTF-8 text"
        if not text.strip() or "\0" in text:
            return f"{flag_name}: got {text!r}, expected text" + ("" if text else " (is a variable unset?)")
    if "choices" in limits and value not in limits["choices"]:
        guess = nearest(value, limits["choices"])
        return f"{flag_name}: got {value!r}, expected one of {', '.join(limits['choices'])}{guess}"
    for name, (holds, words) in _LIMITS.items():
        if name in limits and not holds(value, limits[name]):
            return f"{flag_name}: got {value}, expected {words} {limits[name]}"
    return None
