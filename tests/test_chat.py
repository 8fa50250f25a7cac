"""chat.py: which model talks and which scores, what the page's history means, and the real server through its API."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

import chat
import checkpoint
import models
import utils

ROOT = Path(__file__).resolve().parent.parent
QUESTION = {"role": "user", "content": "What should I know about bread?"}


@pytest.fixture(scope="module")
def run_folder(base, tokenizer, tmp_path_factory):
    """A run whose step-2 is a reward checkpoint of the demo's model."""
    folder = tmp_path_factory.mktemp("rm") / "bread"
    models.RewardModel.create(base, tokenizer, 0).save(folder / "step-2")
    utils.write_json(folder / "step-2" / "train_config.json", {"model": base})
    return folder


@pytest.fixture(scope="module")
def reward_checkpoint(run_folder):
    return run_folder / "step-2"


@pytest.fixture(scope="module")
def lora_checkpoint(base, tokenizer, tmp_path_factory):
    """A reward adapter without a train_config.json."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    models.RewardModel.create(base, tokenizer, 0, models.LoraSettings()).save(folder)
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """chat.py as a process of its own; as a context manager it is stopped on leaving."""

    def __init__(self, *arguments):
        # Python leaves Ctrl-C alone where a background shell has turned it off, so the child turns it on again
        start = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        start += "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]); "
        start += "runpy.run_path(sys.argv[0], run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, str(ROOT / "chat.py"), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ.copy(),
        )
        watchdog = threading.Timer(60, self.process.kill)  # a server that never opens must not hang the tests
        watchdog.start()
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.match(r"open (\S+)", line):
                self.url = found.group(1)
                break
        watchdog.cancel()
        assert hasattr(self, "url"), "".join(self.lines) + self.process.stderr.read()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop(signal.SIGTERM)

    def stop(self, number):
        """Send a signal; returns (exit code, stderr)."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=30)
        return self.process.returncode, stderr


@pytest.fixture(scope="module")
def server(reward_checkpoint):
    with Server("--model", reward_checkpoint, "--port", free_port()) as running:
        yield running


@pytest.fixture
def client(server):
    return Client(server.url, verbose=False)


# ---------------------------------------------------------------------------------------------------------------------
# Who talks and who scores
# ---------------------------------------------------------------------------------------------------------------------


def test_a_reward_checkpoint_scores_and_its_base_talks(reward_checkpoint, base):
    assert chat.choose_models(str(reward_checkpoint), None) == (base, reward_checkpoint)


def test_a_reward_adapter_names_its_base_itself(lora_checkpoint, base):
    assert chat.is_reward_checkpoint(lora_checkpoint)
    assert chat.choose_models(str(lora_checkpoint), None) == (base, lora_checkpoint)


def test_a_base_that_moved_gives_way_to_the_one_the_adapter_knows(lora_checkpoint, base, tmp_path):
    for path in lora_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    utils.write_json(tmp_path / "train_config.json", {"model": "demo/of/another/folder"})
    assert chat.base_model_of(tmp_path) == base


def test_a_policy_talks_and_nobody_scores_unless_asked(base, reward_checkpoint):
    assert chat.choose_models(base, None) == (base, None)
    assert chat.choose_models(base, str(reward_checkpoint)) == (base, reward_checkpoint)
    assert chat.choose_models("Qwen/Qwen3-0.6B", None) == ("Qwen/Qwen3-0.6B", None)


def test_a_policy_adapter_is_no_reward_checkpoint(tmp_path):
    utils.write_json(tmp_path / "adapter_config.json", {"task_type": "CAUSAL_LM"})
    assert not chat.is_reward_checkpoint(tmp_path)


def test_a_run_folder_means_its_newest_sound_step(tmp_path):
    for step, content in ((9, "whole"), (10, "whole")):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        (folder / "config.json").write_text(content)
        checkpoint.write_manifest(folder, step)
    assert chat.sound_checkpoint(str(tmp_path)) == tmp_path / "step-10"
    (tmp_path / "step-10" / "config.json").write_text("wholf")
    assert chat.sound_checkpoint(str(tmp_path)) == tmp_path / "step-9"
    with pytest.raises(utils.CheckpointError, match="step-9 is complete"):
        chat.sound_checkpoint(str(tmp_path / "step-10"))


def test_a_reward_checkpoint_of_unknown_base_asks_for_the_reward_model_flag(tmp_path):
    utils.write_json(tmp_path / "config.json", {"architectures": ["Qwen3ForSequenceClassification"]})
    with pytest.raises(utils.UserError, match="--model TALKER --reward_model"):
        chat.choose_models(str(tmp_path), None)


def test_a_policy_is_refused_as_reward_model(base):
    with pytest.raises(utils.UserError, match="--reward_model names no reward checkpoint"):
        chat.choose_models(base, base)


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_settings_that_are_no_object_are_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(utils.UserError, match=r"config\.json"):
        chat.is_reward_checkpoint(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Dialogues
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["two words", [{"type": "text", "text": "two words"}], [{"type": "text", "text": "two "}, "words"]]
)
def test_text_comes_back_from_every_form_of_content(content):
    assert chat.text_of(content) == "two words"


def test_a_dialogue_holds_no_notes_and_no_unanswered_message():
    history = [
        {"role": "user", "content": [{"type": "text", "text": "far too long"}], "metadata": None},
        {"role": "assistant", "content": "too long", "metadata": {"title": "no reply"}},
        QUESTION,
        {"role": "assistant", "content": [{"type": "text", "text": "Knead."}], "metadata": {"title": None}},
    ]
    wanted = [{"role": "system", "content": "be brief"}, QUESTION, {"role": "assistant", "content": "Knead."}]
    assert chat.dialogue_of(history, " be brief ") == wanted
    assert chat.dialogue_of(history) == wanted[1:]


def test_messages_come_back_from_the_page_as_they_were():
    chatbot = chat.plain_chatbot()
    text = "    if a < b:\n\t<b>&amp; &lt;</b>\n"
    shown = chatbot.postprocess([{"role": "assistant", "content": text}])
    assert "<" not in shown.root[0].content[0].text
    assert chat.dialogue_of(chatbot.preprocess(shown)) == [{"role": "assistant", "content": text}]


def test_rewards_are_those_of_the_dialogue_up_to_each_reply(base, reward_checkpoint):
    stage = chat.Stage(base, reward_checkpoint)
    stage.load()
    history = [QUESTION, {"role": "assistant", "content": "Knead."}] * 2
    first, second = (stage.reward.score_dialogues([history[:end]])[0] for end in (2, 4))
    assert stage.describe_rewards(history, "") == f"**reward {second:.3f}** · replies before: {first:.3f}"
    assert stage.describe_rewards(history, "", is_replying=True) == stage.describe_rewards([], "") == ""
    too_long = [QUESTION, {"role": "assistant", "content": "word " * 3000}]
    assert "the model's limit is 2,048" in stage.describe_rewards(too_long, "")


def test_a_failing_generation_ends_in_a_note(base, monkeypatch):
    stage = chat.Stage(base, None)
    stage.load()

    def fail(*args, **kwargs):
        yield "half a"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stage.policy, "stream", fail)
    (half, is_going_on), (last, is_going_on_after) = stage.answer("hello", [], "", 0.7, 0.9, 16)
    assert (half, is_going_on, is_going_on_after) == ("half a", True, False)
    assert chat.is_note(last) and "out of memory" in last["content"]


# ---------------------------------------------------------------------------------------------------------------------
# The real server
# ---------------------------------------------------------------------------------------------------------------------


def test_a_reply_streams_and_ends(client):
    job = client.submit(QUESTION["content"], temperature=0.7, max_new_tokens=40, api_name="/chat")
    reply = job.result(timeout=60)
    pieces = job.outputs()
    assert len(pieces) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(pieces))
    assert reply == pieces[-1] and reply.strip()


def test_the_score_of_a_reply_is_the_reward_models(client, reward_checkpoint):
    reply = client.predict(QUESTION["content"], max_new_tokens=24, api_name="/chat")
    dialogue = [QUESTION, {"role": "assistant", "content": reply}]
    in_blocks = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in dialogue]
    wanted = models.RewardModel.restore(reward_checkpoint).eval().score_dialogues([dialogue])[0]
    assert client.predict(json.dumps(dialogue), api_name="/score") == pytest.approx(wanted, abs=1e-5)
    assert client.predict(json.dumps(in_blocks), api_name="/score") == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("messages", ["{", "3", "[]", '[{"role": "user"}]', '["hello"]', '{"role": "user"}', "null"])
def test_what_is_no_dialogue_is_refused_and_the_server_lives_on(client, messages):
    with pytest.raises(AppError) as caught:
        client.predict(messages, api_name="/score")
    assert "wants a JSON list" in str(caught.value) or "empty conversation" in str(caught.value)
    assert isinstance(client.predict(json.dumps([QUESTION]), api_name="/score"), float)


def test_a_prompt_that_does_not_fit_is_refused_in_tokens(client, tokenizer):
    answer = client.predict(QUESTION["content"], max_new_tokens=2040, api_name="/chat")
    tokens = len(
        tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, enable_thinking=False, return_dict=False)
    )
    assert answer["metadata"]["title"] == "no reply"
    assert f"{tokens} tokens" in answer["content"] and "limit is 2,048" in answer["content"]
    assert isinstance(client.predict(QUESTION["content"], max_new_tokens=16, api_name="/chat"), str)


def test_a_stopped_reply_makes_way_for_the_next_one(client):
    job = client.submit(QUESTION["content"], max_new_tokens=1900, api_name="/chat")
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    started = time.perf_counter()
    assert isinstance(client.predict("Hello?", max_new_tokens=8, api_name="/chat"), (str, dict))
    assert time.perf_counter() - started < 5  # the whole reply would take longer


def test_the_model_loads_by_button_and_then_by_autoload(base, reward_checkpoint):
    with Server("--model", base, "--reward_model", reward_checkpoint, "--autoload", "--port", free_port()) as server:
        client = Client(server.url, verbose=False)
        assert f"loading {base}\n" in server.lines
        assert "talks" in str(client.predict(api_name="/load"))
        assert isinstance(client.predict(json.dumps([QUESTION]), api_name="/score"), float)


def test_without_a_model_the_page_opens_at_once_and_says_what_is_missing():
    with Server() as server:  # HF_HUB_OFFLINE is set, and no cache holds the default model
        client = Client(server.url, verbose=False)
        assert "press Load" in client.predict("hello", api_name="/chat")["content"]
        assert "Qwen/Qwen3-0.6B" in str(client.predict(api_name="/load"))


def test_ctrl_c_stops_with_130_and_no_traceback(base):
    code, stderr = Server("--model", base, "--port", free_port()).stop(signal.SIGINT)
    assert (code, stderr) == (130, "stopped\n")


def test_a_taken_port_is_left_unless_it_was_asked_for(run_script):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < chat.free_port("127.0.0.1", port, port + 20) <= port + 20
        result = run_script("chat.py", "--port", port)
    assert result.returncode == 2
    assert f"--port {port} is taken" in result.stderr and "Traceback" not in result.stderr


def test_missing_paths_exit_2_and_suggest_the_nearest_name(run_script, reward_checkpoint):
    mistyped = reward_checkpoint.with_name("step-3")
    for name_of_flag in ("--model", "--reward_model"):
        result = run_script("chat.py", name_of_flag, mistyped)
        assert result.returncode == 2
        assert name_of_flag in result.stderr and "did you mean 'step-2'?" in result.stderr


def test_bad_flags_exit_2_and_are_all_named(run_script):
    result = run_script("chat.py", "--autolod", "--port", "70000", "--host", "")
    assert result.returncode == 2
    for part in ("--autolod: no such flag, did you mean --autoload?", "--port: got 70000", "--host: got nothing"):
        assert part in result.stderr
    assert run_script("chat.py", "--host", "no.such.host.invalid").returncode == 2


def test_help_does_not_wait_for_torch_or_gradio():
    code = "import sys, chat; print([name for name in ('torch', 'gradio', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n"
