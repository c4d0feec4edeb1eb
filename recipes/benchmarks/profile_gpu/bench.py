"""Time the profile's Triton kernels beside FlashAttention's forward and backward, on one CUDA GPU.

    python recipes/benchmarks/profile_gpu/bench.py -o recipes/benchmarks/profile_gpu/times.csv

Both sides get the same random bfloat16 tensors, round by round in turn. FlashAttention is torch's own
(scaled_dot_product_attention, flash backend only). A row of the CSV is one side at one length: the median and the
range of its times, and its peak memory beyond the inputs.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moa.profile import triton_sweep
from moa.profile.sweep import Scores, SpanGrid

Step = Callable[[], object]
SINK_TOKENS, MIN_SPAN_TOKENS = 64, 128


def flash(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> dict[str, Step]:
    """Forward alone, and backward alone of a graph made once."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    out = attend()
    return {
        "forward": lambda: attend().detach(),
        "backward": lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True),
    }


def profiled(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, attenuation: float) -> dict[str, Step]:
    """The same two with the losses of every span in the backward pass, at one point of the path."""
    n = q.shape[2]
    grid = SpanGrid.for_length(n, SINK_TOKENS, MIN_SPAN_TOKENS)
    rows = torch.arange(1, n + 1)
    kept = torch.minimum(rows, torch.maximum(torch.tensor(MIN_SPAN_TOKENS), (rows + 3) // 4))
    scores = Scores(q.shape[3] ** -0.5, None, None, attenuation, SINK_TOKENS, (rows - (kept - SINK_TOKENS))[None])
    out, lse = triton_sweep.forward(q, k, v, None, scores)
    return {
        "forward": lambda: triton_sweep.forward(q, k, v, None, scores),
        "backward": lambda: triton_sweep.backward(q, k, v, None, out, lse, d_out, scores, grid, "joint"),
    }


def milliseconds(step: Step) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def peak_bytes(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(n: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the CSV for one length."""
    torch.manual_seed(args.seed)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    tensors = [torch.randn(1, h, n, args.head_dim, device="cuda", dtype=torch.bfloat16) for h in heads]
    sides = {"flash": flash(*tensors), "moa": profiled(*tensors, args.attenuation)}
    steps = {(side, name): step for side, parts in sides.items() for name, step in parts.items()}
    memory = {key: peak_bytes(step) for key, step in steps.items()}  # compiles and warms up as well
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(args.rounds):
        for key, step in steps.items():
            times[key].append(milliseconds(step))
    return [row(key, n, times[key], memory[key], times["flash", key[1]], args) for key in steps]


def row(
    key: tuple[str, str], n: int, times: list[float], memory: int, flash_times: list[float], args: argparse.Namespace
) -> dict[str, Any]:
    side, name = key
    return {
        "side": side, "pass": name, "n_tokens": n, "median_ms": round(statistics.median(times), 4),
        "least_ms": round(min(times), 4), "greatest_ms": round(max(times), 4),
        "ratio_to_flash": round(statistics.median(times) / statistics.median(flash_times), 3),
        "peak_extra_bytes": memory, "heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim,
        "dtype": "bfloat16", "attenuation": args.attenuation, "rounds": args.rounds, "seed": args.seed,
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(sys.argv),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--attenuation", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU; compile.py says what can be said without one")
    table = [entry for n in args.lengths for entry in measure(n, args)]
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    for entry in table:
        print(f"{entry['n_tokens']:>7} {entry['side']:>5} {entry['pass']:>8} {entry['median_ms']:>9} ms", end=" ")
        print(f"{entry['ratio_to_flash']} x flash, {entry['peak_extra_bytes'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
