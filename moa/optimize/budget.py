"""Budgets in bytes or milliseconds, converted to the density that the optimizer keeps.

A budget holds for what it names (`4@131072x8`: 4 GiB for 8 sequences of 131,072 tokens), and the density that this comes to
holds at every profiled length and at the validation length as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from moa.errors import InfeasibleError, UsageError
from moa.optimize.roofline import Weights, attention_s, basis, device_named, linear_s
from moa.plan import ELEMENT_BYTES, Budget, ModelShape
from moa.spans import MAX_TOKENS

GIB = 1 << 30
_PLACE = re.compile(r"(?P<amount>\d+(\.\d+)?)@(?P<context>\d+)(x(?P<sequences>\d+))?")


def dense_bytes_per_token(shape: ModelShape) -> int:
    """Keys and values of one token, all layers and KV heads, in the model's dtype."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * ELEMENT_BYTES[shape.dtype]


def kv_bytes_budget(bytes_per_token: float, shape: ModelShape) -> Budget:
    """So many bytes of keys and values per token of the text.

    Raises:
        UsageError: not a positive number.
    """
    if not 0 < bytes_per_token < math.inf:
        raise UsageError(f"--kv-bytes-per-token must be a positive number, got {bytes_per_token}")
    dense = dense_bytes_per_token(shape)
    return _budget(
        "kv_bytes_per_token", Fraction(bytes_per_token), Fraction(0), Fraction(dense), f"{shape.dtype} cache"
    )


def kv_gib_budget(asked: str, shape: ModelShape) -> Budget:
    """`AMOUNT@CONTEXTxSEQUENCES`: so many GiB of keys and values for so many sequences of so many tokens.

    Raises:
        UsageError: not of that form.
    """
    amount, context, sequences = _parsed("--kv-gib", asked)
    dense = Fraction(dense_bytes_per_token(shape) * context * sequences, GIB)
    return _budget("kv_gib", amount, Fraction(0), dense, f"{shape.dtype} cache", (context, sequences))


def decode_budget(asked: str, device_name: str, shape: ModelShape, weights: Weights) -> Budget:
    """`MS@CONTEXTxSEQUENCES`: so many milliseconds for a decode step of so many sequences of so many tokens.

    Raises:
        UsageError: not of that form, or no such device.
        InfeasibleError: the matrix products alone take longer.
    """
    amount, context, sequences = _parsed("--decode-ms", asked)
    device = device_named(device_name)
    free = 1e3 * linear_s(device, weights, sequences)
    attention = 1e3 * attention_s(device, shape, float(shape.layers * shape.kv_heads * context * sequences))
    if amount <= free:
        raise InfeasibleError(
            f"--decode-ms {asked} cannot be met on {device_name}: without any attention a step of {sequences} sequences "
            f"takes {free:.4g} ms ({basis(device_name, weights)}); ask for more than that, or use a faster device"
        )
    ends = Fraction(free), Fraction(free + attention)
    place = (context, sequences)
    return _budget("decode_ms", amount, *ends, basis(device_name, weights), place, device_name.lower())


def _parsed(option: str, asked: str) -> tuple[Fraction, int, int]:
    """Amount, tokens of a sequence, sequences."""
    found = _PLACE.fullmatch(asked.strip())
    if found is None:
        raise UsageError(
            f"{option} must be AMOUNT@CONTEXT or AMOUNT@CONTEXTxSEQUENCES, such as 4@131072x8, got {asked!r}"
        )
    amount, context, sequences = Fraction(found["amount"]), int(found["context"]), int(found["sequences"] or 1)
    if amount <= 0 or not 0 < context < MAX_TOKENS // 2 or not 0 < sequences < MAX_TOKENS:
        raise UsageError(f"{option} must have a positive amount, context and number of sequences, got {asked!r}")
    return amount, context, sequences


def _budget(
    kind: str,
    amount: Fraction,
    free: Fraction,
    dense: Fraction,
    why: str,
    place: tuple[int, int] | None = None,
    device: str = "",
) -> Budget:
    density = min(Fraction(1), (amount - free) / (dense - free))
    rounded = float(density)
    if Fraction(str(rounded)) > density:  # the optimizer takes the decimal number that is printed
        rounded = math.nextafter(rounded, 0)
    context, sequences = place or (None, None)
    return Budget.model_validate(
        {
            "kind": kind,
            "amount": float(amount),
            "context_tokens": context,
            "sequences": sequences,
            "device": device,
            "free_amount": float(free),
            "dense_amount": float(dense),
            "density_ratio": rounded,
            "basis": why,
        }
    )


UNITS = {"kv_bytes_per_token": "bytes per token", "kv_gib": "GiB", "decode_ms": "ms"}


def budget_text(budget: Budget) -> str:
    """One line: what was asked for, what density that is, what a dense cache needs, and what the conversion rests on."""
    unit = UNITS[budget.kind]
    enough = "; the dense cache fits" if budget.density_ratio == 1 else ""
    return (
        f"{budget.option} is a density of {budget.density_ratio:.4g}{enough} "
        f"(dense: {budget.dense_amount:.4g} {unit}; {budget.basis})"
    )


def check_least(
    density: float, budget: Budget | None, lengths_tokens: Sequence[int], least_spans_tokens: Sequence[int]
) -> None:
    """Refuse a budget that the shortest rule exceeds, before anything is measured.

    Args:
        density: the budget, or what it was converted to.
        budget: what was asked for where it was no density.
        lengths_tokens: where the density holds.
        least_spans_tokens: the shortest span of any rule at each of them.

    Raises:
        InfeasibleError: names the tightest length and the least possible value in the unit that was asked for.
    """
    shares = [Fraction(span, n) for span, n in zip(least_spans_tokens, lengths_tokens, strict=True)]
    tight = max(range(len(shares)), key=lambda i: shares[i])
    if shares[tight] <= Fraction(str(density)):
        return
    least = math.ceil(shares[tight] * 10**6) / 10**6
    asked = f"--density {density:g}" if budget is None else budget_text(budget)
    way = f"--density {least:g}" if budget is None else budget.option_for(_rounded_up(budget.amount_at(least)))
    raise InfeasibleError(
        f"{asked}: no plan keeps this. At {lengths_tokens[tight]} tokens, the tightest length, the shortest rule keeps "
        f"{least_spans_tokens[tight]} tokens, a density of {float(shares[tight]):.4g}. The least possible value is {way}; "
        "or lower --min-span-tokens, or leave out the short lengths"
    )


def _rounded_up(amount: float) -> str:
    """With four digits, not below."""
    digits = 3 - math.floor(math.log10(amount))
    return f"{math.ceil(amount * 10.0**digits) / 10.0**digits:.{max(0, digits)}f}"
