"""The demo: a tiny Qwen3 with random weights and two thousand made-up preference pairs, written to disk.

The files have the same forms as those of Qwen3-0.6B and HH-RLHF, so everything else works the same. Deterministic and
offline.

There are four kinds of pairs, each about something a reward model should notice. In each kind the better reply is the
longer one exactly half of the time, so length predicts nothing:

    on topic    a reply to the question, against one about something else
    polite      a friendly reply, against a rude one with the same facts
    complete    a complete reply, against one that ends in the middle of a sentence
    harmless    declining to help with a theft, against helping
"""

import contextlib
import functools
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import utils
from common import atomic_files

TRAIN_PAIRS, TEST_PAIRS, SEED = 1600, 400, 20240115
VOCABULARY = 1024
KINDS = ("on topic", "polite", "on topic", "complete", "harmless")  # on topic twice: it is the hardest
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = Path(__file__).with_name("demo_chat_template.jinja")  # Qwen3's: no thought but before the last reply
# lists of sentences; "topics" maps each topic to those that answer a question about it
TEXTS = utils.read_json(Path(__file__).with_name("demo_sentences.json"))


def write_demo(folder: Path) -> tuple[Path, Path]:
    """Write the model and the pairs below `folder` unless they are there; returns (model folder, pairs folder).

    Raises FileExistsError if `folder` holds anything else, which is never touched.
    """
    model_folder, pairs_folder = folder / "model", folder / "pairs"

    def is_there() -> bool:
        return model_folder.is_dir() and pairs_folder.is_dir()

    if not is_there():
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
        try:
            with atomic_files.atomic_folder(folder, f".tmp-{folder.name}-{os.getpid()}") as temporary:
                train, test = make_pairs()
                _write_pairs(temporary / "pairs", train, test)
                _write_model(temporary / "model", [pair[side] for pair in train for side in ("chosen", "rejected")])
        except FileExistsError:
            if not is_there():  # otherwise another process wrote it first
                raise
    return model_folder, pairs_folder


# -- Pairs -------------------------------------------------------------------------------------------------------------


def make_pairs() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Train and test pairs in HH-RLHF's form with a `kind` column; no dialogue is in both."""
    draw = random.Random(SEED)
    makers = {"on topic": _on_topic, "polite": _polite, "complete": _complete, "harmless": _harmless}
    pairs, seen = [], set()
    for number in range(TRAIN_PAIRS + TEST_PAIRS):
        kind = KINDS[number % len(KINDS)]
        chosen_is_longer = number // len(KINDS) % 2 == 0
        while True:
            prompt, better, worse = makers[kind](draw)
            has_wanted_length = len(better) != len(worse) and (len(better) > len(worse)) == chosen_is_longer
            if has_wanted_length and (prompt, better) not in seen:
                break
        seen.add((prompt, better))
        pairs.append({"chosen": f"{prompt} {better}", "rejected": f"{prompt} {worse}", "kind": kind})
    draw.shuffle(pairs)
    return pairs[TEST_PAIRS:], pairs[:TEST_PAIRS]


def _dialogue(draw: random.Random, question: str) -> str:
    """A transcript up to the open reply; half of them begin with small talk."""
    small_talk = ""
    if draw.random() < 0.5:
        small_talk = f"\n\nHuman: {draw.choice(TEXTS['openings'])}\n\nAssistant: {draw.choice(TEXTS['greetings'])}"
    return f"{small_talk}\n\nHuman: {question}\n\nAssistant:"


def _ask(draw: random.Random, topic: str) -> str:
    return _dialogue(draw, f"{draw.choice(TEXTS['questions']).format(topic)} {draw.choice(TEXTS['details'])}".strip())


def _facts(draw: random.Random, topic: str) -> list[str]:
    return draw.sample(TEXTS["topics"][topic], draw.randint(1, 3))


def _on_topic(draw: random.Random) -> tuple[str, str, str]:
    asked, other = draw.sample(list(TEXTS["topics"]), 2)
    return _ask(draw, asked), " ".join(_facts(draw, asked)), " ".join(_facts(draw, other))


def _polite(draw: random.Random) -> tuple[str, str, str]:
    topic = draw.choice(list(TEXTS["topics"]))

    def reply(tone: list[str]) -> str:
        sentences = _facts(draw, topic)
        sentences.insert(draw.choice([0, len(sentences)]), draw.choice(tone))
        return " ".join(sentences)

    return _ask(draw, topic), reply(TEXTS["polite"]), reply(TEXTS["rude"])


def _complete(draw: random.Random) -> tuple[str, str, str]:
    topic = draw.choice(list(TEXTS["topics"]))
    *whole, last = _facts(draw, topic)
    words = last.rstrip(".").split()
    cut = " ".join([*whole, *words[: draw.randint(2, len(words) - 1)]])
    return _ask(draw, topic), " ".join(_facts(draw, topic)), cut


def _harmless(draw: random.Random) -> tuple[str, str, str]:
    question = draw.choice(TEXTS["theft questions"])
    better = [draw.choice(TEXTS["declining"]), *draw.sample(TEXTS["alternatives"], draw.randint(0, 2))]
    worse = draw.sample(TEXTS["helping"], draw.randint(1, 3))
    return _dialogue(draw, question.format(draw.choice(TEXTS["thefts"]))), " ".join(better), " ".join(worse)


# -- The rules ---------------------------------------------------------------------------------------------------------


def is_demo(dataset: str) -> bool:
    """Whether a dataset is the demo's pairs."""
    files = [Path(dataset).expanduser() / f"{name}.jsonl" for name in ("train", "test")]
    if not all(file.is_file() for file in files):
        return False
    train, test = make_pairs()
    return all(
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == pairs
        for file, pairs in zip(files, (train, test), strict=True)
    )


def keeps_rules(prompt: list[dict[str, str]], reply: str) -> bool:
    """Whether a reply is one that the pairs' rules prefer: whole sentences, none twice, on topic, polite, harmless."""
    sentences = [part for part in re.split(r"(?<=[.?!])\s+", reply.strip()) if part]
    kinds = {_sentence_kinds().get(sentence) for sentence in sentences}
    if not sentences or None in kinds or len(set(sentences)) < len(sentences) or "rude" in kinds:
        return False
    question = prompt[-1]["content"]
    if any(theft in question for theft in TEXTS["thefts"]):
        return "declining" in kinds and kinds <= {"declining", "alternatives", "polite"}
    topics = {topic for topic in TEXTS["topics"] if topic in question}
    return bool(kinds & topics) and kinds <= topics | {"polite"}


@functools.cache
def _sentence_kinds() -> dict[str, str]:
    """What each sentence of the demo is about: a topic, or a kind of sentence."""
    kinds = {sentence: topic for topic, sentences in TEXTS["topics"].items() for sentence in sentences}
    names = ("polite", "rude", "declining", "alternatives", "helping")
    return kinds | {sentence: name for name in names for sentence in TEXTS[name]}


def _write_pairs(folder: Path, train: list[dict[str, str]], test: list[dict[str, str]]) -> None:
    folder.mkdir(parents=True)
    for name, pairs in (("train", train), ("test", test)):
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


# -- Model and tokenizer -----------------------------------------------------------------------------------------------


def _write_model(folder: Path, texts: list[str]) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    tokenizer = _train_tokenizer(texts)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE, like Qwen's, with a vocabulary small enough for the pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )  # fmt: skip
