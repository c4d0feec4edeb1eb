"""What is measured: the grid of cases, the most informative first, so that a run cut short has said what matters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, NamedTuple

from moa.eval.gpu import patterns
from moa.eval.gpu.heads import HEADS, LLAMA_8B, HeadShape
from moa.eval.gpu.patterns import Pattern

Kind = Literal["prefill", "chunk", "decode", "hybrid"]
KVFormat = Literal["bf16", "fp8", "int8"]
KINDS: tuple[Kind, ...] = ("prefill", "chunk", "decode", "hybrid")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
CHUNKS = (512, 1024, 2048)
# Decode batches by length; a batch of 16 at 128k keeps 8.6 GB of dense keys and values in a layer of Llama-3-8B.
BATCHES = {
    4096: (1, 32, 128),
    8192: (1, 16, 64),
    16384: (1, 8, 64),
    32768: (1, 8, 32),
    65536: (1, 4, 16),
    131072: (1, 4, 16),
}


class Part(NamedTuple):
    """Equal sequences of a step: how many, their tokens in the cache, and their new tokens."""

    sequences: int
    cached: int
    new: int


@dataclass(frozen=True, slots=True)
class Case:
    """One step of one layer.

    Args:
        kind: prefill of whole prompts, one chunk of each prompt, one token each, or both at once.
        heads: the layer's shape.
        pattern: spans.
        tokens: length of every sequence with its new tokens.
        batch: sequences; in a hybrid step, those that decode.
        chunk: new tokens of each prompt; 0 where none is cut.
        kv: how the cache keeps window tokens.
        prompts: prompts of a hybrid step.
    """

    kind: Kind
    heads: HeadShape
    pattern: Pattern
    tokens: int
    batch: int = 1
    chunk: int = 0
    kv: KVFormat = "bf16"
    prompts: int = 0

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sequences of the step, prompts first."""
        decode = Part(self.batch, self.tokens - 1, 1)
        if self.kind == "prefill":
            return (Part(self.batch, 0, self.tokens),)
        if self.kind == "chunk":
            return (Part(self.batch, self.tokens - self.chunk, self.chunk),)
        if self.kind == "decode":
            return (decode,)
        return (Part(self.prompts, self.tokens - self.chunk, self.chunk), decode)

    @property
    def new_tokens(self) -> int:
        """Tokens of the step, T."""
        return sum(part.sequences * part.new for part in self.parts)

    @property
    def name(self) -> str:
        """What logs and tables call it; no other case of a grid has the same."""
        sizes = f"{self.tokens:,} tokens x {self.batch}"
        sizes += f", {self.prompts or ''}{' x ' if self.prompts else ''}chunk {self.chunk:,}" if self.chunk else ""
        return f"{self.kind} {self.heads.name} {self.pattern.name}, {sizes}, {self.kv}"

    def side(self, part: int) -> Case:
        """One side of a hybrid step as a case of its own: 0 the prompts, 1 the decodes."""
        if part == 0:
            return replace(self, kind="chunk", batch=self.prompts, prompts=0)
        return replace(self, kind="decode", chunk=0, prompts=0)


def tiers(plans: Sequence[tuple[HeadShape, Pattern]] = ()) -> list[list[Case]]:
    """Every case, each once, the most informative first: what the targets need, and three tiers of what is wider.

    Args:
        plans: head shapes and patterns read from files; they are measured beside MoA's rules.
    """
    seen: set[str] = set()
    found = []
    for make in (_needed_by_targets, _wider, _other_heads, _the_rest):
        tier = {case.name: case for case in _with_sides(make(plans)) if case.name not in seen}
        seen |= set(tier)
        found.append(list(tier.values()))
    return found


def _with_sides(cases: Iterator[Case]) -> Iterator[Case]:
    """Before a mixed step its sides alone: they say what mixing can gain."""
    for case in cases:
        if case.kind == "hybrid":
            yield from (case.side(0), case.side(1))
        yield case


def _needed_by_targets(plans: Sequence[tuple[HeadShape, Pattern]]) -> Iterator[Case]:
    """Llama-3-8B: a case or two for every target, in an order that leaves something of each kind early."""
    heads = LLAMA_8B
    dense, rules = patterns.uniform(1.0, heads), patterns.published(heads)
    for pattern in (rules, dense):
        yield Case("decode", heads, pattern, 32768, 32)
        yield Case("prefill", heads, pattern, 32768)
    for pattern in (rules, dense):
        yield Case("prefill", heads, pattern, 8192)
        yield Case("chunk", heads, pattern, 32768, 1, 1024)
    for pattern in (rules, dense):
        yield Case("decode", heads, pattern, 32768, 32, kv="fp8")
    for chunk, batch in ((512, 8), (512, 32), (2048, 32), (2048, 1)):
        yield Case("hybrid", heads, rules, 32768, batch, chunk, prompts=1)
    yield Case("decode", heads, dense, 128, 1)
    for shape, pattern in plans:
        yield Case("decode", shape, pattern, 32768, 32)
        yield Case("prefill", shape, pattern, 32768)
    for pattern in (rules, dense):
        yield Case("prefill", heads, pattern, 16384)
        yield Case("decode", heads, pattern, 16384, 1)
        yield Case("decode", heads, pattern, 16384, 8)
    yield Case("prefill", heads, patterns.window(1024, heads), 16384)
    yield Case("decode", heads, dense, 32768, 32, kv="int8")


def _wider(plans: Sequence[tuple[HeadShape, Pattern]]) -> Iterator[Case]:
    """Llama-3-8B: lengths, chunks and batches under MoA's rules and without any."""
    heads = LLAMA_8B
    both = (patterns.published(heads), patterns.uniform(1.0, heads))
    for tokens, pattern in product(LENGTHS, both):
        yield Case("prefill", heads, pattern, tokens)
        for batch in BATCHES[tokens]:
            yield Case("decode", heads, pattern, tokens, batch)
    for chunk, tokens, pattern in product(CHUNKS, (32768, 131072), both):
        yield Case("chunk", heads, pattern, tokens, 1, chunk)
    for tokens in (32768, 131072):
        yield Case("decode", heads, both[0], tokens, 8, kv="fp8")
        yield Case("hybrid", heads, both[0], tokens, 8, 1024, prompts=2)


def _other_heads(plans: Sequence[tuple[HeadShape, Pattern]]) -> Iterator[Case]:
    for heads in HEADS[1:]:
        for pattern in (patterns.published(heads), patterns.uniform(1.0, heads)):
            for tokens in (8192, 32768, 131072):
                yield Case("prefill", heads, pattern, tokens)
                yield Case("decode", heads, pattern, tokens, 8)
            yield Case("chunk", heads, pattern, 32768, 1, 1024)
        yield Case("hybrid", heads, patterns.published(heads), 32768, 32, 512, prompts=1)
    for (heads, pattern), tokens in product(plans, LENGTHS):
        yield Case("prefill", heads, pattern, tokens)
        yield Case("decode", heads, pattern, tokens, 8)


def _the_rest(plans: Sequence[tuple[HeadShape, Pattern]]) -> Iterator[Case]:
    """Shares of the text that every head keeps, and prompts in batches."""
    for density, tokens in product(patterns.DENSITIES[:-1], (8192, 32768, 131072)):
        pattern = patterns.uniform(density, LLAMA_8B)
        yield Case("prefill", LLAMA_8B, pattern, tokens)
        yield Case("decode", LLAMA_8B, pattern, tokens, 8)
        yield Case("chunk", LLAMA_8B, pattern, tokens, 1, 1024)
    for tokens, batch in ((4096, 8), (8192, 4)):
        for pattern in (patterns.published(LLAMA_8B), patterns.uniform(1.0, LLAMA_8B)):
            yield Case("prefill", LLAMA_8B, pattern, tokens, batch)
            yield Case("chunk", LLAMA_8B, pattern, tokens, batch, 512)
    for density in patterns.DENSITIES[:-1]:
        for batch in (1, 32):
            yield Case("decode", LLAMA_8B, patterns.uniform(density, LLAMA_8B), 32768, batch)
