"""Storage in pages: what a window leaves behind goes back to the system, and the count of bytes says what is there."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moa.kernels import storage
from moa.kernels.storage import ByteCount, Storage

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="pages are Linux's")
# Measured in a process of its own: other tests' freed memory would be taken again unseen.
RESIDENT = """
import sys, torch
from pathlib import Path
from tests_lab import make_rules
from moa.kernels.batch import Batch
from moa.kernels.dispatch import attend, new_memory

torch.set_num_threads(1)

def resident():  # without pages of files, which the system takes from libraries whenever it likes
    everything, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (everything - of_files) * {page}

def step(kv, count, position):
    q, k, v = (torch.randn(count, 4, 128) for _ in range(3))
    attend(q, k, v, kv, 0, Batch.pack([(0, count, position)]))

def run():
    kv, seen = new_memory("torch", rules), []
    kv.add(0)
    for position in range(0, 8192, 512):
        step(kv, 512, position)
        seen.append((kv.kv_bytes, resident() - base))
    for position in range(8192, 8192 + 300):
        step(kv, 1, position)
    return kv, max(held for held, _ in seen), max(more for _, more in seen)

rules, base = make_rules([[(4096, 0.0)] * 4], sink=64, least=128), 0
run()  # libraries, compiled products and scratch memory, so that they count as there before
base = resident()
kv, most, most_resident = run()
print(most, most_resident, kv.kv_bytes, resident() - base)
kv.remove(0)
print(kv.kv_bytes, resident() - base)
"""


@LINUX
def test_resident_memory_follows_the_window(tmp_path: Path) -> None:
    """8k tokens through a window of 4k: 32 MiB if kept, 16 MiB of live keys and values."""
    lab = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
    (tmp_path / "tests_lab.py").write_text(lab, encoding="utf-8")
    code = RESIDENT.replace("{page}", str(mmap.PAGESIZE))
    path = [str(tmp_path), *sys.path]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    most, most_resident, held, resident, nothing, left = map(int, done.stdout.split())
    live, noise = 4096 * 4 * 2 * 128 * 4, 2 << 20
    assert live <= held <= 1.02 * live
    assert most <= 1.2 * live, "a chunk and the window it moves"
    assert 0.98 * live - noise <= resident <= 1.02 * live + noise
    assert most_resident <= 1.2 * live + noise
    assert nothing == 0
    assert left <= noise


@LINUX
@pytest.mark.parametrize("size", [8, 48, 64, 80])
def test_dropped_pages_read_as_zero_and_live_ones_stay(size: int) -> None:
    count = ByteCount()
    held = Storage(count, torch.empty(3, 1, size), 3000, True)
    held.data[:, :, :3000] = 1
    held.touch(3000)
    pages = -(-3000 * size * 4 // mmap.PAGESIZE)
    assert count.allocated == 2 * 3 * pages * mmap.PAGESIZE
    held.release_below(2000)
    gone = 2000 * size * 4 // mmap.PAGESIZE
    assert count.allocated == 2 * 3 * (pages - gone) * mmap.PAGESIZE
    assert held.data[:, :, 2000:3000].eq(1).all()
    assert held.data[:, :, : gone * mmap.PAGESIZE // (size * 4)].eq(0).all()
    held.close()
    assert count.allocated == 0


@LINUX
def test_pages_are_for_large_stores_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.empty(1, 64)
    least = storage.LEAST_PAGES * mmap.PAGESIZE // 256
    assert storage.reserves_pages(row, least)
    assert not storage.reserves_pages(row, least - 1)
    assert not storage.reserves_pages(row.to("meta"), least)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not storage.reserves_pages(row, least)


@LINUX
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_moving_between_plain_tensors_and_pages_keeps_tokens_and_bytes(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    """Grows from a plain tensor into pages, past the reserved range, and on; bytes stay within 2 % and two pages."""
    monkeypatch.setattr(storage, "LEAST_PAGES", 4)
    monkeypatch.setattr(storage, "RESERVE_TIMES", 2)
    rules, qkv = lab.make_rules([[(0, beta), (40, 0.0)]]), lab.make_qkv(1300, 2, 2, 32, 0)
    kv = lab.new_torch_memory(rules)
    outs = [lab.run_steps(kv, [x[:90] for x in qkv], [90])]
    kinds = set()
    for n in range(90, 1200):
        outs.append(lab.run_steps(kv, [x[n : n + 1] for x in qkv], [1]))
        kinds.add(kv.state(0).layers[0].stores[0].is_paged)
        assert rules.kv_bytes(n + 1, 32, 4) <= kv.kv_bytes <= 1.03 * rules.kv_bytes(n + 1, 32, 4) + 8 * mmap.PAGESIZE
    outs.append(lab.run_steps(kv, [x[1200:] for x in qkv], [100]))
    assert kinds == {False, True}
    torch.testing.assert_close(torch.cat(outs).double(), lab.oracle(rules, qkv), atol=1e-5, rtol=1e-5)
