"""data.py: tokens equal to the chat template's, the cache, what is skipped."""

import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data
import models
from common import progress
from data_pipeline import inspection, parsing, reading, sampler, sources, tokenization
from tests.conftest import ROOT, dataset_of, micro_batches_of
from utils import DiskOrNetworkError, UserError

SYSTEM = {"role": "system", "content": "Be short."}
QUESTION = {"role": "user", "content": "Is the oven hot?"}
YES = {"role": "assistant", "content": "Yes, it is."}
NO = {"role": "assistant", "content": "No."}
PROMPT = "\n\nHuman: Is the oven hot?\n\nAssistant:"
GOOD_ROW = {"chosen": f"{PROMPT} Yes, it is.", "rejected": f"{PROMPT} No."}
TEST_ROW = {"chosen": f"{PROMPT} Try it.", "rejected": f"{PROMPT} No."}
IDENTICAL_ROW = {"chosen": f"{PROMPT} No.", "rejected": f"{PROMPT} No."}


def reply(text):
    return [QUESTION, {"role": "assistant", "content": text}]


def transcript(text):
    return f"{PROMPT} {text}"


# (row, chosen dialogue, rejected dialogue), in several forms
FORMS = [
    (GOOD_ROW, [QUESTION, YES], [QUESTION, NO]),
    (
        {"chosen": [SYSTEM, QUESTION, YES], "rejected": [SYSTEM, QUESTION, NO]},
        [SYSTEM, QUESTION, YES], [SYSTEM, QUESTION, NO],
    ),
    ({"prompt": "Is the oven hot?", "chosen": "Yes, it is.", "rejected": "No."}, [QUESTION, YES], [QUESTION, NO]),
    ({"prompt": [QUESTION], "chosen": [YES], "rejected": [NO]}, [QUESTION, YES], [QUESTION, NO]),
    (
        {"prompt": "Is the oven hot?", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        [QUESTION, YES], [QUESTION, NO],
    ),
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?" + transcript("No."), "rejected": transcript("No.")},
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, QUESTION, NO], [QUESTION, NO],
    ),
    ({"chosen": transcript("Yes. And more."), "rejected": transcript("Yes.")}, reply("Yes. And more."), reply("Yes.")),
    ({"chosen": [YES], "rejected": [NO]}, [YES], [NO]),
    ({"chosen": transcript("😀 ï\tمرحبا\0"), "rejected": transcript("😃")}, reply("😀 ï\tمرحبا\0"), reply("😃")),
    ({"chosen": transcript("<|im_end|>"), "rejected": transcript("<think>")}, reply("<|im_end|>"), reply("<think>")),
    ({"chosen": reply("  spaces \n"), "rejected": reply("spaces")}, reply("  spaces \n"), reply("spaces")),
]  # fmt: skip


def ids_of(tokenizer, dialogue):
    return tokenizer.apply_chat_template(dialogue, return_dict=False)


@pytest.fixture
def load(tmp_path, tokenizer):
    """Load training rows, beside one test row, from a folder of their own."""

    def load_rows(train_rows, max_length=None, tokenizer=tokenizer):
        folder = tmp_path / "pairs"
        folder.mkdir(exist_ok=True)
        for name, content in (("train", train_rows), ("test", [TEST_ROW])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        return data.load_pairs(str(folder), tokenizer, max_length)[0]

    return load_rows


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("RL_WITH_RM_CACHE", str(cache))
    return cache


@pytest.fixture
def tokenized(monkeypatch):
    """The names of the sources that are tokenized from now on."""
    names, original = [], data._tokenize

    def count(source, tokenizer, folder):
        names.append(Path(source.name).name)
        original(source, tokenizer, folder)

    monkeypatch.setattr(data, "_tokenize", count)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def test_every_form_of_row_has_exactly_the_chat_templates_tokens(load, tokenizer):
    pairs = load([row for row, _, _ in FORMS])
    assert pairs.rows.tolist() == list(range(1, len(FORMS) + 1)) and pairs.counts.skipped == 0
    for index, (row, chosen, rejected) in enumerate(FORMS):
        sides = [side.tolist() for side in pairs.sequences(index)]
        assert sides == [ids_of(tokenizer, chosen), ids_of(tokenizer, rejected)], row


def assert_tokens_are_the_templates(pairs, source, tokenizer):
    parsed = {row.row: row.pair for row in parsing.read_pairs(source)}
    assert len(pairs) > 0 and len(parsed) == pairs.counts.rows
    for index, row in enumerate(pairs.rows.tolist()):
        chosen, rejected = (side.tolist() for side in pairs.sequences(index))
        assert chosen == ids_of(tokenizer, parsed[row].chosen), row
        assert rejected == ids_of(tokenizer, parsed[row].rejected), row


def test_the_demos_tokens_are_exactly_the_chat_templates(small_dataset, tokenizer):
    both = data.load_pairs(small_dataset, tokenizer)
    assert [len(pairs) for pairs in both] == [64, 16]
    found = sources.find_sources(sources.DataSpec(str(small_dataset)))
    for pairs, (source,) in zip(both, (found.train, found.test), strict=True):
        assert_tokens_are_the_templates(pairs, source, tokenizer)


@pytest.fixture(scope="module")
def real_pairs(real_data, real_tokenizer):
    return data.load_pairs(real_data, real_tokenizer, 2048)


def test_real_tokens_are_exactly_the_chat_templates(real_pairs, real_data, real_tokenizer):
    found = sources.find_sources(sources.DataSpec(str(real_data)))
    for pairs, (source,) in zip(real_pairs, (found.train, found.test), strict=True):
        assert_tokens_are_the_templates(pairs, source, real_tokenizer)


def test_every_real_row_is_kept_or_skipped_for_a_reason(real_pairs):
    train, test = real_pairs
    for pairs in real_pairs:
        assert len(pairs) + pairs.counts.skipped == pairs.counts.rows
    assert (train.counts.rows, len(train), test.counts.rows, len(test)) == (1200, 1199, 300, 300)
    assert {key: train.counts.count[key] for key in parsing.SKIP_REASONS if train.counts.count[key]} == {"no_reply": 1}
    assert train.counts.first_rows["no_reply"] == [270]


def test_at_least_95_percent_of_the_computed_real_tokens_are_needed(real_pairs, real_tokenizer):
    train, _ = real_pairs
    plan = sampler.StepSampler(len(train), examples_per_step=128, epochs=1, seed=0)
    needed = computed = 0
    taken = []
    for step in range(1, plan.total_steps + 1):
        for batch in micro_batches_of(train, plan.indices_for(step), 4096, 32, real_tokenizer.pad_token_id, 3840):
            needed += int((batch.example_index >= 0).sum())
            computed += batch.input_ids.numel()
            taken += batch.indices.tolist()
    assert sorted(taken) == list(range(len(train)))
    assert needed == train.packed_lengths.sum()
    assert 0.95 <= needed / computed <= 1


def test_margins_and_kinds_come_along(load):
    pairs = load(
        [GOOD_ROW, {**GOOD_ROW, "margin": 1.5, "kind": "polite"}, IDENTICAL_ROW, {**GOOD_ROW, "kind": "polite"}]
    )
    assert pairs.label_margins.tolist() == [0, 1.5, 0] and pairs.label_margins.dtype == np.float32
    assert [pairs.kind_names[kind] for kind in pairs.kinds] == ["", "polite", "polite"]
    assert pairs.rows.tolist() == [1, 2, 4]


def test_a_tokenizer_that_pads_and_cuts_on_its_own_does_neither_here(load, base, tokenizer):
    odd = models.load_tokenizer(base)
    odd.backend_tokenizer.enable_padding(length=64)
    odd.backend_tokenizer.enable_truncation(max_length=8)
    pairs = load([GOOD_ROW], tokenizer=odd)
    assert pairs.sequences(0)[0].tolist() == ids_of(tokenizer, [QUESTION, YES])


def test_a_tokenizer_that_adds_tokens_on_its_own_adds_none_to_the_templates(load, base, tokenizer):
    from tokenizers.processors import TemplateProcessing

    odd = models.load_tokenizer(base)
    start = ("<|endoftext|>", odd.convert_tokens_to_ids("<|endoftext|>"))
    odd.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[start])
    assert odd("Yes.")["input_ids"][0] == start[1], "this tokenizer should add a token"
    pairs = load([GOOD_ROW], tokenizer=odd)
    assert pairs.sequences(0)[0].tolist() == ids_of(odd, [QUESTION, YES]) == ids_of(tokenizer, [QUESTION, YES])


def test_rows_beyond_the_first_chunk_keep_numbers_and_tokens(load, tokenizer, monkeypatch, empty_cache):
    monkeypatch.setattr(tokenization, "ROWS_AT_A_TIME", 3)
    pairs = load([row for row, _, _ in FORMS[:4]] + [IDENTICAL_ROW] * 3 + [row for row, _, _ in FORMS[4:8]])
    assert pairs.rows.tolist() == [1, 2, 3, 4, 8, 9, 10, 11] and pairs.counts.rows == 11
    for index, (_, chosen, rejected) in enumerate(FORMS[:8]):
        sides = [side.tolist() for side in pairs.sequences(index)]
        assert sides == [ids_of(tokenizer, chosen), ids_of(tokenizer, rejected)]


def plain_files(source, tokenizer, folder):
    """What the cache holds of a source, the plain way: row by row, each side encoded alone."""
    kept, skipped = [], []
    for row, pair, _ in parsing.read_pairs(source):
        if isinstance(pair, str):
            skipped.append((row, list(parsing.SKIP_REASONS).index(pair.partition(": ")[0])))
            continue
        chosen, rejected = (np.array(ids_of(tokenizer, side), np.int32) for side in (pair.chosen, pair.rejected))
        prefix = tokenization.shared_prefix(chosen, rejected)
        kept.append((row, pair, chosen, rejected[prefix:], prefix))
    folder.mkdir()
    np.concatenate([np.concatenate(ids) for _, _, *ids, _ in kept]).tofile(folder / "tokens.bin")
    lengths = [(prefix, len(chosen) - prefix, len(tail)) for _, _, chosen, tail, prefix in kept]
    np.save(folder / "lengths.npy", np.array(lengths, np.int32))
    np.save(folder / "rows.npy", np.array([row for row, *_ in kept]))
    np.save(folder / "margins.npy", np.array([pair.label_margin for _, pair, *_ in kept], np.float32))
    warnings = [[name in pair.warnings for name in parsing.WARNINGS] for _, pair, *_ in kept]
    np.save(folder / "notes.npy", np.array(warnings))
    np.save(folder / "skipped_rows.npy", np.array([row for row, _ in skipped], np.int64))
    np.save(folder / "skipped_keys.npy", np.array([key for _, key in skipped], np.int32))


def assert_files_are_the_plain_ones(source, tokenizer, tmp_path):
    made, plain = tmp_path / "made", tmp_path / "plain"
    made.mkdir()
    data._tokenize(source, tokenizer, made)
    plain_files(source, tokenizer, plain)
    names = sorted(path.name for path in plain.iterdir())
    assert [(made / name).read_bytes() == (plain / name).read_bytes() for name in names] == [True] * 7, names


def test_the_cache_holds_what_row_by_row_gives_byte_for_byte(tmp_path, tokenizer, write_rows, monkeypatch):
    monkeypatch.setattr(tokenization, "ROWS_AT_A_TIME", 3)
    source = reading.Source("made up", (write_rows([row for form in FORMS for row in (form[0], IDENTICAL_ROW)]),))
    assert_files_are_the_plain_ones(source, tokenizer, tmp_path)


def test_real_pairs_cache_holds_what_row_by_row_gives_byte_for_byte(tmp_path, real_data, real_tokenizer):
    (source,) = sources.find_sources(sources.DataSpec(str(real_data))).test
    assert_files_are_the_plain_ones(source, real_tokenizer, tmp_path)


class BreaksAt:
    """A real tokenizer's backend whose `encode_batch_fast` fails at its nth call."""

    def __init__(self, backend, call, error):
        self.backend, self.calls_left, self.error = backend, call, error

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch_fast(self, *arguments, **flags):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise self.error
        return self.backend.encode_batch_fast(*arguments, **flags)


class WithBackend:
    def __init__(self, tokenizer, backend):
        self.tokenizer, self.backend_tokenizer = tokenizer, backend

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("error", [RuntimeError("no such byte"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_error_while_encoding_surfaces_and_leaves_nothing(load, tokenizer, empty_cache, monkeypatch, call, error):
    monkeypatch.setattr(tokenization, "ROWS_AT_A_TIME", 3)
    broken = WithBackend(tokenizer, BreaksAt(tokenizer.backend_tokenizer, call, error))
    with pytest.raises(type(error)) as caught:
        load([row for row, _, _ in FORMS], tokenizer=broken)
    assert caught.value is error
    assert list(empty_cache.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def breaking_at(row, parse):
    count = itertools.count(1)

    def parse_or_break(*arguments):
        if next(count) == row:
            raise RuntimeError(f"the {row}th")
        return parse(*arguments)

    return parse_or_break


def test_an_error_behind_good_chunks_surfaces_and_no_thread_stays(load, empty_cache, monkeypatch):
    monkeypatch.setattr(tokenization, "ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(parsing, "parse_row", breaking_at(8, parsing.parse_row))
    with pytest.raises(RuntimeError, match="the 8th"):
        load([GOOD_ROW] * 8)
    assert list(empty_cache.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends a console's Ctrl-C to no single process")
def test_a_stop_while_encoding_ends_at_the_chunk_in_hand(empty_cache, real_data, real_tokenizer_folder, tmp_path):
    """Ctrl-C in a process that tokenizes: it ends at once, by KeyboardInterrupt, and leaves no cache entry."""
    lines = gzip.decompress((Path(real_data) / "train.jsonl.gz").read_bytes())
    (tmp_path / "train.jsonl").write_bytes(lines * 20)
    (tmp_path / "test.jsonl").write_text(json.dumps(TEST_ROW) + "\n")
    script = (
        "import data, sys\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "data.load_pairs(sys.argv[2], tokenizer)\n"
    )
    command = [sys.executable, "-c", script, real_tokenizer_folder, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in empty_cache.glob(".tmp-*/tokens.bin")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode != 0 and errors.splitlines()[-1] == "KeyboardInterrupt", errors
    assert list(empty_cache.iterdir()) == []


@pytest.mark.parametrize("columns", ["20", "200"])
def test_progress_is_shown_in_plain_lines_however_wide_the_terminal(load, monkeypatch, capsys, empty_cache, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(tokenization, "ROWS_AT_A_TIME", 2)
    clock = itertools.count(step=20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    load([row for row, _, _ in FORMS])
    lines = [line for line in capsys.readouterr().err.splitlines() if "train.jsonl" in line]
    counted = [int(re.search(r"train\.jsonl: (\d+) rows, \d+ rows/s$", line).group(1)) for line in lines]
    assert len(counted) >= 2 and counted == sorted(set(counted)) and counted[-1] <= len(FORMS)


def test_half_a_surrogate_pair_in_a_text_does_not_stop_the_run(load):
    pairs = load([GOOD_ROW, {"chosen": transcript("Yes \ud83d."), "rejected": transcript("No.")}])
    assert len(pairs) + pairs.counts.skipped == 2


def test_no_usable_row_makes_an_empty_dataset(load):
    pairs = load([IDENTICAL_ROW])
    assert len(pairs) == 0 and (pairs.counts.rows, pairs.counts.skipped) == (1, 1)


def test_sides_of_which_one_starts_with_the_other_come_back_whole(tmp_path):
    made = [([7, 8, 9], [7, 8, 9, 10]), ([7, 8, 9, 10], [7]), ([1, 2], [3, 4])]
    pairs = dataset_of(tmp_path / "made", made)
    assert pairs.lengths.tolist() == [[2, 1, 2], [0, 4, 1], [0, 2, 2]]
    assert [tuple(side.tolist() for side in pairs.sequences(index)) for index in range(3)] == made


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def test_the_second_load_does_not_tokenize_again(load, empty_cache, monkeypatch):
    first = load([row for row, _, _ in FORMS])

    def fail(*args):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(data, "_tokenize", fail)
    second = load([row for row, _, _ in FORMS])
    assert second.fingerprint == first.fingerprint and len(second) == len(FORMS)
    assert all(np.array_equal(second.tokens(index), first.tokens(index)) for index in range(len(FORMS)))


def test_only_a_file_with_new_content_is_tokenized_again(load, empty_cache, tokenized):
    first = load([GOOD_ROW])
    assert tokenized == ["train.jsonl", "test.jsonl"]
    second = load([GOOD_ROW, {**GOOD_ROW, "chosen": transcript("Maybe.")}])
    assert tokenized == ["train.jsonl", "test.jsonl", "train.jsonl"]
    assert (len(first), len(second)) == (1, 2) and first.fingerprint != second.fingerprint


def test_another_template_or_tokenizer_tokenizes_again(load, base, tokenizer, empty_cache, tokenized):
    load([GOOD_ROW])
    other_template = models.load_tokenizer(base)
    other_template.chat_template = tokenizer.chat_template.replace("<think>\n\n</think>\n\n", "")
    other_words = models.load_tokenizer(base)
    other_words.add_tokens(["oven"])
    for number, other in enumerate((other_template, other_words), start=2):
        pairs = load([GOOD_ROW], tokenizer=other)
        assert len(tokenized) == 2 * number
        assert pairs.sequences(0)[0].tolist() == ids_of(other, [QUESTION, YES]) != ids_of(tokenizer, [QUESTION, YES])
    load([GOOD_ROW], tokenizer=models.load_tokenizer(base))
    assert len(tokenized) == 6, "the first tokenizer's result is still there"


def test_another_max_length_does_not_tokenize_again(load, empty_cache, tokenized):
    load([GOOD_ROW])
    load([GOOD_ROW], max_length=8)
    assert len(tokenized) == 2


def test_the_fingerprint_is_that_of_the_kept_pairs(load):
    longer = {**GOOD_ROW, "chosen": transcript("Yes. " * 50)}
    everything, kept = load([GOOD_ROW, longer]), load([GOOD_ROW, longer], max_length=60)
    assert len(kept) == 1 and everything.fingerprint != kept.fingerprint
    assert kept.fingerprint == load([GOOD_ROW, longer], max_length=61).fingerprint


def test_what_killed_tokenizings_left_is_cleared_after_a_day_and_a_live_one_is_not(load, empty_cache):
    long_ago = time.time() - 2 * 24 * 3600
    dead, live = empty_cache / ".tmp-aaaa-1", empty_cache / ".tmp-bbbb-2"
    for folder in (dead, live):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"")
        os.utime(folder, (long_ago, long_ago))
    os.utime(dead / "tokens.bin", (long_ago, long_ago))
    load([GOOD_ROW])
    assert not dead.exists() and live.exists()


def test_a_broken_file_leaves_nothing_in_the_cache(tmp_path, tokenizer, empty_cache):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(GOOD_ROW)}\n" * 2 + '{"chosen": "Yes."')
    with pytest.raises(UserError, match=r"pairs\.jsonl:3"):
        data.load_pairs(str(path), tokenizer)
    assert list(empty_cache.iterdir()) == []


TOKENISE_AT_ONCE = """
import sys, time
from pathlib import Path
from types import SimpleNamespace

root, base, dataset, meeting, name = sys.argv[1:]
sys.path.insert(0, root)
import data, tokenizers  # not transformers, which takes seconds to import

tokenizer = SimpleNamespace(
    backend_tokenizer=tokenizers.Tokenizer.from_file(base + "/tokenizer.json"),
    chat_template="none",
    apply_chat_template=lambda dialogues, tokenize: [str(dialogue) for dialogue in dialogues],
)
original = data._tokenize

def tokenize_once_both_are_here(source, tokenizer, folder):
    original(source, tokenizer, folder)
    split = Path(source.name).stem
    Path(meeting, f"{split}-{name}").touch()
    deadline = time.monotonic() + 60
    while len(list(Path(meeting).glob(f"{split}-*"))) < 2:
        assert time.monotonic() < deadline, "the other process did not come"
        time.sleep(0.005)

data._tokenize = tokenize_once_both_are_here
train, test = data.load_pairs(dataset, tokenizer)
print(len(train), len(test), train.fingerprint, test.fingerprint, int(train.tokens(len(train) - 1).sum()))
"""


def test_two_processes_that_tokenize_at_once_both_succeed(base, small_dataset, tmp_path, empty_cache):
    (tmp_path / "meeting").mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOKENISE_AT_ONCE, str(ROOT), base, small_dataset, str(tmp_path / "meeting"), name],
            env={**os.environ, "RL_WITH_RM_CACHE": str(empty_cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "other")
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0] and results[0][0].startswith("64 16 ")
    assert len(list(empty_cache.iterdir())) == 2, "one folder for each split, and no temporary one"


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_cache_at_a_files_place_is_named(load, tmp_path, monkeypatch, below):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RL_WITH_RM_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(DiskOrNetworkError, match=r"cache cannot be written(.|\n)*RL_WITH_RM_CACHE"):
        load([GOOD_ROW])


def test_a_cache_that_may_not_be_written_is_named(load, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    if os.access(cache, os.W_OK):  # root may write anywhere: say no in the system's place
        original = os.mkdir

        def refuse(path, *args, **kwargs):
            if cache in Path(path).parents:
                raise PermissionError(13, "Permission denied", str(path))
            original(path, *args, **kwargs)

        monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setenv("RL_WITH_RM_CACHE", str(cache))
    with pytest.raises(DiskOrNetworkError, match=r"cache cannot be written(.|\n)*RL_WITH_RM_CACHE") as caught:
        load([GOOD_ROW])
    assert str(cache) in str(caught.value) and "next:   make the folder writable" in str(caught.value)


def test_the_cache_is_below_the_users_unless_told(monkeypatch, tmp_path):
    monkeypatch.setenv("RL_WITH_RM_CACHE", str(tmp_path / "own"))
    assert data.cache_root() == tmp_path / "own"
    monkeypatch.delenv("RL_WITH_RM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_root() == tmp_path / "xdg" / "rl-with-rm"
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert data.cache_root() == Path.home() / ".cache" / "rl-with-rm"


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize("name", ["tokens.bin", "lengths.npy", "notes.npy", "report.json"])
def test_a_damaged_cache_entry_is_made_again(load, empty_cache, name, damage):
    wanted = load([GOOD_ROW, TEST_ROW]).lengths.tolist()
    for path in empty_cache.glob(f"*/{name}"):
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1])
    assert load([GOOD_ROW, TEST_ROW]).lengths.tolist() == wanted


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.npy", "rows.npy"])
def test_a_cache_entry_that_was_changed_is_made_again(load, empty_cache, name):
    wanted = load([GOOD_ROW, TEST_ROW])
    for path in empty_cache.glob(f"*/{name}"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    again = load([GOOD_ROW, TEST_ROW])
    assert again.lengths.tolist() == wanted.lengths.tolist() and again.tokens(0).tolist() == wanted.tokens(0).tolist()


def test_a_full_disk_under_the_cache_names_the_cache(load, empty_cache, monkeypatch):
    def full(*arguments):
        raise OSError("Not enough free space to write 24000156 bytes")  # numpy's own, without an errno

    monkeypatch.setattr(data.np, "save", full)
    with pytest.raises(DiskOrNetworkError, match="RL_WITH_RM_CACHE"):
        load([GOOD_ROW])


def test_votes_for_neither_side_are_counted_and_no_reason_to_stop(load):
    votes = [{**GOOD_ROW, "vote": vote} for vote in ("a", "tie", "both_bad", "tie")]
    pairs = load(votes)
    assert len(pairs) == 1 and pairs.counts.count == {"no_preference": 3}
    pairs.check_skipped()


# ---------------------------------------------------------------------------------------------------------------------
# What is skipped
# ---------------------------------------------------------------------------------------------------------------------

REPLIES = ["Yes.", "Yes, yes.", "Yes, yes, yes.", *(("Yes. " * count).strip() for count in (10, 20, 40))]


def test_a_pair_of_exactly_max_length_is_kept_and_a_longer_one_skipped(load, tokenizer):
    # the longer side is once the chosen, once the rejected one
    content = [{"chosen": transcript(text), "rejected": transcript("No.")} for text in REPLIES]
    content += [{"chosen": transcript("No."), "rejected": transcript(text)} for text in REPLIES]
    longest = [max(len(ids_of(tokenizer, reply(t))), len(ids_of(tokenizer, reply("No.")))) for t in REPLIES] * 2
    for max_length in sorted({*longest, *(length - 1 for length in longest)}):
        pairs = load(content, max_length)
        fitting = [row for row, length in enumerate(longest, start=1) if length <= max_length]
        too_long = [row for row, length in enumerate(longest, start=1) if length > max_length]
        assert pairs.rows.tolist() == fitting
        assert pairs.counts.count["too_long"] == pairs.counts.skipped == len(too_long)
        assert pairs.counts.first_rows.get("too_long", []) == too_long[:5]


def test_pairs_behind_one_that_is_too_long_keep_their_tokens(load, tokenizer):
    content = [{"chosen": transcript(text), "rejected": transcript("No.")} for text in ("Ja.", "Yes. " * 99, "Sure.")]
    pairs = load(content, max_length=100)
    assert pairs.rows.tolist() == [1, 3] and len(pairs) == 2
    assert [pairs.sequences(index)[0].tolist() for index in (0, 1)] == [
        ids_of(tokenizer, reply(text)) for text in ("Ja.", "Sure.")
    ]


def test_a_reply_of_120_000_words_is_counted_as_too_long(load):
    huge = " ".join(f"word{number}" for number in range(120_000))
    pairs = load([GOOD_ROW, {"chosen": transcript(huge), "rejected": transcript("No.")}], max_length=2048)
    assert len(pairs) == 1 and pairs.counts.first_rows == {"too_long": [2]}


def test_every_reason_is_counted_with_its_rows(load, base):
    picky = models.load_tokenizer(base)
    picky.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + picky.chat_template
    )
    reasons = {
        "no_dialogue": {"chosen": "A text.", "rejected": transcript("No.")},
        "no_reply": {"chosen": PROMPT, "rejected": transcript("No.")},
        "wrong_last_speaker": {"chosen": [QUESTION, YES], "rejected": [QUESTION]},
        "identical": IDENTICAL_ROW,
        "no_text": {"chosen": transcript("half: \ud83d"), "rejected": transcript("No.")},
        "no_preference": {**GOOD_ROW, "vote": "tie"},
        "null": {**GOOD_ROW, "chosen": None},
        "wrong_type": {**GOOD_ROW, "chosen": 3},
        "unknown_role": {"chosen": [{"role": "cat", "content": "Yes."}], "rejected": [NO]},
        "not_text": {"chosen": [{**YES, "content": [{"type": "image"}]}], "rejected": [NO]},
        "rendered": {"chosen": "[INST] Hello [/INST] Yes.", "rejected": transcript("No.")},
        "no_choice": {**GOOD_ROW, "margin": "large"},
        "no_columns": {"good": "Yes.", "bad": "No."},
        "template": {"chosen": [SYSTEM, QUESTION, YES], "rejected": [SYSTEM, QUESTION, NO]},
        "too_long": {"chosen": transcript("Yes. " * 50), "rejected": transcript("No.")},
    }
    assert reasons.keys() == parsing.SKIP_REASONS.keys() - {"trained_on", "repeated"}, "not of pairs"
    pairs = load([GOOD_ROW, *reasons.values(), GOOD_ROW], max_length=60, tokenizer=picky)
    assert pairs.counts.count == Counter(dict.fromkeys(reasons, 1))
    assert pairs.counts.first_rows == {key: [row] for row, key in enumerate(reasons, start=2)}
    assert (pairs.counts.rows, pairs.counts.skipped, pairs.rows.tolist()) == (17, 15, [1, 17])
    lines = pairs.parts[0].counts.lines()
    assert len(lines) == 15 and lines[-2] == (
        '  skipped 1: refused by the model\'s chat template (row 15; the first: it says "no system here")'
    )
    assert "  skipped 1: a null in place of a text (row 8; the first: 'chosen' is null)" in lines


def test_a_tool_call_that_the_template_leaves_out_is_counted_and_no_reply_if_it_is_all(load, base):
    plain = models.load_tokenizer(base)
    plain.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "thermometer", "arguments": {}}}]}
    unseen = {**call, "tool_calls": [{"function": {"name": "oven", "arguments": {}}}]}  # which the question names
    rows = [
        {"prompt": [QUESTION], "chosen": [{**call, "content": "Let me see."}], "rejected": [NO]},
        {"prompt": [QUESTION], "chosen": [call], "rejected": [NO]},
        {"prompt": [QUESTION], "chosen": [unseen], "rejected": [NO]},
    ]
    pairs = load([GOOD_ROW, *rows], tokenizer=plain)
    assert pairs.counts.first_rows == {"not_rendered": [2], "no_reply": [3, 4]} and pairs.rows.tolist() == [1, 2]
    assert "leaves out the tool call that is all of it" in pairs.parts[0].counts.lines()[0]
    plain.chat_template = plain.chat_template.replace(
        "{{ message.content }}", "{{ message.content }}{{ message.tool_calls }}"
    )
    pairs = load([GOOD_ROW, *rows], tokenizer=plain)
    assert pairs.rows.tolist() == [1, 2, 3, 4] and not pairs.counts.count


def test_a_turn_that_the_template_leaves_out_is_counted(load, base):
    without_system = models.load_tokenizer(base)
    without_system.chat_template = (
        "{% for message in messages if message.role != 'system' %}{{ message.content }}\n{% endfor %}"
    )
    row = {"chosen": [SYSTEM, QUESTION, YES], "rejected": [SYSTEM, QUESTION, NO]}
    pairs = load([GOOD_ROW, row], tokenizer=without_system)
    assert len(pairs) == 2 and pairs.counts.first_rows == {"not_rendered": [2]}
    found = tokenization.tokenize_groups([[row["chosen"]], [row["chosen"][1:]]], without_system, 100)
    assert [group.is_whole for group in found] == [False, True]


def test_a_template_that_is_broken_is_not_blamed_on_the_rows(load, base):
    broken = models.load_tokenizer(base)
    broken.chat_template = "{% for message in messages %}{{ message.content + 1 }}{% endfor %}"
    with pytest.raises(TypeError):
        load([GOOD_ROW], tokenizer=broken)


def test_noted_rows_are_counted_and_kept(load):
    merged = {"chosen": transcript("Yes.\n\nAssistant: Sure."), "rejected": transcript("No.")}
    differ = {"chosen": transcript("Yes."), "rejected": "\n\nHuman: B?\n\nAssistant: No."}
    pairs = load([GOOD_ROW, merged, differ, merged])
    assert len(pairs) == 4 and pairs.counts.skipped == 0
    assert pairs.counts.first_rows == {"merged": [2, 4], "prompts_differ": [3]}
    assert pairs.counts.lines() == [
        "  kept 2: turns of the same speaker in a row, merged into one (rows 2, 4)",
        "  kept 1: the two sides answer different prompts (row 3)",
    ]


def test_a_row_that_is_too_long_is_not_also_counted_as_kept(load):
    merged = {"chosen": transcript("Yes. " * 50 + "\n\nAssistant: Sure."), "rejected": transcript("No.")}
    pairs = load([GOOD_ROW, merged], max_length=60)
    assert pairs.counts.lines() == ["  skipped 1: too long (row 2)"]


def test_only_the_first_five_rows_of_a_reason_are_listed(load):
    pairs = load([GOOD_ROW, *[IDENTICAL_ROW] * 7])
    assert pairs.counts.lines() == ["  skipped 7: chosen and rejected are the same (rows 2, 3, 4, 5, 6, …)"]


def test_different_texts_with_equal_tokens_are_identical(load, base):
    from tokenizers import normalizers

    lower = models.load_tokenizer(base)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    pairs = load([GOOD_ROW, {"chosen": transcript("NO."), "rejected": transcript("no.")}], tokenizer=lower)
    assert pairs.rows.tolist() == [1] and pairs.counts.first_rows == {"identical": [2]}


@pytest.mark.parametrize("bad, total", [(1, 10), (2, 20), (3, 30), (7, 70)])
def test_exactly_a_tenth_may_be_skipped_and_one_row_more_may_not(load, bad, total):
    good = [{**GOOD_ROW, "id": number} for number in range(total - bad)]
    load([*good, *[IDENTICAL_ROW] * bad]).check_skipped()
    pairs = load([*good[1:], *[IDENTICAL_ROW] * (bad + 1)])
    assert pairs.counts.rows == total
    with pytest.raises(UserError, match=r"% of the rows would be skipped(.|\n)*are the same(.|\n)*--bad_rows skip"):
        pairs.check_skipped()


def test_pairs_that_are_too_long_count_as_skipped(load):
    longer = {"chosen": transcript("Yes. " * 50), "rejected": transcript("No.")}
    load([GOOD_ROW, longer]).check_skipped()
    pairs = load([GOOD_ROW, longer], max_length=60)
    with pytest.raises(UserError, match=r"^error: 50% of the rows(.|\n)*too long \(row 2\)") as caught:
        pairs.check_skipped()
    assert pairs.name in str(caught.value)


def test_one_row_above_a_tenth_of_a_thousand_is_refused():
    pairs = data.PairDataset.__new__(data.PairDataset)
    part = data.SourcePairs.__new__(data.SourcePairs)
    part.name, part.counts = "made up", data.Counts(1000, Counter(identical=101), {"identical": [1]})
    pairs.parts, part.unusable_share = [part], 100 / 1000
    pairs.check_skipped()
    part.unusable_share = 101 / 1000
    with pytest.raises(UserError, match="skipped 101: "):
        pairs.check_skipped()


def test_a_tenth_is_one_of_the_file_and_not_of_its_small_held_out_part(tmp_path, tokenizer):
    rows = [{"prompt": f"Is oven {n} hot?", "chosen": "Yes, it is.", "rejected": "No."} for n in range(60)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *[{"foo": 1}] * 5]))  # all on one side
    for pairs in data.load_pairs(str(path), tokenizer):
        pairs.check_skipped()
        assert pairs.parts[0].unusable_share == 5 / 65
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *[{"foo": 1}] * 7]))
    for pairs in data.load_pairs(str(path), tokenizer):
        with pytest.raises(UserError, match="10% of the rows would be skipped"):
            pairs.check_skipped()


# ---------------------------------------------------------------------------------------------------------------------
# Several sets, and data.py as a script
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_sets(tmp_path):
    """A file that is split by hash, with a kind and margins, and a folder with a test file."""
    rows = [
        {"prompt": f"Is oven {n} hot?", "chosen": "Yes, it is.", "rejected": "No.", "kind": "ovens", "margin": n / 10}
        for n in range(60)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.jsonl").write_text(f"{json.dumps(GOOD_ROW)}\n{json.dumps(IDENTICAL_ROW)}\n" * 20)
    (tmp_path / "b" / "test.jsonl").write_text(json.dumps(TEST_ROW) + "\n")
    return tmp_path / "a.jsonl", tmp_path / "b"


def test_several_sets_are_one_dataset_each_counted_by_name(two_sets, tokenizer):
    first, second = (data.load_pairs(str(path), tokenizer) for path in two_sets)
    both = data.load_pairs(",".join(map(str, two_sets)), tokenizer)
    for part in (0, 1):
        alone, together = (first[part], second[part]), both[part]
        assert len(together) == sum(map(len, alone))
        at = 0
        for number, pairs in enumerate(alone):
            for index in range(len(pairs)):
                assert together.tokens(at).tolist() == pairs.tokens(index).tolist()
                assert together.label_margins[at] == pairs.label_margins[index]
                assert together.kind_names[together.kinds[at]] == pairs.kind_names[pairs.kinds[index]]
                assert together.places(np.array([at])) == [(number, pairs.rows[index])]
                at += 1
    lines = both[0].lines("train", "pairs")
    assert [line for line in lines if not line.startswith(" ")] == [
        f"train: kept {len(first[0])} of {len(first[0])} rows of {two_sets[0]}",
        f"train: kept 20 of 40 rows of {two_sets[1] / 'train.jsonl'}",
    ]
    with pytest.raises(UserError, match=r"50% of the rows") as caught:
        both[0].check_skipped()  # a tenth of each set, not of all together
    assert str(two_sets[1] / "train.jsonl") in str(caught.value) and str(two_sets[0]) not in str(caught.value)
    assert both[0].fingerprint not in (first[0].fingerprint, second[0].fingerprint)


def test_both_parts_of_a_file_are_tokenized_once(two_sets, tokenizer, empty_cache, tokenized):
    train, test = data.load_pairs(str(two_sets[0]), tokenizer)
    assert tokenized == ["a.jsonl"]
    assert len(train) + len(test) == 60 and len(test) and not set(train.rows) & set(test.rows)


def test_looking_at_data_shows_what_would_be_read(two_sets, base, capsys):
    data.main(["--dataset", str(two_sets[0]), "--dataset", str(two_sets[1]), "--model", base, "--show", "2"])
    out = capsys.readouterr().out
    assert f"rows of {two_sets[0]}" in out and f"train: kept 20 of 40 rows of {two_sets[1] / 'train.jsonl'}" in out
    assert "repeated in train: 19 pairs" in out
    # the oven of b's test file is that of its train file
    assert "in both train and test: 0 pairs, skipped in test; of the others 1 prompt of" in out
    assert "the chosen reply is the longer one in 100%" in out and "shared prompt" in out
    assert out.count("as the model sees it") == 2 and "Yes, it is.<|im_end|>" in out
    assert "train: 50% of the rows would be skipped: train_rm.py stops, unless --bad_rows skip is given" in out
    assert "\x1b" not in out, "no colours where nothing shows them"


def test_looking_at_data_of_which_nothing_can_be_used_is_an_error(tmp_path, base, capsys):
    (tmp_path / "empty.jsonl").write_text(json.dumps(IDENTICAL_ROW) + "\n")
    with pytest.raises(UserError, match=r"no training data is left(.|\n)*1 row"):
        data.main(["--dataset", str(tmp_path / "empty.jsonl"), "--model", base])
    assert "skipped 1" in capsys.readouterr().out
    (tmp_path / "tiny.jsonl").write_text(json.dumps(GOOD_ROW) + "\n")
    data.main(["--dataset", str(tmp_path / "tiny.jsonl"), "--model", base])
    assert "nothing is held out" in capsys.readouterr().out


def test_rows_of_several_files_are_named_by_file_and_shapes_counted(tmp_path, tokenizer):
    """From the cache too, where no file is read."""
    other = {"prompt": "Hello", "response_0": "no", "response_1": "a long reply", "better_response_id": 1}
    for shard, rows in enumerate([[GOOD_ROW, other, IDENTICAL_ROW], [IDENTICAL_ROW, GOOD_ROW, other, other]]):
        path = tmp_path / f"train-0000{shard}-of-00002.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(GOOD_ROW) + "\n")
    for _ in range(2):
        train, test = data.load_pairs(str(tmp_path), tokenizer)
        lines = "\n".join(train.lines("train", "pairs"))
        assert "(rows train-00000-of-00002.jsonl:3, train-00001-of-00002.jsonl:1)" in lines
        assert "3 rows read as PKU-SafeRLHF" in lines
        assert "read as" not in "\n".join(test.lines("test", "pairs"))


def test_contradictory_pairs_are_counted(tmp_path, base, capsys):
    rows = [GOOD_ROW, {"chosen": GOOD_ROW["rejected"], "rejected": GOOD_ROW["chosen"]}, TEST_ROW]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(TEST_ROW) + "\n")
    data.main(["--dataset", str(tmp_path), "--model", base])
    out = capsys.readouterr().out
    assert "contradictory in train: 1 pair also the other way round" in out
    assert "in both train and test: 1 pair, skipped in test; of the others 0 prompts of 0" in out


def test_each_speakers_turns_have_a_colour_and_nothing_else_reaches_the_terminal():
    dialogue = [{"role": "user", "content": "Hot?\x1b[2J"}, {"role": "assistant", "content": "Yes."}]
    text = inspection.colored("<u>Hot?\x1b[2J</u><a>Yes.</a>", dialogue, in_color=True)
    assert (
        text == "\x1b[2m<u>\x1b[0m\x1b[36mHot?\\x1b[2J\x1b[0m\x1b[2m</u><a>\x1b[0m\x1b[32mYes.\x1b[0m\x1b[2m</a>\x1b[0m"
    )
    assert inspection.colored("x" * 5000, [], in_color=False).endswith("x\n… 1,000 characters more")


def test_wrong_columns_are_named_before_anything_is_read(capsys):
    with pytest.raises(UserError, match=r"--columns: 'chosn' is not one of"):
        data.main(["--columns", "chosn=x"])
