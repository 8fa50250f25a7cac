"""TensorBoard's event file of a run, and rewriting it when a run is resumed."""

import os
import sys
from pathlib import Path
from typing import Any

BY_EXAMPLES = "_by_examples"
QUALITIES = ("/loss", "/accuracy", "/reward", "/win_rate", "/judge_win_rate", "/kl")  # ends of tags


class TensorBoardLogger:
    """TensorBoard's event file of one run."""

    def __init__(self, folder: Path | None, resumed_step: int = 0, resumed_examples: int = 0):
        """`folder` None writes nothing: of several processes one does."""
        self.is_off = folder is None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        if resumed_step:
            drop_events_after(folder, resumed_step, resumed_examples)
        self.writer = SummaryWriter(str(folder), flush_secs=10)

    def scalars(self, values: dict[str, float], step: int, examples: int) -> None:
        """Write scalars over steps; those that say how good the model is over examples seen as well."""
        for tag, value in values.items():
            self._write("add_scalar", tag, value, step)
            if tag.endswith(QUALITIES):
                self._write("add_scalar", tag + BY_EXAMPLES, value, examples)

    def histogram(self, tag: str, values: Any, step: int) -> None:
        if (finite := values[values.isfinite()]).numel():  # TensorBoard draws nothing else, and raises
            self._write("add_histogram", tag, finite, step)

    def table(self, tag: str, rows: dict[str, Any], step: int) -> None:
        """Key and value as a Markdown table."""
        lines = ["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
        self._write("add_text", tag, "\n".join(lines), step)

    def close(self) -> None:
        self._write("close")

    def _write(self, what: str, *arguments: Any) -> None:
        """A full disk under the logs ends the logging, and says so, but not the training."""
        if self.is_off:
            return
        try:
            getattr(self.writer, what)(*arguments)
        except OSError as error:
            self.is_off = True
            print(f"TensorBoard's log cannot be written any more ({error}); training goes on without", file=sys.stderr)


def drop_events_after(folder: Path, step: int, examples: int) -> None:
    """Rewrite a run's event files without the points after `step`, which a resumed run is about to draw again.

    TensorBoard's own purging (`purge_step`) compares every tag's step with one number, so it would also hide all points
    of the tags that count examples.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.summary.writer.record_writer import RecordWriter

    def counts_examples(event: Any) -> bool:
        return any(value.tag.endswith(BY_EXAMPLES) for value in event.summary.value)

    for path in sorted(folder.glob("events.out.tfevents.*")):
        events = list(LegacyEventFileLoader(str(path)).Load())
        kept = [event for event in events if event.step <= (examples if counts_examples(event) else step)]
        if len(kept) == len(events):
            continue
        temporary = path.with_name(f".tmp-{path.name}")
        with temporary.open("wb") as file:
            writer = RecordWriter(file)
            for event in kept:
                writer.write(event.SerializeToString())
            writer.close()
        os.replace(temporary, path)
