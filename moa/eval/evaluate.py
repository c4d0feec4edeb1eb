"""One way of running a model, evaluated: recall and plain-text perplexity, dense or under a plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.errors import UsageError
from moa.eval.perplexity import perplexity
from moa.eval.recall import recall
from moa.eval.records import DENSE, LossAt, MethodResult, ParetoPoint, PlanRef, RecallTask
from moa.hf.apply import apply
from moa.plan import Plan
from moa.profile.artefact import Profile
from moa.spans import ElasticRule


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan | None,
    lengths_tokens: Sequence[int],
    *,
    method: str = DENSE,
    density_budget_ratio: float | None = None,
    task: RecallTask | None = None,
    perplexity_lengths_tokens: Sequence[int] | None = None,
    backend: str = "torch",
    allow_other_weights: bool = False,
) -> MethodResult:
    """Recall and perplexity of `model` dense (`plan` None) or under `plan`; the model is left as it was found.

    Args:
        model: a transformers causal LM without a plan applied.
        tokenizer: its fast tokenizer.
        plan: the plan, or None.
        lengths_tokens: lengths of recall.
        method: what to call the result.
        density_budget_ratio: the budget the plan was made for.
        task: the questions; `RecallTask()` when None.
        perplexity_lengths_tokens: lengths of plain-text perplexity; those of recall when None.
        backend, allow_other_weights: as in `apply`.

    Raises:
        DataError: a length is too short.
        UsageError: the dense model's name for a plan.
        PlanError, ModelError: as `apply`.
    """
    if plan is not None and method == DENSE:
        raise UsageError(f"a result under a plan cannot be called {DENSE!r}; give it a method of its own")
    plain = lengths_tokens if perplexity_lengths_tokens is None else perplexity_lengths_tokens
    context: AbstractContextManager[object] = (
        apply(model, plan, backend=backend, allow_other_weights=allow_other_weights) if plan else nullcontext()
    )
    with context:
        return MethodResult(
            method=method,
            density_budget_ratio=density_budget_ratio,
            plan=PlanRef.of(plan, lengths_tokens) if plan else None,
            backend=backend if plan else str(model.config._attn_implementation),
            recall=recall(model, tokenizer, lengths_tokens, task),
            perplexity=perplexity(model, tokenizer, plain),
        )


def pareto_points(
    profile: Profile, plans: Sequence[Plan], chosen: Plan, true_losses: Sequence[float | None] | None = None
) -> tuple[ParetoPoint, ...]:
    """The candidates of `compress` with their predicted loss at every profiled length.

    Args:
        profile: what they were made from.
        plans: the candidates.
        chosen: the one that was taken; it may carry a validation record that its candidate does not.
        true_losses: measured at the unseen length, one per candidate.
    """
    measured = true_losses if true_losses is not None else [None] * len(plans)
    longest = max(at.n_tokens for at in profile.lengths)
    return tuple(
        ParetoPoint(
            label=str(i),
            density_ratio=plan.span_rules.density_ratio(longest),
            losses=_predicted(profile, plan),
            chosen=plan.rules == chosen.rules,
            validation_loss=loss,
        )
        for i, (plan, loss) in enumerate(zip(plans, measured, strict=True), 1)
    )


def _predicted(profile: Profile, plan: Plan) -> tuple[LossAt, ...]:
    """Predicted loss of a plan at every profiled length: the sum over its heads."""
    distinct = sorted({pair for layer in plan.rules for pair in layer})
    losses = profile.rule_losses(tuple(ElasticRule(*pair) for pair in distinct), plan.length_mode)  # [E, L, HKV, R]
    cells = [(i, j, distinct.index(pair)) for i, layer in enumerate(plan.rules) for j, pair in enumerate(layer)]
    return tuple(
        LossAt(length_tokens=at.n_tokens, loss=float(sum(loss[cell] for cell in cells)))
        for at, loss in zip(profile.lengths, losses, strict=True)
    )
