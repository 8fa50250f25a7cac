"""Where preference data is: the files or hub splits that `--dataset` means, for training and for testing.

`find_sources` looks in local files and folders as they lie, such as a copy of a hub repository, and on the hub. What it
leaves aside (another split, another subset) it says.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import utils
from common import hub
from data_pipeline import reading, shapes
from data_pipeline.reading import Columns, Source
from utils import UserError, nearest

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "validation", "valid", "val", "eval", "dev")
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
OTHER_SUFFIXES = (".ndjson", ".tsv", ".zst", ".xz", ".bz2", ".zip", ".tar.gz", ".arrow", ".feather", ".xlsx", ".pkl")
DEEPEST = 3  # folders below --dataset
READ = f"{', '.join(reading.SUFFIXES)}, at most {DEEPEST} folders deep"
HUB = "https://huggingface.co/datasets/"

_SHARD = re.compile(r"[-_.](\d+)-of-(\d+)(-[0-9a-f]+)?$|(?:^|[-_.])\d+$")
_ROLE = re.compile(rf"(?:(.*)[-_. ])?({'|'.join(TRAIN_NAMES + TEST_NAMES)})(?:[-_. ](.*))?", re.IGNORECASE)


@dataclass(frozen=True)
class DataSpec:
    """Which data: the settings that train_rm.py, eval_rm.py and data.py share."""

    dataset: str
    subset: str | None = None
    split: str | None = None
    test_split: str | None = None
    columns: Columns = ()

    @classmethod
    def of(cls, config: Any) -> "DataSpec":
        """Of a config with these settings; `--columns` is a text there."""
        columns = shapes.parse_columns(config.columns)
        return cls(config.dataset, config.subset, config.split, config.test_split, columns)


class Found(NamedTuple):
    """The sources of training and of testing, and what the user should know about how they were chosen."""

    train: tuple[Source, ...]
    test: tuple[Source, ...]
    notes: tuple[str, ...] = ()


# -- Finding -----------------------------------------------------------------------------------------------------------


def find_sources(spec: DataSpec) -> Found:
    """The train and test data of files, folders or hub ids; UserError if there is no training data."""
    parts = [_find(dataclasses.replace(spec, dataset=name)) for name in dataset_names(spec.dataset)]
    train, test, notes = (tuple(itertools.chain.from_iterable(column)) for column in zip(*parts, strict=True))
    if len(set(train)) < len(train):
        raise UserError("--dataset names the same data twice", where=spec.dataset, next="name it once")
    return Found(train, test, notes)


def dataset_names(text: str) -> list[str]:
    """The names in `a,b`; a path that holds commas is one name."""
    pieces, names = text.split(","), []
    while pieces:
        joined = (",".join(pieces[:count]).strip() for count in range(len(pieces), 1, -1))
        name = next((name for name in joined if Path(name).expanduser().exists()), pieces[0].strip())
        pieces = pieces[name.count(",") + 1 :]
        names.append(name)
    if not all(names):
        raise UserError("--dataset has an empty name", found=text, next="--dataset A,B, or --dataset A --dataset B")
    return names


def without_subset(spec: DataSpec) -> DataSpec:
    """`NAME:SUBSET` as a name with a subset, where NAME alone is no file or folder of that spelling."""
    if spec.dataset.startswith(HUB):  # as a browser shows it
        return dataclasses.replace(spec, dataset="/".join(spec.dataset.removeprefix(HUB).split("/")[:2]))
    name, colon, subset = spec.dataset.rpartition(":")
    is_drive = len(name) == 1  # C:\\pairs
    if not colon or not subset or is_drive or Path(spec.dataset).expanduser().exists():
        return spec
    if hub.looks_like_a_path(name) and not Path(name).expanduser().exists():
        return spec  # a path that is not there
    if spec.subset not in (None, subset):
        raise UserError(f"--subset {spec.subset} and --dataset {spec.dataset} name two subsets", next="leave one out")
    return dataclasses.replace(spec, dataset=name, subset=subset)


def from_anywhere(dataset: str) -> str:
    """The names of `--dataset` with absolute paths, so that they are found from any working folder."""
    names = []
    for name in dataset_names(dataset):
        path, subset = (spec := without_subset(DataSpec(name))).dataset, spec.subset
        names.append((str(Path(path).absolute()) if Path(path).exists() else path) + f":{subset}" * bool(subset))
    return ",".join(names)


def seen_from_here(dataset: str) -> str:
    return ",".join(utils.seen_from_here(name) for name in dataset_names(dataset))


def _find(spec: DataSpec) -> Found:
    spec = without_subset(spec)
    hub.check_path_exists(spec.dataset, "--dataset")
    path = Path(spec.dataset).expanduser()
    if path.is_file():
        found = _in_file(path, spec)
    else:
        subsets, notes = splits_of(spec)
        parts = [train_and_test(name, splits, spec) for name, splits in subsets.items()]
        train, test = (tuple(one[at] for one in parts) for at in (0, 1))
        found = Found(train, test, (*(note for one in parts for note in one[2]), *notes))
    return found._replace(**{
        name: tuple(dataclasses.replace(source, columns=spec.columns) for source in getattr(found, name))
        for name in ("train", "test")
    })  # fmt: skip


def _in_file(path: Path, spec: DataSpec) -> Found:
    check_is_data(path, "--dataset")
    for name in ("subset", "split", "test_split"):
        if value := getattr(spec, name):
            raise UserError(
                f"--{name} {value}: a single file has no {name.replace('_', ' ')}s", where=path,
                next="leave it out, or name the folder",
            )  # fmt: skip
    whole = Source(str(path), (path,))
    return Found(*((dataclasses.replace(whole, part=part),) for part in ("train", "test")))


def check_is_data(path: Path, flag: str) -> None:
    if not path.name.endswith(reading.SUFFIXES):
        wanted = f"expected: {', '.join(reading.SUFFIXES[:-1])} or {reading.SUFFIXES[-1]}"
        raise UserError(f"{flag} is not a supported file type", where=path, next=wanted)


def splits_of(spec: DataSpec, roles: tuple[str, ...] = ("train",)) -> tuple[dict[str, dict[str, Source]], list[str]]:
    """The splits of each subset that a folder's or hub id's settings mean, by name, and notes on what is left aside.

    Those without a split for any of `roles` are left aside if others have one.
    """
    path = Path(spec.dataset).expanduser()
    subsets = _splits_in(path) if path.is_dir() else {spec.subset or "": _splits_on_hub(spec)}
    saved = any(source.hub_rows is not None for splits in subsets.values() for source in splits.values())
    unread = [] if saved or not path.is_dir() else _unread_files(path)
    notes = [f"not read in {spec.dataset}: {_some(unread)} (only {READ})"] * bool(unread)
    if spec.subset and path.is_dir():
        inside = {name: splits for name, splits in subsets.items() if spec.subset in (name, name.split("/")[-1])}
        if not inside:
            raise UserError(
                f"--subset {spec.subset}: no such folder{nearest(spec.subset, subsets)}", where=path,
                found=_some(filter(None, subsets)) or "no folders with data",
            )  # fmt: skip
        return inside, notes
    usable = {name: splits for name, splits in subsets.items() if any(_role(split) in roles for split in splits)}
    usable = usable or subsets
    # preferences before anything else; what lies in the folder itself or is the default before what lies deeper
    preferred = {name: splits for name, splits in usable.items() if "pref" in name.lower()}
    usable = preferred or {name: usable[name] for name in ("", "default") if name in usable} or usable
    if aside := sorted(name or "the files in the folder itself" for name in subsets.keys() - usable.keys()):
        notes.insert(0, f"left aside in {spec.dataset}: {_some(aside)} (--subset takes one)")
    return usable, notes


def train_and_test(subset: str, splits: dict[str, Source], spec: DataSpec) -> tuple[Source, Source, list[str]]:
    """A subset's training and test data: those asked for, else those whose names say so, preferences first."""
    where = spec.dataset + f", {subset}" * bool(subset)
    for name in ("split", "test_split"):
        wanted = getattr(spec, name)
        if wanted and wanted not in splits:
            raise UserError(
                f"--{name} {wanted}: no such split{nearest(wanted, splits)}", where=where, found=_named(splits)
            )
    train = spec.split or best_split(splits, "train")
    if train is None:
        raise UserError(
            "--dataset has no training data", where=where, found=_named(splits),
            next=f"--split NAME takes one of these; data files end in {', '.join(reading.SUFFIXES)}",
        )  # fmt: skip
    test = spec.test_split or best_split(splits, "test", train)
    if test == train:
        raise UserError(
            f"the split {test} cannot be training and test data at once", where=where, found=_named(splits),
            next="another --split or --test_split",
        )  # fmt: skip
    aside = _some(sorted(name for name in splits if name not in (train, test)))
    notes = [f"left aside in {where}: {aside} (--split and --test_split take one)"] * bool(aside)
    if test is None:
        parts = (dataclasses.replace(splits[train], part=part) for part in ("train", "test"))
        return (*parts, notes)
    return splits[train], splits[test], notes


def _named(splits: Iterable[str]) -> str:
    return _some(filter(None, splits)) or "files whose names are of no split"


def best_split(splits: Iterable[str], role: str, beside: str | None = None) -> str | None:
    """The split that is most likely meant by "train" or "test", for a test split the one that belongs to `beside`."""
    candidates = [name for name in splits if _role(name) == role]
    if role == "test" and beside:
        family = _family(beside)
        candidates = [name for name in candidates if _family(name) in (family, ("", ""))]
        candidates.sort(key=lambda name: _family(name) != family)
    names = TRAIN_NAMES if role == "train" else TEST_NAMES

    def rank(name: str) -> tuple:
        keyword, (_, suffix) = _keyword(name), _family(name)
        is_of_other_kind = suffix in ("sft", "gen")
        family = 0 if beside is None else _family(name) != _family(beside)
        place = names.index(keyword) if keyword else len(names)
        return (family, "pref" not in name.lower(), is_of_other_kind, name.lower() not in names, place)

    return min(candidates, key=rank, default=None)


def _keyword(split: str) -> str:
    match = _ROLE.fullmatch(split)
    return match.group(2).lower() if match else ""


def _role(split: str) -> str:
    """What a split's name says that it is for: "train", "test" or "" for neither. A split without a name trains."""
    keyword = _keyword(split)
    return "train" if keyword in TRAIN_NAMES or not split else "test" if keyword else ""


def _family(split: str) -> tuple[str, str]:
    """What stands before and after "train" or "test" in a split's name."""
    match = _ROLE.fullmatch(split)
    return ((match.group(1) or "").lower(), (match.group(3) or "").lower()) if match else ("", "")


# -- In a folder -------------------------------------------------------------------------------------------------------


def _splits_in(folder: Path) -> dict[str, dict[str, Source]]:
    """The splits of a folder, by the subset (an inner folder, or "") and by name."""
    if _is_saved(folder):
        return {"": _saved_splits(folder)}
    groups: dict[tuple[str, str], list[Path]] = {}
    files = sorted(_data_files(folder))
    for path in files:
        groups.setdefault(_subset_and_split(path.relative_to(folder)), []).append(path)
    subsets: dict[str, dict[str, Source]] = {}
    for (subset, split), paths in groups.items():
        _check_shards(paths, split or "data")
        name = str(paths[0]) + f" and {len(paths) - 1} more" * (len(paths) > 1)
        subsets.setdefault(subset, {})[split] = Source(name, tuple(paths))
    if not subsets:
        for inner in sorted(folder.iterdir()):
            if _is_saved(inner):
                subset, split = _subset_and_split(Path(inner.name, "data.jsonl"))
                saved = _saved_splits(inner)
                subsets.setdefault(subset, {}).update({split: saved[""]} if saved.keys() == {""} else saved)
    if not subsets:
        inside = sorted(path.name for path in folder.iterdir())
        raise UserError(
            "--dataset is a folder without data files", where=folder,
            found=_some(_unread_files(folder) or inside) or "nothing",
            next=f"data files end in {', '.join(reading.SUFFIXES)}",
        )  # fmt: skip
    if any(name and _role(name) == "train" for splits in subsets.values() for name in splits):
        # beside files that say what they are for, others are something else
        subsets = {
            subset: {each: source for name in splits for each, source in _split_by_name(name, splits[name])}
            for subset, splits in subsets.items()
        }
    return subsets


def _split_by_name(name: str, source: Source) -> list[tuple[str, Source]]:
    """A split, or each of several files without a split's name by its own name."""
    if name or not source.files:
        return [(name or source.name, source)]
    return [(stem(path), Source(str(path), (path,))) for path in source.files]


def _files_below(folder: Path, deepest: int) -> Iterator[tuple[int, str, str]]:
    """(depth, folder, name) of files in and below a folder, but of hidden ones."""
    for at, folders, names in os.walk(folder, followlinks=True):
        depth = len(Path(at).relative_to(folder).parts)
        folders[:] = [name for name in folders if not name.startswith(".") and depth < deepest]
        yield from ((depth, at, name) for name in sorted(names) if not name.startswith("."))


def _unread_files(folder: Path) -> list[str]:
    """Files that look like data, and are not read: of another type, with capitals, or too deep."""
    return sorted(
        Path(at, name).relative_to(folder).as_posix()
        for depth, at, name in _files_below(folder, DEEPEST + 2)
        if name.lower().endswith((*reading.SUFFIXES, *OTHER_SUFFIXES)) and name not in NOT_DATA
        and (depth > DEEPEST or not name.endswith(reading.SUFFIXES))
    )  # fmt: skip


def _data_files(folder: Path) -> Iterator[Path]:
    for _, at, name in _files_below(folder, DEEPEST):
        if name.endswith(reading.SUFFIXES) and name not in NOT_DATA:
            if not (path := Path(at, name)).exists():
                raise UserError("a link leads nowhere", where=path, next="restore or remove it")
            yield path


def stem(path: Path) -> str:
    return path.name.removesuffix(next(suffix for suffix in reading.SUFFIXES if path.name.endswith(suffix)))


def _subset_and_split(path: Path) -> tuple[str, str]:
    """`data/train_prefs-00000-of-00002.parquet` -> ("", "train_prefs"); `harmless-base/test.jsonl` -> ("harmless-base",
    "test"); `default/train/0.parquet` -> ("default", "train"); `pairs.jsonl` -> ("", "")."""
    folders = list(path.parts[:-1])
    split = _SHARD.sub("", stem(path))
    if not _role(split) or not split:
        at = next((at for at in reversed(range(len(folders))) if folders[at] and _role(folders[at])), None)
        split = folders.pop(at) if at is not None else ""
    return "/".join(name for name in folders if name != "data"), split


def _check_shards(paths: list[Path], split: str) -> None:
    """UserError if shards are missing, or if files of one name are not shards of one whole."""
    stems = [stem(path) for path in paths]
    marks = [_SHARD.search(stem) for stem in stems]
    is_twice = len(set(stems)) < len(stems) or split in stems  # in two formats, or whole beside shards
    if split != "data" and len(paths) > 1 and is_twice:
        raise UserError(
            f"--dataset has more than one {split} file", where=paths[0].parent, found=_some(p.name for p in paths),
            next="keep one of them there, or name the file itself",
        )  # fmt: skip
    counted = [mark for mark in marks if mark and mark.group(2)]
    totals = {int(mark.group(2)) for mark in counted}
    if len(totals) > 1 or len({mark.group(1) for mark in counted}) < len(counted):
        found, advice = _some(path.name for path in paths), "keep one whole set of them there"
        raise UserError(f"--dataset has shards of {split} twice", where=paths[0].parent, found=found, next=advice)
    here = {int(mark.group(1)) for mark in counted}
    for total in totals:
        if missing := sorted(set(range(total)) - here):
            raise UserError(
                f"--dataset lacks {len(missing)} of the {total} files of {split}", where=paths[0].parent,
                found=f"missing: {split}-{missing[0]:05}-of-{total:05}", next="download the whole set again",
            )  # fmt: skip


def _is_saved(folder: Path) -> bool:
    """Whether a folder is what `datasets.save_to_disk` wrote."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved_splits(folder: Path) -> dict[str, Source]:
    """What `datasets.save_to_disk` wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # its errors have no common base class
        raise UserError(
            "--dataset cannot be opened", where=folder, found=f"{type(error).__name__}: {error}", next=reading.AGAIN
        ) from error
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"": saved}
    return {name: Source(f"{folder} {name}".strip(), hub_rows=rows) for name, rows in splits.items()}


# -- On the hub --------------------------------------------------------------------------------------------------------


def _splits_on_hub(spec: DataSpec) -> dict[str, Source]:
    name = spec.dataset + f":{spec.subset}" * bool(spec.subset)
    return {split: Source(f"{name} {split}", hub_rows=rows) for split, rows in hub_splits(spec).items()}


def hub_splits(spec: DataSpec) -> Any:
    """All splits of a dataset on the hub, or of its local copy: name -> datasets.Dataset.

    A subset is one of the dataset's configurations, or else one of its folders.
    """
    instead = "python train_rm.py --demo   (offline), or --dataset FILE.jsonl"
    local_only = hub.only_local_copy(spec.dataset, "dataset", "--dataset", instead)
    import datasets

    if local_only:
        datasets.config.HF_HUB_OFFLINE = True  # or it retries for half a minute before looking in its cache
    try:
        options: dict[str, Any] = {}
        if spec.subset:
            names = datasets.get_dataset_config_names(spec.dataset)
            options = {"name": spec.subset} if spec.subset in names else {"data_dir": spec.subset}
        return datasets.load_dataset(spec.dataset, **options)
    except Exception as error:  # its errors have no common base class
        raise UserError(
            "--dataset cannot be opened", where=spec.dataset, found=f"{type(error).__name__}: {error}",
            next="if it has several configurations, --subset NAME takes one",
        ) from error  # fmt: skip


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)
