"""tokenization.py: texts cut at their shared start keep their ids; chunks encoded ahead; shared prefixes."""

import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Prepend, Replace, Strip
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, UnicodeScripts

from common.prefetch import prefetched
from data_pipeline import parsing, sources, tokenization


def of_backend(backend):
    return SimpleNamespace(backend_tokenizer=backend)


def bytes_tokenizer(pre_tokenizer, *added, special=True):
    """Every byte a token, and some added tokens, each given as its letters or (letters, flags)."""
    vocabulary = {letter: number for number, letter in enumerate(sorted([*ByteLevel.alphabet(), "▁"]))}
    backend = tokenizers.Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizer
    for token in added:
        content, flags = (token, {}) if isinstance(token, str) else token
        made = tokenizers.AddedToken(content, **{"normalized": False, **flags})
        (backend.add_special_tokens if special else backend.add_tokens)([made])
    return backend


def encoded(texts, backend, tokens):
    """The ids of one group of texts."""
    (group,) = tokenization.encode_groups([list(texts)], backend, tokens)
    return [ids.tolist() for ids in group]


PARTS = ["a", "b", " ", "<", "|", ">", "<|a|>", "<|b|>", "é", "e\u0301", "\u0301", "\n", "x<|a|>", "<|a|>b", "ab", ""]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "pre_tokenizer",
    [None, ByteLevel(add_prefix_space=True), Sequence([Digits(), ByteLevel()]), Metaspace(prepend_scheme="always")],
    ids=str,
)
@pytest.mark.parametrize(
    "normalizer", [None, NFC(), Prepend("▁"), Strip(), Replace("a", "b"), Lowercase()], ids=lambda value: str(value)
)
def test_cutting_behind_an_added_token_changes_no_id(special, pre_tokenizer, normalizer):
    backend = bytes_tokenizer(pre_tokenizer, "<|a|>", "<|b|>", ("ab", {"normalized": True}), special=special)
    if normalizer is not None:
        backend.normalizer = normalizer
    tokens = tokenization.cut_tokens(of_backend(backend))
    assert tokens == ["<|a|>", "<|b|>"]
    draw = random.Random(0)
    for _ in range(50):
        start = "".join(draw.choices(PARTS, k=8))
        texts = [start + "".join(draw.choices(PARTS, k=draw.randrange(5))) for _ in range(draw.choice([1, 2, 2, 3]))]
        wanted = [backend.encode(text, add_special_tokens=False).ids for text in texts]
        assert encoded(texts, backend, tokens) == wanted, texts


@pytest.mark.parametrize(
    "backend, token, texts",
    [
        (bytes_tokenizer(ByteLevel(), "<|a|>", "<|a|>b"), "<|a|>", ("<|a|>b", "<|a|>bc")),
        (bytes_tokenizer(ByteLevel(), "<|a|>", "x<|a|>b"), "<|a|>", ("x<|a|>b", "x<|a|>bc")),
        (bytes_tokenizer(ByteLevel(), "<|a|>", "x<|"), "<|a|>", ("x<|a|>b", "x<|a|>c")),
        (bytes_tokenizer(ByteLevel(), "<|a|>", "|>b"), "<|a|>", None),
        (bytes_tokenizer(ByteLevel(), "aba"), "aba", ("ababax", "ababay")),
        (bytes_tokenizer(ByteLevel(False), ("<|a|>", {"rstrip": True})), "<|a|>", ("<|a|> b", "<|a|> c")),
        (bytes_tokenizer(ByteLevel(), ("<|a|>", {"single_word": True})), "<|a|>", ("x<|a|>b", "x<|a|>c")),
        (bytes_tokenizer(Metaspace(prepend_scheme="first"), "<|a|>"), "<|a|>", ("<|a|>b", "<|a|>c")),
        (bytes_tokenizer(UnicodeScripts(), "<|a|>"), "<|a|>", None),
    ],
    ids=[
        "starts_longer",
        "within_longer",
        "begins_within_another",
        "another_begins_within",
        "itself",
        "strips",
        "word",
        "first",
        "unknown",
    ],
)
def test_behind_a_token_that_its_surroundings_may_change_no_text_is_cut(backend, token, texts):
    assert token not in tokenization.cut_tokens(of_backend(backend))
    if texts is not None:  # and rightly so
        wanted = [backend.encode(text, add_special_tokens=False).ids for text in texts]
        assert encoded(texts, backend, [token]) != wanted
        assert encoded(texts, backend, []) == wanted


def test_special_tokens_that_are_read_as_plain_text_are_no_place_to_cut():
    backend = bytes_tokenizer(ByteLevel(), "<|a|>")
    backend.encode_special_tokens = True
    assert tokenization.cut_tokens(of_backend(backend)) == []


def test_qwen3s_shared_starts_are_encoded_once(real_tokenizer, real_data):
    pair = next(parsing.read_pairs(sources.find_sources(sources.DataSpec(str(real_data))).train[0])).pair
    texts = real_tokenizer.apply_chat_template([pair.chosen, pair.rejected], tokenize=False)
    given = []

    class Watched:
        def encode_batch_fast(self, stretches, add_special_tokens):
            given.extend(stretches)
            return real_tokenizer.backend_tokenizer.encode_batch_fast(stretches, add_special_tokens)

    tokenization.encode_groups([texts], Watched(), tokenization.cut_tokens(real_tokenizer))
    start, chosen, rejected = given
    assert [start + chosen, start + rejected] == texts and len(start) > len(texts[0]) / 2


def test_at_most_one_chunk_is_encoded_ahead():
    rendered, encoded = [], []

    def chunks():
        for number in range(6):
            rendered.append(number)
            yield tokenization.Chunk(1, texts=[[str(number)]])

    def encode(texts):
        encoded.append(int(texts[0][0]))
        return texts

    for number, (chunk, ids) in enumerate(prefetched(chunks(), lambda chunk: (chunk, encode(chunk.texts)))):
        assert chunk.texts == ids == [[str(number)]]
        assert max(encoded) <= number + 1 and len(rendered) <= number + 2
        time.sleep(0.01)  # time in which the thread would run ahead if it could
    assert encoded == rendered == list(range(6))


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ([1, 2, 3], [1, 2, 4, 5], 2),
        ([1, 2, 3], [1, 2, 3, 4], 2),  # one side is a prefix of the other
        ([1, 2, 3, 4], [1, 2, 3], 2),
        ([1], [1, 2, 3], 0),
        ([1, 2], [1], 0),
        ([1, 2, 3], [4, 2, 3], 0),  # the first token differs
        ([1], [2], 0),
        ([1, 2, 3], [1, 4, 3], 1),  # equal again after the difference
        ([1, 2, 3], [1, 2, 3], 2),
    ],
)
def test_shared_prefix_leaves_each_side_a_token(chosen, rejected, expected):
    assert tokenization.shared_prefix(np.array(chosen), np.array(rejected)) == expected


def test_shared_prefix_agrees_with_a_plain_loop_on_random_sequences():
    draw = np.random.default_rng(0)
    for _ in range(500):
        chosen, rejected = (draw.integers(0, 2, size=draw.integers(1, 9)) for _ in range(2))
        length = 0
        while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
            length += 1
        assert tokenization.shared_prefix(chosen, rejected) == length
