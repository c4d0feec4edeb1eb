"""Whatever fails, and wherever, detaching leaves the model as it was: hooks, config, forward, and what it saves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moa.hf import apply, attention
from moa.hf.apply import Attachment
from moa.plan import Plan

WITHIN = {Attachment.__init__.__code__, Attachment._attach.__code__, sys.modules[apply.__module__]._set.__code__}


class Interrupted(BaseException):
    """As KeyboardInterrupt: nothing on the way may catch it for an error of its own."""


def interrupting(line: int) -> Callable[..., Any]:
    """A trace function that interrupts before the n-th line of what attaches."""
    seen = count()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code not in WITHIN:
            return None
        if event == "line" and next(seen) == line:
            raise Interrupted
        return trace

    return trace


def test_interrupted_at_any_line_of_attaching(model, plan, make) -> None:
    before, own, tracing = make.traces(model), model.config._attn_implementation, sys.gettrace()
    for line in count():
        sys.settrace(interrupting(line))
        try:
            attached = apply(model, plan)
        except Interrupted:
            sys.settrace(tracing)
            assert make.traces(model) == before, f"line {line}"
        else:
            sys.settrace(tracing)
            break
    assert line > 30
    attached.detach()
    assert make.traces(model) == before
    assert model.config._attn_implementation == own


def call(model: PreTrainedModel, ids: torch.Tensor, how: str, options: dict[str, Any]) -> None:
    if how == "forward":
        model(ids)
    elif how == "training":
        model(ids, labels=ids).loss.backward()
    else:
        model.generate(ids, **{**options, "max_new_tokens": 3}, num_beams=2 if how == "beams" else 1)


@pytest.mark.parametrize(("how", "calls"), [("forward", 2), ("training", 2), ("greedy", 6), ("beams", 6)])
def test_interrupted_in_any_layer_of_any_step(
    how: str, calls: int, model, plan: Plan, prompts, make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model goes on under its plan as if nothing had been, and without it afterwards."""
    model.save_pretrained(tmp_path / "before")  # writes its class's name into its config
    before, dense = make.traces(model), model.generate(prompts, **make.greedy)
    with apply(model, plan):
        sparse = model.generate(prompts, **make.greedy)
    attend = attention.attend
    for fails_at in range(calls):
        done = count()

        def failing(*args: Any, done: count[int] = done, fails_at: int = fails_at, **kwargs: Any) -> torch.Tensor:
            if next(done) == fails_at:
                raise Interrupted
            return attend(*args, **kwargs)

        with apply(model, plan):
            monkeypatch.setattr(attention, "attend", failing)
            with pytest.raises(Interrupted):
                call(model, prompts, how, make.greedy)
            monkeypatch.setattr(attention, "attend", attend)
            assert torch.equal(model.generate(prompts, **make.greedy), sparse)
        model.zero_grad()
        assert make.traces(model) == before
    assert torch.equal(model.generate(prompts, **make.greedy), dense)
    model.save_pretrained(tmp_path / "after")
    assert files(tmp_path / "after") == files(tmp_path / "before")


def test_a_plan_that_cannot_be_saved_leaves_the_rest_as_it_was(model, plan, make, monkeypatch, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "before")
    before = make.traces(model)
    with apply(model, plan), monkeypatch.context() as patch:
        patch.setattr(Plan, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.save_pretrained(tmp_path / "attached")
    assert make.traces(model) == before


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
