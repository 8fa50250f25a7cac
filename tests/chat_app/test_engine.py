"""engine.py: generating, ranking, scoring, comparing, and switching models, on the demo's small model."""

import gc
import itertools
import math
import shutil
import threading
import weakref
from dataclasses import replace

import pytest
import torch

import utils
from chat_app import engine
from chat_app.engine import ChatEngine, Reply, Settings, held_out_percentiles
from checkpointing import manifest

QUESTION = [{"role": "user", "content": "What should I know about bread?"}]
SHORT = Settings(max_new_tokens=12, temperature=1.0)


@pytest.fixture
def fresh_engine(base, reward_checkpoint):
    """For tests that load other models."""
    loaded = ChatEngine(base, reward_checkpoint, reward_checkpoint.parent.parent)
    loaded.load()
    return loaded


@pytest.fixture(scope="module")
def chat_engine(base, reward_checkpoint):
    """For tests that leave its models loaded."""
    loaded = ChatEngine(base, reward_checkpoint, reward_checkpoint.parent.parent)
    loaded.load()
    return loaded


def replied(text):
    return [*QUESTION, {"role": "assistant", "content": text}]


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def test_replies_only_grow(chat_engine):
    torch.manual_seed(1)
    steps = list(chat_engine.generate(QUESTION, Settings(candidates=3, max_new_tokens=60, temperature=1.0)))
    assert all(len(step) == 3 for step in steps)
    for before, after in itertools.pairwise(steps):
        assert all(later.content.startswith(earlier.content) for earlier, later in zip(before, after, strict=True))


def test_the_candidates_are_ranked_by_reward(chat_engine):
    replies = [Reply("Knead."), Reply(""), Reply("No!"), Reply("Wait for an hour.")]
    ranked = chat_engine.rank(QUESTION, replies)
    rewards = dict(zip(("Knead.", "No!", "Wait for an hour."), chat_engine.rewards_of(
        [replied(text) for text in ("Knead.", "No!", "Wait for an hour.")]), strict=True))  # fmt: skip
    assert [reply.content for reply, _ in ranked] == sorted(rewards, key=lambda text: -rewards[text])
    assert [reward for _, reward in ranked] == sorted(rewards.values(), reverse=True)


def test_without_a_reward_model_the_candidates_keep_their_order(base):
    alone = ChatEngine(base)
    alone.load()
    assert alone.rank(QUESTION, [Reply("b"), Reply("a")]) == [(Reply("b"), None), (Reply("a"), None)]
    with pytest.raises(ValueError, match="no reward model is loaded"):
        alone.rewards_of([replied("b")])


def test_the_system_prompt_affects_replies_and_rewards(chat_engine):
    def write(dialogue, settings):
        torch.manual_seed(1)
        return list(chat_engine.generate(dialogue, settings))[-1]

    plain = write(QUESTION, SHORT)
    told = write(QUESTION, replace(SHORT, system_prompt="Be rude."))
    as_message = write([{"role": "system", "content": "Be rude."}, *QUESTION], SHORT)
    assert told == as_message != plain
    (_, alone), (_, with_prompt) = (chat_engine.rank(QUESTION, plain, prompt)[0] for prompt in ("", "Be rude."))
    assert alone != with_prompt


@pytest.mark.parametrize(
    "text, may_think, wanted",
    [
        ("Hello", False, Reply("Hello")),
        ("<thi", True, Reply("")),
        ("<thi", False, Reply("<thi")),
        ("<think>\nhm", True, Reply("", "hm")),
        ("<think>\nhm\n</think>\n\nYes", True, Reply("Yes", "hm")),
        ("hm\n</think>\n\nYes", True, Reply("Yes", "hm")),  # the template opened it
        ("a </think> b", False, Reply("a </think> b")),
    ],
)
def test_thinking_is_separated_from_the_reply(text, may_think, wanted):
    assert Reply.of(text, may_think) == wanted


def test_a_missing_reply_is_explained(chat_engine, monkeypatch):
    pieces = {"thinking": ["<think>", "hm"], "nothing": [""]}

    def stream(name):
        yield from ([piece] for piece in pieces[name])
        return [True]

    def write(name):
        monkeypatch.setattr(chat_engine.policy, "stream_candidates", lambda *rest, **sampling: stream(name))
        return list(chat_engine.generate(QUESTION, Settings(thinking=True)))

    with pytest.raises(ValueError, match="still thinking when it reached max new tokens"):
        write("thinking")
    with pytest.raises(ValueError, match="ended its reply without a word"):
        write("nothing")


def test_a_reply_says_whether_it_is_whole_cut_off_or_stopped(chat_engine, monkeypatch):
    torch.manual_seed(1)
    config = chat_engine.policy.hf_model.generation_config
    with monkeypatch.context() as patch:  # every second token ends a reply
        patch.setattr(config, "eos_token_id", list(range(0, chat_engine.policy.hf_model.config.vocab_size, 2)))
        settings = Settings(max_new_tokens=2, temperature=1.0, top_p=1.0, candidates=16)
        assert {reply.ending for reply in list(chat_engine.generate(QUESTION, settings))[-1]} == {"", "cut"}
    stop = threading.Event()
    writing = chat_engine.generate(QUESTION, Settings(max_new_tokens=1500, temperature=1.0, top_p=1.0), stop=stop)
    next(writing)
    stop.set()
    rest = list(writing)
    assert len(rest) <= 3 and rest[-1][0].ending == "stopped"


def test_a_reply_stopped_before_its_first_word_is_no_error(chat_engine):
    stop = threading.Event()
    stop.set()
    (reply,) = list(chat_engine.generate(QUESTION, SHORT, stop=stop))[-1]
    assert reply.ending == "stopped"


@pytest.mark.parametrize(
    "dialogue, settings, reason",
    [
        ([], Settings(), "nothing to reply to"),
        (replied("Yes."), Settings(), "nothing to reply to"),
        (QUESTION, Settings(top_p=0), "top-p: got 0"),
        (QUESTION, Settings(max_new_tokens=0), "max new tokens: got 0, expected a whole number from 1"),
        (QUESTION, Settings(max_new_tokens=math.inf), "max new tokens: got inf, expected a whole number from 1"),
        (QUESTION, Settings(candidates=17), "candidates: got 17, expected a whole number from 1 to 16"),
        (QUESTION, Settings(max_new_tokens=2040), r"too long: \d+ tokens so far and up to 2,040 new ones"),
        (QUESTION, Settings("word " * 3000), "too long"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_generated(chat_engine, dialogue, settings, reason):
    with pytest.raises(ValueError, match=reason):
        next(chat_engine.generate(dialogue, settings))


def test_nothing_is_answered_before_a_model_is_loaded(base):
    with pytest.raises(ValueError, match="no model is loaded yet"):
        next(ChatEngine(base).generate(QUESTION, Settings()))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


def test_rewards_are_the_reward_models_and_are_computed_once(chat_engine, monkeypatch):
    dialogues = [replied("Knead."), replied("No."), replied("Knead.")]
    wanted = chat_engine.reward_model.score_dialogues(dialogues)
    assert chat_engine.rewards_of(dialogues) == pytest.approx(wanted, abs=1e-5)
    monkeypatch.setattr(chat_engine.reward_model, "score_dialogues", None)
    assert chat_engine.rewards_of(dialogues) == pytest.approx(wanted, abs=1e-5)


def test_the_cache_of_rewards_is_limited(chat_engine, monkeypatch):
    monkeypatch.setattr(engine, "MAX_CACHED_REWARDS", 2)
    chat_engine.rewards_of([replied(str(number)) for number in range(5)])
    assert len(chat_engine._rewards) == 2


def test_a_comparison_follows_bradley_and_terry(chat_engine, monkeypatch):
    monkeypatch.setattr(chat_engine, "rewards_of", lambda dialogues: [2.0, 0.5])
    found = chat_engine.compare(QUESTION, ("Knead.", "No."))
    assert found["p_a"] == pytest.approx(1 / (1 + math.exp(-1.5)))


@pytest.mark.parametrize(
    "prompt, replies, reason",
    [
        ([], ("a", "b"), "the prompt is empty"),
        (QUESTION, (" ", "b"), "reply A is empty"),
        (QUESTION, ("a", ""), "reply B is empty"),
    ],
)
def test_an_empty_comparison_is_refused(chat_engine, prompt, replies, reason):
    with pytest.raises(ValueError, match=reason):
        chat_engine.compare(prompt, replies)


# ---------------------------------------------------------------------------------------------------------------------
# Switching
# ---------------------------------------------------------------------------------------------------------------------


def test_switching_frees_the_old_model(fresh_engine):
    old = weakref.ref(fresh_engine.reward_model), weakref.ref(next(fresh_engine.reward_model.parameters()))
    assert fresh_engine.rewards_of([replied("Knead.")])
    fresh_engine.load(fresh_engine.policy_name, "")
    gc.collect()
    assert [reference() for reference in old] == [None, None] and fresh_engine.reward_model is None
    assert dict(fresh_engine.status())["reward model"].startswith("none")


def test_a_failed_load_keeps_the_old_models_and_says_why(fresh_engine, reward_checkpoint, monkeypatch):
    before = fresh_engine.policy, fresh_engine.reward_model, fresh_engine.policy_name, fresh_engine.reward_model_name
    with pytest.raises(ValueError, match="etc is not on offer here"):
        fresh_engine.load("/etc", fresh_engine.reward_model_name)
    with pytest.raises(ValueError, match="model is not on offer here"):
        fresh_engine.second_policy("evil/model")
    fresh_engine.load(fresh_engine.policy_name, "")
    content = (reward_checkpoint / "model.safetensors").read_bytes()
    try:
        (reward_checkpoint / "model.safetensors").write_bytes(content[:-1])
        with pytest.raises(utils.CheckpointError, match=r"model\.safetensors"):
            fresh_engine.load(fresh_engine.policy_name, before[3])
    finally:
        (reward_checkpoint / "model.safetensors").write_bytes(content)
    assert fresh_engine.policy is before[0] and fresh_engine.reward_model is None


def test_a_reply_keeps_its_model_while_another_is_loaded(fresh_engine, base):
    writing = fresh_engine.generate(QUESTION, Settings(max_new_tokens=200, temperature=1.0, top_p=1.0))
    next(writing)
    old = fresh_engine.policy
    fresh_engine.policy_name = "another one"
    fresh_engine.load(base, fresh_engine.reward_model_name)
    assert fresh_engine.policy is not old
    assert len(list(writing)) > 1


def test_a_checkpoint_replaced_under_the_same_name_is_loaded_again(base, reward_checkpoint, tmp_path):
    import shutil

    folder = tmp_path / "run" / "step-2"
    shutil.copytree(reward_checkpoint, folder)
    loaded = ChatEngine(base, folder, tmp_path)
    loaded.load()
    before = loaded.reward_model
    loaded.load()
    assert loaded.reward_model is before
    (folder / "manifest.json").unlink()
    (folder / "note.txt").write_text("another training")
    manifest.write_manifest(folder, 2)
    loaded.load()
    assert loaded.reward_model is not before


def test_an_offline_machine_gets_advice_for_the_page(base, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loading = ChatEngine("nobody/nothing-of-this-name")
    with pytest.raises(utils.DiskOrNetworkError) as caught:
        loading.load()
    assert "under Models" in str(caught.value) and "train_rm.py" not in str(caught.value)


def test_two_visitors_who_press_load_at_once_load_the_model_once(base, monkeypatch):
    loading, opened = ChatEngine(base), []
    original = ChatEngine._open_policy
    monkeypatch.setattr(ChatEngine, "_open_policy", lambda self, *rest: opened.append(1) or original(*rest))
    threads = [threading.Thread(target=loading.load) for _ in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(opened) == 1 and loading.policy is not None


def test_a_second_policy_replies_beside_the_loaded_one_and_is_opened_once(chat_engine):
    second = chat_engine.second_policy(chat_engine.policy_name)
    assert second is not chat_engine.policy and chat_engine.second_policy(chat_engine.policy_name) is second
    assert list(chat_engine.generate(QUESTION, SHORT, second))[-1][0].content


def test_the_status_names_models_parameters_precision_and_memory(chat_engine):
    lines = dict(chat_engine.status())
    assert "721,984 parameters, fp32 on cpu" in lines["policy"]
    assert lines["reward model"].startswith("bread / step-2 (newest)")
    assert "GiB in use on cpu" in lines["memory"]


def test_where_a_reward_lies_among_the_held_out_ones_is_read_from_the_checkpoints_report(
    base, reward_checkpoint, tmp_path
):
    step = tmp_path / "run/step-2"
    shutil.copytree(reward_checkpoint, step)
    report = tmp_path / "run/reports/step-2/report.json"
    loaded = ChatEngine(base, step, tmp_path)
    loaded.load()
    assert loaded.share_below(0.0) is None
    report.parent.mkdir(parents=True)
    for content in ("", "{", "[]", '{"reward_percentiles": 3}', '{"reward_percentiles": [2, 1]}'):
        report.write_text(content)
        assert held_out_percentiles(step) == []
    utils.write_json(report, {"reward_percentiles": [-1.0, 0.0, 3.0]})
    again = ChatEngine(base, step, tmp_path)
    again.load()
    shares = [again.share_below(reward) for reward in (-9.0, -0.5, 0.0, 1.5, 9.0)]
    assert shares == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
