"""Tables of rows through the `datasets` library: Parquet files, data set folders and hub ids; never remote code."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.errors import DataError, UsageError

# More would cost memory and time, and calibration takes a few dozen.
MAX_ROWS = 50_000
log = logging.getLogger("moa")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of `datasets`, with its columns."""

    name: str
    data: Any  # a datasets.Dataset, which has no types

    @property
    def columns(self) -> list[str]:
        """Their names, in order."""
        return list(self.data.column_names)

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The first `MAX_ROWS` rows, with these columns."""
        if len(self.data) > MAX_ROWS:
            log.warning("%s: the first %d of %d rows are used", self.name, MAX_ROWS, len(self.data))
        yield from self.data.select_columns(list(columns)).select(range(min(MAX_ROWS, len(self.data))))


def load_table(source: str, config: str | None, split: str | None) -> Table:
    """One split of a data set; by default "train", or the only one there is.

    Args:
        source: a Parquet file, a folder as `datasets` reads or saves them, or a hub id; a folder or hub id may be
            followed by `:config` or `:config/split`.
        config, split: the same as options of their own.

    Raises:
        UsageError: config or split are given twice.
        DataError: there is no such data set, or it cannot be reached or read.
    """
    name, config, split = _parts(source, config, split)
    try:
        with _quiet():
            found = _load(name, config)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - datasets raises anything, from pyarrow's errors to ValueError
        raise DataError(f"{source}: cannot be loaded as a data set: {_reason(error)}; {_way_out(name)}") from None
    if not isinstance(found, dict):
        found = {split or "train": found}
    if split is None:
        split = "train" if "train" in found or len(found) != 1 else next(iter(found))
    if split not in found:
        raise DataError(f"{source}: no split {split!r}, it has {', '.join(found)}; name one with --dataset-split")
    return Table(source, found[split])


def _parts(source: str, config: str | None, split: str | None) -> tuple[str, str | None, str | None]:
    """Name, config and split of `name:config/split`."""
    if Path(source).exists():
        return source, config, split
    name, _, tail = source.partition(":")
    tail_config, _, tail_split = tail.partition("/")
    for option, typed, in_name in (("config", config, tail_config), ("split", split, tail_split)):
        if typed and in_name and typed != in_name:
            raise UsageError(f"--dataset says {in_name!r} and --dataset-{option} says {typed!r}; give one of them")
    return name, config or tail_config or None, split or tail_split or None


def _load(name: str, config: str | None) -> Any:
    import datasets

    path = Path(name)
    if path.is_file():
        return datasets.load_dataset("parquet", data_files={"train": str(path.resolve())})
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of another library among our lines."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200].rstrip('.')}"


def _way_out(name: str) -> str:
    if Path(name).exists():
        return "give a folder of JSONL or Parquet files, or one such file"
    return (
        f"check the id and --dataset-config; on a machine without network, bring a copy ('hf download --repo-type "
        f"dataset {name}' elsewhere) and name its folder"
    )
