"""Compile Triton kernels for GPUs that need not be there, and say what they take.

Triton brings ptxas and cuobjdump, so this runs on a CPU; TRITON_INTERPRET must not be set. Importing this module imports
triton.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import inspect
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# KiB of shared memory that one thread block can have (CUDA C++ Programming Guide, compute capabilities).
SHARED_KIB = {80: 163, 89: 99, 90: 227}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes: registers and spilled bytes of a thread, shared memory of a thread block."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def usage_of(
    kernel: Any, kinds: Mapping[str, str], constants: Mapping[str, Any], capability: int, warps: int, stages: int
) -> Usage:
    """Compile `kernel` and read what it takes.

    Args:
        kernel: a function under `triton.jit`.
        kinds: Triton's type of each argument, as "*bf16" or "i32"; a trailing "%16" says that it is a multiple of 16, which
            pointers are anyhow.
        constants: values of the constexpr arguments; names that the kernel lacks are left out.
        capability: of the GPU, 90 for sm_90.
        warps: per thread block.
        stages: of the software pipeline.

    Raises:
        TypeError: kernels are interpreted in this process.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError("kernels are interpreted in this process: compile in one without TRITON_INTERPRET")
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else kinds[name].removesuffix("%16") for name in names}
    divisible = [name for name in names if signature[name].startswith("*") or kinds.get(name, "").endswith("%16")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return _usage(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))


def source_digest(kernel: Any) -> str:
    """First digits of a sha256 over what a kernel and all device functions it calls do: their code without comments, and the
    constants it names. Kernels may be interpreted in this process."""
    sources: dict[str, str] = {}
    _collect(kernel.fn, sources)
    return hashlib.sha256("\n".join(sources[name] for name in sorted(sources)).encode()).hexdigest()[:12]


def _collect(function: Callable[..., Any], sources: dict[str, str]) -> None:
    """Code and constants of a device function and of what it calls, by name."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if not isinstance(tree, ast.FunctionDef) or function.__name__ in sources:
        return
    tree.decorator_list, tree.body = [], tree.body[1:] if ast.get_docstring(tree) else tree.body
    sources[function.__name__] = ast.unparse(tree)
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        if isinstance(found, tl.constexpr):
            sources[name] = f"{name} = {found.value!r}"
        elif callable(getattr(found, "fn", None)):
            _collect(found.fn, sources)  # type: ignore[union-attr]  # a function under triton.jit


def _usage(binary: Any) -> Usage:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = dict(word.split(":") for line in text.splitlines() if "REG:" in line for word in line.split()[:2])
    return Usage(int(words["REG"]), int(words["STACK"]), binary.metadata.shared)


def tabulate(
    doc: str | None, table: Path, options: Mapping[str, list[Any]], rows: Callable[..., Iterable[dict[str, Any]]]
) -> None:
    """The command line of a script that tables what kernels take, as CSV on stdout or into `table`.

    Each option takes several values and has those of `options` by default; `rows` gets them all by name, and
    `capabilities` first.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {table.name} instead of stdout")
    for name, values in {"capabilities": list(SHARED_KIB), **options}.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(values[0]), nargs="+", default=values, help=f"of {values}")
    chosen = vars(parser.parse_args())
    write = chosen.pop("write")
    found = [{**row, "triton": triton.__version__} for row in rows(**chosen)]
    with table.open("w", newline="") if write else sys.stdout as out:
        writer = csv.DictWriter(out, found[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
