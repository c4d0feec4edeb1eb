"""A list of candidate rules from a file, instead of the usual grid."""

from __future__ import annotations

import json
from pathlib import Path

from moa.errors import DataError
from moa.spans import ElasticRule

MAX_RULES = 1000


def read_rules(path: Path) -> tuple[ElasticRule, ...]:
    """The rules of a JSON or YAML file: a list of `[alpha, beta]`, alpha in whole tokens, beta in [0, 1].

    Nothing is added to the list, also not the dense rule.

    Raises:
        DataError: not such a file; names the entry, what was wanted and what was got.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; --rules takes a JSON or YAML list of [alpha, beta]") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or not JSON
        raise DataError(f"{path}: cannot be read as JSON or YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, list) or not 1 <= len(content) <= MAX_RULES:
        got = f"{len(content)} entries" if isinstance(content, list) else type(content).__name__
        raise DataError(f"{path}: rules are a list of 1 to {MAX_RULES} pairs [alpha, beta], got {got}")
    rules = tuple(_rule(pair, f"{path}: entry {i}") for i, pair in enumerate(content))
    for i, rule in enumerate(rules):
        if rule in rules[:i]:
            raise DataError(f"{path}: entry {i} repeats entry {rules.index(rule)}: {content[i]}; name every rule once")
    return rules


def _rule(pair: object, where: str) -> ElasticRule:
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(number) in (int, float) for number in pair):
        raise DataError(f"{where}: a rule is a pair of numbers [alpha, beta], got {pair!r:.60}")
    try:
        return ElasticRule(*pair)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: {error}") from None
