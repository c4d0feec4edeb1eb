"""Files of a Hugging Face hub repository, with errors that say what to do. Bytes in, bytes out: nothing of ours in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moa.errors import HubError, MoaError, ResourceError, UsageError, shortage
from moa.units import human_bytes

# organisation/name, as the hub allows; a file such as out/plan.json is none
REPO_ID = re.compile(r"(?!.*(--|\.\.))[\w][\w.-]{0,95}/[\w][\w.-]{0,95}(?<!\.git)(?<!\.json)(?<![.-])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds at one commit."""

    commit: str
    names: frozenset[str]
    private: bool


def list_files(repo_id: str, revision: str | None = None) -> Listing:
    """What a repository holds at a revision, the newest of its main branch when None.

    Raises:
        UsageError: that is no repository's name.
        HubError: there is no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    check_repo_id(repo_id)
    with explaining(repo_id):
        info = HfApi().model_info(repo_id, revision=revision)
    names = frozenset(file.rfilename for file in info.siblings or [])
    return Listing(info.sha or "main", names, bool(info.private))


def read_file(repo_id: str, name: str, revision: str | None, max_bytes: int) -> bytes:
    """One file, from the hub or from what an earlier download left in the hub's cache.

    Raises:
        UsageError: that is no repository's name.
        HubError: there is no such file, it is larger than `max_bytes` (it is then not downloaded), or it is not in the
            cache and the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    check_repo_id(repo_id)
    with explaining(repo_id):
        found = hf_hub_download(repo_id, name, revision=revision, dry_run=True)
        _require_small(repo_id, name, found.file_size or 0, max_bytes)
        path = Path(hf_hub_download(repo_id, name, revision=revision))
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    _require_small(repo_id, name, len(data), max_bytes)  # whatever size the server named
    return data


def _require_small(repo_id: str, name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        limit = human_bytes(max_bytes)
        raise HubError(f"{repo_id}: {name} has {human_bytes(size)}, more than the {limit} there is room for")


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be a repository's name.

    Raises:
        UsageError: it is not of the form organisation/name.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise UsageError(f"{repo_id[:200]!r} is no repository id; wanted the form organisation/name")


@contextmanager
def explaining(repo_id: str, missing: str = "plan.json; it is not one that moa push made") -> Iterator[None]:
    """Turn what the hub's client raises into errors that say what to do; `missing` is what a repository may lack."""
    try:
        yield
    except MoaError:
        raise
    except Exception as error:  # noqa: BLE001 - the client raises its own, the HTTP library's and OSError
        raise _explained(repo_id, error, missing) from None


def _explained(repo_id: str, error: Exception, missing: str) -> HubError | ResourceError:
    """The client's error in one line, with the way out."""
    from huggingface_hub import errors

    found = shortage(error)
    if found is not None:
        return found
    offline = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    if isinstance(error, offline):
        return HubError(
            f"{repo_id}: no such file or folder here, it is not in the hub's cache, and the hub cannot be reached "
            "(offline, or HF_HUB_OFFLINE is set); go online once, or name a local file"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return HubError(f"{repo_id}: access is denied; accept its terms on the hub, and log in with: hf auth login")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return HubError(
            f"{repo_id}: no such file or folder here, and no such repository on the hub; "
            "if it is private, log in with: hf auth login"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo_id}: the repository has no such revision")
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{repo_id}: the repository has no {missing}")
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return HubError(f"{repo_id}: the hub did not answer as it should: {text}; try again later")
