"""The shape of a model, from the `config.json` beside its weights; no weights are read and no code of the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from moa.errors import ModelError, PlanError
from moa.local_paths import public_name
from moa.plan import ELEMENT_BYTES, ModelShape, Plan, explain, parse_json, read_limited


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a plan has to know of a model.

    Args:
        shape: layers, heads, dtype.
        max_length_tokens: the longest sequence the model says it can take; None where it does not say.
    """

    shape: ModelShape
    max_length_tokens: int | None


def read_model_config(path: str | Path) -> ModelConfig:
    """Read a model's `config.json`, or that of a model folder.

    Raises:
        ModelError: there is no such file, it is not JSON, or it lacks a key that says the shape.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if not file.exists():
        raise ModelError(f"{file}: no such file; name a model folder or its config.json")
    try:
        content = parse_json(read_limited(file), str(file))
    except PlanError as error:
        raise ModelError(str(error)) from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: a model's config is a JSON object, got {type(content).__name__}")
    return _from_content(content, str(file))


def check_model(plan: Plan, config: ModelConfig, source: str) -> None:
    """Check that a plan is for a model of this shape.

    Raises:
        PlanError: names the first property that differs, and both values.
    """
    for name in ("architecture", "layers", "heads", "kv_heads", "head_dim"):
        wanted, got = getattr(config.shape, name), getattr(plan.model, name)
        if wanted != got:
            raise PlanError(
                f"{source}: the plan is for a model with {name} {got}, this model has {wanted}; "
                "make a plan for this model with: moa compress MODEL -o OUT"
            )


def _from_content(content: Mapping[str, object], source: str) -> ModelConfig:
    # A model of text and pictures keeps its language part here.
    inner = content.get("text_config")
    text = inner if isinstance(inner, dict) else content
    heads = _count(text, "num_attention_heads", source)
    head_dim = _optional_count(text, "head_dim", source) or _count(text, "hidden_size", source) // heads
    fields = {
        "architecture": _architecture(content),
        "layers": _count(text, "num_hidden_layers", source),
        "heads": heads,
        "kv_heads": _optional_count(text, "num_key_value_heads", source) or heads,
        "head_dim": head_dim,
        "dtype": _dtype(text, content),
        "name": public_name(str(content.get("_name_or_path", ""))),
    }
    try:
        shape = ModelShape.model_validate(fields)
    except ValidationError as error:
        raise ModelError(f"{source}: {explain(error, ModelShape)}") from None
    return ModelConfig(shape, _optional_count(text, "max_position_embeddings", source))


def _architecture(content: Mapping[str, object]) -> str:
    listed = content.get("architectures")
    if isinstance(listed, list) and listed:
        return str(listed[0])
    return str(content.get("model_type", "unknown"))


def _dtype(*contents: Mapping[str, object]) -> str:
    # transformers 5 writes "dtype", older versions wrote "torch_dtype"
    named = (str(content.get(key, "")) for content in contents for key in ("dtype", "torch_dtype"))
    return next((name for name in named if name in ELEMENT_BYTES), "float32")


def _count(content: Mapping[str, object], key: str, source: str) -> int:
    value = _optional_count(content, key, source)
    if value is None:
        raise ModelError(f"{source}: the key {key!r} is missing, so the model's shape is not known")
    return value


def _optional_count(content: Mapping[str, object], key: str, source: str) -> int | None:
    value = content.get(key)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise ModelError(f"{source}: {key} must be a whole number above 0, got {value!r}")
    return value
