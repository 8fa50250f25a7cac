"""Flags from a dataclass: every field is a flag and a key of a `--config` file. Defaults < file < flags.

Standard library only. Everything wrong is said in one message.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from utils import UserError, counted, nearest


def flag(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that is also a flag. Limits: `minimum`, `above`, `below`, `choices`; `group` for `--help`.

    `word` is a text that may stand instead of a number. `is_name_on_disk` says that a text is only compared with names
    on the disk, which may be any bytes.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def read_flags(config_class: type, argv: list[str], description: str) -> tuple[dict[str, Any], list[str]]:
    """What the user gave on the command line or in `--config`, converted, and everything wrong with it in words.

    The two come back together so that `build_config` can report the rest of the problems in the same message.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    parsed, unknown = _parser(config_class, description).parse_known_args(_join_negative_numbers(argv))
    # what follows an unknown flag is its value, and no second mistake
    values_of_unknown = {value for word, value in itertools.pairwise(unknown) if word.startswith("-")}
    problems = [_unknown_flag(w, fields) for w in unknown if w.startswith("-") or w not in values_of_unknown]
    texts = dict(vars(parsed))
    file_name = texts.get("config")
    values = _read_config_file(config_class, file_name, problems) if file_name else {}
    for name, text in texts.items():
        try:
            kind = _type_of(config_class, name)
            if text == fields[name].metadata.get("word", object):
                values[name] = text
                continue
            # a list's words are names: '~' in them is a letter
            values[name] = tuple(text) if kind is tuple else _from_text(kind, os.path.expanduser(text))
        except ValueError as error:
            problems.append(f"--{name}: got {text!r}, wants {error}{_or_word(fields[name])}")
    return values, problems


def _join_negative_numbers(argv: list[str]) -> list[str]:
    """`--lr -1e-5` as `--lr=-1e-5`: argparse takes -1e-5 for a flag, and would miss the value."""
    joined: list[str] = []
    for word in argv:
        is_value = joined and joined[-1].startswith("--") and "=" not in joined[-1]
        if is_value and re.fullmatch(r"-(\d|\.\d|inf|nan).*", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def build_config(config_class: type, values: dict[str, Any], problems: list[str]) -> Any:
    """The frozen config, or one UserError that names every bad value: flag, what came, what is wanted."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    config = config_class(**{name: value for name, value in values.items() if name in fields})
    problems = problems + [text for field in fields.values() if (text := _limit_broken(field, config))]
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
        title = field.metadata.get("group", "options")
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
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
            group.add_argument(f"--{field.name}", metavar=metavar, help=help_text)
    return parser


def _type_of(config_class: type, name: str) -> type:
    """The plain type of a field: `int` for both `int` and `int | None`, `tuple` for `tuple[str, ...]`."""
    hint = typing.get_type_hints(config_class)[name]
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return typing.get_origin(hint) or hint


_WANTED = {int: "a whole number", float: "a number", bool: "True or False", str: "text", tuple: "a list of texts"}


def _or_word(field: dataclasses.Field) -> str:
    return f" or {field.metadata['word']}" if "word" in field.metadata else ""


def _from_text(kind: type, text: str) -> Any:
    """A flag's text as a value; ValueError says what was wanted."""
    if kind is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in known:
            raise ValueError(_WANTED[bool])
        return known[text.lower()]
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(_WANTED[kind]) from None
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def _unknown_flag(word: str, fields: dict[str, Any]) -> str:
    if not word.startswith("-"):
        return f"{word!r}: belongs to no flag"
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    guess = nearest(name, fields)
    return f"{word.split('=')[0]}: no such flag" + guess.replace("'", "--", 1).replace("'", "")


def _read_config_file(config_class: type, file_name: str, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(Path(file_name).read_text(encoding="utf-8-sig"), object_pairs_hook=_refuse_repeats)
    except OSError as error:
        problems.append(f"--config: {file_name}: {error.strerror or error}")
        return {}
    except UnicodeDecodeError as error:
        problems.append(f"--config: {file_name}: not UTF-8 text (byte {error.start})")
        return {}
    except (ValueError, RecursionError) as error:
        problems.append(f"--config: {file_name}: not JSON: {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"--config: {file_name}: wants one JSON object, got {type(content).__name__}")
        return {}
    # --debug must hold before any file is read
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    names = [name for name in fields if name not in ("config", "debug")]
    values = {}
    for key, value in content.items():
        if key not in names:
            problems.append(f"--config: {file_name}: {key!r} is no setting{nearest(key, names)}")
            continue
        kind = _type_of(config_class, key)
        if kind is tuple and type(value) is list and all(type(item) is str for item in value):
            value = tuple(value)
        if kind is float and type(value) is int and abs(value) < 1e300:
            value = float(value)
        if value == fields[key].metadata.get("word", object):
            values[key] = value
            continue
        # type() and not isinstance(): True is an int to Python, and `"batch_size": true` is a mistake
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            wanted = _WANTED[kind] + _or_word(fields[key])
            problems.append(f"--config: {file_name}: {key!r}: got {value!r}, wants {wanted}")
            continue
        values[key] = os.path.expanduser(value) if kind is str else value  # as the shell does with flags
    return values


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{sorted(repeated)[0]!r} stands there twice")
    return dict(pairs)


def _is_utf8(text: str) -> bool:
    """Whether a text can be written to files; bytes of a path that are no UTF-8 reach Python as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def wrong_types(config_class: type, values: dict[str, Any]) -> list[str]:
    """What in settings that were stored as JSON cannot be a setting, in words; unknown names are none of ours."""
    found = []
    for field in dataclasses.fields(config_class):
        kind, value = _type_of(config_class, field.name), values.get(field.name, field.default)
        is_missing = (value is None and field.default is None) or value == field.metadata.get("word", object)
        if not is_missing and type(value) is not kind and not (kind is float and type(value) is int):
            found.append(f"{field.name!r}: got {value!r}, wants {_WANTED[kind]}{_or_word(field)}")
    return found


def _limit_broken(field: dataclasses.Field, config: Any) -> str | None:
    value, limits = getattr(config, field.name), field.metadata
    if value is None or value == limits.get("word", object):
        return None
    texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
    if "is_name_on_disk" not in limits and (foreign := [text for text in texts if not _is_utf8(text)]):
        return f"--{field.name}: got {foreign[0]!a}, wants UTF-8 text"
    if blank := [text for text in texts if not text.strip() or "\0" in text]:
        return f"--{field.name}: got {blank[0]!r}, wants a text" + (" (is a variable unset?)" if not blank[0] else "")
    if "choices" in limits and value not in limits["choices"]:
        guess = nearest(str(value), limits["choices"])
        return f"--{field.name}: got {value!r}, wants one of {', '.join(limits['choices'])}{guess}"
    if "minimum" in limits and value < limits["minimum"]:
        return f"--{field.name}: got {value}, wants at least {limits['minimum']}"
    if "above" in limits and value <= limits["above"]:
        return f"--{field.name}: got {value}, wants more than {limits['above']}"
    if "below" in limits and value >= limits["below"]:
        return f"--{field.name}: got {value}, wants less than {limits['below']}"
    return None
