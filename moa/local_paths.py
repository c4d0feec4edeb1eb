"""Places on this machine: what others are told instead of them, and where a text names one all the same."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath

# What begins like a place on some machine, not within a word, a URL or a tag: /home/me, ~/x, ./x, ../x, C:\x, file:/x.
_PLACE = re.compile(r"""(?<![\w.:/<~\\])(?:file:/+|~[\w.-]*/|\.{1,2}/|/(?=[\w.~])|[A-Za-z]:[\\/])[^\s"'`|,;()<>]*""")


def looks_local(name: str) -> bool:
    """Whether a name of a model or data set says by its form that it lies on somebody's machine."""
    return bool(_PLACE.match(name))


def public_name(name: str) -> str:
    """What others may be told of a model or data set of this name: of one that lies here, its last part.

    A data set's `:config/split` stays. Hub ids, and all other names of nothing that is here, stay as they are.
    """
    place, colon, part = (name, "", "") if _is_here(name) else _split(name)
    if not (looks_local(place) or _is_here(place)):
        return name
    last = PureWindowsPath(place).name if "\\" in place else Path(place).name
    last = Path(place).resolve().name if last in ("", "..") else last
    return f"{last}{colon}{part}"


def public_command(arguments: Iterable[str]) -> list[str]:
    """A command's words, with what lies here named by its last part alone."""
    return [_public_word(word) for word in arguments]


def typed_command() -> str:
    """What was typed to `moa` to start this process, as others may be told."""
    return shlex.join(["moa", *public_command(sys.argv[1:])])


def places_in(text: str) -> Iterator[str]:
    """Places on some machine that a text names; web addresses, and relative paths that do not look like one, are none."""
    yield from (found[0] for found in _PLACE.finditer(text))


def _split(name: str) -> tuple[str, str, str]:
    """Place, colon and what follows it; the colon of a drive, as in `C:\\data`, is part of the place."""
    drive = name[:2] if re.match(r"[A-Za-z]:[\\/]", name) else ""
    place, colon, part = name[len(drive) :].partition(":")
    return drive + place, colon, part


def _is_here(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):  # too long, or a zero byte
        return False


def _public_word(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    told = public_name(value)
    name, between, place = value.partition("=")  # NAME=FILE, as some options take it
    told = f"{name}={public_name(place)}" if told == value and between else told
    return f"{option}{equals}{told}"
