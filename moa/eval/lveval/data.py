"""LV-Eval's samples, out of the files it publishes: on the hub a zip per data set, in it a file of JSON lines per length.

The hub's repository holds a script that would load them; no such script is run, which `datasets` refuses as well.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from moa.errors import DataError
from moa.hub_files import explaining

REPOSITORY = "Infinigence/LVEval"
# 200 texts of 256 thousand words are half a gigabyte
MAX_FILE_BYTES = 4 << 30


def samples(subset: str, level: str, folder: Path | None) -> Iterator[dict[str, Any]]:
    """A data set's samples at a length level: `input`, `context`, `answers`, and `answer_keywords` where there are any.

    Args:
        folder: with `SUBSET_LEVEL.jsonl` or `SUBSET.zip`, or a folder SUBSET with the former; the hub's when None.

    Raises:
        DataError: there is no such file here and no network, or it is not what LV-Eval publishes; names file and line.
        HubError: the hub does not have it.
    """
    name = f"{subset}_{level}.jsonl"
    with _opened(subset, name, folder) as (source, lines):
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _checked(line, f"{source}, line {number}")


@contextmanager
def _opened(subset: str, name: str, folder: Path | None) -> Iterator[tuple[str, IO[str]]]:
    """The file's name for a message, and its lines."""
    path = _download(f"{subset}.zip") if folder is None else _found(folder, subset, name)
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield path.name, lines
            return
        with zipfile.ZipFile(path) as archive, archive.open(_member(archive, name, path.name)) as stream:
            yield f"{path.name}: {name}", io.TextIOWrapper(stream, encoding="utf-8")
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path.name}: not a file that LV-Eval publishes: {error}") from None


def _found(folder: Path, subset: str, name: str) -> Path:
    wanted = (folder / name, folder / subset / name, folder / f"{subset}.zip")
    for path in wanted:
        if path.is_file():
            return path
    raise DataError(f"{folder}: has neither {name} nor {subset}.zip, as LV-Eval publishes them")


def _download(name: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    with explaining(REPOSITORY, missing=name):
        try:
            return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))
        except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
            raise DataError(
                f"{REPOSITORY}: {name} is not in the hub's cache, and the hub cannot be reached; while there is a network "
                "moa eval prefetch gets it, and --data-folder takes it from a folder"
            ) from None


def _member(archive: zipfile.ZipFile, name: str, source: str) -> zipfile.ZipInfo:
    for member in archive.infolist():
        if PurePosixPath(member.filename).name == name:
            if member.file_size > MAX_FILE_BYTES:
                raise DataError(f"{source}: {name} has {member.file_size} bytes, more than LV-Eval's own could have")
            return member
    raise DataError(f"{source}: holds no {name}, as LV-Eval's own does")


def _checked(line: str, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not JSON: {error}") from None
    texts = isinstance(row, dict) and all(isinstance(row.get(field), str) for field in ("input", "context"))
    answers = row.get("answers") if texts else None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{source}: wanted an object with texts `input` and `context` and a list of texts `answers`")
    keywords = row.get("answer_keywords")
    if not isinstance(keywords, str | None):
        raise DataError(f"{source}: answer_keywords must be a text, got {type(keywords).__name__}")
    return {"input": row["input"], "context": row["context"], "answers": answers, "answer_keywords": keywords}
