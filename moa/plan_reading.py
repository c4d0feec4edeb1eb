"""Untrusted files of plans: how much of one is read, which JSON is taken, and what is wrong with it in one line."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel, ValidationError

from moa.errors import PlanError, closest

# A model of 200 layers with 128 KV heads makes a plan below 1 MiB.
MAX_PLAN_BYTES = 8 << 20


def read_limited(file: Path) -> bytes:
    """The bytes of a plan file, refused above 8 MiB.

    Raises:
        PlanError: the file is missing, unreadable or too large.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_PLAN_BYTES + 1)
    except FileNotFoundError:
        raise PlanError(f"{file}: no such file; make a plan with: moa compress MODEL -o OUT") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        raise PlanError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_PLAN_BYTES:
        raise PlanError(f"{file}: larger than {MAX_PLAN_BYTES} bytes; no plan is")
    return data


def parse_json(text: str | bytes, source: str) -> object:
    """Strict JSON: no NaN or Infinity, no repeated key, no absurd depth or number.

    Raises:
        PlanError: anything else; names line and column where there are any.
    """

    def no_constant(name: str) -> NoReturn:
        raise PlanError(f"{source}: {name} is not a number that JSON knows")

    def no_repeat(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) < len(pairs):
            ((repeated, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise PlanError(f"{source}: the key {reprlib.repr(repeated)} occurs twice in one object")
        return content

    try:
        raw = text.encode() if isinstance(text, str) else text
        # decoded here, because json.loads would guess UTF-16 and UTF-32 as well
        return json.loads(raw.decode(), parse_constant=no_constant, object_pairs_hook=no_repeat)
    except json.JSONDecodeError as error:
        raise PlanError(f"{source}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise PlanError(f"{source}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise PlanError(f"{source}: not a plan: objects nested too deeply") from None
    except ValueError as error:
        raise PlanError(f"{source}: not a plan: {error}") from None


def explain(error: ValidationError, record: type[BaseModel]) -> str:
    """The first thing wrong with a record, in one line: field, what was wanted, what was got."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(record, first["loc"][:-1])
        return f"unknown key {where!r}{closest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"the key {where!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in ("value_error", "json_invalid"):
        message += f", got {reprlib.repr(first['input'])}"
    return f"{where}: {message}" if where else message


def _path(loc: tuple[int | str, ...]) -> str:
    """`rules[3][0]`, `model.layers`; "" for the record itself."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(record: type[BaseModel], loc: tuple[int | str, ...]) -> Mapping[str, object]:
    for part in loc:
        field = record.model_fields.get(str(part))
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        record = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), record)
    return record.model_fields
