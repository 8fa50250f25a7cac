"""Questions on a terminal. Ctrl-C and end of input never count as an answer."""

import re
import sys
from collections.abc import Callable
from typing import Any

import questionary


def has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def ask(kind: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The answer to one question. Ctrl-C raises KeyboardInterrupt; Ctrl-D and a closed terminal end the program."""
    question = kind(*arguments, **options)
    if kind in (questionary.select, questionary.checkbox):  # unlike text questions, they ignore Ctrl-D
        end_input = question.application.key_bindings.add("c-d", eager=True)
        end_input(lambda event: event.app.exit(exception=EOFError()))
    try:
        return question.unsafe_ask()
    except KeyboardInterrupt:
        print("Ctrl-C: this question deleted nothing")
        raise
    except EOFError:
        print("end of input: this question deleted nothing")
        raise SystemExit from None


def yes_or_no(question: str) -> bool:
    return ask(questionary.confirm, question, default=False, auto_enter=False)


def exact_word(word: str, question: str) -> bool:
    return ask(questionary.text, question) == word


def choose(question: str, titles: list[str]) -> int:
    """The index of the title that was chosen."""
    return ask(questionary.select, question, choices=indexed(titles))


def parse_numbers(text: str, highest: int) -> list[int]:
    """'1,3-5' -> [1, 3, 4, 5]; ValueError says what is wrong."""
    numbers: set[int] = set()
    for part in text.replace(",", " ").split():
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        if not match:
            raise ValueError(f"{part!r} is not a number or range such as 1,3-5")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if not 1 <= first <= last <= highest:
            raise ValueError(f"{part} is not within 1 to {highest}")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def pick(what: str, titles: list[str]) -> list[int]:
    """Indices of `titles`, picked by numbers and ranges, or from a list with arrow keys and space."""

    def validate(text: str) -> bool | str:  # True, or what is wrong
        try:
            parse_numbers(text, len(titles))
        except ValueError as error:
            return str(error)
        return True

    question = f"{what} (1,3-5; Enter for a list):"
    text = ask(questionary.text, question, validate=validate)
    if text.strip():
        return [number - 1 for number in parse_numbers(text, len(titles))]
    return ask(questionary.checkbox, what, choices=indexed(titles))


def indexed(titles: list[str]) -> list[questionary.Choice]:
    return [questionary.Choice(title, value=index) for index, title in enumerate(titles)]
