"""The table of tested model classes: each is profiled, compressed and run under a plan, and held against eager attention.

The oracle is the untouched model with transformers' own eager attention, given a dense mask per layer and head that is
written out from the definition of a span. `python tests/hf/test_architectures.py` writes the table to
docs/architectures.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from moa.hf import apply, attention, model_shape
from moa.pipeline import compress
from moa.plan import Plan
from moa.profile.collect import InfluenceSettings, profile_length
from moa.profile.data import TextSample
from moa.runner.engine import Engine
from moa.runner.request import SamplingParams
from moa.runner.settings import EngineSettings
from moa.settings import CompressSettings
from moa.stages import Workspace

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
SINK, LEAST, VOCAB, WINDOW = 4, 16, 400, 24
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
REST = {"max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
# As two layers, both of a kind or one of each: spans that differ between heads, dense ones among them.
RULES = (((0, 0.5), (20, 0.0)), ((0, 1.0), (0, 0.25)))


@dataclass(frozen=True)
class Case:
    """A model class of the table.

    Args:
        family: what its users call it.
        model_type: its config's name in transformers.
        special: what of its attention is beyond grouped heads and rotary positions.
        changes: to the tiny config.
        windows: the model's own sliding window per layer.
    """

    family: str
    model_type: str
    special: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    windows: tuple[int | None, int | None] = (None, None)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
CASES = (
    Case("Llama 2", "llama"),
    Case("Llama 3", "llama", "`llama3` rotary scaling", {"rope_parameters": LLAMA3}),
    Case("Llama with MHA", "llama", "one query head per KV head", {"num_key_value_heads": 4}),
    Case("Mistral", "mistral", "sliding window in every layer", {"sliding_window": WINDOW}, (WINDOW, WINDOW)),
    Case("Mixtral", "mixtral", "experts; sliding window", {**MOE, "sliding_window": WINDOW}, (WINDOW, WINDOW)),
    Case("Qwen 2, Qwen 2.5", "qwen2", "biases; `yarn` rotary scaling", {"rope_parameters": YARN}),
    Case("Qwen 2 with windows", "qwen2", "sliding window in upper layers",
         {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW}, (None, WINDOW)),
    Case("Qwen 3", "qwen3", "norm of queries and keys; wide heads", {"head_dim": 32}),
    Case("Qwen 3 MoE", "qwen3_moe", "norm of queries and keys; experts", {**MOE, "head_dim": 32}),
    Case("Gemma", "gemma", "wide heads", {"head_dim": 32}),
    Case("Gemma 2", "gemma2", "capped scores; alternating windows; own scale; wide heads",
         {**ALTERNATING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "head_dim": 32}, (WINDOW, None)),
    Case("Gemma 3 (text)", "gemma3_text", "alternating windows, each with its rotary base; norm of queries and keys",
         {**ALTERNATING, "query_pre_attn_scalar": 8, "head_dim": 32}, (WINDOW, None)),
    Case("Phi-3", "phi3", "fused projections; sliding window", {"sliding_window": WINDOW}, (WINDOW, WINDOW)),
    Case("Phi-2", "phi", "rotary positions in part of a head"),
    Case("OLMo 2", "olmo2", "norm of whole queries and keys"),
    Case("OLMo 3", "olmo3", "norm of whole queries and keys; alternating windows", ALTERNATING, (WINDOW, None)),
    Case("gpt-oss", "gpt_oss", "learned sinks; alternating windows; experts",
         {**MOE, **ALTERNATING, "rope_parameters": YARN}, (WINDOW, None)),
    Case("Granite", "granite", "own scale", {"attention_multiplier": 0.3}),
    Case("SmolLM 3", "smollm3", "layers without positions", {"no_rope_layers": [1, 0]}),
    Case("Cohere 2 (Command)", "cohere2", "alternating windows; no positions in full layers", ALTERNATING, (WINDOW, None)),
    Case("GLM 4", "glm4", "rotary positions in part of a head", {"head_dim": 16}),
    Case("StarCoder 2", "starcoder2", "biases; sliding window", {"sliding_window": WINDOW}, (WINDOW, WINDOW)),
    Case("StableLM", "stablelm", "rotary positions in part of a head"),
    Case("GPT-NeoX, Pythia", "gpt_neox", "fused projections", {"num_key_value_heads": 4}),
    Case("GPT-2", "gpt2", "learned positions", {"num_key_value_heads": 4}),
    Case("OPT", "opt", "learned positions", {"num_key_value_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 64}),
)  # fmt: skip


def name_of(case: Case) -> str:
    return case.family.replace(" ", "-")


every_case = pytest.mark.parametrize("case", CASES, ids=name_of)


def make_model(case: Case, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny random model whose attention is sharp enough that one wrong key shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **{**SIZES, **HEADS, **REST, **case.changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.set_experts_implementation("eager")  # the fast ones know no float64
    if "capped" in case.special:
        model.set_attn_implementation("eager")  # before transformers 5.23 sdpa drops the cap in silence
    for module in model.modules():
        if hasattr(module, "sinks"):
            torch.nn.init.normal_(module.sinks)
    return model


def rules_of(model: PreTrainedModel) -> tuple[tuple[tuple[int, float], ...], ...]:
    """`RULES`, repeated over the KV heads."""
    repeats = model_shape(model).kv_heads // 2
    return tuple(tuple(pair for pair in layer for _ in range(repeats)) for layer in RULES)


def make_plan(model: PreTrainedModel) -> Plan:
    fields = {"model": model_shape(model), "rules": rules_of(model), "sink_tokens": SINK, "min_span_tokens": LEAST}
    return Plan.model_validate(fields)


def kept(alpha: int, beta: float, n: int, window: int | None) -> Tensor:
    """Which key each of n queries sees, bool [n, n], key by key from DESIGN's definition of a span."""
    seen = torch.zeros(n, n, dtype=torch.bool)
    for p in range(n):
        span = min(p + 1, max(LEAST, math.ceil(alpha + beta * (p + 1))))
        for j in range(p + 1):
            in_span = j < SINK or j >= p + 1 - (span - SINK)
            seen[p, j] = in_span and (window is None or p - j < window)
    return seen


def span_masks(case: Case, model: PreTrainedModel, n: int) -> list[Tensor]:
    """Additive masks [1, HQ, n, n], one per layer."""
    shape = model_shape(model)
    masks = []
    for layer, window in zip(rules_of(model), case.windows, strict=True):
        heads = [kept(*pair, n, window) for pair in layer for _ in range(shape.heads // shape.kv_heads)]
        hidden = ~torch.stack(heads)[None]
        masks.append(torch.zeros(hidden.shape, dtype=model.dtype).masked_fill(hidden, torch.finfo(model.dtype).min))
    return masks


@contextmanager
def eager_under(
    model: PreTrainedModel, masks: list[Tensor], on_rows: Callable[..., None] | None = None
) -> Iterator[None]:
    """The model's own eager attention function, under a mask of ours per layer."""

    def oracle(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, **options: Any) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        out, rows = eager(module, q, k, v, masks[module.layer_idx], **options)
        if on_rows:
            on_rows(module.layer_idx, rows)
        return out, None

    AttentionInterface.register("test_oracle", oracle)
    AttentionMaskInterface.register("test_oracle", flash_attention_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("test_oracle")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def make_ids(rows: int, n: int) -> Tensor:
    return torch.randint(3, VOCAB, (rows, n), generator=torch.Generator().manual_seed(1))


def differ(got: Tensor, want: Tensor) -> float:
    """Largest difference, in units of the logits' spread."""
    return float((got - want).abs().max() / want.std())


either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@every_case
@either_dtype
def test_prefill_chunks_and_decode_equal_eager_attention_under_a_dense_mask(case: Case, dtype: torch.dtype) -> None:
    n, model = 90, make_model(case, dtype)
    ids, plan = make_ids(2, n), make_plan(model)
    with torch.no_grad():
        with eager_under(model, span_masks(case, model, n)):
            want = model(ids, use_cache=False).logits
        assert differ(model(ids, use_cache=False).logits, want) > 0.1, "the plan changes nothing"
        for backend in ("torch", "reference"):
            with apply(model, plan, backend=backend) as attachment:
                whole, cache = model(ids).logits, attachment.new_cache()
                cuts = [0, 1, 40, 71, *range(72, n + 1)]  # chunks, then single tokens
                steps = [model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(cuts)]
            # norms and rotary positions are float32 in most models, whatever the model is
            assert differ(whole, want) < 2e-4, f"backend {backend}, prefill"
            assert differ(torch.cat(steps, 1), want) < 2e-4, f"backend {backend}, chunks and decode"


@every_case
@either_dtype
def test_left_padded_rows_equal_their_own_runs(case: Case, dtype: torch.dtype) -> None:
    """Token for token, however the prompt is cut into chunks; a row of padding alone changes no other."""
    model, ids = make_model(case, dtype), make_ids(3, 60)
    mask = torch.ones_like(ids)
    mask[0, :17], mask[2] = 0, 0
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    with apply(model, make_plan(model)):
        alone = [model.generate(ids[:1, 17:], **options)[0], model.generate(ids[1:2], **options)[0]]
        for chunk in (None, 1, 16, 23, 59):
            rows = model.generate(
                ids.masked_fill(mask == 0, 0), attention_mask=mask, prefill_chunk_size=chunk, **options
            )
            assert torch.equal(rows[0, 17:], alone[0]), f"chunks of {chunk}"
            assert torch.equal(rows[1], alone[1]), f"chunks of {chunk}"


@every_case
@either_dtype
def test_rows_padded_on_any_side_equal_their_own_logits_and_padding_gives_0(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward, with and without a cache: on the left, on the right, as likelihoods are batched, and throughout."""
    model, ids, attended = make_model(case, dtype), make_ids(4, 60), []
    mask = torch.ones_like(ids)
    mask[0, :17], mask[1, 45:], mask[3] = 0, 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    ours = attention.moa_attention

    def seen(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        attended.append(ours(*args, **kwargs)[0])  # [B, T, HQ, D]
        return attended[-1], None

    monkeypatch.setattr(attention, "moa_attention", seen)
    with apply(model, make_plan(model)), torch.no_grad():
        for use_cache in (True, False):
            attended.clear()
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
            assert logits.isfinite().all()
            assert len(attended) == 2
            assert all((out[mask == 0] == 0).all() and out[mask == 1].any() for out in attended)
            for row in range(3):
                alone = model(ids[row : row + 1, mask[row].bool()], use_cache=use_cache).logits[0]
                assert differ(logits[row, mask[row].bool()], alone) < 2e-4, f"row {row}"


@every_case
@either_dtype
def test_a_dense_plan_is_the_untouched_model_token_for_token(case: Case, dtype: torch.dtype) -> None:
    """Padded rows are held against stock runs without padding: stock eager attention of float64 makes NaN of padding."""
    model, ids = make_model(case, dtype), make_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None}
    want, alone = model.generate(ids, **options), model.generate(ids[:1, 17:], **options)
    with apply(model, Plan.uniform(model_shape(model), 0, 1.0)):
        assert torch.equal(model.generate(ids, **options), want)
        padded = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(padded[:1, 17:], alone)
        assert torch.equal(padded[1], want[1])


@every_case
@pytest.mark.parametrize("planned", [False, True], ids=["dense", "plan"])
def test_an_engine_says_what_the_model_says_alone(case: Case, planned: bool) -> None:
    """Prompts in chunks beside decodes of others, in one packed row."""
    model, ids = make_model(case, torch.float32), make_ids(3, 60)
    prompts = [ids[0], ids[1, :33], ids[2, :5]]
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    with apply(model, make_plan(model)) if planned else nullcontext():
        alone = [model.generate(prompt[None], **options)[0, len(prompt) :].tolist() for prompt in prompts]
    with Engine(model, make_plan(model) if planned else None, EngineSettings(token_budget=17)) as engine:
        done = engine.generate([p.tolist() for p in prompts], SamplingParams(max_tokens=12, ignore_eos=True))
    assert [list(completion.tokens) for completion in done] == alone


@every_case
def test_influence_is_that_of_the_definition(case: Case) -> None:
    """A few spans, by brute force: eager attention's P and dLoss/dP, keys masked, rows renormalised and summed."""
    n, model = 60, make_model(case)
    ids = make_ids(1, n)[0].tolist()
    sample = TextSample(tuple(ids), tuple(range(n - 4, n)), tuple(ids[-4:]))
    got = profile_length(model, [sample], n, SINK, LEAST, InfluenceSettings("joint", (1.0,)))
    assert got.losses.shape[:2] == (2, model_shape(model).kv_heads)
    assert np.isfinite(got.losses).all()
    rows: dict[int, Tensor] = {}

    def keep_rows(layer: int, p: Tensor) -> None:
        p.retain_grad()
        rows[layer] = p

    hidden = [~kept(0, 1.0, n, window) for window in case.windows]
    masks = [torch.zeros(1, 1, n, n, dtype=model.dtype).masked_fill(h, torch.finfo(model.dtype).min) for h in hidden]
    with eager_under(model, masks, keep_rows):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, n - 5 : n - 1]
        F.cross_entropy(logits.float(), torch.tensor(ids[-4:]), reduction="sum").backward()
    for s in (0, len(got.grid.spans_tokens) // 2, -1):
        keep = kept(got.grid.spans_tokens[s], 0.0, n, None)
        for layer, p in rows.items():
            masked = torch.where(keep, 0, p).sum(-1, keepdim=True)
            change = ((torch.where(keep, p, 0) / (1 - masked) - p) * p.grad).sum(-1)  # [1, HQ, n]
            per_head = change[0].view(got.losses.shape[1], -1, n).sum(1).detach().numpy()  # [HKV, n]
            summed = np.abs(np.add.reduceat(per_head, got.grid.position_edges[:-1], axis=1))  # [HKV, buckets]
            np.testing.assert_allclose(got.losses[layer, :, :, s], summed, rtol=2e-3, atol=1e-4 * got.losses.max())
    assert got.losses[..., 0].max() > 0


SETTINGS = CompressSettings(lengths_tokens=(64, 128), num_samples=2, max_candidates=2, supervision="reference")


@every_case
def test_compress_makes_a_plan_that_runs(case: Case, tmp_path: Path) -> None:
    from moa.demo.tokenizer import build_tokenizer

    model = make_model(case, torch.float32)
    workspace = Workspace.open(tmp_path, resume=False, overwrite=False)
    result = compress(model, build_tokenizer(), SETTINGS, workspace)
    assert all(length.density_ratio <= SETTINGS.density for length in result.plan.lengths)
    assert result.plan.validation is not None
    assert math.isfinite(result.plan.validation.sparse_loss)
    with apply(model, result.plan) as attachment, torch.no_grad():
        assert model(make_ids(1, 256)).logits.isfinite().all()
        assert attachment.kv_bytes < result.plan.kv_bytes(256) * 1.1


def render() -> str:
    """docs/architectures.md."""
    lines = [
        "# Model classes",
        "",
        "Each row is a tiny random model that every run of the tests profiles, compresses and runs under a plan.",
        "`tests/hf/test_architectures.py` writes this page, and a test keeps it so. Checked for each, with both backends:",
        "",
        "- logits of a whole prefill, of chunks and of single tokens are those of the untouched model with transformers' own",
        "  eager attention under a dense mask, in float32 and float64;",
        "- each row of a batch padded on the left, on the right or throughout gives its own run's logits and, in any chunks,",
        "  its own tokens; padding attends to nothing and gives 0; a dense plan gives the untouched model's tokens;",
        "- the engine, packing chunks and decodes of several requests in one row, says what each says alone;",
        "- the profiler's influence is that of its definition by brute force; `moa compress` makes a plan within its budget.",
        "",
        "| model | class | beyond grouped heads and rotary positions |",
        "|---|---|---|",
    ]
    for case in CASES:
        config = AutoConfig.for_model(case.model_type)
        name = AutoModelForCausalLM._model_mapping[type(config)].__name__
        lines.append(f"| {case.family} | `{name}` | {case.special or '-'} |")
    return "\n".join(lines) + "\n"


def test_the_documented_table_is_what_is_tested() -> None:
    assert DOCS.read_text(encoding="utf-8") == render(), f"run: python {Path(__file__).name}"


if __name__ == "__main__":
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(render(), encoding="utf-8")
