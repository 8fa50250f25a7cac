"""A reward model that knows its data, and one server for all tests that need a real one: it starts in ten seconds."""

import os
import shutil
from pathlib import Path

import pytest

import utils
from checkpointing import manifest
from tests.chat_server import Server, free_port

PAGE_HOST = "chat.example.org"  # behind the proxy of test_proxy.py


@pytest.fixture(scope="session")
def reward_checkpoint(run_folder, demo_folder, tmp_path_factory):
    """The run's checkpoint in a run of its own that says what it was trained on."""
    folder = tmp_path_factory.mktemp("rm") / "bread" / "step-2"
    shutil.copytree(run_folder / "step-2", folder, ignore=shutil.ignore_patterns("manifest.json"))
    settings = utils.read_json(folder / "train_config.json")
    utils.write_json(folder / "train_config.json", {**settings, "dataset": str(demo_folder[1])})
    manifest.write_manifest(folder, 2)
    return folder


@pytest.fixture(scope="session")
def server(reward_checkpoint, tmp_path_factory):
    """chat.py with the small reward model and its base; `votes_file` is where its votes go, `policy_dir` is empty."""
    votes_file = tmp_path_factory.mktemp("votes") / "preferences.jsonl"
    policy_dir = tmp_path_factory.mktemp("grpo")
    model = os.environ.get("SCREENSHOT_MODEL", reward_checkpoint)
    output_dir = Path(model).parent if "SCREENSHOT_MODEL" in os.environ else reward_checkpoint.parent.parent
    arguments = ["--model", model, "--output_dir", output_dir, "--policy_dir", policy_dir, "--page_host", PAGE_HOST]
    with Server(*arguments, "--port", free_port(), "--votes_file", votes_file) as running:
        running.votes_file, running.policy_dir = votes_file, policy_dir
        yield running
