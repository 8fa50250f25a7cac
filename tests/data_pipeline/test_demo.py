"""demo.py: the pairs are worth learning, undecidable by length, and the same everywhere."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline import demo, sampler
from data_pipeline.parsing import Pair, parse_transcript


@pytest.fixture(scope="module")
def pairs():
    train, test = demo.make_pairs()
    return train + test


def replies(pair):
    return tuple(parse_transcript(pair[side])[-1]["content"] for side in ("chosen", "rejected"))


def test_the_pairs_are_the_same_everywhere_and_in_every_version():
    content = json.dumps(demo.make_pairs()).encode()
    assert hashlib.sha256(content).hexdigest() == "09c65a7ef3ecd1510b3ab00e7d84ab70c604e7947ce7f27123fc6932a347ddd0"


def test_there_are_two_thousand_pairs_of_four_kinds(pairs):
    assert len(pairs) == 2000
    assert set(Counter(pair["kind"] for pair in pairs)) == {"on topic", "polite", "complete", "harmless"}
    assert min(Counter(pair["kind"] for pair in pairs).values()) >= 400


@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_longer_wins_half_of_the_time(pairs, length):
    for kind in [None, *demo.KINDS]:
        lengths = [[length(reply) for reply in replies(pair)] for pair in pairs if kind in (None, pair["kind"])]
        wins = sum(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0 for chosen, rejected in lengths)
        # each kind by itself too, with room for chance where only words are counted
        assert wins / len(lengths) == pytest.approx(0.5, abs=0.03 if kind is None else 0.06), kind


def test_longer_wins_half_of_the_time_in_tokens(pairs, tokenizer):
    lengths = [[len(tokenizer(reply)["input_ids"]) for reply in replies(pair)] for pair in pairs]
    wins = sum(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0 for chosen, rejected in lengths)
    assert wins / len(lengths) == pytest.approx(0.5, abs=0.03)


def test_train_and_test_share_no_dialogue():
    train, test = demo.make_pairs()
    assert (len(train), len(test)) == (demo.TRAIN_PAIRS, demo.TEST_PAIRS)
    assert not {pair["chosen"] for pair in train} & {pair["chosen"] for pair in test}


def test_every_pair_is_a_preference_in_hh_form(pairs):
    from data_pipeline.parsing import parse_pair

    for pair in pairs:
        parsed = parse_pair(pair, ValueError)
        assert isinstance(parsed, Pair) and parsed.warnings == () and parsed.kind == pair["kind"]


def test_writing_twice_gives_the_same_bytes_and_keeps_what_is_there(demo_folder, tmp_path):
    model, pairs = demo.write_demo(tmp_path / "again")
    for folder, other in ((model, demo_folder[0]), (pairs, demo_folder[1])):
        for path in folder.iterdir():
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    before = (model / "config.json").stat().st_mtime_ns
    assert demo.write_demo(tmp_path / "again") == (model, pairs)
    assert (model / "config.json").stat().st_mtime_ns == before


def test_a_folder_that_holds_something_else_is_never_touched(run_script, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("years of work")
    result = run_script("train_rm.py", "--demo")
    assert result.returncode == 2 and "nothing in it was touched" in result.stderr
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "demo" / "thesis.tex").read_text() == "years of work"


def test_the_tokenizer_speaks_qwens_format(tokenizer):
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * 2
    assert tokenizer.apply_chat_template(dialogue, tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHello<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(dialogue[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_is_qwen3s_own(tokenizer, real_tokenizer_folder):
    import models

    real = models.load_tokenizer(real_tokenizer_folder)
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * 2
    for messages, options in ((dialogue, {}), (dialogue[:3], {"add_generation_prompt": True}),
                              (dialogue[:3], {"add_generation_prompt": True, "enable_thinking": False})):  # fmt: skip
        wanted = real.apply_chat_template(messages, tokenize=False, **options)
        assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == wanted


def test_the_demo_learns_every_kind(run_script, tmp_path):
    """In 225 of its 350 steps, which is sooner than it has to."""
    result = run_script("train_rm.py", "--demo", "--run_name", "demo", "--max_steps", 225, timeout=600)
    assert result.returncode == 0, result.stderr
    end = result.stdout.split("done:")[1]
    accuracy = float(end.split("held-out accuracy ")[1].split("%")[0])
    assert accuracy >= 95
    for kind in ("on topic", "polite", "complete", "harmless"):
        share = float(end.split(f"\n  {kind}")[1].split("%")[0])
        assert share >= 85, kind
    config = json.loads(Path(tmp_path / "checkpoints/rm/demo/step-225/train_config.json").read_text())
    assert config["epochs"] == 7
    pairs_per_step = config["batch_size"] * config["grad_accum"]
    assert sampler.StepSampler(demo.TRAIN_PAIRS, pairs_per_step, config["epochs"], seed=0).total_steps == 350
