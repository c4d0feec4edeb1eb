"""Rows of a data set: a file, a folder or a hub id, its columns by our names, and which rows calibrate or validate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moa.errors import DataError, UsageError, closest
from moa.profile.hub import load_table
from moa.profile.synthetic import SYNTHETIC

ROW_KEYS = ("prompt", "answer", "context", "messages", "text")
SHAPES = '{"prompt": ..., "answer": ...}, {"messages": [{"role": ..., "content": ...}, ...]} or {"text": ...}'


@dataclass(frozen=True, slots=True)
class Row:
    """One text with a question: `turns` are (role, content) up to the question, `answer` is None where none is given.

    Args:
        turns: at least one; a plain text is one turn of the role "" and is its own answer, at its end.
        answer: what the data say comes next.
        context: the part of the last turn that may be cut where the whole does not fit; "" for all of the longest turn.
    """

    turns: tuple[tuple[str, str], ...]
    answer: str | None = None
    context: str = ""

    @property
    def plain(self) -> bool:
        """Whether this is running text, without question or turns."""
        return self.turns[0][0] == ""


def read_rows(source: str, config: str | None = None, split: str | None = None, columns: str = "") -> tuple[Row, ...]:
    """The rows of a JSON-lines or Parquet file, of a data set folder, or of a Hugging Face data set.

    Args:
        source: path or hub id; a hub id or folder may be followed by `:config` or `:config/split`.
        config, split: the same as options of their own.
        columns: `ours=theirs` pairs separated by commas, such as `prompt=input,answer=output`; columns that are not
            named are then ignored.

    Raises:
        UsageError: `columns` is no such list, or config or split are given twice or for a file.
        DataError: there is no such data set, or a row is not of the known shapes; names file, line and key.
    """
    names = parse_columns(columns)
    if not source:
        raise UsageError("--dataset is empty; name a hub id, a folder or a file, or leave it out for made-up texts")
    path = Path(source)
    if path.is_file() or not _may_be_table(source):
        if config or split:
            raise UsageError(f"--dataset-config and --dataset-split are for hub ids and folders; {source} is a file")
        if path.suffix != ".parquet" or not path.is_file():
            return _read_lines(path, names)
    table = load_table(source, config, split)
    wanted = list(names.values()) if names else [name for name in ROW_KEYS if name in table.columns]
    missing = [name for name in wanted if name not in table.columns]
    if missing or not wanted:
        raise DataError(
            f"{source}: no column {(missing or ROW_KEYS)[0]!r}, it has {', '.join(table.columns)}; "
            "name its columns with --columns, such as prompt=input,answer=output"
        )
    ours = {theirs: key for key, theirs in names.items()} or {name: name for name in wanted}
    # a null in a table is a value that is not given
    rows = ({ours[k]: v for k, v in row.items() if v is not None} for row in table.rows(wanted))
    return _some(tuple(_row(row, f"{source}, row {i}") for i, row in enumerate(rows)), source)


def parse_columns(text: str) -> dict[str, str]:
    """`ours=theirs` pairs as a mapping.

    Raises:
        UsageError: it is not such a list, or names a column of ours that there is not.
    """
    pairs = dict[str, str]()
    for part in filter(None, text.split(",")):
        ours, equals, theirs = part.partition("=")
        if ours not in ROW_KEYS or not equals or not theirs or ours in pairs or theirs in pairs.values():
            raise UsageError(
                f"--columns takes different OURS=THEIRS pairs with OURS among {', '.join(ROW_KEYS)}, got {part!r}"
                f"{closest(ours, ROW_KEYS)}"
            )
        pairs[ours] = theirs
    return pairs


def split_rows(rows: Sequence[Row], source: str) -> tuple[list[Row], list[Row]]:
    """Rows for calibration and, a quarter of them, for validation: disjoint, and the same for every length and seed.

    Raises:
        DataError: there are not two different rows.
    """
    digests = {hashlib.sha256(json.dumps(asdict(row)).encode()).hexdigest(): row for row in rows}
    if len(digests) < 2:
        raise DataError(f"{source}: one sample cannot both calibrate and validate; give at least two different ones")
    ordered = [digests[key] for key in sorted(digests)]
    held_out = max(1, len(ordered) // 4)
    return ordered[held_out:], ordered[:held_out]


def _may_be_table(source: str) -> bool:
    """Whether `source` can name a data set's folder or hub id: what looks like a missing file is said to be one."""
    if Path(source).is_dir() or Path(source.partition(":")[0]).is_dir():
        return True
    name = source.partition(":")[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).suffix.startswith(".json")


def _read_lines(path: Path, names: Mapping[str, str]) -> tuple[Row, ...]:
    try:
        # split at line feeds alone: JSON strings may hold the other line ends that `splitlines` knows
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; --dataset takes a JSON-lines or Parquet file, a data set's folder, "
            f"a hub id like 'org/name', or {SYNTHETIC!r}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    lines_at = ((line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip())
    return _some(tuple(_row(_renamed(_parsed(line, where), names, where), where) for line, where in lines_at), path)


def _some(rows: tuple[Row, ...], source: object) -> tuple[Row, ...]:
    if not rows:
        raise DataError(f"{source}: no samples; wanted rows like {SHAPES}")
    return rows


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: wanted a JSON object, got {type(row).__name__}")
    return row


def _renamed(row: dict[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """The row by our names; without a mapping every key must be one of them."""
    if names:
        return {ours: row[theirs] for ours, theirs in names.items() if theirs in row}
    for key in row:
        if key not in ROW_KEYS:
            raise DataError(
                f"{where}: unknown key {key!r}{closest(key, ROW_KEYS)}; known are {', '.join(ROW_KEYS)}, "
                "and --columns takes other names"
            )
    return row


def _row(row: Mapping[str, Any], where: str) -> Row:
    for key in ("prompt", "answer", "context", "text"):
        if key in row:
            _require_text(row[key], repr(key), where)
    given = [key for key in ("prompt", "messages", "text") if key in row]
    if len(given) != 1:
        found = f"both {given[0]!r} and {given[1]!r}" if given else "none of 'prompt', 'messages' and 'text'"
        raise DataError(f"{where}: {found}; wanted one of {SHAPES}")
    extra = [key for key in ("answer", "context") if key in row and given[0] != "prompt"]
    if extra:
        raise DataError(f"{where}: {extra[0]!r} belongs to a 'prompt'; {given[0]!r} brings its own")
    if "messages" in row:
        return _chat(row["messages"], where)
    if "text" in row:
        return Row((("", row["text"]),))
    context = row.get("context", "")
    content = f"{context}\n\n{row['prompt']}" if context else row["prompt"]
    return Row((("user", content),), row.get("answer"), context)


def _chat(messages: object, where: str) -> Row:
    """Turns up to the last answer; an assistant's turn at the end is the answer."""
    if not isinstance(messages, Iterable) or isinstance(messages, str | Mapping):
        raise DataError(f"{where}: 'messages' must be a list of {{role, content}}, got {messages!r:.60}")
    turns = []
    for i, turn in enumerate(messages):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise DataError(f"{where}: 'messages'[{i}] must be {{role, content}}, got {turn!r:.60}")
        for key in ("role", "content"):
            _require_text(turn[key], f"'messages'[{i}][{key!r}]", where)
        turns.append((turn["role"], turn["content"]))
    answer = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if not turns:
        raise DataError(f"{where}: 'messages' holds no turn that could be answered")
    return Row(tuple(turns), answer)


def _require_text(value: object, name: str, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name} must be a text that is not empty, got {value!r:.60}")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"{where}: {name} holds half of a surrogate pair, which is no text")
