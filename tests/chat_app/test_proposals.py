"""proposals.py: where prompts come from, and which of the replies make the pair."""

import json
import threading
from dataclasses import replace

import pytest

from chat_app import proposals
from chat_app.engine import ChatEngine, Reply, Settings
from chat_app.proposals import closest_pair

SETTINGS = Settings(max_new_tokens=12, temperature=1.0)
CHAT = [
    {"role": "user", "content": "Is rye bread?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And oats?"},
]


@pytest.fixture(scope="module")
def chat_engine(base, reward_checkpoint):
    loaded = ChatEngine(base, reward_checkpoint, reward_checkpoint.parent.parent)
    loaded.load()
    return loaded


@pytest.fixture
def trained_on(tmp_path, write_rows):
    """The folder of a reward model that was trained on some rows."""

    def write(rows, **settings):
        path = write_rows(rows) if rows is not None else tmp_path / "gone.jsonl"
        folder = tmp_path / "reward"
        folder.mkdir()
        (folder / "train_config.json").write_text(json.dumps({"dataset": str(path), **settings}))
        return str(folder)

    return write


def row(number, **more):
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    return {"prompt": prompt, "chosen": "Yes.", "rejected": "No.", **more}


def scored(*pairs):
    return [(Reply(text, ending=ending), reward) for text, reward, ending in pairs]


def test_the_pair_is_the_one_whose_rewards_are_closest():
    found = closest_pair(scored(("a", 3.0, ""), ("b", 1.0, ""), ("c", 0.5, ""), ("d", -2.0, "")))
    assert (found[0], {found[1].content, found[2].content}) == (0.5, {"b", "c"})


def test_replies_of_the_same_words_are_no_pair():
    replies = scored(("Yes, it is!", 1.0, ""), ("yes it is", 1.1, ""), ("No.", 0.0, ""))
    assert {reply.content for reply in closest_pair(replies)[1:]} == {"Yes, it is!", "No."}
    assert closest_pair(replies[:2]) is None


def test_unfinished_replies_are_taken_only_where_others_are_missing():
    replies = scored(("a", 0.0, "cut"), ("b", 0.1, "cut"), ("c", 5.0, ""), ("d", 0.0, ""))
    assert {reply.content for reply in closest_pair(replies)[1:]} == {"c", "d"}
    assert {reply.content for reply in closest_pair(replies[:3])[1:]} == {"a", "b"}


def test_prompts_are_those_that_the_training_held_out(trained_on):
    prompts = proposals.training_prompts(trained_on([row(number) for number in range(200)]))
    assert 2 < len(prompts) < 30 and all(prompt[0]["content"].startswith("Question") for prompt in prompts)


def test_prompts_of_tools_and_system_turns_are_left_out(trained_on):
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [*(row(number) for number in range(5)), *(row(n, prompt=system) for n in range(200)), row(1, tools=tools)]
    assert all(len(prompt) == 1 for prompt in proposals.training_prompts(trained_on(rows)))


def test_the_pair_answers_a_held_out_prompt(chat_engine, demo_folder):
    *steps, (message, found) = proposals.propose(chat_engine, [], SETTINGS, threading.Event())
    assert [step[0] for step in steps] == [f"Prompt {n} of 2: writing 4 replies …" for n in (1, 2)] and message == ""
    prompt, (reply_a, reply_b) = found
    assert reply_a.content != reply_b.content and reply_a.ending == "cut"
    assert json.dumps(prompt[-1]["content"])[1:-1] in (demo_folder[1] / "test.jsonl").read_text()


@pytest.mark.parametrize("reward_model", ["elsewhere", "data is gone"])
def test_without_the_trainings_data_the_chats_questions_are_used(
    chat_engine, trained_on, tmp_path, reward_model, monkeypatch
):
    folder = trained_on(None) if reward_model == "data is gone" else str(tmp_path)
    monkeypatch.setattr(chat_engine, "reward_model_name", folder)
    *_, (_, (prompt, replies)) = proposals.propose(chat_engine, CHAT, SETTINGS, threading.Event())
    assert prompt in (CHAT[:1], CHAT) and len(replies) == 2
    with pytest.raises(ValueError, match=r"no prompts to propose: .*Ask something in the chat"):
        list(proposals.propose(chat_engine, [], SETTINGS, threading.Event()))


def test_a_stopped_proposal_ends_without_a_pair(chat_engine):
    stop = threading.Event()
    steps = proposals.propose(chat_engine, [], replace(SETTINGS, max_new_tokens=1000), stop)
    next(steps)
    stop.set()
    assert list(steps) == []


@pytest.mark.parametrize(
    "changes, reason",
    [({"temperature": 0}, "raise the temperature"), ({"max_new_tokens": 2040}, "too long")],
)
def test_why_there_is_no_pair_is_said(chat_engine, changes, reason):
    with pytest.raises(ValueError, match=reason):
        list(proposals.propose(chat_engine, [], replace(SETTINGS, **changes), threading.Event()))


def test_without_a_reward_model_there_is_nothing_to_propose(base):
    alone = ChatEngine(base)
    alone.load()
    with pytest.raises(ValueError, match="no reward model is loaded"):
        list(proposals.propose(alone, CHAT, SETTINGS, threading.Event()))
