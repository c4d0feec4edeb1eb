"""Under which conditions a paired evaluation was made, and what each variant was, in words."""

from __future__ import annotations

from moa.eval.paired.records import PairedReport, Variant

HEADLINE = ("model", "device", "samples", "date")  # what a reader must know before the first number


def conditions(report: PairedReport) -> dict[str, str]:
    """Everything that all numbers of the report have in common."""
    c, e = report.conditions, report.conditions.environment
    template = f"sha256 {c.chat_template_sha256[:12]}, {c.template_tokens} tokens" if c.chat_template_sha256 else "none"
    revision = c.model_revision + (f" ({c.model_commit[:12]})" if c.model_commit else "")
    facts = {
        "model": f"{c.model_name} ({c.architecture}, {c.parameters:,} parameters), revision {revision}",
        "fingerprint": c.model_fingerprint[:16],
        "tokenizer": f"sha256 {c.tokenizer_sha256[:16]}",
        "device": f"{e.device}, {e.dtype}, {_several(e.threads, 'thread')}, "
        f"{_several(c.processes, 'process', 'es')}, batch size {c.batch_size}",
        "lengths": ", ".join(f"{n:,}" for n in c.lengths_tokens) + " tokens",
        "room": f"{c.max_length_tokens:,} tokens for prompt, answer and template; prompts that do not fit are cut on the "
        f"{c.truncation_side}",
        "context": f"{c.context_tokens:,} tokens" if c.context_tokens else "the model does not say",
        "chat template": template,
        "samples": f"{c.num_samples} per length of made-up tasks, seed {c.data_seed}; "
        f"{report.truncated} truncated, {report.unpaired} unpaired",
        "seeds": ", ".join(f"{name.removesuffix('_seed')} {value}" for name, value in c.seeds.items()),
        "tasks": ", ".join(f"{task.name} v{task.version}" for task in report.tasks),
        "files": ", ".join(f"{name} {value}" for name, value in c.options.items()),
        "versions": ", ".join(f"{name} {number}" for name, number in c.versions.items()) + f", Python {e.python}",
        "date": c.date,
        "took": f"{c.time_s:,.0f} s",
    }
    return {name: value for name, value in facts.items() if value}


def variant_facts(variant: Variant) -> str:
    """How a variant computed attention, by which plan or settings; what it keeps at each length is a table's."""
    parts = [f"attention {variant.attention}"]
    if variant.plan:
        parts.append(f"plan {variant.plan.sha256[:12]}")
    if variant.settings:
        parts.append("; ".join(f"{name} {value}" for name, value in variant.settings.items()))
    if variant.equal_to:
        parts.append(f"made to have the KV bytes of {variant.equal_to}")
    if not variant.saves_memory:
        parts.append("accuracy only: keys are hidden, memory holds them all")
    return "; ".join(parts)


def _several(count: int, name: str, ending: str = "s") -> str:
    return f"{count} {name}{ending if count > 1 else ''}"
