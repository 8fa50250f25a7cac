"""common/hub.py: what a path that is not there almost was."""

import os

import pytest

from common import hub
from utils import UserError


@pytest.mark.parametrize(
    "typed, wanted",
    [
        ("./checkpoints/rm/rnu", ["did you mean 'run'?", "near it in checkpoints/rm: run"]),
        ("./checkpoints/rm/rnu/step-3", ["did you mean 'run'?", "rnu does not exist either; near it in", ": run"]),
        ("./checkpoints/rm/2024", ["near it in checkpoints/rm: 20240115_143022, 20240116_143022"]),
        ("./checkpoints/rm/Qwen-LR", ["did you mean 'qwen-lr-1e-5'?"]),
        ("./chekcpoints/rm/run", ["did you mean 'checkpoints'?", "near it in .: checkpoints"]),
        ("./checkpoints/rm/zzzz", ["no such file or folder\n", "holds 20240115_143022, 20240116_143022, other-0"]),
    ],
)
def test_a_mistyped_path_is_answered_with_the_names_near_it(tmp_path, monkeypatch, typed, wanted):
    monkeypatch.chdir(tmp_path)
    names = ["run", "20240115_143022", "20240116_143022", "qwen-lr-1e-5", ".trash"]
    for name in [*names, *(f"other-{number}" for number in range(9))]:
        (tmp_path / "checkpoints/rm" / name).mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        hub.check_path_exists(typed, "--model")
    text = str(caught.value)
    assert all(part.replace("/", os.sep) in text for part in wanted), text
    assert ".trash" not in text and (typed[-4:] != "zzzz" or "and 5 more" in text)
    assert (typed[-4:] == "zzzz") == ("other-" in text)
