"""What the YAML files in `moa/eval/tasks/lveval` name: LV-Eval's documents, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from moa.errors import DataError, UsageError, closest
from moa.eval.lveval.data import samples
from moa.eval.lveval.metrics import score
from moa.eval.lveval.subsets import LEVELS, subset_of

# An option: a folder with LV-Eval's own files, where they are not to come from the hub
FOLDER = "data_folder"


def make_dataset(*, subset: str, level: str, **given: Any) -> dict[str, Dataset]:
    """The documents of a data set at a length level.

    Args:
        subset, level: as LV-Eval calls them.
        given: lm-eval's `--metadata` and `--model_args`, of which `data_folder` counts.

    Raises:
        UsageError: there is no such data set or level.
        DataError, HubError: as `moa.eval.lveval.data.samples`; or there are no samples.
        ImportError: a package that the scores need is missing.
    """
    asked = subset_of(subset)
    if level not in LEVELS:
        raise UsageError(f"LV-Eval has no level {level!r}{closest(level, LEVELS)}")
    score(asked, "", "")  # so that a missing package is told now, not after hours
    folder = Path(given[FOLDER]) if given.get(FOLDER) else None
    rows = [
        {
            "prompt": asked.prompt(row["context"], row["input"]),
            "answers": row["answers"],
            "answer_keywords": row["answer_keywords"] or "",
            "subset": subset,
        }
        for row in samples(subset, level, folder)
    ]
    if not rows:
        raise DataError(f"LV-Eval's {subset}_{level} has no samples")
    return {"test": Dataset.from_list(rows)}


def scored(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """LV-Eval's score of an answer, between 0 and 1; LV-Eval prints percent."""
    return {"score": score(subset_of(doc["subset"]), results[0], doc["answers"][0], doc["answer_keywords"])}
