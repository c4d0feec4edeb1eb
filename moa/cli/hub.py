"""`moa push` and `moa pull`: share plans through the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moa.cli.output import emit, emit_json

RepoId = Annotated[str, typer.Argument(help="Hub repository: organisation/name.")]


def push(
    output_dir: Annotated[Path, typer.Argument(help="Folder that moa compress made.")],
    repo_id: RepoId,
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
) -> None:
    """Put a plan with its card, profile and reports on the hub; never stages, settings, logs or local paths."""
    from moa import hub

    emit(hub.push(output_dir, repo_id, private=private))


def pull(
    repo_id: RepoId,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the plan and all else.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: the newest of main.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same names.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Write the result as one JSON object.")] = False,
) -> None:
    """Get a plan from the hub; it is checked before anything is written."""
    from moa import hub

    found = hub.pull(repo_id, output_dir, revision=revision, overwrite=overwrite)
    if json:
        files = [str(path) for path in found.files]
        emit_json({"repo_id": repo_id, "commit": found.commit, "sha256": found.plan.sha256, "files": files})
        return
    emit(
        f"{found.files[-1]}: {found.plan.distinct_rules} rules, sha256 {found.plan.sha256[:12]}, commit {found.commit[:12]}"
    )
