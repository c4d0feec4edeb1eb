"""The Profile: predicted loss per layer, KV head, position bucket and span, from which any rule's cost follows."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from moa.errors import ProfileError
from moa.files import write_atomic
from moa.plan import Calibration, ModelShape
from moa.profile.sweep import SpanGrid
from moa.spans import ElasticRule, LengthMode, span

SCHEMA_VERSION = "1"
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LengthProfile:
    """Influence at one length.

    Args:
        n_tokens: the length.
        grid: position buckets and spans.
        losses: predicted loss per sample when all rows of a bucket have that span, float64 [L, HKV, positions, spans].
        backends: who computed them, sorted; () in files of before this was written down.
    """

    n_tokens: int
    grid: SpanGrid
    losses: FloatArray
    backends: tuple[str, ...] = ()

    def rule_loss(self, rule: ElasticRule, min_span_tokens: int, mode: LengthMode = "running") -> FloatArray:
        """Predicted loss [L, HKV] of giving each head `rule`; linear between the sampled spans."""
        edges = np.array(self.grid.position_edges, dtype=np.int64)
        middle = (edges[:-1] + edges[1:] + 1) // 2 if mode == "running" else np.full(len(edges) - 1, self.n_tokens)
        alpha, beta = np.array(rule.alpha), np.array(rule.beta_fixed)
        kept = span(alpha, beta, middle, min_span_tokens)
        # A running span that covers a bucket's last row grew with every row before it and masked nothing.
        last = edges[1:] if mode == "running" else middle
        at_last = span(alpha, beta, last, min_span_tokens)
        covers = at_last >= last
        kept = np.where(kept >= middle, at_last, kept)  # the middle's own length has cut it short
        grid = np.array(self.grid.spans_tokens, dtype=np.float64)
        upper = np.clip(np.searchsorted(grid, kept), 1, len(grid) - 1)
        width = np.maximum(grid[upper] - grid[upper - 1], 1.0)  # 0 where one span is all there is
        weight = np.clip((kept - grid[upper - 1]) / width, 0.0, 1.0)
        buckets = np.arange(len(middle))
        below, above = self.losses[:, :, buckets, upper - 1], self.losses[:, :, buckets, upper]
        total: FloatArray = np.where(covers, 0.0, below * (1 - weight) + above * weight).sum(-1)
        return total

    def stretched(self, n_tokens: int) -> LengthProfile:
        """A guess at another length: evidence that lay at a share of the text still does, so all distances scale.

        For a head that looks a fixed distance back this asks for more than it needs, never for less.
        """
        factor = n_tokens / self.n_tokens
        spans = tuple(max(1, round(span * factor)) for span in self.grid.spans_tokens)
        edges = tuple(round(edge * factor) for edge in self.grid.position_edges)
        return LengthProfile(n_tokens, SpanGrid(spans, edges, self.grid.sink_tokens), self.losses)


@dataclass(frozen=True, slots=True)
class Profile:
    """Influence at every profiled length, with where it comes from.

    Raises:
        ProfileError: from `load`, for anything that is not a profile.
    """

    model: ModelShape
    calibration: Calibration
    sink_tokens: int
    min_span_tokens: int
    lengths: tuple[LengthProfile, ...]

    def rule_losses(
        self, rules: tuple[ElasticRule, ...], mode: LengthMode = "running", unseen_tokens: int | None = None
    ) -> FloatArray:
        """Predicted loss of every rule for every head at every length, [lengths, L, HKV, R].

        `unseen_tokens` adds a last row for a length of its own; see `rule_losses_at`.
        """
        asked = [at.n_tokens for at in self.lengths] + ([] if unseen_tokens is None else [unseen_tokens])
        return np.stack([self.rule_losses_at(n, rules, mode) for n in asked])

    def rule_losses_at(self, n_tokens: int, rules: tuple[ElasticRule, ...], mode: LengthMode = "running") -> FloatArray:
        """Predicted loss of every rule for every head at any one length, [L, HKV, R].

        Measured at a profiled length. Between two of them, both stretched to it and weighted by how near they are in
        the logarithm of the length; outside of them, a guess from the nearest one.
        """
        total: FloatArray = np.zeros((self.model.layers, self.model.kv_heads, len(rules)))
        for weight, at in self._around(n_tokens):
            total += weight * np.stack([at.rule_loss(rule, self.min_span_tokens, mode) for rule in rules], axis=-1)
        return total

    def _around(self, n_tokens: int) -> list[tuple[float, LengthProfile]]:
        """Profiles that speak for a length, with weights of sum 1."""
        ordered = sorted(self.lengths, key=lambda at: at.n_tokens)
        upper = bisect_left([at.n_tokens for at in ordered], n_tokens)
        if upper < len(ordered) and ordered[upper].n_tokens == n_tokens:
            return [(1.0, ordered[upper])]
        if upper in (0, len(ordered)):
            return [(1.0, ordered[max(0, upper - 1)].stretched(n_tokens))]
        below, above = ordered[upper - 1], ordered[upper]
        share = math.log(n_tokens / below.n_tokens) / math.log(above.n_tokens / below.n_tokens)
        return [(1 - share, below.stretched(n_tokens)), (share, above.stretched(n_tokens))]

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "model": self.model.model_dump_json(),
            "calibration": self.calibration.model_dump_json(),
            "sink_tokens": str(self.sink_tokens),
            "min_span_tokens": str(self.min_span_tokens),
            "lengths": json.dumps(
                [[at.n_tokens, list(at.grid.spans_tokens), list(at.grid.position_edges)] for at in self.lengths]
            ),
            "backends": json.dumps([list(at.backends) for at in self.lengths]),
        }
        tensors = {f"losses.{at.n_tokens}": np.ascontiguousarray(at.losses) for at in self.lengths}
        write_atomic(path, _canonical(safetensors.numpy.save(tensors, metadata)))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile; see the class for what it raises."""
        try:
            with safetensors.safe_open(path, "numpy") as file:
                meta = file.metadata() or {}
                if meta.get("schema_version") != SCHEMA_VERSION:
                    raise ProfileError(
                        f"{path}: not a profile of schema {SCHEMA_VERSION}; profile again with --overwrite"
                    )
                sink = int(meta["sink_tokens"])
                model = ModelShape.model_validate_json(meta["model"])
                measured = json.loads(meta["lengths"])
                backends = json.loads(meta["backends"]) if "backends" in meta else [()] * len(measured)
                lengths = tuple(
                    _checked(
                        LengthProfile(
                            n,
                            SpanGrid(tuple(spans), tuple(edges), sink),
                            file.get_tensor(f"losses.{n}"),
                            tuple(map(str, names)),
                        ),
                        model,
                    )
                    for (n, spans, edges), names in zip(measured, backends, strict=True)
                )
            return cls(
                model,
                Calibration.model_validate_json(meta["calibration"]),
                sink,
                int(meta["min_span_tokens"]),
                lengths,
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise ProfileError(
                f"{path}: cannot be read as a profile ({' '.join(str(error).split())[:200]}); profile again with --overwrite"
            ) from None


def _checked(at: LengthProfile, model: ModelShape) -> LengthProfile:
    wanted = (model.layers, model.kv_heads, len(at.grid.position_edges) - 1, len(at.grid.spans_tokens))
    if at.losses.shape != wanted or at.losses.dtype != np.float64:
        raise ValueError(
            f"losses at {at.n_tokens} tokens are {at.losses.dtype} {at.losses.shape}, wanted float64 {wanted}"
        )
    return at


def _canonical(data: bytes) -> bytes:
    """The same file with its header's keys sorted: safetensors writes metadata in no fixed order."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
