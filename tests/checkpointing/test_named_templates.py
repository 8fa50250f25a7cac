"""A base model with several named chat templates, which transformers saves in a folder: from training to the trash."""

import json

import pytest

import models
import utils
from checkpointing import manifest, resolve
from tests.reward_models import save_with_named_templates

FOLDER = "additional_chat_templates"
NAMED = {f"{FOLDER}/rag.jinja", f"{FOLDER}/tool_use.jinja"}


@pytest.fixture(scope="module")
def named_base(base, tmp_path_factory):
    return str(save_with_named_templates(tmp_path_factory.mktemp("named") / "model", base))


def test_they_are_all_kept_and_the_default_is_used(named_base, tokenizer):
    named = models.load_tokenizer(named_base)
    assert list(named.chat_template) == ["default", "rag", "tool_use"]
    dialogue = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]
    plain = tokenizer.apply_chat_template(dialogue, tokenize=False)
    assert named.apply_chat_template(dialogue, tokenize=False) == plain
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    assert named.apply_chat_template(dialogue, tools=tools, tokenize=False).startswith("tools: ")


def test_templates_in_the_old_form_are_opened_too(base, tmp_path, tokenizer):
    folder = save_with_named_templates(tmp_path / "model", base)
    named = models.load_tokenizer(str(folder))
    for path in [*(folder / FOLDER).iterdir(), folder / "chat_template.jinja"]:
        path.unlink()
    listed = [{"name": name, "template": text} for name, text in named.chat_template.items()]
    settings = utils.read_json(folder / "tokenizer_config.json")
    utils.write_json(folder / "tokenizer_config.json", settings | {"chat_template": listed})
    assert models.load_tokenizer(str(folder)).chat_template == named.chat_template
    utils.write_json(folder / "tokenizer_config.json", settings | {"chat_template": listed[:1]})
    assert models.load_tokenizer(str(folder)).chat_template == tokenizer.chat_template
    utils.write_json(folder / "tokenizer_config.json", settings | {"chat_template": listed[1:]})
    with pytest.raises(utils.UserError, match=r"none of them is the default(.|\n)*rag, tool_use"):
        models.load_tokenizer(str(folder))


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["full", "LoRA"])
def test_a_run_is_saved_resumed_evaluated_deleted_and_brought_back(
    run_script, named_base, small_dataset, tmp_path, lora
):
    def run(script, *arguments):
        result = run_script(script, *arguments)
        assert result.returncode == 0, result.stderr
        return result

    flags = ["--model", named_base, "--dataset", small_dataset, "--batch_size", 8, "--grad_accum", 2, "--save_steps", 2,
             "--eval_num_batches", 1, "--lr", "1e-3", "--no_report", *lora]  # fmt: skip
    run("train_rm.py", *flags, "--run_name", "straight")
    run("train_rm.py", *flags, "--run_name", "other", "--max_steps", 2)
    run("train_rm.py", "--resume_from", tmp_path / "checkpoints/rm/other", "--max_steps", 0)
    straight, other = (tmp_path / f"checkpoints/rm/{name}/step-4" for name in ("straight", "other"))
    content = manifest.read_manifest(straight)["files"]
    assert content.keys() > NAMED and manifest.problem(straight) is None
    for name in content.keys() - {"train_config.json", "adapter_config.json"}:  # PEFT writes a set, in any order
        assert (straight / name).read_bytes() == (other / name).read_bytes(), name
    assert list(models.load_tokenizer(str(other)).chat_template) == ["default", "rag", "tool_use"]

    run("eval_rm.py", "--model", straight, "--dataset", small_dataset, "--report_dir", "out")
    assert utils.read_json(tmp_path / "out/report.json")["pairs"] == 16

    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    (listed,) = [one for one in json.loads(run("manage_runs.py", "--json").stdout) if one["name"] == "straight"]
    assert listed["checkpoint_bytes"] == sum(
        path.lstat().st_size for path in straight.parent.rglob("*") if not path.is_dir()
    )
    run("manage_runs.py", "--delete", "straight/step-4", "--yes")
    assert not straight.exists()
    run("manage_runs.py", "--undo")
    run("manage_runs.py", "--shrink", "--name", "straight", "--yes")
    assert resolve.sound_checkpoint(str(straight)) == straight  # it is valid without its optimizer state too
    run("manage_runs.py", "--undo")
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before
    assert manifest.problem(straight) is None


@pytest.fixture
def saved(named_base, tmp_path):
    """A step with named templates, by a manifest that lists them."""
    folder = tmp_path / "run" / "step-1"
    models.RewardModel.create(named_base, models.load_tokenizer(named_base), 0).save(folder)
    manifest.write_manifest(folder, 1)
    return folder


@pytest.mark.parametrize(
    "damage, found",
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "its content changed"),
        (lambda path: path.rename(path.with_name("other")) and path.mkdir(), "no such file"),
    ],
)
def test_a_damaged_file_in_a_folder_is_named(saved, damage, found, capsys):
    assert manifest.problem(saved) is None
    earlier = saved.with_name("step-0")
    earlier.mkdir()
    manifest.write_manifest(earlier, 0)
    damage(saved / FOLDER / "rag.jinja")
    with pytest.raises(utils.CheckpointError, match=found) as caught:
        resolve.sound_checkpoint(str(saved))
    assert f"where:  {saved / FOLDER / 'rag.jinja'}" in str(caught.value)
    assert manifest.find(str(saved.parent)) == earlier
    assert f"step-1 is damaged ({FOLDER}/rag.jinja: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "a//b", "", "."])
def test_a_manifest_that_leads_out_of_its_folder_is_damaged(saved, name):
    content = manifest.read_manifest(saved)
    content["files"][name] = {"bytes": 0, "sha256": ""}
    utils.write_json(saved / "manifest.json", content | {"sha256": manifest.own_checksum(content)})
    path, found = manifest.problem(saved)
    assert path == saved / "manifest.json" and repr(name) in found


def test_a_windows_path_in_a_manifest_leads_out_on_windows(monkeypatch):
    names = ["C:secret", "..\\secret", "rag:v2.jinja"]
    assert not any(map(manifest.leads_out, names))  # elsewhere these are names of files like any other
    monkeypatch.setattr(manifest.os, "name", "nt")
    assert all(map(manifest.leads_out, names)) and not manifest.leads_out(f"{FOLDER}/rag.jinja")
