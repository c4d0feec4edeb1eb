"""The model's files, at the revision that is asked for."""

from __future__ import annotations

from pathlib import Path

from moa import demo
from moa.eval.paired.settings import EvalSettings
from moa.hf.load import check_folder
from moa.hub_files import explaining

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


def fetch_model(settings: EvalSettings) -> str:
    """The folder with a model and its tokenizer: the one named, or what the hub or its cache has of a repository.

    Raises:
        ModelError: a folder is named that is none, or holds no model.
        HubError: there is no such repository or revision, or it is not in the cache and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    place = demo.resolve(settings.model)
    check_folder(place)
    if Path(place).exists():
        return place
    with explaining(settings.model):
        return snapshot_download(place, revision=settings.revision, allow_patterns=[*PATTERNS])
