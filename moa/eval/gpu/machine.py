"""What the machine is and what it can do: names, versions, clocks, and the measured rates that kernels are held against."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from moa.eval.gpu.timing import Clock, measure

COPY_BYTES, MATMUL_SIZE = 1 << 31, 8192
LAUNCHES = 64
PACKAGES = ("moa", "torch", "triton", "flashinfer-python", "flash-attn", "flash-attn-3", "nvidia-cudnn-cu13")


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of this machine, measured in this run.

    Args:
        copy_bytes_per_s: bytes read plus bytes written by a copy within device memory.
        matmul_flops_per_s: a square bfloat16 product of random numbers.
        launch_s: one small kernel among many in a graph.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    launch_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """The device and the software on it."""

    device: str
    capability: str
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    driver: str
    cuda: str
    python: str
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Clocks:
    """What the device says of itself at one moment; None where it does not."""

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None


def measure_rates(
    device: torch.device, clock: Clock, copy_bytes: int = COPY_BYTES, matmul_size: int = MATMUL_SIZE
) -> Rates:
    """Measure copy, matrix product and launches; sizes are for a large GPU, and smaller only in tests."""
    return Rates(
        _copy_rate(device, clock, copy_bytes), _matmul_rate(device, clock, matmul_size), _launch(device, clock)
    )


def _copy_rate(device: torch.device, clock: Clock, n_bytes: int) -> float:
    source = torch.randn(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure([lambda: target.copy_(source)], clock).median_s


def _matmul_rate(device: torch.device, clock: Clock, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / measure([lambda: torch.mm(a, b, out=out)], clock).median_s


def _launch(device: torch.device, clock: Clock) -> float:
    small = torch.zeros(1, device=device)
    return measure([lambda: small.add_(1)] * LAUNCHES, clock).median_s


def describe(device: torch.device) -> Machine:
    """The device and versions as they are now; a CPU has no multiprocessors."""
    versions = tuple((name, found) for name in PACKAGES if (found := _version(name)))
    python = platform.python_version()
    if device.type != "cuda":
        return Machine(platform.machine(), "", 0, 0, 0, "", "", python, versions)
    facts = torch.cuda.get_device_properties(device)
    return Machine(
        device=facts.name,
        capability=f"{facts.major}.{facts.minor}",
        multiprocessors=facts.multi_processor_count,
        l2_bytes=int(facts.L2_cache_size),
        memory_bytes=facts.total_memory,
        driver=(_ask_driver(device, "driver_version") or ("",))[0],
        cuda=str(torch.version.cuda),
        python=python,
        versions=versions,
    )


def clocks(device: torch.device) -> Clocks:
    """Clocks, power and temperature now, as the driver's own tool says them."""
    found = _ask_driver(device, "clocks.sm,clocks.mem,power.draw,temperature.gpu")
    return Clocks(*(_number(text) for text in found)) if found else Clocks()


def now() -> str:
    """Date and time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _ask_driver(device: torch.device, fields: str) -> tuple[str, ...] | None:
    if device.type != "cuda":
        return None
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # its number may differ from torch's
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", which]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_query(done.stdout)


def parse_query(text: str) -> tuple[str, ...]:
    """The fields of one line of nvidia-smi's CSV."""
    return tuple(part.strip() for part in text.strip().split(","))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
