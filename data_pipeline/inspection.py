"""What `python data.py` shows of preference data before anything is trained on it.

Letters: N pairs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline import parsing, sampler
from data_pipeline.messages import Messages
from data_pipeline.parsing import Pair
from data_pipeline.reading import Source
from data_pipeline.tokenization import longest_sequences, render
from utils import counted, printable

PERCENTILES = (50, 95, 100)
LONGEST_SHOWN = 4000  # characters of a dialogue
COLORS = {"system": "35", "user": "36", "assistant": "32", "tool": "33", "markup": "2"}  # of ANSI escapes


# -- What is there more than once --------------------------------------------------------------------------------------


@dataclass
class Texts:
    """Hashes of the pairs of a part of the data."""

    pairs: list[bytes] = field(default_factory=list)
    swapped: set[bytes] = field(default_factory=set)  # the pairs with chosen and rejected exchanged
    prompts: set[bytes] = field(default_factory=set)

    @classmethod
    def of(cls, rows: Iterable[Pair]) -> "Texts":
        found = cls()
        for pair in rows:
            chosen, rejected = parsing.digest_of(pair.chosen), parsing.digest_of(pair.rejected)
            found.pairs.append(chosen + rejected)
            found.swapped.add(rejected + chosen)
            found.prompts.add(parsing.digest_of(pair.chosen[:-1]))
        return found


def texts_of(sources: Iterable[Source], pairs: Any) -> Texts:
    """Those of a `data.PairDataset` that was read from `sources`."""
    kept = set(pairs.places(np.arange(len(pairs))))

    def read() -> Iterator[Pair]:
        for at, source in enumerate(sources):
            for row in parsing.read_pairs(source):
                if (at, row.row) in kept and not isinstance(row.pair, str):
                    yield row.pair

    return Texts.of(read())


def repetitions(train: Texts, test: Texts, shared_pairs: int) -> list[str]:
    """Lines about pairs that occur more than once, contradict each other, or are in training and test data.

    `shared_pairs` of the test data were skipped because they are training pairs too, and are not among `test`.
    """
    distinct = set(train.pairs)
    both_ways = len(distinct & train.swapped) // 2
    shared_prompts = len(train.prompts & test.prompts)
    return [
        f"repeated in train: {counted(len(train.pairs) - len(distinct), 'pair')}",
        f"contradictory in train: {counted(both_ways, 'pair')} also the other way round",
        f"in both train and test: {counted(shared_pairs, 'pair')}, skipped in test; of the others "
        f"{counted(shared_prompts, 'prompt')} of {len(test.prompts):,}"
        + (": the test is easier than it looks" if shared_prompts else ""),
    ]


# -- Lengths -----------------------------------------------------------------------------------------------------------


def lengths(pairs: Any, max_length: int) -> list[str]:
    """A table of the tokens of a `data.PairDataset`'s pairs, as text."""
    if not len(pairs):
        return []
    prompt, chosen, rejected = pairs.lengths.T  # (N,) each
    lines = ["tokens               median     95 %  longest"]
    rows = {"shared prompt": prompt, "chosen reply": chosen, "rejected reply": rejected}
    for name, values in (rows | {"longer side": longest_sequences(pairs.lengths)}).items():
        lines.append(f"  {name:<16}" + "".join(f"{int(value):>9,}" for value in np.percentile(values, PERCENTILES)))
    longer = np.mean(chosen > rejected) + np.mean(chosen == rejected) / 2
    lines.append(f"the chosen reply is the longer one in {longer:.0%}: what a model gets right that only sees length")
    if too_long := pairs.counts.count["too_long"]:
        lines.append(f"longer than --max_length {max_length:,}: {counted(too_long, 'row')}, skipped")
    return lines


# -- Dialogues ---------------------------------------------------------------------------------------------------------


def dialogues(
    sources: tuple[Source, ...], pairs: Any, tokenizer: Any, count: int, in_color: bool
) -> Iterator[list[str]]:
    """Some pairs, spread over the data, as the model will see them: the chosen dialogue, then the rejected reply."""
    sample = sampler.fixed_sample(len(pairs), count, seed=0) if count else []
    wanted = set(pairs.places(sample)) if len(sample) else set()
    for at, source in enumerate(sources):
        rows = {row for part, row in wanted if part == at}
        for row in parsing.read_pairs(source) if rows else ():
            if row.row not in rows or isinstance(row.pair, str):
                continue
            rows.discard(row.row)  # of several pairs of a row, the first
            pair = row.pair
            texts = render([pair.chosen, pair.rejected], tokenizer, pair.tools)
            if isinstance(texts, str):
                continue
            shared = _shared_start(*texts)
            margin = f", margin {pair.label_margin:g}" if pair.label_margin else ""
            yield [
                f"--- {source.place(row.row)}{margin}: chosen, as the model sees it ---",
                colored(texts[0], pair.chosen, in_color),
                f"--- rejected, from where it differs (character {shared:,}) ---",
                colored(texts[1][shared:], pair.rejected[-1:], in_color),
            ]
            if not rows:
                break


def _shared_start(first: str, second: str) -> int:
    at = next((at for at, signs in enumerate(zip(first, second, strict=False)) if len(set(signs)) > 1), 0)
    return first.rfind("\n", 0, at) + 1  # whole lines


def colored(text: str, dialogue: Messages, in_color: bool) -> str:
    """A rendered dialogue with each turn in its speaker's colour and the template's own text dim, if `in_color`."""
    pieces, at = [], 0
    for message in dialogue:
        content = message["content"].strip()
        start = text.find(content, at) if content else -1
        if start < 0:
            continue  # the template leaves it out, or changes it
        pieces += [("markup", text[at:start]), (message["role"], content)]
        at = start + len(content)
    pieces.append(("markup", text[at:]))
    left, shown = LONGEST_SHOWN, []
    for role, piece in pieces:
        cut = "\n".join(printable(line) for line in piece[:left].split("\n"))
        shown.append(f"\x1b[{COLORS[role]}m{cut}\x1b[0m" if in_color and cut else cut)
        left -= len(piece[:left])
    more = f"\n… {len(text) - LONGEST_SHOWN:,} characters more" if len(text) > LONGEST_SHOWN else ""
    return "".join(shown).rstrip("\n") + more
