"""AdamW with its moments in main memory: the same bits as torch's, and memory that is taken before the first step."""

import pytest
import torch

import train_rm
from tests.test_models import make_model
from train_rm import RewardTrainingConfig
from training import optimizer
from training.optimizer import AdamW
from utils import UserError

SHAPES = [(7, 5), (300,), (), (64, 9)]


def parameters_and_gradients(steps):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return parameters, [[torch.randn(shape) * 10**-step for shape in SHAPES] for step in range(steps)]


def train(adamw, parameters, gradients, first=0):
    for step, of_step in enumerate(gradients, start=first):
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone() if step or parameter.dim() else None  # one has none in the first step
        adamw.param_groups[0]["lr"] = 0.1 / (step + 1)
        adamw.step()


@pytest.mark.parametrize("offloads", ["from the start", "after two steps", "never"])
def test_a_step_is_bitwise_that_of_torch(offloads, monkeypatch):
    monkeypatch.setattr(optimizer, "NUMBERS_AT_ONCE", 64)
    settings = {"lr": 0.1, "weight_decay": 0.01, "fused": True}
    plain, gradients = parameters_and_gradients(5)
    theirs = torch.optim.AdamW(plain, **settings)
    train(theirs, plain, gradients)

    mine, gradients = parameters_and_gradients(5)
    ours = AdamW(mine, **settings)
    if offloads == "from the start":
        ours.offload()
    ours.make_moments()
    train(ours, mine, gradients[:2])
    if offloads == "after two steps":
        ours.offload()
    train(ours, mine, gradients[2:], first=2)

    for one, other in zip(mine, plain, strict=True):
        assert torch.equal(one, other)
        assert ours.state[one].keys() == theirs.state[other].keys()
        assert all(torch.equal(value, theirs.state[other][key]) for key, value in ours.state[one].items())


def out_of_memory_until_offloaded(adamw, monkeypatch):
    zeros = torch.zeros_like

    def little_memory(tensor):
        if not adamw.is_offloaded and tensor.shape == SHAPES[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return zeros(tensor)

    monkeypatch.setattr(torch, "zeros_like", little_memory)


def test_moments_that_do_not_fit_beside_the_weights_are_kept_in_main_memory(monkeypatch):
    parameters, _ = parameters_and_gradients(0)
    adamw = AdamW(parameters, fused=True)
    out_of_memory_until_offloaded(adamw, monkeypatch)
    adamw.make_moments(may_offload=True)
    assert adamw.is_offloaded and all(
        adamw.state[parameter]["exp_avg"].shape == parameter.shape for parameter in parameters
    )


def test_where_that_is_not_allowed_the_message_says_what_to_type(monkeypatch):
    parameters, _ = parameters_and_gradients(0)
    adamw = AdamW(parameters, fused=True)
    out_of_memory_until_offloaded(adamw, monkeypatch)
    with pytest.raises(UserError, match=r"moments do not fit(.|\n)*--offload_optimizer"):
        adamw.make_moments()


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    parameters, _ = parameters_and_gradients(0)
    monkeypatch.setattr(torch, "zeros_like", lambda tensor: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        AdamW(parameters, fused=True).make_moments(may_offload=True)


@pytest.mark.parametrize("lora", [False, True])
def test_the_head_can_have_a_learning_rate_of_its_own(base, tokenizer, lora):
    model = make_model(base, tokenizer, lora)
    adamw = optimizer.make_optimizer(model, RewardTrainingConfig(lr=1e-5, head_lr=1e-3))
    others, head = adamw.param_groups
    assert [tuple(parameter.shape) for parameter in head["params"]] == [(1, 128)]
    assert (others["lr_scale"], head["lr_scale"]) == (1.0, pytest.approx(100))
    assert len(others["params"]) == len(model.trained_parameters()) - 1


def test_each_group_of_parameters_follows_the_schedule(base, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rates = []
    monkeypatch.setattr(AdamW, "step", lambda adamw: rates.append([group["lr"] for group in adamw.param_groups]))
    train_rm.main(["--model", base, "--dataset", small_dataset, "--no_report", "--batch_size", "4", "--max_steps", "4",
                   "--grad_accum", "1", "--eval_num_batches", "1", "--lr", "1e-3", "--head_lr", "0.1",
                   "--lr_schedule", "linear"])  # fmt: skip
    assert rates == [pytest.approx([scale * 1e-3, scale * 0.1]) for scale in (1, 0.75, 0.5, 0.25)]
