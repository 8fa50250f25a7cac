"""One progress bar for everything that takes long: tokenizing, training, evaluating."""

import sys
import time
from typing import Any, TextIO

import utils

PLAIN_LINES = 20  # for a whole run, where the output is no terminal ...
PLAIN_SECONDS = 30  # ... but at least one line in this many seconds


class ProgressBar:
    """A tqdm bar on a terminal; elsewhere plain lines, few enough for a log file. Both show rate and time left.

    Args:
        label: what is being done, such as "step" or "tokenizing train.jsonl".
        total: how many units there are; None if unknown: then no time left is shown.
        done: units finished before this process began, which do not count towards the rate.
        unit: what is counted, in the plural; "" if `figures` already has a rate.
        first_after: nothing is shown for this many seconds, so that short work stays silent.
        stream: where plain lines go (default: standard output).
    """

    def __init__(
        self, label: str, total: int | None, *, done: int = 0, unit: str = "", first_after: float = 0.0,
        is_shown: bool = True, stream: TextIO | None = None,
    ):  # fmt: skip
        self.label, self.total, self.first, self.unit = label, total, done, unit
        self.is_shown, self.stream = is_shown, stream
        self.started = time.monotonic()
        self.next_line = self.started + first_after  # no plain line before this time
        self.shown = done
        self.bar: Any = None
        if is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                desc=label, total=total, initial=done, unit=unit or label, dynamic_ncols=True, smoothing=0.1,
                leave=not first_after, delay=first_after,
            )  # fmt: skip

    def update(self, done: int, *figures: str) -> None:
        """Show that `done` units are finished, with figures such as "loss 0.6931"."""
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(figures), refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.is_shown and self._is_line_due(done):
            self.shown, self.next_line = done, time.monotonic() + PLAIN_SECONDS
            self.say((", " if self.unit else "  ").join([self._counted(done), *figures, *self._pace(done)]))

    def _is_line_due(self, done: int) -> bool:
        now = time.monotonic()
        if self.total is None or self.unit:
            return now >= self.next_line
        stride = max(1, self.total // PLAIN_LINES)
        return done // stride > self.shown // stride or now >= self.next_line or done == self.total

    def _counted(self, done: int) -> str:
        if not self.unit:
            return f"{self.label} {done}/{self.total}"
        return f"{self.label}: {done:,}" + (f" of {self.total:,}" if self.total else "") + f" {self.unit}"

    def _pace(self, done: int) -> list[str]:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = max(done - self.first, 1e-9) / seconds
        texts = [f"{rate:,.0f} {self.unit}/s"] if self.unit else []
        return texts + ([f"{utils.format_duration((self.total - done) / rate)} left"] if self.total else [])

    def say(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        if self.bar is not None:
            self.bar.clear()
        print(text, file=self.stream, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
