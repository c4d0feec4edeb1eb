"""Recall by depth and length: a pass key in noise, a value in a long list of keys and values."""

from __future__ import annotations

import json
import random
import uuid

from moa.eval.longtext.draft import Draft, Wanted
from moa.eval.longtext.prose import NOISE

# The task of Mohtashami and Jaggi, arXiv 2305.16300
PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the "
    "important information there.\n{context}\nWhat is the pass key?"
)
PASSKEY_PREFIX = "The pass key is"
# The task of Liu et al., Lost in the Middle, arXiv 2307.03172
KEY_VALUE = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{context}\n\n"
    'Key: "{key}"'
)
KEY_VALUE_PREFIX = "Corresponding value:"
DEPTHS = 10


def depth_of(wanted: Wanted) -> float:
    """Where a sample's evidence goes: from the start to the end in equal steps, over and over."""
    return wanted.index % DEPTHS / (DEPTHS - 1)


def passkey(wanted: Wanted, rng: random.Random, units: int) -> Draft:
    """A sample with `units` lines of noise."""
    key = str(rng.randint(10000, 99999))
    lines = [NOISE] * units
    at = round(depth_of(wanted) * units)
    lines.insert(at, f"The pass key is {key}. Remember it. {key} is the pass key.")
    return Draft(PASSKEY.format(context="\n".join(lines)), PASSKEY_PREFIX, (key,), depth_of(wanted))


def key_value(wanted: Wanted, rng: random.Random, units: int) -> Draft:
    """A sample with `units` pairs."""
    pairs = {_uuid(rng): _uuid(rng) for _ in range(units)}
    keys = [*pairs]
    key = keys[round(depth_of(wanted) * (len(keys) - 1))]
    text = "{" + ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs.items()) + "}"
    return Draft(KEY_VALUE.format(context=text, key=key), KEY_VALUE_PREFIX, (pairs[key],), depth_of(wanted))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
