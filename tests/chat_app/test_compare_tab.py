"""compare_tab.py: rewards by word and their colours, who wrote which reply, blind votes and agreement."""

import json
import re
from types import SimpleNamespace

import gradio as gr
import pytest

import utils
from chat_app import compare_tab
from chat_app.compare_tab import END, CompareTab, coloured, known_sides, reward_by_word, sides
from chat_app.engine import ChatEngine, Reply


def test_a_words_change_is_the_sum_of_its_tokens_changes():
    tokens = [
        ["Kn", 0.0],
        ["ead", 1.0],
        [" the", 1.5],
        [" do", 1.0],
        ["ugh", 3.0],
        [".", 2.5],
        ["<|im_end|>", 4.0],
        ["\n", 5.0],
    ]
    assert reward_by_word(tokens, "Knead the dough.") == [("Knead", 1.0), (" the", 1.5), (" dough.", 2.5), (END, 5.0)]


@pytest.mark.parametrize(
    "pieces, reply, wanted",
    [
        (["a", "\n\n", "- b"], "a\n\n- b", ["a", "\n\n", "- b"]),
        (["Hi", "\n", "you"], " Hi\nyou ", ["Hi", "\n", "you"]),  # the template stripped the reply
        (["", "\U0001f642", "!", "<e>"], "\U0001f642!", ["\U0001f642!", END]),  # several tokens of one character
        (["面包", "很", "好"], "面包很好", ["面包", "很", "好"]),
        (["Yes", ".<e>"], "Yes.", ["Yes."]),  # a token that reaches over the end
    ],
)
def test_every_character_of_a_reply_is_in_one_word(pieces, reply, wanted):
    assert [text for text, _ in reward_by_word([[piece, 0.0] for piece in pieces], reply)] == wanted


def test_the_largest_change_is_the_strongest_colour_but_the_ends():
    words = [("a", 0.0), (" b", 1.0), (" <c>", 0.5), (END, 9.0)]
    shown = re.findall(
        r'<mark class="(\w+)" style="--share: ([\d.]+)" title="([^"]+)">(.*?)</mark>', coloured("A", words)
    )
    assert shown == [
        ("up", "1.00", "+1.000", " b"),
        ("down", "0.50", "-0.500", " &lt;c&gt;"),
        ("up", "1.00", "+8.500", END),
    ]


def test_a_reply_without_rewards_by_token_says_so():
    assert "no reward before the end" in coloured("B", [])
    assert compare_tab.reward_plot([[], []]).visible is False


@pytest.mark.parametrize(
    "p_a, wanted",
    [
        (0.5, "sees no difference"),
        (0.75, "prefers A</b> with probability <b>75.0%"),
        (0.1, "prefers B</b> with probability <b>90.0%"),
        (0.99999, "over 99.9%"),
    ],
)
def test_the_verdict_names_the_preferred_reply_first(p_a, wanted):
    verdict = compare_tab.verdict_of({"p_a": p_a, "reward_a": 1.0, "reward_b": -1.0})
    assert wanted in verdict and verdict.startswith("<b>The reward model")


def test_what_is_known_of_a_reply_is_forgotten_once_it_is_changed():
    replies = [Reply("First.", ending="cut"), Reply("Second.")]
    text_a, text_b, pair = sides(replies, ["policy", "other"], is_swapped=True)
    assert (text_a, text_b, pair["swapped"]) == ("Second.", "First.", True)
    known = known_sides(pair, [text_a, text_b])
    assert known == [{"written_by": "other", "ending": ""}, {"written_by": "policy", "ending": "cut"}]
    nothing = {"written_by": None, "ending": None}
    assert known_sides(pair, [text_a, "First!"]) == [known[0], nothing]
    assert known_sides(None, ["a", "b"]) == [nothing, nothing]


@pytest.fixture
def tab(base, reward_checkpoint, tmp_path):
    engine = ChatEngine(base, reward_checkpoint, reward_checkpoint.parent.parent)
    engine.load()
    with gr.Blocks():
        settings = [gr.Textbox(), *(gr.Number() for _ in range(3)), gr.Checkbox(), gr.Number()]
        return CompareTab(engine, tmp_path / "preferences.jsonl", gr.Tab(), gr.State(), settings)


VISITOR = SimpleNamespace(session_hash="visitor")
SETTINGS = ["", 1.0, 0.9, 12, False, 1]
QUESTION = "What should I know about bread?"


def test_a_blind_page_draws_sides_and_order_of_writing_and_shows_two_policies_replies_together(tab, monkeypatch):
    second = tab.engine.second_policy(tab.engine.policy_name)
    monkeypatch.setattr(tab.engine, "second_policy", lambda name: second)
    order, original = [], tab.engine.generate

    def generate(dialogue, settings, policy=None, stop=None):
        order.append("second" if policy is second else "loaded")
        return original(dialogue, settings, policy, stop)

    monkeypatch.setattr(tab.engine, "generate", generate)
    drawn = set()
    for _ in range(24):
        order.clear()
        _, *steps = tab.write_both(None, QUESTION, "another policy", True, VISITOR, *SETTINGS)
        assert len(steps) == 1 and all(steps[0][:2])
        names = [side["written_by"] for side in steps[0][2]["sides"]]
        assert set(names) == {tab.engine.policy_name, "another policy"}
        assert steps[0][2]["swapped"] == (names[1] == tab.engine.policy_name)
        drawn.add((steps[0][2]["swapped"], order[0]))
    assert len(drawn) == 4  # of 24 draws, all four miss one with a probability of 0.4 %
    for _ in range(5):
        _, *steps = tab.write_both(None, QUESTION, "another policy", False, VISITOR, *SETTINGS)
        assert not steps[-1][2]["swapped"] and len(steps) > 2


def test_a_vote_is_saved_without_rewards_where_there_are_none(tab, monkeypatch):
    def fail(dialogues):
        raise ValueError("too long: 3,000 tokens")

    monkeypatch.setattr(tab.engine, "rewards_of", fail)
    message, *_ = tab.vote("a", None, None, None, "", None, QUESTION, "Yes.", "No.")
    assert "is saved as row 1" in message and "without rewards (too long: 3,000 tokens)" in message
    tab.engine.reward_model = None
    tab.vote("b", None, None, None, "", None, QUESTION, "Yes.", "No.")
    rows = [json.loads(line) for line in tab.votes_file.read_text().splitlines()]
    assert [row["shown"]["a"]["reward"] for row in rows] == [None, None]
    assert rows[0]["reward_model"] == tab.engine.reward_model_name and rows[1]["reward_model"] is None
    assert "no reward model is loaded" in tab.reveal(None, "", None, QUESTION, "Yes.", "No.")[0]
    assert tab.agreement_line() == ""


def test_agreement_has_its_interval_and_counts_ties_apart(tab):
    assert "No blind vote for one side yet" in tab.agreement_line()
    for number, vote in enumerate(["a", "a", "tie", "both_bad"]):
        tab.vote(vote, None, None, None, "", None, QUESTION, f"Yes {number}.", "No.")
    rows = [json.loads(line) for line in tab.votes_file.read_text().splitlines()][:2]
    agreed = sum(row["shown"]["a"]["reward"] > row["shown"]["b"]["reward"] for row in rows)
    low, high = utils.wilson_interval(agreed, 2)
    wanted = f"agreed with {agreed} of 2 blind votes: <b>{agreed / 2:.0%}</b> (95% interval {low:.0%} to {high:.0%})"
    assert wanted in tab.agreement_line() and "apart from them 2 ties" in tab.agreement_line()
