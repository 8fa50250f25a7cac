"""data_pipeline/dialogues.py: replies to learn from and prompts, from every form that has them."""

import json

import numpy as np
import pytest

import models
from data_pipeline import dialogues
from data_pipeline.sources import DataSpec
from modeling import tokenizers
from tests.data_pipeline.rows import GOOD_ROW, NO, QUESTION, YES
from utils import UserError

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def load(write_rows, tokenizer, base):
    def load_rows(rows, both=False, max_length=512, prompts=False, tokenizer=tokenizer):
        write_rows([GOOD_ROW], "test.jsonl")
        spec = DataSpec(str(write_rows(rows).parent))
        if prompts:
            return dialogues.load_prompts(spec, tokenizer, max_length)[0]
        ends = tokenizers.end_ids(base, tokenizer)
        return dialogues.load_dialogues(spec, tokenizer, max_length, ends, both)[0]

    return load_rows


FORMS = {
    "transcripts": GOOD_ROW,
    "messages with a preference": {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
    "messages": {"messages": [QUESTION, YES]},
    "conversations": {"conversations": [{"from": "human", "value": QUESTION["content"]},
                                        {"from": "gpt", "value": YES["content"]}]},
    "prompt and completion": {"prompt": QUESTION["content"], "completion": YES["content"]},
    "prompt and completion as messages": {"prompt": [QUESTION], "completion": [YES]},
    "instruction and output": {"instruction": QUESTION["content"], "input": "", "output": YES["content"]},
    "question and answer": {"question": QUESTION["content"], "answer": YES["content"]},
}  # fmt: skip


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_has_the_chat_templates_tokens_up_to_the_end_of_the_reply(form, load, tokenizer):
    dataset = load([FORMS[form]])
    prompt = tokenizer.apply_chat_template(
        [QUESTION], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    reply = [*tokenizer.encode(YES["content"], add_special_tokens=False), tokenizer.eos_token_id]
    assert dataset.lengths.tolist() == [[len(prompt), len(reply)]]
    assert dataset.tokens(0).tolist() == [*prompt, *reply]
    assert load([FORMS[form]], prompts=True).tokens(0).tolist() == prompt


def test_of_preferences_one_reply_or_all(load, tokenizer):
    ranked = {
        "prompt": "Hello",
        "answers": [{"answer": text, "rank": rank} for rank, text in enumerate("abc", start=1)],
    }
    for both, wanted in ((False, ["Yes, it is.", "a"]), (True, ["Yes, it is.", "No.", "a", "b", "c"])):
        dataset = load([GOOD_ROW, ranked], both=both)
        replies = [dataset.tokens(at)[dataset.lengths[at, 0] :] for at in range(len(dataset))]
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in replies] == wanted
    lines = dataset.lines("train", "replies")
    assert "train: kept 2 of 2 rows" in lines[0] and lines[1] == "  as 5 replies"
    assert any("1 row read as Nectar" in line for line in lines)


def test_system_turns_tools_and_earlier_turns_stay(load, tokenizer):
    before = [SYSTEM, QUESTION, YES, {"role": "user", "content": "And now?"}]
    dataset = load([{"messages": [*before, NO]}, {"system": "Be brief.", "prompt": before[1:], "response": "No."}])
    assert dataset.prompts == [before, before]
    assert "Be brief." in tokenizer.decode(dataset.tokens(1)) and len(set(dataset.digests.tolist())) == 1


def test_every_row_is_kept_or_counted_and_each_prompt_once(load):
    rows = [
        GOOD_ROW, GOOD_ROW, {"prompt": "Is it?"}, {"messages": [QUESTION, {**YES, "content": "yes " * 600}]},
        {"prompt": None}, {"messages": [{"role": "narrator", "content": "x"}]}, {"prompt": ""},
        {"prompt": "half \ud83d"}, {"chosen": [YES], "rejected": [NO]},
    ]  # fmt: skip
    prompts = load(rows, prompts=True)
    assert [message[-1]["content"] for message in prompts.prompts] == [QUESTION["content"], "Is it?"]
    (part,) = prompts.parts
    assert part.counts.rows == 9 and part.counts.skipped == 7
    assert part.counts.count["repeated"] == 2 and part.counts.count["no_dialogue"] == 2
    replies = load(rows, max_length=100)
    (part,) = replies.parts
    assert replies.rows.tolist() == [1, 2] and part.counts.count["too_long"] == 1
    assert part.counts.count["wrong_last_speaker"] == 1 and part.counts.skipped == 7
    with pytest.raises(UserError, match="of the rows would be skipped"):
        replies.check_skipped()


def test_what_has_no_prompt_is_refused_with_its_columns(load):
    with pytest.raises(UserError, match="no prompt or messages; it has 'good', 'bad'"):
        load([{"good": "Yes.", "bad": "No."}])


def test_a_template_that_changes_what_was_open_gets_the_replys_own_text(load, base):
    odd = models.load_tokenizer(base)
    odd.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>reply: {% endif %}"
    )
    dataset = load([GOOD_ROW], tokenizer=odd)
    text = odd.decode(dataset.tokens(0))
    assert text == "<|im_start|>user: Is the oven hot?<|im_end|><|im_start|>reply: Yes, it is.<|im_end|>"


def test_prompts_are_held_out_as_the_pairs_of_the_same_file_are(write_rows, tokenizer):
    import data

    rows = [{"prompt": f"Is oven {n} hot?", "chosen": "Yes, it is.", "rejected": "No."} for n in range(200)]
    spec = DataSpec(str(write_rows(rows)))
    pairs, prompts = data.load_pairs(spec, tokenizer), dialogues.load_prompts(spec, tokenizer, 512)
    for one, other in zip(pairs, prompts, strict=True):
        assert np.array_equal(one.rows, other.rows) and len(one)
    assert json.dumps(prompts[0].prompts[0]) != json.dumps(prompts[1].prompts[0])
