"""Shared by the tests of evaluations: small reward models, and eval_rm.py run in an empty folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_rm
import models
import utils
from tests.reward_models import save_constant_model, save_length_model

FP32 = ("--precision", "fp32")


@pytest.fixture(scope="session")
def length_model(tmp_path_factory, base):
    return save_length_model(tmp_path_factory.mktemp("models") / "length", base)


@pytest.fixture(scope="session")
def constant_model(tmp_path_factory, base, tokenizer):
    return save_constant_model(tmp_path_factory.mktemp("models") / "constant", base, tokenizer)


@pytest.fixture
def evaluate(tmp_path, monkeypatch, demo_folder):
    """Run eval_rm.main in an empty folder; returns the content of report.json."""
    monkeypatch.chdir(tmp_path)

    def run(model, *flags, dataset=demo_folder[1]):
        given = [] if dataset is None else ["--dataset", str(dataset)]
        eval_rm.main(["--model", str(model), *given, "--report_dir", "out", *map(str, flags)])
        return utils.read_json(Path("out/report.json"))

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without pictures, for tests of something else: drawing takes longer than scoring a few rows."""
    from common import pages
    from evaluation import plots

    monkeypatch.setattr(pages, "svg", lambda plot: "<svg></svg>")
    monkeypatch.setattr(plots, "image", lambda plot: np.zeros((4, 4, 3), dtype=np.uint8))


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def adapter(base, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    model = models.RewardModel.create(base, tokenizer, 3, models.LoraSettings(r=4))
    with torch.no_grad():
        for name, parameter in model.hf_model.named_parameters():
            if "lora_B" in name:  # zero at first, so that an adapter that is not applied would not be noticed
                parameter.normal_(std=0.05)
    model.save(folder)
    return folder
