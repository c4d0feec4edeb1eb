"""Tasks by name: lm-eval's own and ours, their data at hand."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from moa.errors import DataError, MoaError, UsageError, closest, shortage
from moa.eval.harness import TASKS_FOLDER, require_lm_eval
from moa.eval.paired.settings import EvalSettings
from moa.hf.load import first_line

log = logging.getLogger("moa")
# Packages that tasks import, and lm-eval's extra that brings them
EXTRAS = {
    "wonderwords": "ruler",
    "nltk": "ruler",
    "jieba": "longbench",
    "fuzzywuzzy": "longbench",
    "rouge": "longbench",
}
# Tasks that download by themselves and throw away what they got
NEVER_KEPT = "ruler_qa_"


@dataclass(frozen=True, slots=True)
class LoadedTasks:
    """Tasks with their data.

    Args:
        tasks: every single task by name.
        groups: of them that lm-eval knows, by name.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]

    @property
    def answer_tokens(self) -> int:
        """Most tokens that any task writes."""
        return max((_answer_tokens(task) for task in self.tasks.values()), default=0)

    @property
    def made_to_length(self) -> bool:
        """Whether some task's prompts are made to the lengths that were asked for."""
        return any("max_length" in task.eval_docs[0] for task in self.tasks.values())

    @property
    def of_any_length(self) -> bool:
        """Whether some task's prompts are as long as they are."""
        return any("max_length" not in task.eval_docs[0] for task in self.tasks.values())

    @property
    def fewest_samples(self) -> int:
        """Samples of the smallest task."""
        return min(len(task.eval_docs) for task in self.tasks.values())


def load_tasks(settings: EvalSettings, place: str) -> LoadedTasks:
    """Find tasks, tags and groups by name or pattern, and get their data.

    Args:
        place: folder of the model, whose tokenizer decides how much text fits a length.

    Raises:
        UsageError: there is no such task.
        DataError: its data is not here, and cannot be had.
        MoaError: lm-eval, or a package that a task needs, is not installed.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    folders = [str(TASKS_FOLDER), *([settings.include_path] if settings.include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=settings.metadata(place))
    if not all(_matching(name, manager.all_tasks) for name in settings.tasks):
        # lm-eval's thousands, which take a while
        manager = TaskManager(include_path=folders, metadata=settings.metadata(place))
    tasks, groups = dict[str, Any](), dict[str, Any]()
    for name in _names(settings.tasks, manager.all_tasks):
        loaded = _load(manager, name)
        for known, found in ((tasks, loaded["tasks"]), (groups, loaded.get("groups", {}))):
            known.update({each: value for each, value in found.items() if each not in known})
    return LoadedTasks(tasks, groups)


def _names(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    names = []
    for name in wanted:
        found = _matching(name, known)
        if not found:
            raise UsageError(f"no task {name!r}{closest(name, known)}; list them with: moa lm-eval ls subtasks")
        names += found
    return list(dict.fromkeys(names))


def _matching(name: str, known: Sequence[str]) -> list[str]:
    return [name] if name in known else [each for each in known if fnmatch(each, name)]


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load([name])
    except MoaError as error:
        raise type(error)(f"{name}: {error}") from None
    except ImportError as error:
        raise MoaError(_missing(name, error)) from None
    except (OSError, ValueError, LookupError, RuntimeError, EOFError, zlib.error) as error:  # data that is not here
        missing = DataError(f"{name}: its data cannot be had: {first_line(error)}; {_way_out(name)}")
        raise shortage(error) or missing from None
    return loaded


def _way_out(name: str) -> str:
    if name.startswith(NEVER_KEPT):
        return "lm-eval keeps no copy of it, so it needs a network each time; moa_qa_1 takes --passages-file"
    return f"to get it while there is a network: moa eval prefetch MODEL --tasks {name}"


def _missing(name: str, error: ImportError) -> str:
    extra = EXTRAS.get((error.name or "").split(".")[0])
    if extra is None:
        extra = next((extra for package, extra in EXTRAS.items() if package in str(error)), None)
    how = f"; run: pip install 'lm_eval[{extra}]'" if extra else ""
    return f"{name}: a package that this task needs is missing: {first_line(error)}{how}"


def _answer_tokens(task: Any) -> int:
    if task.OUTPUT_TYPE != "generate_until":
        return 0
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(dict(task.config.generation_kwargs or {}))["max_gen_toks"])
