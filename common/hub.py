"""Ask the Hugging Face hub one quick question before any download, so that a typo or a broken connection is reported
within seconds instead of after a minute of retries."""

from pathlib import Path, PureWindowsPath

from utils import DiskOrNetworkError, UserError, near_matches, nearest

ANSWER_WITHIN_SECONDS = 3  # without an answer, huggingface_hub tries a second time
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz")
LFS_POINTER = b"version https://git-lfs"
WANTED = {
    "--model": "a local path or a hub id, such as Qwen/Qwen3-0.6B",
    "--resume_from": "a step-N folder, or a run's folder for its newest step",
    "--dataset": "a local path or a hub id, such as Anthropic/hh-rlhf",
    "--base_model": "the model that an adapter was trained on: a folder, or a hub id",
    "--against": "another reward model: a folder, or a hub id",
    "--reward_model": "the folder of a reward checkpoint, or of its run, such as ./checkpoints/rm/RUN",
}


def looks_like_a_path(name: str) -> bool:
    """Whether a user who typed `name` meant a file or folder. Hub ids have at most one slash and start with a letter or
    digit."""
    if name.startswith((".", "/", "~")) or name.endswith(DATA_SUFFIXES) or PureWindowsPath(name).drive:
        return True
    return "\\" in name or name.count("/") > 1 or Path(name).exists()


def check_path_exists(name: str, flag: str) -> None:
    """Raise UserError, with the nearest names, if `name` is a path and nothing is there. Does not ask the hub."""
    path = Path(name).expanduser()
    if looks_like_a_path(name) and not path.exists():
        raise missing_path(path, flag)


def missing_path(path: Path, flag: str) -> UserError:
    """The error about a path that is not there: what is near its first part that is missing, else what is beside it."""
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    parent = missing.parent
    siblings = (
        sorted(each.name for each in parent.iterdir() if not each.name.startswith(".")) if parent.is_dir() else []
    )
    near = near_matches(missing.name, siblings)
    more = f" and {len(siblings) - 8} more" if len(siblings) > 8 else ""
    holds = f"{parent} holds {', '.join(siblings[:8]) or 'nothing'}{more}"
    found = f"near it in {parent}: {', '.join(near)}" if near else holds
    return UserError(
        f"{flag}: no such file or folder" + (f", did you mean {near[0]!r}?" if near else ""),
        where=path.absolute(),
        found=found if missing == path else f"{path.parent} does not exist either; {found}",
        next=f"{flag} takes {WANTED[flag]}",
    )


def check_no_pointer(path: Path) -> None:
    """UserError if a file, or one in a folder, is what a clone without Git LFS has in place of a large file."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
            if is_pointer:
                raise UserError(
                    "the file is only a pointer to its content, as Git keeps large files", where=file,
                    next=f"git lfs pull   in {file.parent}, or download the file",
                )  # fmt: skip


def _local_guess(name: str) -> str:
    """ ", did you mean …" with what a name that is no path almost is."""
    parent = Path(name).expanduser().parent
    siblings = {str(Path(sibling)) for sibling in parent.iterdir()} if parent.is_dir() else set()
    same = sorted(each for each in siblings if each.startswith(f"{Path(name)}."))
    return f", did you mean {same[0]}?" if same else nearest(str(Path(name)), siblings)


def only_local_copy(repo_id: str, repo_type: str, flag: str, instead: str) -> bool:
    """Whether `repo_id` must be opened from the local cache because the hub cannot be reached.

    Raises UserError if the hub has no such repository or it is gated, DiskOrNetworkError if the hub cannot be reached
    in time and there is no local copy. `instead` says what to type then.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().repo_info(repo_id, repo_type=repo_type, timeout=ANSWER_WITHIN_SECONDS)
        return False
    except HFValidationError as error:
        raise UserError(f"{flag} is neither a local path nor a hub id", found=repo_id, next=str(error)) from error
    except GatedRepoError as error:
        raise UserError(
            f"{flag} {repo_id} is gated: you must accept its owner's terms first",
            where=f"https://huggingface.co/{repo_id}",
            next="accept them there, then: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{flag} {repo_id}: the hub has no such {repo_type}, or it is private{_local_guess(repo_id)}",
            next="check the spelling; for a private one: hf auth login",
        ) from error
    except Exception as error:  # which class depends on the HTTP library underneath; any of them means "no answer"
        is_offline = isinstance(error, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if is_offline else "the Hugging Face hub cannot be reached"
        if _has_local_copy(repo_id, repo_type):
            if not is_offline:
                print(f"{why}; using the local copy of {repo_id}", flush=True)
            return True
        raise DiskOrNetworkError(
            f"{why}, and there is no local copy of {repo_id}",
            where=Path(repo_id).absolute(),
            found=f"no such file or folder either{_local_guess(repo_id)}; {type(error).__name__}: {error}",
            next=instead,
        ) from error


def _has_local_copy(repo_id: str, repo_type: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "snapshots"
    return folder.is_dir() and any(folder.iterdir())
