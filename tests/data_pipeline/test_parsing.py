"""parsing.py: what the rows of a file become, and what is said about rows of a wrong form."""

import pytest

from data_pipeline import parsing, reading
from data_pipeline.parsing import Pair
from tests.data_pipeline.rows import GOOD_ROW, NO, PROMPT, QUESTION, YES, parse, read_all, write_as
from utils import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_transcript_becomes_alternating_messages():
    text = "\n\nHuman: Hello!\n\nAssistant: Yes?\n\nHuman: Is the oven hot?\n\nAssistant: Yes, it is."
    assert parsing.parse_transcript(text) == [
        {"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Yes?"}, QUESTION, YES,
    ]  # fmt: skip


@pytest.mark.parametrize("start", ["", "\n", "\n\n", " \n\n\n"])
def test_a_transcript_may_start_with_any_white_space(start):
    assert parsing.parse_transcript(start + PROMPT.strip() + " No.") == [QUESTION, NO]


@pytest.mark.parametrize(
    "sentence",
    [
        "He said Human: and then Assistant: twice",
        "A list:\nHuman: first\nAssistant: second",
        "Two paragraphs.\n\nHumans: all of us",
        "Two paragraphs.\n\nhuman: in small letters",
        "Two paragraphs.\n\nThe Assistant: a novel",
        "An address follows.\n\nHuman:resources@example.org",
    ],
)
def test_speaker_names_inside_a_text_stay_text(sentence):
    turns = parsing.parse_transcript(f"\n\nHuman: {sentence}\n\nAssistant: {sentence}")
    assert turns == [{"role": "user", "content": sentence}, {"role": "assistant", "content": sentence}]


def test_paragraphs_stay_in_their_turn():
    turns = parsing.parse_transcript("\n\nHuman: One.\n\nTwo.\n\n\nThree.\n\nAssistant: Four.\n\nFive.\n")
    assert [turn["content"] for turn in turns] == ["One.\n\nTwo.\n\n\nThree.", "Four.\n\nFive."]


def test_transcripts_become_a_pair():
    assert parse(**GOOD_ROW) == Pair([QUESTION, YES], [QUESTION, NO])


def test_message_lists_become_a_pair_and_other_keys_of_messages_are_kept():
    system = {"role": "system", "content": "Be short."}
    chosen = [system, QUESTION, {**YES, "name": "bot", "weight": 1}]
    assert parse(chosen=chosen, rejected=[system, QUESTION, {**NO, "name": None}]) == Pair(
        chosen, [system, QUESTION, NO]
    )


@pytest.mark.parametrize("prompt", ["Is the oven hot?", " Is the oven hot?\n", PROMPT, PROMPT + " ", PROMPT[:-12]])
def test_a_prompt_text_goes_in_front_of_reply_texts(prompt):
    assert parse(prompt=prompt, chosen="Yes, it is.", rejected=" No.\n") == Pair([QUESTION, YES], [QUESTION, NO])


def test_reply_texts_may_name_their_speaker():
    pair = parse(prompt=PROMPT, chosen="\n\nAssistant: Yes, it is.", rejected="Assistant: No.")
    assert pair == Pair([QUESTION, YES], [QUESTION, NO])


def test_a_reply_text_that_mentions_speakers_stays_whole():
    reply = "A play.\n\nHuman: I am here.\n\nAssistant: So am I."
    assert parse(prompt="Write.", chosen=reply, rejected="No.").chosen[-1]["content"] == reply


def test_a_prompt_of_several_turns_goes_in_front_of_reply_texts():
    prompt = "\n\nHuman: Hello!\n\nAssistant: Yes?" + PROMPT
    assert [turn["content"] for turn in parse(prompt=prompt, chosen="Yes, it is.", rejected="No.").chosen] == [
        "Hello!", "Yes?", "Is the oven hot?", "Yes, it is.",
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", [[QUESTION], "Is the oven hot?", PROMPT])
def test_a_prompt_goes_in_front_of_reply_messages(prompt):
    assert parse(prompt=prompt, chosen=[YES], rejected=[NO]) == Pair([QUESTION, YES], [QUESTION, NO])


def test_prompt_messages_go_in_front_of_reply_texts():
    assert parse(prompt=[QUESTION], chosen="Yes, it is.", rejected="No.") == Pair([QUESTION, YES], [QUESTION, NO])


def test_whole_message_lists_beside_a_prompt_text_are_not_prompted_twice():  # UltraFeedback's form
    pair = parse(prompt="Is the oven hot?", chosen=[QUESTION, YES], rejected=[QUESTION, NO])
    assert pair == Pair([QUESTION, YES], [QUESTION, NO])


def test_a_prompt_repeated_in_the_reply_transcripts_is_not_prompted_twice():
    assert parse(prompt=PROMPT, **GOOD_ROW) == Pair([QUESTION, YES], [QUESTION, NO])


def test_the_margin_and_kind_columns_are_read():
    assert parse(**GOOD_ROW, margin=2, kind="polite") == Pair([QUESTION, YES], [QUESTION, NO], 2.0, "polite")
    assert parse(**GOOD_ROW, margin=None, kind=None) == Pair([QUESTION, YES], [QUESTION, NO], 0.0, "")
    assert parse(**GOOD_ROW, margin=-0.5).label_margin == -0.5


SKIPPED_ROWS = [
    ("no_dialogue", {"chosen": "just a text", "rejected": f"{PROMPT} No."}),
    ("no_dialogue", {"chosen": f"{PROMPT} Yes.", "rejected": f"A heading.{PROMPT} No."}),
    ("no_dialogue", {"chosen": "", "rejected": f"{PROMPT} No."}),
    ("no_reply", {"chosen": PROMPT, "rejected": f"{PROMPT} No."}),
    ("no_reply", {"chosen": f"{PROMPT} Yes.", "rejected": f"{PROMPT} \n "}),
    ("no_reply", {"prompt": "Is it?", "chosen": "", "rejected": "No."}),
    ("no_reply", {"chosen": [QUESTION, YES], "rejected": [QUESTION, {"role": "assistant", "content": " "}]}),
    ("wrong_last_speaker", {"chosen": f"{PROMPT} Yes.\n\nHuman: Thanks.", "rejected": f"{PROMPT} No."}),
    ("wrong_last_speaker", {"chosen": [QUESTION, YES], "rejected": [QUESTION]}),
    ("identical", {"chosen": f"{PROMPT} Yes.", "rejected": f"{PROMPT} Yes."}),
    ("identical", {"chosen": f"{PROMPT} Yes.", "rejected": f"{PROMPT}  Yes.\n"}),
    ("identical", {"prompt": "Is it?", "chosen": "Yes.", "rejected": "Yes."}),
]


@pytest.mark.parametrize("key, row", SKIPPED_ROWS)
def test_a_row_without_a_preference_is_skipped_under_its_reason(key, row):
    assert key in parsing.SKIP_REASONS
    assert parse(**row) == key


def test_skipped_rows_keep_their_row_numbers(write_rows):
    path = write_rows([GOOD_ROW, *(row for _, row in SKIPPED_ROWS), GOOD_ROW])
    read = read_all(path)
    assert [number for number, _ in read] == list(range(1, len(SKIPPED_ROWS) + 3))
    assert [pair for _, pair in read[1:-1]] == [key for key, _ in SKIPPED_ROWS]
    assert read[-1] == (len(read), Pair([QUESTION, YES], [QUESTION, NO]))


def test_turns_of_one_speaker_in_a_row_are_merged_and_noted():
    pair = parse(
        chosen="\n\nHuman: Hello!\n\nHuman: Is it?\n\nAssistant: Yes.\n\nAssistant: It is.",
        rejected="\n\nHuman: Hello!\n\nHuman: Is it?\n\nAssistant: No.",
    )
    prompt = {"role": "user", "content": "Hello!\n\nIs it?"}
    assert pair.chosen == [prompt, {"role": "assistant", "content": "Yes.\n\nIt is."}]
    assert pair.rejected == [prompt, {"role": "assistant", "content": "No."}]
    assert pair.warnings == ("merged",)


def test_merging_adds_no_empty_line_for_an_empty_turn():
    pair = parse(
        chosen="\n\nHuman: Is it?\n\nHuman:\n\nAssistant: Yes.", rejected="\n\nHuman: Is it?\n\nAssistant: No."
    )
    assert pair.chosen[0] == pair.rejected[0] == {"role": "user", "content": "Is it?"}
    assert pair.warnings == ("merged",)


def test_sides_with_different_prompts_are_kept_and_noted():
    pair = parse(chosen="\n\nHuman: A?\n\nAssistant: Yes.", rejected="\n\nHuman: B?\n\nAssistant: No.")
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("A?", "B?")
    assert pair.warnings == ("prompts_differ",)


def test_noted_rows_come_with_their_row_numbers(write_rows):
    merged = {"chosen": f"{PROMPT} Yes.\n\nAssistant: Sure.", "rejected": f"{PROMPT} No."}
    differ = {"chosen": f"{PROMPT} Yes.", "rejected": "\n\nHuman: B?\n\nAssistant: No."}
    both = {"chosen": merged["chosen"], "rejected": differ["rejected"]}
    read = read_all(write_rows([GOOD_ROW, merged, GOOD_ROW, differ, both]))
    assert {number: pair.warnings for number, pair in read} == {
        1: (), 2: ("merged",), 3: (), 4: ("prompts_differ",), 5: ("merged", "prompts_differ"),
    }  # fmt: skip
    assert {warning for _, pair in read for warning in pair.warnings} == {"merged", "prompts_differ"}


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a wrong form: file, line, reason
# ---------------------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "missing column": ({"chosen": GOOD_ROW["chosen"]}, "no column 'rejected'; it has 'chosen'"),
    "mistyped column": ({**GOOD_ROW, "chosen": None, "chosed": "x"}, "did you mean 'chosed'?"),
    "no column at all": ({}, "no column 'chosen'; it has none"),
    "number as chosen": ({**GOOD_ROW, "chosen": 3}, "'chosen' is a number, not text"),
    "object as rejected": ({**GOOD_ROW, "rejected": {"text": "No."}}, "'rejected' holds"),
    "number as prompt": ({**GOOD_ROW, "prompt": 7}, "'prompt' is a number, not text"),
    "empty message list": ({**GOOD_ROW, "chosen": []}, "'chosen' is an empty list"),
    "number in a prompt list": ({**GOOD_ROW, "prompt": [7]}, "'prompt' holds '7', not a message"),
    "message without role": ({**GOOD_ROW, "chosen": [{"content": "Yes."}]}, "not a message with role and content"),
    "message without content": ({**GOOD_ROW, "chosen": [{"role": "user"}]}, "not a message with role and content"),
    "text as message": ({**GOOD_ROW, "rejected": ["No."]}, "'rejected' holds 'No.', not a message"),
    "unknown role": ({**GOOD_ROW, "chosen": [{"role": "cat", "content": "Yes."}]}, "'chosen' has the role 'cat'"),
    "list as role": ({**GOOD_ROW, "chosen": [{"role": ["user"], "content": "Yes."}]}, "has the role ['user']"),
    "image as content": ({**GOOD_ROW, "chosen": [{**YES, "content": [{"type": "image"}]}]}, "of the type 'image'"),
    "null as content": ({**GOOD_ROW, "rejected": [{**NO, "content": None}]}, "content that is null, not text"),
    "text as margin": ({**GOOD_ROW, "margin": "large"}, "'margin' is 'large', not a finite number"),
    "true as margin": ({**GOOD_ROW, "margin": True}, "'margin' is True, not a finite number"),
    "NaN as margin": ({**GOOD_ROW, "margin": float("nan")}, "'margin' is nan, not a finite number"),
    "infinite margin": ({**GOOD_ROW, "margin": float("inf")}, "'margin' is inf, not a finite number"),
    "a list": ([GOOD_ROW["chosen"], GOOD_ROW["rejected"]], "it is a list, not an object"),
    "a text": ("Yes.", "it is text, not an object"),
    "null": (None, "it is null, not an object"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
@pytest.mark.parametrize("name", list(BAD_ROWS))
def test_a_bad_row_costs_itself_and_says_why(tmp_path, suffix, name):
    row, words = BAD_ROWS[name]
    path = write_as(tmp_path / f"train{suffix}", [GOOD_ROW, row, GOOD_ROW])
    (first, _), (number, reason), (last, _) = read_all(path)
    assert (first, number, last) == (1, 2, 3)
    key, _, detail = reason.partition(": ")
    assert key in parsing.SKIP_REASONS and words in detail
    assert parsing.reason_in_words(reason) == f"{parsing.SKIP_REASONS[key]}: {detail}"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_data_whose_first_rows_have_unknown_columns_is_refused_with_place_columns_and_flag(tmp_path, suffix):
    path = write_as(tmp_path / f"train{suffix}", [{"good": "Yes.", "bad": "No."}] * 3)
    with pytest.raises(UserError, match=r"it has 'good', 'bad'(.|\n)*--columns prompt=NAME") as caught:
        read_all(path)
    assert (f"{path}, row 1" if suffix == ".json" else f"{path}:1") in str(caught.value)


def test_rows_of_unknown_columns_before_a_known_one_are_counted_and_keep_their_places(write_rows):
    read = read_all(write_rows([{"note": "a heading"}, {"note": "another"}, GOOD_ROW, {"note": "an end"}]))
    assert [number for number, _ in read] == [1, 2, 3, 4]
    assert [reason.partition(":")[0] for at, reason in read if at != 3] == ["no_columns"] * 3
    with pytest.raises(UserError, match="no column 'chosen'"):
        read_all(write_rows([{"note": "a heading"}] * parsing.UNKNOWN_ROWS + [GOOD_ROW]))


BAD_PARQUET_ROWS = {
    "empty message list": ({"chosen": []}, "'chosen' is an empty list"),
    "unknown role": ({"chosen": [{"role": "cat", "content": "Yes."}]}, "'chosen' has the role 'cat'"),
    "message without role": ({"chosen": [{"content": "Yes."}]}, "role"),
    "NaN as margin": ({"chosen": [QUESTION, YES], "margin": float("nan")}, "'margin' is nan"),
}


@pytest.mark.parametrize("name", list(BAD_PARQUET_ROWS))
def test_a_bad_row_of_a_parquet_file_costs_itself_and_says_why(tmp_path, name):
    bad, words = BAD_PARQUET_ROWS[name]
    good = {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO], "margin": 1.0}
    path = write_as(tmp_path / "train.parquet", [good, {**good, **bad}, good])
    _, (number, reason), _ = read_all(path)
    assert number == 2 and words in reason


@pytest.mark.parametrize("suffix", reading.SUFFIXES)
def test_a_column_without_a_value_is_not_said_to_be_missing(tmp_path, suffix):
    _, (number, reason) = read_all(write_as(tmp_path / f"train{suffix}", [GOOD_ROW, {**GOOD_ROW, "chosen": None}]))
    assert (number, reason) == (2, "null: 'chosen' is null")


def test_a_margin_that_is_text_is_read_as_a_number_and_counted():
    pair = parse(**GOOD_ROW, margin="1.5")
    assert pair.label_margin == 1.5 and pair.warnings == ("margin_is_text",)
