"""Shared by all tests: hypothesis profiles, no network, where the reference data may lie."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from moa.plan import Plan

# Before any test imports transformers or datasets: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before anything imports triton: kernels run in its interpreter, on the CPU. Whoever compiles does so in a process without.
os.environ["TRITON_INTERPRET"] = "1"

# No deadline: how long an example takes says nothing on a busy machine.
settings.register_profile("moa", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moa")


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Third-party measurements and plans, beside the checkout on some machines; never part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no third-party reference data at {folder}")
    return folder


@pytest.fixture(scope="session")
def save_llama() -> Callable[..., None]:
    """`save_llama(folder, tokenizer, **config)`: a random two-layer Llama as a model folder."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

    def save(folder: Path, tokenizer: PreTrainedTokenizerBase, **config: int) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        torch.manual_seed(0)
        model = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **config, initializer_range=0.2)
        AutoModelForCausalLM.from_config(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def tiny_folder(save_llama: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with the demo's tokenizer, saved as a model folder; read only."""
    from moa.demo.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("model") / "tiny"
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    save_llama(folder, build_tokenizer(), max_position_embeddings=2048, **marks)
    return folder


@pytest.fixture(scope="session")
def tiny_plan(tiny_folder: Path) -> Plan:
    """A plan of a quarter of the text for the model in `tiny_folder`."""
    from transformers import AutoModelForCausalLM

    from moa.hf.shape import model_shape
    from moa.plan import Plan

    shape = model_shape(AutoModelForCausalLM.from_pretrained(tiny_folder))
    return Plan.uniform(shape, 0, 0.25, sink_tokens=4, min_span_tokens=16)


@pytest.fixture
def plan_file(tiny_plan: Plan, tmp_path: Path) -> Path:
    """That plan in a file."""
    path = tmp_path / "plan.json"
    tiny_plan.save(path)
    return path


class Recorded(dict[tuple[str, ...], dict[str, str]]):
    """Rows of a committed table of what kernels take, by the columns that name a row."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.columns = columns
        with path.open(newline="") as file:
            super().__init__((self.key(row), row) for row in csv.DictReader(file))

    def key(self, row: dict[str, str]) -> tuple[str, ...]:
        """What names a row."""
        return tuple(row[column] for column in self.columns)

    def check(self, rows: Sequence[dict[str, str]]) -> None:
        """Hold rows that were just compiled against their GPU's shared memory and the recorded ones."""
        from moa.kernels.offline import SHARED_KIB

        for row in rows:
            assert int(row["shared_bytes"]) <= 1024 * SHARED_KIB[int(row["target"].removeprefix("sm_"))], row
            recorded = self[self.key(row)]
            if recorded["triton"] == row["triton"]:  # another version's registers are its own
                assert row == recorded, "after a change of kernels or tiles: compile.py --write"

    def stale(self, kernels: Mapping[str, object]) -> set[tuple[str, ...]]:
        """Rows of kernels, by the name in their column, whose code has changed since they were compiled."""
        from moa.kernels.offline import source_digest

        digests = {name: source_digest(kernel) for name, kernel in kernels.items()}
        return {key for key, row in self.items() if row["source"] != digests[row["kernel"]]}


@pytest.fixture(scope="session")
def recorded() -> type[Recorded]:
    """`recorded(path, columns)`: a committed table of what kernels take; tests are no packages, so a fixture carries it."""
    return Recorded


@pytest.fixture(scope="session")
def without_network() -> list[str]:
    """Words before a command that run it where there is no network at all, not even this machine's own."""
    words = ["unshare", "--net", "--map-root-user"]
    try:
        seen = subprocess.run([*words, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine allows no network namespace: {error}")
    assert [line.split(":")[0].strip() for line in seen.splitlines()[2:]] == ["lo"]
    return words


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless=new --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --force-color-profile=srgb"
).split()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, new for each file: what one told it (no network, say) must not reach the next.

    Its driver and itself are on the PATH or the tests are skipped.
    """
    from selenium import webdriver

    driver, binary = shutil.which("chromedriver"), next(filter(None, map(shutil.which, BROWSERS)), None)
    if not driver or not binary:
        pytest.skip("no Chromium with its chromedriver on the PATH (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in [*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield started
    started.quit()


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., list[dict[str, str]]]:
    """`compiled(script, *options)`: the rows that a compile.py of the benchmarks prints.

    It runs in a process whose kernels are not interpreted, with nothing kept from earlier runs.
    """
    if find_spec("triton") is None:
        pytest.skip("Triton has wheels for Linux only")

    def run(script: Path, *options: str) -> list[dict[str, str]]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run(
            [sys.executable, str(script), *options], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return list(csv.DictReader(done.stdout.splitlines()))

    return run


@pytest.fixture
def quick_lm_eval(monkeypatch, tmp_path):
    """No look at the thousands of tasks that lm-eval brings, and a cache of the test's own."""
    from functools import partialmethod

    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
