"""chat.py: the real server through its API, its faults, ten users at once, and who may connect."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

import chat
import chat_app.server
import models
import train_rm
import utils
from chat_app import app
from chat_app.engine import ChatEngine
from checkpointing import manifest, run_folder
from common import file_locks
from tests.chat_server import Server, free_port
from tests.conftest import ROOT

QUESTION = {"role": "user", "content": "What should I know about bread?"}
ANSWERED = [QUESTION, {"role": "assistant", "content": "Knead it."}]


@pytest.fixture
def client(server):
    return Client(server.url, verbose=False)


# ---------------------------------------------------------------------------------------------------------------------
# The API
# ---------------------------------------------------------------------------------------------------------------------


def test_a_reply_streams_and_ends(client):
    job = client.submit(QUESTION["content"], max_new_tokens=200, api_name="/chat")
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
    assert client.predict(dialogue, api_name="/score") == pytest.approx(wanted, abs=1e-5)
    assert client.predict(in_blocks, api_name="/score") == pytest.approx(wanted, abs=1e-5)


def test_a_comparison_has_both_rewards_the_probability_and_the_reward_after_each_token(client, reward_checkpoint):
    replies = ("Knead it well.", "No.")
    found = client.predict(QUESTION["content"], *replies, api_name="/compare")
    model = models.RewardModel.restore(reward_checkpoint).eval()
    wanted = model.score_dialogues([[QUESTION, {"role": "assistant", "content": reply}] for reply in replies])
    assert [found["reward_a"], found["reward_b"]] == pytest.approx(wanted, abs=1e-5)
    assert found["p_a"] == pytest.approx(1 / (1 + 2.718281828459045 ** (wanted[1] - wanted[0])), abs=1e-6)
    for letter, reply, reward in zip("ab", replies, wanted, strict=True):
        tokens = found[f"tokens_{letter}"]
        assert "".join(text for text, _ in tokens).startswith(reply)
        assert tokens[-1][1] == pytest.approx(reward, abs=1e-5)


def test_the_best_of_several_candidates_is_the_last_piece(client, reward_checkpoint):
    reply = client.predict(QUESTION["content"], max_new_tokens=16, candidates=4, temperature=1.0, api_name="/chat")
    assert isinstance(reply, str) and reply.strip()


def test_the_api_is_documented(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/chat", "/score", "/compare"}
    assert all(endpoint.get("description") for endpoint in endpoints.values())
    names = [parameter["parameter_name"] for parameter in endpoints["/chat"]["parameters"]]
    assert names == ["message", "history", "system_prompt", "temperature", "top_p", "max_new_tokens", "thinking",
                     "candidates"]  # fmt: skip


BAD_DIALOGUES = ["{", 3, [], None, [{"role": "user"}], ["hello"], {"role": "user"},
                [{"role": "king", "content": "x"}], [{"role": "user", "content": [3]}], [QUESTION],
                [QUESTION, {"role": "assistant", "content": " "}]]  # fmt: skip


@pytest.mark.parametrize("messages", BAD_DIALOGUES)
def test_bad_dialogues_are_refused_and_the_server_keeps_running(client, messages):
    with pytest.raises(AppError) as caught:
        client.predict(messages, api_name="/score")
    assert "expected a list" in str(caught.value) or "only a reply has a reward" in str(caught.value)
    assert isinstance(client.predict(ANSWERED, api_name="/score"), float)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 2040}, "limit is 2,048"),
        ({"temperature": -1}, "temperature: got -1, expected 0 to 2"),
        ({"temperature": "hot"}, "temperature: got 'hot', expected 0 to 2"),
        ({"max_new_tokens": 1.5}, "max new tokens: got 1.5, expected a whole number from 1"),
        ({"thinking": "no"}, "thinking must be true or false"),
        ({"message": 3}, "the message is empty, or no text"),
        ({"candidates": 99}, "candidates: got 99, expected a whole number from 1 to 16"),
        ({"candidates": 2, "temperature": 0}, "would all be the same"),
        ({"message": "  "}, "the message is empty"),
        ({"history": [{"role": "user"}]}, "expected a list"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(client, options, message):
    with pytest.raises(AppError, match=re.escape(message)):
        client.predict(**{"message": QUESTION["content"], **options}, api_name="/chat")


def test_a_megabyte_is_refused_with_its_tokens_and_the_limit(client):
    megabyte = "What should I know about bread? " * 32_768
    with pytest.raises(AppError, match=r"too long: [\d,]{7,} tokens so far .* limit is 2,048"):
        client.predict(megabyte, api_name="/chat")


def test_after_a_stopped_reply_the_next_one_starts(client):
    job = client.submit(QUESTION["content"], max_new_tokens=1900, api_name="/chat")
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    assert isinstance(client.predict("Hello?", max_new_tokens=8, api_name="/chat"), str)
    assert len(job.outputs()) < 200  # the whole reply would be many more


def test_ten_users_at_once_see_their_places_in_the_queue_and_all_are_served(server):
    clients = [Client(server.url, verbose=False) for _ in range(10)]
    jobs = [client.submit(QUESTION["content"], max_new_tokens=40, api_name="/chat") for client in clients]
    places = set()
    while not all(job.done() for job in jobs):
        places |= {job.status().rank for job in jobs if not job.done()}
        time.sleep(0.01)
    assert all(job.result().strip() for job in jobs)
    assert len(places - {None, 0}) >= 3, places


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_process(base, reward_checkpoint, tmp_path_factory):
    """The page served from this process, so that faults can be injected into its models: (engine, client)."""
    engine = ChatEngine(base, reward_checkpoint)
    engine.load()
    folder = tmp_path_factory.mktemp("votes")
    page = app.build_page(engine, folder / "preferences.jsonl", folder / "grpo")
    page.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield engine, Client(page.local_url, verbose=False)
    page.close(verbose=False)


def test_a_generation_that_raises_ends_with_a_message_and_the_next_user_is_served(in_process, monkeypatch):
    engine, client = in_process
    original = engine.policy.hf_model.forward
    calls = []

    def fail_in_the_middle(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(*arguments, **options)

    monkeypatch.setattr(engine.policy.hf_model, "forward", fail_in_the_middle)
    started = time.perf_counter()
    with pytest.raises(AppError, match="out of memory: try a shorter dialogue"):
        client.predict(QUESTION["content"], max_new_tokens=100, api_name="/chat")
    assert time.perf_counter() - started < 30 and len(calls) == 5  # it ends at all; how fast, bench/chat_page.py tells
    assert client.predict("Hello?", max_new_tokens=8, api_name="/chat").strip()


def test_a_switch_during_a_reply_lets_it_finish_on_the_old_model(in_process, base):
    engine, client = in_process
    old = engine.policy
    job = client.submit(QUESTION["content"], max_new_tokens=300, api_name="/chat")
    while not job.outputs():
        time.sleep(0.02)
    engine.policy_name = "another model"
    engine.load(base, engine.reward_model_name)
    assert engine.policy is not old
    assert job.result(timeout=60).strip() and len(job.outputs()) > 3
    assert client.predict("Hello?", max_new_tokens=8, api_name="/chat").strip()


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_chat(monkeypatch, capsys, tmp_path):
    """Run chat.py's main in this process: instead of waiting for Ctrl-C it calls `visit(url, output so far)`."""
    monkeypatch.chdir(tmp_path)

    def run(visit, *arguments):
        def visit_instead_of_waiting():
            output = capsys.readouterr().out
            visit(re.search(r"^open (\S+)", output, re.MULTILINE).group(1), output)

        monkeypatch.setattr(chat_app.server, "wait_for_ctrl_c", visit_instead_of_waiting)
        capsys.readouterr()
        chat.main([*map(str, arguments), "--port", str(free_port())])

    return run


def status_of(url, host=None, origin=None):
    headers = {name: value for name, value in (("Host", host), ("Origin", origin)) if value}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "localhost.evil.example", "10.1.2.3", ""])
def test_a_foreign_host_header_gets_a_4xx(server, host):
    assert 400 <= status_of(server.url, host or " ")[0] < 500
    assert status_of(server.url, "localhost")[0] == status_of(server.url, "[::1]:80")[0] == 200


def test_a_machine_whose_name_has_capitals_accepts_the_name_that_browsers_send(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "MyBox")
    names = chat_app.server.own_names("0.0.0.0", share=False)
    assert "mybox" in names and names == [name.lower() for name in names]


def test_the_documented_container_starts_the_page_with_flags_that_it_takes():
    text = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    python, script, *flags = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE).group(1))
    flags += re.search(r"docker run .* chat-page \\\n(.*)$", text, re.MULTILINE).group(1).split()
    given, problems = chat.flags.read_flags(chat.ChatConfig, flags, "A test.")
    config = chat.flags.build_config(chat.ChatConfig, given, problems)
    assert (python, script, config.host) == ("python", "chat.py", "0.0.0.0")
    assert config.page_hosts == ["gpu-machine.local"] and config.votes_file.startswith("/votes/")


def test_a_page_host_admits_exactly_that_name_as_host_and_as_origin(base, run_chat):
    def visit(url, output):
        assert "whoever reaches Chat.example.org, bücher.example, fd00::5 can use this page" in output
        for host in ("chat.example.org", "chat.example.org:8443", "xn--bcher-kva.example", "[fd00::5]:80", "localhost"):
            assert status_of(url, host)[0] == 200, host
        for host in ("evil.chat.example.org", "example.org", "chat.example.org.evil.example", "[fd00::6]"):
            assert status_of(url, host)[0] == 400, host
        check_that_other_sites_are_refused(url)
        for origin, wanted in (("https://chat.example.org", 200), ("https://x.chat.example.org", 403)):
            assert status_of(f"{url}gradio_api/info", "chat.example.org", origin)[0] == wanted

    names = ("Chat.example.org", "bücher.example", "fd00::5")
    run_chat(visit, "--model", base, *(part for name in names for part in ("--page_host", name)))


def check_that_other_sites_are_refused(url):
    for origin, wanted in (("http://evil.example", 403), ("null", 403), (url.rstrip("/"), 200)):
        request = urllib.request.Request(f"{url}gradio_api/info", headers={"Origin": origin})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert answer.status == wanted
        except urllib.error.HTTPError as error:
            assert error.code == wanted, origin
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{url}gradio_api/upload", data=b"x" * 10, timeout=20)


def test_pages_of_other_sites_can_neither_ask_nor_upload_anything(server):
    check_that_other_sites_are_refused(server.url)


def test_other_sites_are_refused_at_other_addresses_too(base, run_chat):
    run_chat(lambda url, output: check_that_other_sites_are_refused(url), "--model", base, "--host", "127.0.0.2")


def test_no_page_element_may_come_from_elsewhere(server):
    _, headers = status_of(server.url)
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ") and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_files_of_this_machine_are_not_served(server, reward_checkpoint):
    for path in ("/etc/passwd", reward_checkpoint / "config.json", ROOT / "chat.py"):
        assert status_of(f"{server.url}gradio_api/file={path}")[0] in (403, 404)


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--share"], "--share: a public address without --auth"),
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 is reachable by others, so --auth"),
        (["--host", "::"], "--host: :: is reachable by others"),
        (["--auth", "me"], "--auth: expected USER:PASS"),
        (["--auth", ":secret"], "--auth: expected USER:PASS"),
        (["--demo", "--model", "x"], "--demo: brings its own models"),
        (["--page_host", "https://a.example"], "--page_host: got 'https://a.example', expected a host's name without"),
        (["--page_host", "a.example:443"], "--page_host: got 'a.example:443'"),
        (["--page_host", "a.example", "--page_host", "*"], "--page_host: got '*'"),
        (["--page_host", "*.example"], "--page_host: got '*.example'"),
        (["--page_host", ""], "--page_host: got ''"),
    ],
)
def test_flags_that_would_let_anyone_in_are_refused_with_the_reason(flags, reason):
    given, problems = chat.flags.read_flags(chat.ChatConfig, flags, "A test.")
    with pytest.raises(chat.UserError, match=re.escape(reason)) as caught:
        chat.flags.build_config(chat.ChatConfig, given, problems)
    assert caught.value.exit_code == 2


def test_with_auth_nothing_works_without_the_password(base, run_chat):
    def visit(url, output):
        url = url.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(Exception, match=r"[Cc]redentials|401|auth"):
            Client(url, verbose=False).predict("Hello?", api_name="/chat")
        client = Client(url, auth=("me", "secret"), verbose=False)
        assert client.predict("Hello?", max_new_tokens=8, api_name="/chat").strip()
        assert 400 <= status_of(url, "evil.example")[0] < 500

    run_chat(visit, "--model", base, "--host", "0.0.0.0", "--auth", "me:secret")


def test_without_a_model_the_page_opens_at_once_and_says_what_is_missing(run_chat):
    def visit(url, output):
        client = Client(url, verbose=False)
        with pytest.raises(AppError, match="no model is loaded yet: press Load"):
            client.predict("hello", api_name="/chat")
        with pytest.raises(AppError, match="no reward model is loaded"):
            client.predict(ANSWERED, api_name="/score")

    run_chat(visit)  # HF_HUB_OFFLINE is set, and no cache holds the default model


def test_the_demo_trains_its_reward_model_once_and_replies(run_chat):
    def visit(url, output):
        client = Client(url, verbose=False)
        assert "training" not in output
        assert client.predict("Hello?", max_new_tokens=8, api_name="/chat").strip()
        assert isinstance(client.predict(ANSWERED, api_name="/score"), float)

    flags = ["--demo", "--run_name", chat.DEMO_RUN, "--max_steps", "2", "--eval_num_batches", "1", "--no_report"]
    train_rm.main(flags)
    run_chat(visit, "--demo")  # finds that run and trains none


@pytest.mark.parametrize(
    "votes_file, found",
    [
        ("folder", "Is a directory"),
        ("file/votes.jsonl", "Not a directory"),
        ("locked/new/votes.jsonl", "locked is not writable"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_votes_file_that_cannot_be_written_is_refused_before_the_demo_is_trained(
    votes_file, found, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "demo_models", lambda output_dir: pytest.fail("the demo is trained"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write anywhere
    for name in ("folder", "locked"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(chat.UserError, match=f"--votes_file cannot be written(.|\n)*{found}") as caught:
        chat.main(["--demo", "--port", str(free_port()), "--votes_file", votes_file])
    assert caught.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "locked"]


def test_the_demo_without_a_reward_model_trains_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = []

    run = tmp_path / "checkpoints/rm" / chat.DEMO_RUN

    def train(command):
        commands.append(command)
        (run / "step-1").mkdir(parents=True, exist_ok=True)
        return 0

    monkeypatch.setattr(utils, "run_child", train)
    monkeypatch.setattr(chat.resolve, "sound_checkpoint", Path)
    policy_name, reward_folder = chat.demo_models(Path("checkpoints/rm"))
    assert policy_name == os.path.join("demo", "model") and reward_folder == Path("checkpoints/rm") / chat.DEMO_RUN
    assert commands[0][1] == str(ROOT / "train_rm.py") and "--demo" in commands[0]
    chat.demo_models(Path("checkpoints/rm"))  # that one did not say that it finished
    assert commands[1][2:] == ["--resume_from", os.path.join("checkpoints/rm", chat.DEMO_RUN)]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal to one process alone")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_page_alone_ends_the_demos_training_too_which_saves(script_server, tmp_path, number, code):
    script = script_server.start(["chat.py", "--demo", "--port", free_port()], tmp_path)
    script.wait_for("step 17/350")
    script.send_signal(number)
    stopped = script.wait(60)
    assert stopped.returncode == code, stopped.stderr
    run = tmp_path / "checkpoints/rm" / chat.DEMO_RUN
    assert "(the last completed step)" in stopped.stdout and stopped.stderr.endswith("stopped\n")
    assert run_folder.read_record(run).state == "stopped" and manifest.find(str(run)).name >= "step-17"
    assert not file_locks.is_locked(run / file_locks.RunLock.FILE), "nobody trains it any more"


def test_autoload_loads_the_models_at_start_and_ctrl_c_stops_with_130_and_no_traceback(base, reward_checkpoint):
    with Server("--model", base, "--reward_model", reward_checkpoint, "--autoload", "--port", free_port()) as server:
        assert f"loading {base}\n" in server.lines
        assert isinstance(Client(server.url, verbose=False).predict(ANSWERED, api_name="/score"), float)
        assert server.stop(signal.SIGINT) == (130, "stopped\n")


def test_a_taken_port_is_skipped_but_an_error_if_it_was_given(run_script):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < chat_app.server.free_port("127.0.0.1", port, port + 20) <= port + 20
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
    for part in ("--autolod: no such flag, did you mean --autoload?", "--port: got 70000", "--host: got ''"):
        assert part in result.stderr
    assert run_script("chat.py", "--host", "no.such.host.invalid").returncode == 2


def test_help_does_not_wait_for_torch_or_gradio():
    code = "import sys, chat; print([name for name in ('torch', 'gradio', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n"
