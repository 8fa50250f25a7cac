"""flags.py: flags and --config files, and everything wrong in one message."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import flags
from common.flags import flag
from utils import UserError


@dataclass(frozen=True)
class Config:
    batch_size: int = flag(32, "pairs at most", minimum=1)
    rate: float = flag(0.5, "100 % of something", above=0, below=10)
    fast: bool = flag(False, "be quick")
    careful: bool = flag(True, "be slow")
    schedule: str = flag("constant", "how it goes on", choices=("constant", "linear", "cosine"))
    folder: str = flag("out", "where it goes")
    run_name: str | None = flag(None, "what it is called")
    names: tuple[str, ...] = flag((), "several words")
    sets: str = flag("a", "one or several", is_list=True)
    config: str | None = flag(None, "JSON file with settings")

    def problems(self):
        return ["--folder: may not be 'forbidden'"] if self.folder == "forbidden" else []


def read(*argv):
    return flags.build_config(Config, *flags.read_flags(Config, list(argv), "A test."))


def problem_with(*argv):
    with pytest.raises(UserError) as caught:
        read(*argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def test_a_flag_that_may_be_repeated_joins_its_values():
    assert read().sets == "a"
    assert read("--sets", "b").sets == "b"
    assert read("--sets", "b,c", "--sets", "d").sets == "b,c,d"


def test_a_list_takes_several_words_again_and_again_and_expands_nothing():
    assert read("--names", "a", "~", "--fast", "--names", "b").names == ("a", "~", "b")
    assert read().names == ()
    assert "is a variable unset" in problem_with("--names", "a", "") and "expected at least" in problem_with("--names")


def test_a_list_in_a_config_file_is_a_list_of_texts(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"names": ["a", "b"]}')
    assert read("--config", str(path)).names == ("a", "b")
    for wrong in ('"a"', "[1]", "[null]", "{}"):
        path.write_text(f'{{"names": {wrong}}}')
        assert "expected a list of texts" in problem_with("--config", str(path))


def test_without_flags_everything_has_its_default():
    assert read() == Config()
    assert flags.read_flags(Config, [], "A test.") == ({}, [])


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--batch_size", "7"], "batch_size", 7),
        (["--batch_size=7"], "batch_size", 7),
        (["--rate", "1e-5"], "rate", 1e-5),
        (["--rate", "3"], "rate", 3.0),
        (["--rate", "0.0001"], "rate", 0.0001),
        (["--schedule", "cosine"], "schedule", "cosine"),
        (["--folder", "7"], "folder", "7"),
        (["--folder", "a b=c"], "folder", "a b=c"),
        (["--folder=--odd"], "folder", "--odd"),
        (["--run_name", "first"], "run_name", "first"),
        (["--run_name", "None"], "run_name", "None"),
    ],
)
def test_a_flag_becomes_a_value_of_its_type(argv, name, value):
    config = read(*argv)
    assert config == dataclasses.replace(Config(), **{name: value})
    assert type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(
    "argv, value",
    [
        (["--fast"], True),
        (["--no_fast"], False),
        *((["--fast", text], True) for text in ("True", "true", "1", "yes")),
        *((["--fast", text], False) for text in ("False", "false", "0", "no")),
        (["--fast=True"], True),
        (["--fast=False"], False),
        (["--fast", "--folder", "x"], True),
    ],
)
def test_a_switch_has_three_spellings(argv, value):
    assert read(*argv).fast is value
    assert read(*[word.replace("fast", "careful") for word in argv]).careful is value


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--batch_size", "1", "--batch_size", "2"], "batch_size", 2),
        (["--fast", "--no_fast"], "fast", False),
        (["--no_fast", "--fast"], "fast", True),
        (["--fast", "False", "--fast"], "fast", True),
        (["--no_fast", "--fast", "True", "--fast=0"], "fast", False),
    ],
)
def test_the_last_of_several_wins(argv, name, value):
    assert getattr(read(*argv), name) == value


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--batch_size", "many"], "--batch_size: got 'many', expected a whole number"),
        (["--batch_size", "1.5"], "--batch_size: got '1.5', expected a whole number"),
        (["--batch_size", ""], "--batch_size: got '', expected a whole number"),
        (["--batch_size", "9" * 5000], "expected a whole number"),
        (["--rate", "fast"], "--rate: got 'fast', expected a number"),
        (["--rate", "nan"], "--rate: got 'nan', expected a finite number"),
        (["--rate", "inf"], "--rate: got 'inf', expected a finite number"),
        (["--rate", "1e999"], "--rate: got '1e999', expected a finite number"),
        (["--fast", "maybe"], "--fast: got 'maybe', expected True or False"),
        (["--fast="], "--fast: got '', expected True or False"),
        (["--batch_size", "0"], "--batch_size: got 0, expected at least 1"),
        (["--batch_size", "-3"], "--batch_size: got -3, expected at least 1"),
        (["--rate", "0"], "--rate: got 0.0, expected more than 0"),
        (["--rate", "10"], "--rate: got 10.0, expected less than 10"),
        (["--schedule", "cosin"], "got 'cosin', expected one of constant, linear, cosine, did you mean 'cosine'?"),
        (["--folder", "forbidden"], "--folder: may not be 'forbidden'"),
        (["stray"], "'stray': not a flag, nor the value of one"),
        (["--no_fast", "True"], "'True': not a flag, nor the value of one"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_what_came_and_what_is_wanted(argv, message):
    text = problem_with(*argv)
    assert message in text and text.startswith("error: 1 setting cannot be used") and "--help" in text


@pytest.mark.parametrize("argv", [["--batch_size", "1"], ["--rate", "9.99"], ["--rate", "1e-300"]])
def test_values_at_the_edge_of_their_limits_are_taken(argv):
    assert getattr(read(*argv), argv[0][2:]) == float(argv[1])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--batch_sise", "7"], "--batch_sise: no such flag, did you mean --batch_size?"),
        (["--batch-size", "7"], "--batch-size: no such flag, did you mean --batch_size?"),
        (["--batch-size=7"], "--batch-size: no such flag, did you mean --batch_size?"),
        (["--run-name", "first"], "--run-name: no such flag, did you mean --run_name?"),
        (["--qqq"], "--qqq: no such flag"),
        (["-b", "7"], "-b: no such flag"),
    ],
)
def test_an_unknown_flag_names_the_nearest_once(argv, message):
    text = problem_with(*argv)
    assert message in text and text.startswith("error: 1 setting")
    assert ("did you mean" in text) == ("did you mean" in message)


@pytest.mark.parametrize("argv", [["--batch", "7"], ["--sched", "linear"], ["--fas"], ["--no_fas"]])
def test_abbreviations_are_refused(argv):
    assert f"{argv[0]}: no such flag" in problem_with(*argv)


@pytest.mark.parametrize("argv", [["--batch_size"], ["--rate"], ["--run_name"], ["--config"], ["--folder", "--fast"]])
def test_a_missing_value_is_named(argv):
    text = problem_with(*argv)
    assert f"{argv[0]}: expected one argument" in text and "--help" in text


def test_several_problems_are_reported_together(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"schedul": "linear", "batch_size": 0}')
    text = problem_with(
        "--rate", "fast", "--qqq", "1", "--fast", "maybe", "--folder", "forbidden", "--config", str(path)
    )
    assert text.startswith("error: 6 settings cannot be used")
    for part in (
        "--rate: got",
        "--qqq: no such",
        "--fast: got",
        "--folder: may",
        "'schedul' is no",
        "--batch_size: got 0",
    ):
        assert text.count(part) == 1


def test_help_names_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in text and field.metadata["help"] in text
    for shown in ("(default: 32)", "(default: constant)", "{constant,linear,cosine}", "A test."):
        assert shown in text
    assert "(default: None)" not in text


# ---------------------------------------------------------------------------------------------------------------------
# --config files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path):
    def write(content):
        path = tmp_path / "config.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_flags_win_over_a_config_file_wherever_they_stand(config_file):
    path = config_file('{"batch_size": 5, "rate": 2, "fast": true, "run_name": "a"}')
    expected = Config(batch_size=6, rate=2.0, fast=False, run_name="a", config=path)
    assert read("--batch_size", "6", "--config", path, "--no_fast") == expected
    assert type(expected.rate) is type(read("--config", path).rate) is float


@pytest.mark.parametrize("content", ["{}", "\ufeff{}", " \r\n{ }\r\n"])
def test_harmless_config_files_change_nothing(config_file, content):
    path = config_file(content)
    assert read("--config", path) == Config(config=path)


def test_a_config_file_with_a_byte_order_mark_is_read(config_file):
    assert read("--config", config_file(b'\xef\xbb\xbf{"folder": "caf\xc3\xa9"}')).folder == "café"


BAD_CONFIGS = {
    "empty": ("", "not JSON"),
    "no JSON": ("batch_size: 5", "not JSON"),
    "cut": ('{"batch_size": 5', "not JSON"),
    "single quotes": ("{'batch_size': 5}", "not JSON"),
    "trailing comma": ('{"batch_size": 5,}', "not JSON"),
    "list": ('[{"batch_size": 5}]', "expected one JSON object, got list"),
    "null": ("null", "expected one JSON object, got NoneType"),
    "very deep": ("[" * 100_000, "not JSON"),
    "unknown key": ('{"batch_sise": 5}', "'batch_sise' is not a setting, did you mean 'batch_size'?"),
    "key with dashes": ('{"batch-size": 5}', "'batch-size' is not a setting, did you mean 'batch_size'?"),
    "config in config": ('{"config": "other.json"}', "'config' is not a setting"),
    "text for int": ('{"batch_size": "5"}', "'batch_size': got '5', expected a whole number"),
    "bool for int": ('{"batch_size": true}', "'batch_size': got True, expected a whole number"),
    "float for int": ('{"batch_size": 5.0}', "'batch_size': got 5.0, expected a whole number"),
    "null for int": ('{"batch_size": null}', "'batch_size': got None, expected a whole number"),
    "text for float": ('{"rate": "1e-5"}', "'rate': got '1e-5', expected a number"),
    "bool for float": ('{"rate": true}', "'rate': got True, expected a number"),
    "NaN": ('{"rate": NaN}', "'rate': got nan, expected a number"),
    "Infinity": ('{"rate": Infinity}', "'rate': got inf, expected a number"),
    "too large a float": ('{"rate": 1e999}', "'rate': got inf, expected a number"),
    "too large an int for a float": ('{"rate": 1' + "0" * 400 + "}", "'rate': got 1000"),
    "int for bool": ('{"fast": 1}', "'fast': got 1, expected True or False"),
    "text for bool": ('{"fast": "true"}', "'fast': got 'true', expected True or False"),
    "int for text": ('{"folder": 5}', "'folder': got 5, expected text"),
    "int for a text that may be missing": ('{"run_name": 5}', "'run_name': got 5, expected text"),
    "object for int": ('{"batch_size": {"value": 5}}', "'batch_size': got {'value': 5}, expected a whole number"),
    "list for text": ('{"folder": ["a"]}', "'folder': got ['a'], expected text"),
    "nested groups": ('{"speed": {"batch_size": 5}}', "'speed' is not a setting"),
    "duplicate key": ('{"rate": 1, "batch_size": 5, "batch_size": 6}', "the key 'batch_size' is given more than once"),
    "latin-1": (b'{"folder": "caf\xe9"}', "not UTF-8 text (byte 15)"),
    "utf-16": ('{"batch_size": 5}'.encode("utf-16"), "not UTF-8 text (byte 0)"),
    "below its limit": ('{"batch_size": 0}', "--batch_size: got 0, expected at least 1"),
    "no choice": ('{"schedule": "cosin"}', "did you mean 'cosine'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_CONFIGS))
def test_a_bad_config_file_is_named_with_key_value_and_what_is_wanted(config_file, name):
    content, message = BAD_CONFIGS[name]
    path = config_file(content)
    text = problem_with("--config", path)
    assert message in text and text.startswith("error: 1 setting")
    if name not in ("below its limit", "no choice"):  # reported as the flag's, after the layers are joined
        assert f"--config: {path}: " in text


def test_a_missing_config_file_is_named(tmp_path):
    assert f"--config: {tmp_path / 'nowhere.json'}: No such file" in problem_with(
        "--config", str(tmp_path / "nowhere.json")
    )


def test_a_folder_as_config_file_is_named(tmp_path):
    assert f"--config: {tmp_path}: " in problem_with("--config", str(tmp_path))


def test_every_problem_of_a_config_file_is_reported(config_file):
    path = config_file('{"batch_size": "5", "rate": NaN, "fats": true, "folder": null}')
    text = problem_with("--config", path)
    assert text.startswith("error: 4 settings") and text.count(f"--config: {path}: ") == 4


@pytest.mark.parametrize("text", ["", "  ", "a\0b"])
def test_an_empty_text_is_refused_because_a_shell_variable_may_be_unset(text):
    assert "--folder: got" in problem_with("--folder", text)


@pytest.mark.parametrize("text", ["-1e-5", "-1", "-.5"])
def test_a_negative_value_is_a_value_and_no_flag(text):
    assert f"--rate: got {float(text)}, expected more than 0" in problem_with("--rate", text)


def test_a_switch_is_not_given_a_negative_number_that_follows_it():
    assert "--fast: got '-1', expected True or False" in problem_with("--fast", "-1")


def test_debug_in_a_config_file_is_refused_because_it_must_hold_before_the_file_is_read(config_file):
    assert "'debug' is not a setting" in problem_with("--config", config_file('{"debug": true}'))


def test_bytes_that_are_no_utf8_are_refused():
    assert "--folder: got 'out\\udcff', expected UTF-8 text" in problem_with("--folder", "out\udcff")


def test_a_home_folder_in_a_config_file_is_expanded_as_on_the_command_line(config_file):
    path = config_file('{"folder": "~/out"}')
    assert read("--config", path).folder == read("--folder", "~/out").folder == str(Path.home() / "out")


def test_wrong_types_in_stored_settings_are_all_named():
    assert flags.wrong_types(Config, {"batch_size": "7", "rate": 1, "fast": 1}) == [
        "'batch_size': got '7', expected a whole number",
        "'fast': got 1, expected True or False",
    ]
