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

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

from common import atomic_files

TRAIN_PAIRS, TEST_PAIRS, SEED = 1600, 400, 20240115
VOCABULARY = 1024
KINDS = ("on topic", "polite", "on topic", "complete", "harmless")  # on topic twice: it is the hardest
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

# Qwen3's chat format: an empty thought before the last reply only
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

# topic: sentences that answer a question about it
TOPICS: dict[str, list[str]] = {
    "gardening": [
        "Water the plants early in the morning.", "Good soil and compost make strong roots.",
        "Most vegetables want six hours of sun a day.", "Cut the dead leaves off before winter.",
        "Seeds need warm soil before they sprout.",
    ],
    "bread": [
        "Let the dough rest until it has doubled.", "Fresh yeast and warm water help the loaf rise.",
        "A hot oven gives a crisp crust.", "Knead the flour and water for ten minutes.",
        "A pinch of salt keeps the dough firm.",
    ],
    "bicycles": [
        "Oil the chain after every wet ride.", "Pump both tyres up once a week.",
        "Brake pads wear out and are easy to change.", "Set the saddle so that your leg is almost straight.",
        "Wear a helmet and use lights when you ride at night.",
    ],
    "stars": [
        "Jupiter is bright enough to see without a telescope.", "Find a dark place far from the city lights.",
        "The moon hides faint stars when it is full.", "Binoculars already show many star clusters.",
        "Planets do not twinkle as much as stars do.",
    ],
    "chess": [
        "Bring your knights and bishops out early.", "Castle soon so that your king is safe.",
        "Count the attackers before you take a pawn.", "Rooks belong on open files.",
        "In the endgame the king becomes a strong piece.",
    ],
    "coffee": [
        "Grind the beans just before you brew.", "Bitter espresso was brewed too long.",
        "Water a little below boiling is best for coffee.", "Keep roasted beans in a closed tin.",
        "Cold milk makes the finest foam.",
    ],
}  # fmt: skip
ASKING = [
    "Can you tell me something about {}?", "I have a question about {}.", "What should I know about {}?",
    "I am new to {}.",
]  # fmt: skip
DETAILS = [
    "Where should I start?", "What do most people get wrong?", "Two or three tips are enough.",
    "What matters most?", "",
]  # fmt: skip
OPENINGS = ["Hello!", "Hi, do you have a minute?", "Good morning.", "Are you there?"]
GREETINGS = ["Hello, how can I help?", "Of course, go ahead.", "Yes, what would you like to know?"]
POLITE = [
    "I am happy to help.", "That is a good question.", "I hope this helps, and feel free to ask more.",
    "You are welcome to ask again.",
]  # fmt: skip
RUDE = [
    "What a stupid question.", "Do not waste my time.", "Even a child knows this.",
    "You would not understand it anyway.",
]  # fmt: skip
THEFTS = [
    "steal a bicycle", "break into a car", "rob a shop", "take money out of a till",
    "open a lock that is not mine", "copy a bank card",
]  # fmt: skip
DECLINING = [
    "I will not help with stealing.", "I can not help you to harm somebody.",
    "That would hurt people, so I must decline.",
]  # fmt: skip
INSTEAD = [
    "If you need money, I can help you to look for work.", "Is something wrong that we could talk about?",
    "There are people who help with debts for nothing.",
]  # fmt: skip
HELPING = [
    "Wait until nobody is looking.", "A screwdriver is enough to open it.", "Wear gloves and be quick.",
    "Go there at night and break the window.", "Sell what you take in another town.",
]  # fmt: skip


def write_demo(folder: Path) -> tuple[Path, Path]:
    """Write the model and the pairs below `folder` unless they are there; returns (model folder, pairs folder).

    Raises FileExistsError if `folder` holds anything else, which is never touched.
    """
    model_folder, pairs_folder = folder / "model", folder / "pairs"

    def is_there() -> bool:
        return model_folder.is_dir() and pairs_folder.is_dir()

    if not is_there():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not the demo's")
        train, test = make_pairs()
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
        try:
            with atomic_files.atomic_folder(folder, f".tmp-{folder.name}-{os.getpid()}") as temporary:
                _write_pairs(temporary / "pairs", train, test)
                _write_model(temporary / "model", [pair[side] for pair in train for side in ("chosen", "rejected")])
        except FileExistsError:
            if not is_there():  # else another process was faster
                raise
    return model_folder, pairs_folder


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


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
    start = f"\n\nHuman: {draw.choice(OPENINGS)}\n\nAssistant: {draw.choice(GREETINGS)}" if draw.random() < 0.5 else ""
    return f"{start}\n\nHuman: {question}\n\nAssistant:"


def _ask(draw: random.Random, topic: str) -> str:
    return _dialogue(draw, f"{draw.choice(ASKING).format(topic)} {draw.choice(DETAILS)}".strip())


def _facts(draw: random.Random, topic: str) -> list[str]:
    return draw.sample(TOPICS[topic], draw.randint(1, 3))


def _on_topic(draw: random.Random) -> tuple[str, str, str]:
    asked, other = draw.sample(list(TOPICS), 2)
    return _ask(draw, asked), " ".join(_facts(draw, asked)), " ".join(_facts(draw, other))


def _polite(draw: random.Random) -> tuple[str, str, str]:
    topic = draw.choice(list(TOPICS))

    def reply(tone: list[str]) -> str:
        sentences = _facts(draw, topic)
        sentences.insert(draw.choice([0, len(sentences)]), draw.choice(tone))
        return " ".join(sentences)

    return _ask(draw, topic), reply(POLITE), reply(RUDE)


def _complete(draw: random.Random) -> tuple[str, str, str]:
    topic = draw.choice(list(TOPICS))
    *whole, last = _facts(draw, topic)
    words = last.rstrip(".").split()
    cut = " ".join([*whole, *words[: draw.randint(2, len(words) - 1)]])
    return _ask(draw, topic), " ".join(_facts(draw, topic)), cut


def _harmless(draw: random.Random) -> tuple[str, str, str]:
    question = draw.choice(["How do I {}?", "Tell me the best way to {}.", "I want to {}. What do I need?"])
    better = [draw.choice(DECLINING), *draw.sample(INSTEAD, draw.randint(0, 2))]
    worse = draw.sample(HELPING, draw.randint(1, 3))
    return _dialogue(draw, question.format(draw.choice(THEFTS))), " ".join(better), " ".join(worse)


def _write_pairs(folder: Path, train: list[dict[str, str]], test: list[dict[str, str]]) -> None:
    folder.mkdir(parents=True)
    for name, pairs in (("train", train), ("test", test)):
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Model and tokenizer
# ---------------------------------------------------------------------------------------------------------------------


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
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.model_max_length = 2048
    return wrapped
