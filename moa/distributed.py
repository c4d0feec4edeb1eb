"""Several processes of one job (torchrun, accelerate launch): each takes a share, all have the results, one leads.

What they exchange is small and lives on the CPU, so they talk through gloo, also where the models are on GPUs. A process
alone makes the same calls, which then give back what they were given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from moa.errors import MoaError, ResourceError, UsageError

T = TypeVar("T")
FloatArray = npt.NDArray[np.float64]
PEER_TIMEOUT_S = 1800
_FAILED = "moa-failed"
_NOBODY = object()


def environment() -> tuple[int, int]:
    """This process's rank and how many there are, by the variables that launchers set."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of a job; the default is one process alone.

    Raises:
        MoaError: from all that exchanges something, where another process failed, was lost, or does not answer in time.
    """

    rank: int = 0
    world: int = 1
    store: Any = field(default=None, repr=False)  # a store of torch.distributed, where failures are written down

    @property
    def leads(self) -> bool:
        """Whether this process solves and writes."""
        return self.rank == 0

    @property
    def suffix(self) -> str:
        """What sets the name of a share's unit apart; nothing for a process alone."""
        return f"-{self.rank + 1}of{self.world}" if self.world > 1 else ""

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share: every `world`-th item, so that kinds of items that take turns are shared out evenly."""
        return items[self.rank :: self.world]

    def gather(self, share: Sequence[T], dump: Callable[[T], object], load: Callable[[Any], T]) -> tuple[T, ...]:
        """All shares, in the order their items had before `shard`; they travel as JSON."""
        if self.world == 1:
            return tuple(share)
        shares = [json.loads(text) for text in self._all_texts(json.dumps([dump(item) for item in share]))]
        turns = zip_longest(*shares, fillvalue=_NOBODY)
        return tuple(load(item) for turn in turns for item in turn if item is not _NOBODY)

    def mean(self, values: FloatArray, weight: float) -> FloatArray:
        """The mean of all processes' values, weighted and summed in float64; every process gets it."""
        if self.world == 1:
            return values
        total = torch.tensor(np.append(values * weight, weight), dtype=torch.float64)
        with self._guarded():
            dist.all_reduce(total)
        return np.asarray((total[:-1] / total[-1]).numpy().reshape(values.shape), dtype=np.float64)

    def from_leader(self, make: Callable[[], T], dump: Callable[[T], object], load: Callable[[Any], T]) -> T:
        """What the leader makes; to the others it travels as JSON, while they wait."""
        if self.world == 1:
            return make()
        made = make() if self.leads else None
        text = self._all_texts("" if made is None else json.dumps(dump(made)))[0]
        return load(json.loads(text)) if made is None else made

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.world > 1:
            with self._guarded():
                dist.barrier()

    def fail(self, error: BaseException) -> None:
        """Leave word for the others why this process stops."""
        code = error.exit_code if isinstance(error, MoaError) else 1
        with suppress(RuntimeError):  # the one who kept the store may be gone
            self.store.set(_FAILED, json.dumps({"rank": self.rank, "code": code, "why": str(error)}))

    def _all_texts(self, text: str) -> list[str]:
        """Every process's text."""
        mine = torch.frombuffer(bytearray(text.encode() + b" "), dtype=torch.uint8)  # [bytes], never empty
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(mine)
        with self._guarded():
            dist.all_reduce(sizes)
            room = int(sizes.max())
            parts: list[Tensor] = [torch.empty(room, dtype=torch.uint8) for _ in range(self.world)]
            dist.all_gather(parts, torch.nn.functional.pad(mine, (0, room - len(mine))))
        return [
            part[:size].numpy().tobytes().decode().rstrip() for part, size in zip(parts, sizes.tolist(), strict=True)
        ]

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's own errors are all of this kind
            raise self._why(error) from error

    def _why(self, error: RuntimeError) -> BaseException:
        """What another process left word of, or that one was lost without a word."""
        with suppress(RuntimeError):
            if self.store.check([_FAILED]):
                said = json.loads(self.store.get(_FAILED))
                if not self.leads:
                    return SystemExit(said["code"])  # the one that failed has said why
                stopped = ResourceError(f"process {said['rank']} of {self.world} stopped: {said['why']}")
                stopped.exit_code = said["code"]
                return stopped
        return ResourceError(
            f"another of the {self.world} processes of this job was lost, or did not answer within --peer-timeout-s "
            f"({' '.join(str(error).split())[:120]}); finished units are kept: run the same command again with --resume"
        )


@contextmanager
def joined(timeout_s: float = PEER_TIMEOUT_S) -> Iterator[Team]:
    """This process's team, by what its launcher has set in the environment; alone without a launcher.

    Args:
        timeout_s: longest wait for another process.

    Raises:
        ResourceError: the others do not come.
    """
    rank, world = environment()
    if world == 1:
        yield Team()
        return
    wait = timedelta(seconds=timeout_s)
    try:
        store, rank, world = next(rendezvous("env://", timeout=wait))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise ResourceError(f"the {world} processes of this job did not find each other: {error}") from None
    team = Team(rank, world, store)
    try:
        yield team
    except BaseException as error:
        team.fail(error)
        raise
    finally:
        dist.destroy_process_group()


def own_device(device_map: str | None) -> str | None:
    """Where this process's model goes: on GPUs, each process has one.

    Raises:
        UsageError: several processes were each to spread over all GPUs, or there are fewer GPUs than processes.
    """
    _, world = environment()
    if world == 1 or device_map in (None, "cpu"):
        return device_map
    if device_map != "cuda":
        raise UsageError(
            f"--device-map {device_map} with {world} processes: each would take all devices; use --device-map cuda for "
            "a GPU each, or start one process"
        )
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise UsageError(f"--device-map cuda: process {local} of this machine has no GPU of its own, there are {gpus}")
    return f"cuda:{local}"
