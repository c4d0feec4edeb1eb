"""What a paired evaluation is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moa.errors import UsageError
from moa.profile.chat import ChatTemplate

# lm-eval's own
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
DEFAULT_TASKS = ("moa_ruler", "moa_recall")
# All that the model that ships can say
DEMO_TASKS = ("moa_demo",)


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """One evaluation of one model, the same for every way of running it.

    Args:
        model: folder, hub id or "demo".
        tasks: names of lm-eval's and ours, tags and groups; patterns such as `moa_niah_*`.
        lengths_tokens: of tasks that are made to a length.
        num_samples, data_seed: of made-up tasks, at each length.
        limit: of samples per task, for a smoke test only; below 1 a share.
        batch_size: a number, "auto" or "auto:N".
        max_length_tokens: room for prompt and answer; what the lengths need when None.
        prefill_chunk_tokens: tokens of a prompt that generation computes at a time; None for all at once.
        chat_template: "auto" applies the tokenizer's where it has one.
        options: of made-up tasks `passages_file`, `text_file`; of LV-Eval `data_folder`.
        include_path: folder of more tasks.

    Raises:
        UsageError: a value cannot be meant.
    """

    model: str
    tasks: tuple[str, ...] = DEFAULT_TASKS
    lengths_tokens: tuple[int, ...] = (4096,)
    num_samples: int = 100
    data_seed: int = 42
    limit: float | None = None
    batch_size: str = "1"
    max_length_tokens: int | None = None
    prefill_chunk_tokens: int | None = None
    chat_template: ChatTemplate = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    revision: str = "main"
    options: dict[str, str] = field(default_factory=dict)
    include_path: str | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UsageError("no tasks; name some with --tasks, or list them with: moa lm-eval ls subtasks")
        if not self.lengths_tokens or min(self.lengths_tokens) < 1:
            raise UsageError(f"--lengths must be positive whole numbers, got {list(self.lengths_tokens)}")
        if self.num_samples < 1 or self.data_seed < 0:
            raise UsageError(f"--num-samples must be at least 1 and --seed 0, got {self.num_samples}, {self.data_seed}")
        if self.limit is not None and self.limit <= 0:
            raise UsageError(f"--limit must be more than 0, got {self.limit:g}")
        first, _, often = self.batch_size.partition(":")
        if not (
            (first == "auto" and (often or "1").isdecimal()) or (first.isdecimal() and int(first) > 0 and not often)
        ):
            raise UsageError(f"--batch-size must be a whole number, auto or auto:N, got {self.batch_size!r}")

    def metadata(self, place: str) -> dict[str, Any]:
        """What lm-eval hands to tasks that make their data; `place` is the model's folder."""
        given = {"max_seq_lengths": list(self.lengths_tokens), "num_samples": self.num_samples}
        return {"pretrained": place, "data_seed": self.data_seed, **given, **self.options}
