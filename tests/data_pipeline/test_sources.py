"""sources.py: where files are found, how they are split and read, and what is said about broken ones."""

import dataclasses
import gzip
import json
import os
import shutil

import pytest

from data_pipeline import parsing, reading, sampler, sources
from data_pipeline.parsing import Pair
from tests.data_pipeline.rows import (
    GOOD_ROW,
    NO,
    PROMPT,
    QUESTION,
    YES,
    numbered_row,
    parse,
    read_all,
    read_part,
    write_as,
)
from utils import DiskOrNetworkError, UserError


def find(path, **settings):
    """The one train and the one test source of a dataset."""
    found = sources.find_sources(sources.DataSpec(str(path), **settings))
    (train,), (test,) = found.train, found.test
    return train, test


# ---------------------------------------------------------------------------------------------------------------------
# The split by the hash of the prompts
# ---------------------------------------------------------------------------------------------------------------------


def parts_of(path):
    """(row numbers of the train part, of the test part) of a file that is split by hash."""
    train, test = find(path)
    assert (train.part, test.part) == ("train", "test")
    return tuple({number for number, _ in read_part(source)} for source in (train, test))


def test_the_parts_of_one_file_are_disjoint_and_together_complete(write_rows):
    train, test = parts_of(write_rows([numbered_row(number) for number in range(2000)]))
    assert not train & test and train | test == set(range(1, 2001))
    assert 60 <= len(test) <= 140, "about one prompt in 20 is held out"


def test_the_split_stays_when_the_file_grows(write_rows):
    content = [numbered_row(number) for number in range(800)]
    train, test = parts_of(write_rows(content[:500]))
    grown_train, grown_test = parts_of(write_rows(content))
    assert train == {number for number in grown_train if number <= 500} and len(grown_train) > len(train)
    assert test == {number for number in grown_test if number <= 500} and len(grown_test) > len(test)


def as_message_lists(row):
    return {side: parsing.parse_transcript(text) for side, text in row.items()}


def as_prompt_and_replies(row):
    return {
        "prompt": row["chosen"].split(" Yes")[0],
        "chosen": "Yes" + row["chosen"].split(" Yes")[1],
        "rejected": "No.",
    }


@pytest.mark.parametrize("form", [dict, as_message_lists, as_prompt_and_replies])
def test_rows_of_one_prompt_are_on_one_side_of_the_split(write_rows, form):
    replies = ("Yes.", "Yes, surely.", "Yes!\n\nAnd why not?")
    content = [form(numbered_row(number, reply)) for number in range(150) for reply in replies]
    train, test = parts_of(write_rows(content))

    def prompts(part):
        return {(number - 1) // len(replies) for number in part}

    assert len(train) + len(test) == len(content) and test
    assert not prompts(train) & prompts(test)


def test_skipped_rows_are_in_exactly_one_part_too(write_rows):
    content = [{**numbered_row(number), "rejected": numbered_row(number)["chosen"]} for number in range(200)]
    path = write_rows(content)
    keys = [key for source in find(path) for _, key in read_part(source)]
    assert keys == ["identical"] * 200


def test_the_parts_have_fingerprints_of_their_own_that_follow_the_content(write_rows):
    path = write_rows([GOOD_ROW])
    before = [source.fingerprint() for source in find(path)]
    again = [source.fingerprint() for source in find(path)]
    write_rows([GOOD_ROW, GOOD_ROW])
    after = [source.fingerprint() for source in find(path)]
    assert before == again and len({*before, *after}) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", reading.SUFFIXES)
@pytest.mark.parametrize("test_name", sources.TEST_NAMES)
def test_a_folder_with_a_train_and_a_test_file_is_read_whole(tmp_path, suffix, test_name):
    write_as(tmp_path / f"train{suffix}", [numbered_row(number) for number in range(40)])
    write_as(tmp_path / f"{test_name}{suffix}", [numbered_row(number) for number in range(40, 50)])
    train, test = ([pair for _, pair in read_part(source)] for source in find(tmp_path))
    assert [pair.chosen[0]["content"] for pair in train] == [f"What is {number}?" for number in range(40)]
    assert [pair.chosen[0]["content"] for pair in test] == [f"What is {number}?" for number in range(40, 50)]


def test_train_and_test_may_have_different_suffixes(tmp_path):
    write_as(tmp_path / "train.parquet", [GOOD_ROW])
    write_as(tmp_path / "test.jsonl.gz", [GOOD_ROW])
    assert [source.files[0].name for source in find(tmp_path)] == ["train.parquet", "test.jsonl.gz"]


@pytest.mark.parametrize("suffix", reading.SUFFIXES)
def test_a_single_file_of_each_suffix_is_read_the_same(tmp_path, suffix):
    content = [{**numbered_row(number), "margin": 0.5, "kind": "sums"} for number in range(100)]
    path = write_as(tmp_path / f"pairs{suffix}", content)
    assert read_all(path) == [(number, parse(**row)) for number, row in enumerate(content, start=1)]
    train, test = parts_of(path)
    assert not train & test and train | test == set(range(1, 101))


@pytest.mark.parametrize("suffix", reading.SUFFIXES)
def test_message_lists_come_through_each_suffix(tmp_path, suffix):
    path = write_as(tmp_path / f"pairs{suffix}", [{"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}] * 2)
    assert read_all(path) == [(number, Pair([QUESTION, YES], [QUESTION, NO])) for number in (1, 2)]


def test_a_folder_without_a_test_file_is_split_by_hash(tmp_path):
    write_as(tmp_path / "train.jsonl", [numbered_row(number) for number in range(100)])
    train, test = parts_of(tmp_path)
    assert not train & test and train | test == set(range(1, 101))


# (files, settings) -> (train, test, left aside), all as names of files below the folder
LAYOUTS = {
    "a copy of a hub repository with shards": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        {}, ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["data/test-00000-of-00001.parquet"], [],
    ),
    "shards with a hash in their names": (
        ["data/train-00000-of-00001-0060ef47a12160d5.parquet", "data/validation-00000-of-00001-1a.parquet"],
        {}, ["data/train-00000-of-00001-0060ef47a12160d5.parquet"], ["data/validation-00000-of-00001-1a.parquet"], [],
    ),
    "preferences before supervised data": (
        ["train_sft.jsonl", "test_sft.jsonl", "train_prefs.jsonl", "test_prefs.jsonl", "train_gen.jsonl"],
        {}, ["train_prefs.jsonl"], ["test_prefs.jsonl"], ["test_sft", "train_gen", "train_sft"],
    ),
    "a split that is asked for, with its test split": (
        ["train_sft.jsonl", "test_sft.jsonl", "train_prefs.jsonl", "test_prefs.jsonl"],
        {"split": "train_sft"}, ["train_sft.jsonl"], ["test_sft.jsonl"], ["test_prefs", "train_prefs"],
    ),
    "both asked for": (
        ["train_sft.jsonl", "test_sft.jsonl", "train_prefs.jsonl"], {"split": "train_prefs", "test_split": "test_sft"},
        ["train_prefs.jsonl"], ["test_sft.jsonl"], ["train_sft"],
    ),
    "val": (["train.csv", "val.csv"], {}, ["train.csv"], ["val.csv"], []),
    "valid": (["train.csv", "valid.csv"], {}, ["train.csv"], ["valid.csv"], []),
    "dev": (["train.json.gz", "dev.json.gz"], {}, ["train.json.gz"], ["dev.json.gz"], []),
    "test before validation": (
        ["train.jsonl", "validation.jsonl", "test.jsonl"], {}, ["train.jsonl"], ["test.jsonl"], ["validation"],
    ),
    "folders that are splits": (
        ["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
        {}, ["default/train/0000.parquet", "default/train/0001.parquet"], ["default/test/0000.parquet"], [],
    ),
    "the default configuration before others": (
        ["default/train/0000.parquet", "extra/train/0000.parquet"], {}, ["default/train/0000.parquet"], None, ["extra"],
    ),
    "the folder of preferences before others": (
        ["edit/train.jsonl.gz", "preference/train.jsonl.gz", "preference/validation.jsonl.gz"],
        {}, ["preference/train.jsonl.gz"], ["preference/validation.jsonl.gz"], ["edit"],
    ),
    "a subset that is asked for": (
        ["edit/train.jsonl", "preference/train.jsonl"], {"subset": "edit"}, ["edit/train.jsonl"], None, [],
    ),
    "a prefix": (["my_train.jsonl", "my_test.jsonl"], {}, ["my_train.jsonl"], ["my_test.jsonl"], []),
    "files whose names say nothing": (["a.jsonl", "b.jsonl"], {}, ["a.jsonl", "b.jsonl"], None, []),
    "other files beside named ones": (
        ["train.jsonl", "eval_results.json", "notes.jsonl"], {}, ["train.jsonl"], None, ["eval_results", "notes"],
    ),
    "what is no data": (["train.jsonl", "dataset_infos.json", ".cache/train.jsonl"], {}, ["train.jsonl"], None, []),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_folders_are_read_as_they_lie(tmp_path, name):
    files, settings, train_files, test_files, aside = LAYOUTS[name]
    for number, file in enumerate(files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        write_as(tmp_path / file, [numbered_row(10 * number + row) for row in range(3)])
    found = sources.find_sources(sources.DataSpec(str(tmp_path), **settings))
    (train,), (test,) = found.train, found.test
    assert [path.relative_to(tmp_path).as_posix() for path in train.files] == train_files
    if test_files is None:
        assert (train.part, test.part, test.files) == ("train", "test", train.files)
    else:
        assert [path.relative_to(tmp_path).as_posix() for path in test.files] == test_files
    assert [note for note in found.notes if not all(each in note for each in aside)] == []
    assert bool(found.notes) == bool(aside)


def test_rows_of_shards_go_on_counting_and_keep_their_places(tmp_path):
    for shard in range(2):
        rows = [numbered_row(2 * shard), {**GOOD_ROW, "chosen": None}]
        write_as(tmp_path / f"train-{shard:05}-of-00002.jsonl", rows)
    train = dataclasses.replace(find(tmp_path)[0], part="all")
    assert [number for number, _ in read_part(train)] == [1, 2, 3, 4]
    assert {number: train.place(number) for number in (2, 4)} == {
        2: f"{tmp_path / 'train-00000-of-00002.jsonl'}:2", 4: f"{tmp_path / 'train-00001-of-00002.jsonl'}:2",
    }  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows lets only administrators make links")
def test_links_are_followed_and_those_that_lead_nowhere_named(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").symlink_to(write_as(tmp_path / "pairs.jsonl", [GOOD_ROW]))
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")
    assert find(tmp_path / "set")[0].files == (tmp_path / "set" / "train.jsonl",)
    (tmp_path / "pairs.jsonl").unlink()
    with pytest.raises(UserError, match=r"leads nowhere(.|\n)*train\.jsonl"):
        find(tmp_path / "set")


def test_files_that_look_like_data_and_are_not_read_are_named(tmp_path):
    write_as(tmp_path / "train.jsonl", [GOOD_ROW])
    for name in ("b.JSONL", "c.ndjson", "d.tsv", "e.jsonl.zst", "README.md", ".hidden.tsv"):
        (tmp_path / name).write_text("{}")
    deep = tmp_path / "1/2/3/4/5"
    deep.mkdir(parents=True)
    write_as(deep / "train.jsonl", [GOOD_ROW])
    (note,) = sources.find_sources(sources.DataSpec(str(tmp_path))).notes
    assert "not read" in note and "1/2/3/4/5/train.jsonl, b.JSONL, c.ndjson, d.tsv, e.jsonl.zst (" in note
    with pytest.raises(UserError, match=r"without data files(.|\n)*5/train\.jsonl"):
        find(tmp_path / "1")


def test_the_address_of_a_set_on_the_hub_is_its_id(monkeypatch):
    fake_hub(monkeypatch, train=[GOOD_ROW], test=[GOOD_ROW])
    for address in (
        "https://huggingface.co/datasets/somebody/pairs",
        "https://huggingface.co/datasets/somebody/pairs/tree/main",
    ):
        assert find(address)[0].name == "somebody/pairs train"


def test_one_split_cannot_be_both(tmp_path):
    for split in ("train", "test"):
        write_as(tmp_path / f"{split}.jsonl", [GOOD_ROW])
    with pytest.raises(UserError, match=r"test cannot be training and test data at once(.|\n)*--test_split"):
        find(tmp_path, split="test")


def test_a_missing_shard_is_named(tmp_path):
    write_as(tmp_path / "train-00000-of-00003.parquet", [GOOD_ROW])
    write_as(tmp_path / "train-00002-of-00003.parquet", [GOOD_ROW])
    with pytest.raises(UserError, match=r"lacks 1 of the 3 files of train(.|\n)*train-00001-of-00003"):
        find(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["train-00000-of-00001-aa11.parquet", "train-00000-of-00001-bb22.parquet"],
    ],
)
def test_two_generations_of_shards_are_refused(tmp_path, names):
    for name in names:
        write_as(tmp_path / name, [GOOD_ROW])
    with pytest.raises(UserError, match=r"shards of train twice(.|\n)*keep one whole set"):
        find(tmp_path)


def test_hh_rlhfs_own_folders_are_read_all_or_one(tmp_path):
    for folder in ("harmless-base", "helpful-base"):
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            write_as(tmp_path / folder / f"{split}.jsonl.gz", [GOOD_ROW])
    (tmp_path / "red-team-attempts").mkdir()
    write_as(tmp_path / "red-team-attempts" / "red_team_attempts.jsonl.gz", [{"transcript": "x"}])
    found = sources.find_sources(sources.DataSpec(str(tmp_path)))
    assert [source.files[0].parent.name for source in found.train] == ["harmless-base", "helpful-base"]
    assert [source.files[0].parent.name for source in found.test] == ["harmless-base", "helpful-base"]
    assert found.notes == (f"left aside in {tmp_path}: red-team-attempts (--subset takes one)",)
    for spec in (
        sources.DataSpec(f"{tmp_path}:helpful-base"), sources.DataSpec(str(tmp_path), subset="helpful-base"),
    ):  # fmt: skip
        (train,) = sources.find_sources(spec).train
        assert train.files == (tmp_path / "helpful-base" / "train.jsonl.gz",)
    with pytest.raises(UserError, match="did you mean 'helpful-base'"):
        find(tmp_path, subset="helpful")
    with pytest.raises(UserError, match="name two subsets"):
        find(f"{tmp_path}:helpful-base", subset="harmless-base")


def test_several_sets_are_found_one_after_the_other(tmp_path):
    first, second = write_as(tmp_path / "a.jsonl", [GOOD_ROW]), tmp_path / "b"
    second.mkdir()
    for split in ("train", "test"):
        write_as(second / f"{split}.jsonl", [GOOD_ROW])
    found = sources.find_sources(sources.DataSpec(f"{first},{second}"))
    assert [(source.files[0].name, source.part) for source in found.train + found.test] == [
        ("a.jsonl", "train"), ("train.jsonl", "all"), ("a.jsonl", "test"), ("test.jsonl", "all"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="the same data twice"):
        sources.find_sources(sources.DataSpec(f"{first},{first}"))
    with pytest.raises(UserError, match="empty name"):
        sources.find_sources(sources.DataSpec(f"{first},"))
    comma = write_as(tmp_path / "a,b.jsonl", [GOOD_ROW])
    assert find(comma)[0].files == (comma,)
    assert sources.dataset_names(f"{first}, {comma} ,{second}") == [str(first), str(comma), str(second)]
    assert sources.from_anywhere(f"{first},{comma}") == f"{first},{comma}"


@pytest.mark.parametrize("flag", ["split", "test_split"])
def test_a_split_that_is_not_there_is_named_with_the_nearest(tmp_path, flag):
    for split in ("train_prefs", "test_prefs"):
        write_as(tmp_path / f"{split}.jsonl", [GOOD_ROW])
    with pytest.raises(UserError, match=rf"--{flag} tran_prefs: no such split, did you mean 'train_prefs'"):
        find(tmp_path, **{flag: "tran_prefs"})
    with pytest.raises(UserError, match=f"--{flag} train: a single file has no"):
        find(tmp_path / "train_prefs.jsonl", **{flag: "train"})


@pytest.mark.parametrize("is_split", [True, False])
def test_what_datasets_saved_to_disk_is_read(tmp_path, is_split):
    import datasets

    rows = datasets.Dataset.from_list([{"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}] * 3)
    saved = datasets.DatasetDict(train_prefs=rows, test_prefs=rows.select([0])) if is_split else rows
    saved.save_to_disk(str(tmp_path / "saved"))
    train, test = find(tmp_path / "saved")
    assert (train.part, test.part) == (("all", "all") if is_split else ("train", "test"))
    pair = Pair([QUESTION, YES], [QUESTION, NO])
    assert read_part(dataclasses.replace(train, part="all")) == [(number, pair) for number in (1, 2, 3)]


def test_a_folder_of_what_was_saved_to_disk_is_read_by_name(tmp_path, capsys):
    import datasets

    def save(count, *place):
        rows = datasets.Dataset.from_list([{"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}] * count)
        rows.save_to_disk(str(tmp_path.joinpath(*place)))

    save(3, "splits", "train")
    save(1, "splits", "test")
    train, test = find(tmp_path / "splits")
    assert (train.part, test.part, len(read_part(train)), len(read_part(test))) == ("all", "all", 3, 1)
    save(3, "sets", "one")
    save(4, "sets", "two")
    found = sources.find_sources(sources.DataSpec(str(tmp_path / "sets")))
    assert [len(read_part(dataclasses.replace(source, part="all"))) for source in found.train] == [3, 4]
    assert not found.notes
    assert len(read_part(dataclasses.replace(find(tmp_path / "sets", subset="two")[0], part="all"))) == 4
    shutil.copytree(tmp_path / "splits" / "train", tmp_path / "mixed" / "alpha")
    rows = datasets.Dataset.from_list([{"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "mixed" / "beta"))
    found = sources.find_sources(sources.DataSpec(str(tmp_path / "mixed")))
    assert [source.name for source in found.train] == [f"{tmp_path / 'mixed' / 'beta'} train"]
    assert found.notes == (f"left aside in {tmp_path / 'mixed'}: alpha (--subset takes one)",)


def test_every_file_that_is_left_aside_is_named(tmp_path):
    for name in ("train", "extra", "more"):
        write_as(tmp_path / f"{name}.jsonl", [GOOD_ROW])
    found = sources.find_sources(sources.DataSpec(str(tmp_path)))
    assert found.notes == (f"left aside in {tmp_path}: extra, more (--split and --test_split take one)",)
    assert find(tmp_path, split="extra")[0].files == (tmp_path / "extra.jsonl",)


def test_a_name_without_its_suffix_is_guessed_when_the_hub_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "pairs").mkdir()
    write_as(tmp_path / "pairs" / "train.jsonl", [GOOD_ROW])
    with pytest.raises(DiskOrNetworkError, match=r"did you mean pairs/train\.jsonl\?"):
        find("pairs/train")


def test_a_pointer_of_git_lfs_is_not_taken_for_data(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=r"only a pointer(.|\n)*git lfs pull"):
        read_all(path)


def test_rows_that_share_a_prompt_are_held_out_by_row(tmp_path):
    rows = [{"prompt": "The same?", "chosen": f"Yes {number}.", "rejected": "No."} for number in range(400)]
    train, test = parts_of(write_as(tmp_path / "same.jsonl", rows))
    assert not train & test and len(train | test) == 400 and 5 <= len(test) <= 40
    rows = [{**row, "prompt": f"One of {number % 3}?"} for number, row in enumerate(rows)]
    train, test = parts_of(write_as(tmp_path / "three.jsonl", rows))
    assert not train & test and len(train | test) == 400 and 5 <= len(test) <= 40


def test_ranked_replies_to_different_prompts_are_held_out_by_prompt():
    prompts = [(row, digest) for row, digest in enumerate(range(100, 119)) for _ in range(6)]
    assert not sampler.shares_prompts(prompts) and not sampler.shares_prompts([])
    assert sampler.shares_prompts([*prompts, (200, 100)])
    assert sampler.shares_prompts([(row, row if row < 40 else 7) for row in range(100)])


def test_a_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_as(tmp_path / "pairs.jsonl", [GOOD_ROW])
    assert find("~/pairs.jsonl")[0].files[0] == tmp_path / "pairs.jsonl"


def test_a_folder_with_two_train_files_is_refused(tmp_path):
    write_as(tmp_path / "train.jsonl", [GOOD_ROW])
    write_as(tmp_path / "train.parquet", [GOOD_ROW])
    with pytest.raises(UserError, match=r"more than one train file(.|\n)*train\.jsonl, train\.parquet") as caught:
        find(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_a_train_file_says_what_it_holds(tmp_path):
    write_as(tmp_path / "test.jsonl", [GOOD_ROW])
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"no training data(.|\n)*found: *test(.|\n)*--split") as caught:
        find(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_empty_folder_is_said_to_hold_nothing(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        find(tmp_path)


@pytest.mark.parametrize("name", ["train.tsv", "train.txt", "train", "train.jsonl.zip"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text("chosen,rejected\n")
    with pytest.raises(UserError, match=r"\.jsonl, \.jsonl\.gz, \.json, .* or \.csv\.gz") as caught:
        find(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("mistyped", ["trian.jsonl", "train.json"])
def test_a_mistyped_path_names_the_nearest(tmp_path, mistyped):
    write_as(tmp_path / "train.jsonl", [GOOD_ROW])
    (tmp_path / "zebra").mkdir()
    with pytest.raises(UserError, match=r"--dataset: .*did you mean 'train\.jsonl'\?") as caught:
        find(tmp_path / mistyped)
    assert str(tmp_path / mistyped) in str(caught.value)


@pytest.mark.parametrize("mistyped", ["trian.jsonl", "pairs/trian.jsonl"])
def test_a_mistyped_file_name_is_not_taken_for_a_hub_id(tmp_path, monkeypatch, mistyped):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    for folder in (tmp_path, tmp_path / "pairs"):
        write_as(folder / "train.jsonl", [GOOD_ROW])
    with pytest.raises(UserError, match=r"did you mean 'train\.jsonl'\?"):
        find(mistyped)


def test_a_path_in_a_missing_folder_says_so(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist either"):
        find(tmp_path / "nowhere" / "train.jsonl")


def fake_hub(monkeypatch, **splits):
    import datasets

    hub_splits = {name: datasets.Dataset.from_list(content) for name, content in splits.items()}
    monkeypatch.setattr(sources.hub, "only_local_copy", lambda *arguments: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: datasets.DatasetDict(hub_splits))


def test_the_splits_of_a_hub_dataset_are_found_and_read(monkeypatch):
    content = [{"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}]
    fake_hub(monkeypatch, test_prefs=content, train_prefs=[*content, *content], other=[{"text": "no pairs"}])
    train, test = find("somebody/pairs")
    assert (train.name, test.name) == ("somebody/pairs train_prefs", "somebody/pairs test_prefs")
    pair = Pair([QUESTION, YES], [QUESTION, NO])
    assert read_part(train) == [(1, pair), (2, pair)] and read_part(test) == [(1, pair)]
    assert train.fingerprint() != test.fingerprint()


def test_a_hub_dataset_without_a_test_split_is_split_by_hash(monkeypatch):
    fake_hub(monkeypatch, train=[numbered_row(number) for number in range(100)])
    train, test = parts_of("somebody/pairs")
    assert not train & test and train | test == set(range(1, 101))


def test_a_hub_dataset_without_a_train_split_is_refused(monkeypatch):
    fake_hub(monkeypatch, test=[GOOD_ROW], other=[GOOD_ROW])
    with pytest.raises(UserError, match=r"no training data(.|\n)*somebody/pairs(.|\n)*test, other"):
        find("somebody/pairs")


def test_a_broken_row_on_the_hub_is_named(monkeypatch):
    fake_hub(monkeypatch, train=[GOOD_ROW, {**GOOD_ROW, "chosen": None}], test=[GOOD_ROW])
    train, _ = find("somebody/pairs")
    assert read_part(train)[1] == (2, "null: 'chosen' is null")
    assert train.place(2) == "somebody/pairs train, row 2"


# ---------------------------------------------------------------------------------------------------------------------
# Broken files: file, line, reason
# ---------------------------------------------------------------------------------------------------------------------

GOOD_LINE = json.dumps(GOOD_ROW).encode()
BAD_LINES = {
    "cut line": (GOOD_LINE[:-5], "not JSON"),
    "two rows": (GOOD_LINE + GOOD_LINE, "not JSON"),
    "single quotes": (b"{'chosen': 'Yes.'}", "not JSON"),
    "open brackets": (b"[" * 100_000, "not JSON"),
    "duplicate key": (b'{"chosen": "Yes.", "chosen": "No.", "rejected": "No."}', "'chosen' is given more than once"),
    "duplicate key in a message": (b'{"chosen": [{"role": "user", "role": "user"}]}', "'role' is given more than once"),
    "byte of latin-1": (b'{"chosen": "caf\xe9"}', "not UTF-8 text"),
    "byte of utf-16": (b"\xff\xfe" + GOOD_LINE, "not UTF-8 text"),
    "raw control character": (b'{"chosen": "a\x00b"}', "not JSON"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("name", list(BAD_LINES))
def test_a_broken_line_is_named_with_file_line_and_reason(tmp_path, suffix, name):
    line, reason = BAD_LINES[name]
    content = b"\n".join([GOOD_LINE, line, GOOD_LINE])
    path = tmp_path / f"train{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
    with pytest.raises(UserError) as caught:
        read_all(path)
    assert f"{path}:2" in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize("name", ["cut line", "single quotes", "duplicate key", "byte of latin-1"])
def test_a_broken_row_in_a_json_file_is_not_blamed_on_the_first(tmp_path, name):
    line, reason = BAD_LINES[name]
    path = tmp_path / "train.json"
    path.write_bytes(b"[\n" + b",\n".join([GOOD_LINE, line, GOOD_LINE]) + b"\n]\n")
    with pytest.raises(UserError) as caught:
        read_all(path)
    text = str(caught.value)
    assert str(path) in text and reason in text
    assert "row 1" not in text, "the first row is whole"


def test_broken_json_in_a_json_file_names_the_line(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(b"[\n" + b",\n".join([GOOD_LINE, b"{'chosen': 'Yes.'}", GOOD_LINE]) + b"\n]\n")
    with pytest.raises(UserError, match="line 3"):
        read_all(path)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_cut_gzip_file_is_named_with_the_last_whole_line(tmp_path, kept):
    lines = b"".join(json.dumps(numbered_row(number)).encode() + b"\n" for number in range(2000))
    path = tmp_path / "train.jsonl.gz"
    whole = gzip.compress(lines)
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=r"damaged or cut off(.|\n)*after line \d+") as caught:
        read_all(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [GOOD_LINE, gzip.compress(GOOD_LINE)[:-8] + b"\0" * 8, b"\x1f\x8b\x08\0" + b"\xff" * 99]
)
def test_what_is_no_gzip_file_is_named(tmp_path, content):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or cut off") as caught:
        read_all(path)
    assert str(path) in str(caught.value)


def test_a_json_file_may_hold_its_rows_under_one_key(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"data": [GOOD_ROW]}, indent=2))
    assert read_all(path) == [(1, parse(**GOOD_ROW))]


@pytest.mark.parametrize(
    "content, kind", [(GOOD_LINE, "dict"), (b'"text"', "str"), (b"null", "NoneType"), (b"3", "int")]
)
def test_a_json_file_that_is_no_list_is_refused(tmp_path, content, kind):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"must hold one list of rows(.|\n)*{kind}(.|\n)*\.jsonl") as caught:
        read_all(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "overwritten"])
def test_a_broken_parquet_file_is_named(tmp_path, damage):
    path = write_as(tmp_path / "train.parquet", [numbered_row(number) for number in range(3000)])
    whole = path.read_bytes()
    middle = len(whole) // 3
    damaged = {
        "cut": whole[: len(whole) // 2],
        "text": GOOD_LINE,
        "empty": b"",
        "overwritten": whole[:10] + b"\xff" * middle + whole[10 + middle :],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"damaged, or not a parquet file(.|\n)*after row \d+") as caught:
        read_all(path)
    assert str(path) in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Harmless oddities
# ---------------------------------------------------------------------------------------------------------------------

PAIR = Pair([QUESTION, YES], [QUESTION, NO])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, suffix):
    content = b"[" + GOOD_LINE + b"]" if suffix == ".json" else GOOD_LINE + b"\n" + GOOD_LINE
    content = b"\xef\xbb\xbf" + content
    path = tmp_path / f"train{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
    assert read_all(path)[0] == (1, PAIR)


def test_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD_LINE + b"\r\n" + GOOD_LINE + b"\r\n")
    assert read_all(path) == [(1, PAIR), (2, PAIR)]


def test_blank_lines_are_skipped_and_still_counted_as_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n" + GOOD_LINE + b"\n\n  \t\r\n" + GOOD_LINE + b"\n\n\n")
    assert read_all(path) == [(2, PAIR), (5, PAIR)]


def test_a_last_line_without_an_end_is_read(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD_LINE + b"\n" + GOOD_LINE)
    assert read_all(path) == [(1, PAIR), (2, PAIR)]


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "train.jsonl").touch()
    assert read_all(tmp_path / "train.jsonl") == []


@pytest.mark.parametrize(
    "odd", ["a\0b", "a\u2028b\x85c\x0bd", "😀 naïve مرحبا", "line\r\nline", "<|im_end|>", "\\n\\nHuman: x"]
)
def test_odd_characters_inside_a_text_come_through(write_rows, odd):
    row = {"chosen": f"{PROMPT} {odd}", "rejected": f"{PROMPT} No."}
    assert read_all(write_rows([row, GOOD_ROW])) == [
        (1, Pair([QUESTION, {"role": "assistant", "content": odd}], [QUESTION, NO])), (2, PAIR),
    ]  # fmt: skip


def test_unescaped_line_separators_do_not_end_a_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({**GOOD_ROW, "note": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_all(path) == [(1, PAIR)]


@pytest.mark.parametrize("suffix", reading.SUFFIXES)
def test_a_reply_of_120_000_words_is_read_whole(tmp_path, suffix):
    reply = " ".join(f"word{number}" for number in range(120_000))
    path = write_as(tmp_path / f"train{suffix}", [GOOD_ROW, {**GOOD_ROW, "chosen": f"{PROMPT} {reply}"}])
    assert read_all(path)[1] == (2, Pair([QUESTION, {"role": "assistant", "content": reply}], [QUESTION, NO]))


def test_other_columns_do_no_harm(write_rows):
    row = {**GOOD_ROW, "id": 3, "source": None, "scores": [1, 2], "meta": {"a": {"b": []}}}
    assert read_all(write_rows([row])) == [(1, PAIR)]


# ---------------------------------------------------------------------------------------------------------------------
# CSV
# ---------------------------------------------------------------------------------------------------------------------


def test_messages_in_cells_are_read_as_json_and_as_pandas_writes_lists(tmp_path):
    for number, write in enumerate((json.dumps, repr)):
        path = tmp_path / f"pairs{number}.csv"
        cells = [write([QUESTION, YES]), write([QUESTION, NO])]
        path.write_text("chosen,rejected\n" + ",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n")
        assert read_all(path) == [(1, Pair([QUESTION, YES], [QUESTION, NO]))]


def test_lines_within_cells_quotes_and_empty_cells_come_through(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,chosen,rejected\r\n"Is it, or\nis it ""not""?",[1],\r\n')
    ((number, reason),) = read_all(path)
    assert (number, reason) == (1, "null: 'rejected' is null")
    path.write_bytes(b'prompt,chosen,rejected\n"Is it, or\nis it ""not""?",[1],No\n')
    ((_, pair),) = read_all(path)
    assert [turn["content"] for turn in pair.chosen] == ['Is it, or\nis it "not"?', "[1]"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("prompt,chosen,rejected\na,b\n", r"not whole(.|\n)*row 1(.|\n)*2 cells, where the first line has 3"),
        ('prompt,chosen,rejected\n"a,b,c\n', r"not CSV(.|\n)*after row 0"),
        ("prompt,chosen,chosen\na,b,c\n", "two columns of one name"),
    ],
)
def test_a_broken_csv_file_is_named(tmp_path, text, words):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_all(tmp_path / "pairs.csv")
