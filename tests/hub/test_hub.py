"""Plans travel through a hub whole and checked, and nothing that names this machine goes with them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from moa.eval.records import Conditions, Environment, MethodResult, Report
from moa.eval.report import to_json
from moa.plan import ModelShape, Plan, load_plan
from moa.plan_card import plan_card

SHAPE = ModelShape(architecture="LlamaForCausalLM", layers=2, heads=4, kv_heads=2, head_dim=8, name="org/base")
PLAN = Plan.uniform(SHAPE, 0, 0.5, sink_tokens=4, min_span_tokens=16)
REPORT = Report(
    title="moa",
    conditions=Conditions(
        model_name="org/base", model_fingerprint="f", architecture="LlamaForCausalLM", parameters=7,
        environment=Environment(
            device="cpu", dtype="float32", threads=1, moa="1", torch="2", transformers="5", python="3"
        ),
        task=None, lengths_tokens=(64,), date="2026-01-02T03:04:05+00:00", command="moa eval org/base --density 1/2",
    ),
    dense=MethodResult(method="dense", backend="sdpa"),
    methods=(),
)  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder as a run leaves it."""
    folder = tmp_path / "out"
    (folder / "stages").mkdir(parents=True)
    PLAN.save(folder / "plan.json")
    texts = {
        "README.md": plan_card(PLAN),
        "report.md": "# report",
        "report.json": to_json(REPORT),
        "moa.log": "/home/me",
        ".moa.lock": "",
    }
    for name, text in {**texts, "config.yaml": "model: /home/me", "stages/a.json": "[]", "thesis.tex": "mine"}.items():
        (folder / name).write_text(text)
    (folder / "accuracy.png").write_bytes(b"png")
    (folder / "profile.safetensors").write_bytes(safetensors.numpy.save({"losses.64": np.ones(99)}, {"model": "{}"}))
    return folder


TRAVEL = {"plan.json", "README.md", "report.md", "report.json", "accuracy.png", "profile.safetensors"}


def test_what_is_pushed_is_what_is_pulled(hub, moa, out: Path, tmp_path: Path) -> None:
    code, said, errors = moa("push", out, "org/plan")
    assert code == 0, errors
    assert said == f"{hub.url}/org/plan/commit/{hub.commit_of('org/plan')}\n"
    assert {name: (out / name).read_bytes() for name in TRAVEL} == hub.repos["org/plan"]
    assert not hub.private["org/plan"]
    code, said, errors = moa("pull", "org/plan", "-o", tmp_path / "new/here", "--json")
    assert code == 0, errors
    assert json.loads(said)["commit"] == hub.commit_of("org/plan")
    assert {p.name: p.read_bytes() for p in (tmp_path / "new/here").iterdir()} == hub.repos["org/plan"]
    assert not any(p.is_symlink() for p in (tmp_path / "new/here").iterdir())
    # the same commit again, from what the client cached
    assert moa("pull", "org/plan", "-o", tmp_path / "again", "--revision", hub.commit_of("org/plan"))[0] == 0


def test_a_plan_alone_is_pushed_with_its_card(hub, moa, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert moa("push", tmp_path, "org/plan", "--private")[0] == 0
    assert hub.repos["org/plan"] == {"plan.json": PLAN.to_json().encode(), "README.md": plan_card(PLAN).encode()}
    assert hub.private["org/plan"]


def test_a_private_plan_is_not_pushed_to_a_public_repository(hub, moa, out: Path) -> None:
    hub.repos["org/plan"] = {}
    code, _, errors = moa("push", out, "org/plan", "--private")
    assert code == 3
    assert "is there already and is public" in errors
    assert hub.repos["org/plan"] == {}


def naming_a_place(name: str) -> bytes:
    """A file of an output folder that tells where something lies on this machine."""
    if name == "plan.json":
        return Plan.uniform(SHAPE.model_copy(update={"name": "/home/me/x"}), 0, 0.5).to_json().encode()
    if name == "report.json":
        typed = {"command": "moa eval /home/me/x --plan out"}
        conditions = REPORT.conditions.model_copy(update=typed)
        return to_json(REPORT.model_copy(update={"conditions": conditions})).encode()
    if name == "profile.safetensors":
        calibration = json.dumps({"dataset": "/home/me/x"})
        return safetensors.numpy.save({"losses.64": np.ones(99)}, {"calibration": calibration})
    return b"Made of `/home/me/x` on my machine."


@pytest.mark.parametrize("name", ["plan.json", "README.md", "report.json", "report.md", "profile.safetensors"])
def test_what_names_a_place_on_this_machine_stays_on_it(hub, moa, out: Path, name) -> None:
    (out / name).write_bytes(naming_a_place(name))
    code, _, errors = moa("push", out, "org/plan")
    assert code == 3
    assert f"{out / name} names /home/me/x, a place on this machine" in errors
    assert ("set its sha256 to an empty string" in errors) == (name == "plan.json")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.json", b"{}"),
        ("report.json", b'{"command": "moa"}'),
        ("profile.safetensors", b""),
        ("profile.safetensors", bytes(1000)),
        ("profile.safetensors", b"\xff" * 1000),
        ("profile.safetensors", (2).to_bytes(8, "little") + b"[]"),
        ("profile.safetensors", (18).to_bytes(8, "little") + b'{"__metadata__":3}'),
    ],
)
def test_what_is_not_what_its_name_says_stays_too(hub, moa, out: Path, name, content) -> None:
    (out / name).write_bytes(content)
    code, _, errors = moa("push", out, "org/plan")
    assert code == 3
    assert errors.startswith(f"moa: error: {out / name}: not a ")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["plan", "a/b/c", "../x", "org/na me", "org/-x-", "org/x.git", "org/" + "x" * 200])
def test_names_that_are_no_repositories(moa, hub, out: Path, tmp_path: Path, name) -> None:
    for arguments in (("push", out, name), ("pull", name, "-o", tmp_path / "new")):
        code, _, errors = moa(*arguments)
        assert code == 2
        assert "is no repository id; wanted the form organisation/name" in errors
    assert hub.requests == []


def test_what_is_no_output_folder_is_not_pushed(moa, hub, out: Path, tmp_path: Path) -> None:
    assert moa("push", tmp_path / "none", "org/plan")[0] == 3
    text = (out / "plan.json").read_text()
    (out / "plan.json").write_text(text.replace('"min_span_tokens": 16', '"min_span_tokens": 32'))
    code, _, errors = moa("push", out, "org/plan")
    assert code == 3
    assert "the content's digest is" in errors
    assert hub.requests == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the repository holds no plan.json"),
        ({"README.md": b"card"}, "the repository holds no plan.json"),
        ({"plan.json": b"{}", "README.md": b"card"}, "the key 'model' is missing"),
        ({"plan.json": PLAN.to_json().replace("0.5", "0.25").encode()}, "the content's digest is"),
        ({"plan.json": b"[" * 100_000}, "not a plan"),
        ({"plan.json": bytes((8 << 20) + 1)}, "plan.json has 8.00 MiB, more than the 8.00 MiB"),
        (
            {"plan.json": PLAN.to_json().encode(), "README.md": bytes((1 << 20) + 1)},
            "README.md has 1.00 MiB, more than",
        ),
    ],
    ids=["empty", "no plan", "no rules", "edited", "deep", "large plan", "large card"],
)
def test_a_plan_that_is_not_valid_is_not_written(moa, hub, tmp_path: Path, files, message) -> None:
    hub.repos["org/plan"] = files
    code, said, errors = moa("pull", "org/plan", "-o", tmp_path / "new")
    assert (code, said) == (3, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "new").exists()
    if "large" in message or "more than" in message:
        large = next(name for name, data in files.items() if len(data) > 1 << 20)
        assert not any(r.startswith("GET") and r.endswith(large) for r in hub.requests), "it was downloaded"


PICTURE_LIMITS = [
    ({f"a{i}.png": b"x" for i in range(65)}, "65 pictures, "),
    # the last of these is one byte too many
    ({**{f"a{i}.png": bytes(16 << 20) for i in range(3)}, "b.png": bytes(16 << 20), "c.png": b"x"}, "c.png"),
]


@pytest.mark.parametrize(("pictures", "named"), PICTURE_LIMITS, ids=["many", "large"])
def test_pictures_are_bounded_both_ways(moa, hub, tmp_path: Path, pictures, named) -> None:
    hub.repos["org/plan"] = {"plan.json": PLAN.to_json().encode(), **pictures}
    code, _, errors = moa("pull", "org/plan", "-o", tmp_path / "new")
    assert (code, errors.count("\n")) == (3, 1)
    assert named in errors
    assert not (tmp_path / "new").exists()
    assert not any(r.startswith("GET") and r.endswith(("/c.png", "/a64.png")) for r in hub.requests), (
        "it was downloaded"
    )
    del hub.repos["org/plan"]
    (tmp_path / "out").mkdir()
    for name, data in {"plan.json": PLAN.to_json().encode(), **pictures}.items():
        (tmp_path / "out" / name).write_bytes(data)
    code, _, errors = moa("push", tmp_path / "out", "org/plan")
    assert code == 3
    assert named in errors
    assert not hub.repos


def test_what_is_not_there(moa, hub, tmp_path: Path) -> None:
    code, _, errors = moa("pull", "org/none", "-o", tmp_path / "new")
    assert code == 3
    assert "no such repository on the hub" in errors
    hub.repos["org/plan"] = {"plan.json": PLAN.to_json().encode()}
    code, _, errors = moa("pull", "org/plan", "-o", tmp_path / "new", "--revision", "v9")
    assert code == 3
    assert "org/plan: the repository has no such revision" in errors


def test_a_file_in_the_way_is_not_replaced_without_a_word(moa, hub, out: Path, tmp_path: Path) -> None:
    hub.repos["org/plan"] = {"plan.json": PLAN.to_json().encode(), "README.md": b"theirs", "../../evil.png": b"x"}
    new = tmp_path / "new"
    new.mkdir()
    (new / "README.md").write_text("mine")
    code, _, errors = moa("pull", "org/plan", "-o", new)
    assert code == 2
    assert f"{new / 'README.md'} exists" in errors
    assert [p.name for p in new.iterdir()] == ["README.md"]
    assert moa("pull", "org/plan", "-o", new, "--overwrite")[0] == 0
    assert (new / "README.md").read_text() == "theirs"
    assert {p.name for p in new.iterdir()} == {"plan.json", "README.md"}
    assert not any("evil" in request for request in hub.requests)


def test_a_download_that_breaks_off_leaves_nothing(moa, hub, out: Path, tmp_path: Path) -> None:
    hub.repos["org/plan"] = {name: (out / name).read_bytes() for name in TRAVEL}
    hub.cut["profile.safetensors"] = 500
    code, _, errors = moa("pull", "org/plan", "-o", tmp_path / "new", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert code == 3, errors
    assert not (tmp_path / "new").exists()
    hub.cut.clear()
    assert moa("pull", "org/plan", "-o", tmp_path / "new")[0] == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == hub.repos["org/plan"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_pull_that_is_stopped_leaves_nothing(hub, environment, out: Path, tmp_path: Path, number) -> None:
    hub.repos["org/plan"] = {name: (out / name).read_bytes() for name in TRAVEL}
    hub.hold = "profile.safetensors"
    command = [sys.executable, "-m", "moa", "pull", "org/plan", "-o", str(tmp_path / "new")]
    with subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - a shell may ignore it
    ) as process:
        limit = time.monotonic() + 60
        while not any(r.startswith("GET") and r.endswith(hub.hold) for r in hub.requests):
            assert time.monotonic() < limit
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        hub.released.set()
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
        assert "Traceback" not in errors
    assert not (tmp_path / "new").exists()


def test_a_plan_is_named_by_its_repository(hub, moa, environment, tmp_path: Path) -> None:
    hub.repos["org/plan"] = {"plan.json": PLAN.to_json().encode()}
    code, said, errors = moa("plan", "show", "org/plan", "--json")
    assert code == 0, errors
    assert json.loads(said)["sha256"] == PLAN.sha256
    # offline it comes from the cache, and what is not there is said
    assert moa("plan", "validate", "org/plan", HF_HUB_OFFLINE="1")[0] == 0
    code, _, errors = moa("plan", "show", "org/other", HF_HUB_OFFLINE="1")
    assert code == 3
    assert "org/other: no such file or folder here" in errors
    assert "HF_HUB_OFFLINE is set" in errors


def test_a_local_folder_comes_before_the_hub(hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    PLAN.save(tmp_path / "org/plan/plan.json")
    assert load_plan("org/plan") == PLAN
    assert hub.requests == []


APPLIED = """
import torch, transformers, moa
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
with moa.apply(model, "org/plan") as attached, torch.no_grad():
    model(torch.arange(3, 203)[None])
    print(attached.plan.sha256, attached.kv_bytes < attached.dense_kv_bytes)
"""


def test_a_model_takes_a_plan_from_the_hub(hub, environment, tiny_folder: Path, tiny_plan: Plan) -> None:
    """And offline from the hub's cache, once it has been there."""
    hub.repos["org/plan"] = {"plan.json": tiny_plan.to_json().encode()}
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", APPLIED.format(folder=str(tiny_folder))],
            env={**environment, **offline}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout == f"{tiny_plan.sha256} True\n", done.stderr
