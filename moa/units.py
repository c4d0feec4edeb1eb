"""How sizes are written for people."""

from __future__ import annotations


def human_bytes(n_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1: `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} TiB"
