"""Ranks that compute together: how they meet, what they tell each other, how a module is shared among them.

The only module that knows torch.distributed. A stage is given a `World`; alone (`ALONE`) every method is what one
process does anyway, so that stages hold no second path.

Three groups of processes stand behind a World. Gradients go over the default one (NCCL for CUDA devices, gloo
otherwise). Results, errors and sums go over a gloo group of their own, and so does the flag that is exchanged in every
step: each group keeps its own order of operations, so that a flag under way never waits for a gradient.

How ranks meet: rank 0 listens on a port that the system chose and publishes where (`Meeting`); the others try each of
its addresses and know it by a token, for an address such as that of a bridge can stand for another host elsewhere.
"""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Store, TCPStore
from torch.nn.parallel import DistributedDataParallel

from maehpc.addresses import far_first, own_addresses, route_to
from maehpc.errors import InputError, Interrupted, LostRanksError, MaehpcError, RunError

Result = TypeVar("Result")

TICK_S = 1.0
"""Seconds between two signs of life of a rank at work while others wait for it."""

BUCKET_MIB = 25.0
"""Gradients are summed among ranks in parts of this size, while the backward still computes the others."""

_TRY_S = 2.0
"""Seconds that an address of rank 0 is given to answer."""

_LOOK_S = (0.05, 1.0)
"""Seconds between two looks for rank 0, at first and at most: a shared file system serves a thousand ranks at once."""

_ALL = "all ranks"  # the store's key for what every rank told, once all are there

_BUFFERS = "forward_sync_buffers"  # whether rank 0's are sent before every step
if _BUFFERS not in signature(DistributedDataParallel.__init__).parameters:
    _BUFFERS = "broadcast_buffers"  # its older name

_LOST = re.compile(r"\bgloo\b|\bNCCL\b|connection (closed|reset) by peer|broken pipe|socket timeout", re.IGNORECASE)
"""How torch.distributed's plain RuntimeErrors are known; nothing else of a stage speaks of such things."""


class Meeting(Protocol):
    """Where rank 0 tells the others how to find it; a folder that all of them see, say."""

    def publish(self, facts: dict[str, Any]) -> None:
        """Rank 0 tells, once, where it listens (JSON)."""

    def find(self) -> dict[str, Any] | None:
        """What rank 0 told; None where it has not yet."""


@dataclass(frozen=True)
class _Groups:
    control: Any
    flags: Any
    busy: threading.Lock = field(default_factory=threading.Lock)


class Flag:
    """A number on its way to every rank."""

    def __init__(self, value: Tensor, work: Any = None) -> None:
        self._value = value
        self._work = work

    def wait(self) -> int:
        """The largest number that any rank gave."""
        if self._work is not None:
            self._work.wait()
        return int(self._value)


@dataclass(frozen=True)
class World:
    """The ranks that compute one stage together, seen from one of them.

    All ranks call the same methods in the same order.

    Attributes:
        rank: this process, 0 to size - 1.
        size: number of processes.
        local_rank: this process among those of its host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    _groups: _Groups | None = field(default=None, repr=False, compare=False)

    @property
    def leader(self) -> bool:
        """Whether this is rank 0, which alone owns folders and writes files."""
        return self.rank == 0

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Every rank runs its `work`, however long it takes; all get all results, or the same error.

        While one works and others wait, all exchange signs of life, so that a rank that died is noticed and one that
        is slow is not taken for dead. `work` must exchange nothing with other ranks itself.

        Args:
            work: of this rank.

        Returns:
            The results in the order of ranks, as JSON gives them back.

        Raises:
            MaehpcError: the error of the first rank that met one, on every rank; an interruption only where there is
                no other.
            LostRanksError: another rank failed in another way, or is gone.
        """
        if self._groups is None:
            return [work()]
        failure: Exception | None = None
        outcome: dict[str, Any] = {}
        with _Alive(self._groups):
            try:
                outcome = {"result": work()}
            except Exception as error:
                outcome, failure = _described(error), error
        outcomes = self._exchange(outcome)
        if failure is not None and "failed" in outcome:
            raise failure
        errors = [(told["error"] == "interrupted", rank) for rank, told in enumerate(outcomes) if "error" in told]
        if errors:
            _, rank = min(errors)
            raise failure if rank == self.rank and failure is not None else _error(outcomes[rank])
        for rank, told in enumerate(outcomes):
            if "failed" in told:
                raise LostRanksError(f"rank {rank} failed ({told['failed']}); its log tells more")
        return [told["result"] for told in outcomes]

    def from_leader(self, work: Callable[[], Result]) -> Result:
        """Rank 0 runs `work`; every rank gets its result, or its error.

        Raises:
            MaehpcError: what `work` raised.
        """
        if self._groups is None:
            return work()
        results = self.together(work if self.leader else lambda: cast(Result, None))
        return results[0]

    def alike(self, work: Callable[[], Result]) -> Result:
        """Every rank runs `work` and keeps its own result; the error of one is everybody's.

        Raises:
            MaehpcError: as `together`.
        """
        results: list[Result] = []
        self.together(lambda: results.append(work()))
        return results[0]

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.together(lambda: None)

    def _exchange(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks. JSON: what comes over a network is never unpickled."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self._gathered(data)]

    def _gathered(self, data: Tensor) -> list[Tensor]:
        """Bytes (uint8 [n], n differs) of every rank."""
        assert self._groups is not None
        group = self._groups.control
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=group)
        return [part[: int(length)].clone() for part, length in zip(parts, lengths, strict=True)]

    def gather(self, tensor: Tensor | None) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks.

        Args:
            tensor: [n, ...]; n may differ among ranks. None stands for no rows, where not even the shape is known.

        Returns:
            Tensors on the device of `tensor` (the CPU where it is None).
        """
        if self._groups is None:
            assert tensor is not None, "one rank alone has every row"
            return [tensor]
        known = [kind for kind in self._exchange(tensor is not None and _kind(tensor[:0])) if kind]
        assert known.count(known[0]) == len(known), f"the ranks' tensors differ in more than their rows: {known}"
        shape, dtype = known[0]["shape"][1:], getattr(torch, known[0]["dtype"])
        device = torch.device("cpu") if tensor is None else tensor.device
        rows = torch.empty(0, *shape, dtype=dtype) if tensor is None else tensor.detach().cpu().contiguous()
        parts = self._gathered(rows.reshape(-1).view(torch.uint8))
        return [part.view(dtype).reshape(-1, *shape).to(device) for part in parts]

    def copy_from_leader(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's tensors, byte for byte; the other ranks give None. On the CPU."""
        if self._groups is None:
            assert tensors is not None, "one rank alone leads"
            return dict(tensors)
        ours = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
        for name, kind in self._exchange({name: _kind(tensor) for name, tensor in ours.items()})[0].items():
            tensor = ours[name] if self.leader else torch.empty(kind["shape"], dtype=getattr(torch, kind["dtype"]))
            if tensor.numel():
                dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0, group=self._groups.control)
            ours[name] = tensor
        return ours

    def begin_largest(self, value: int) -> Flag:
        """Sends a number to every rank and returns at once; `Flag.wait` gives the largest."""
        tensor = torch.tensor(int(value))
        if self._groups is None:
            return Flag(tensor)
        return Flag(tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._groups.flags, async_op=True))

    def largest(self, value: int) -> int:
        """The largest number that any rank gives."""
        return self.begin_largest(value).wait()

    def parallel(self, module: nn.Module, unused: bool = False, bucket_mib: float | None = None) -> nn.Module:
        """`module` such that a backward leaves the mean of all ranks' gradients in every rank.

        Every rank begins with rank 0's parameters. Buffers are not exchanged in a step.

        Args:
            module: at least one of its parameters is trained.
            unused: whether some trained parameters get no gradient.
            bucket_mib: see `BUCKET_MIB`, the default.
        """
        if self._groups is None:
            return module
        options: dict[str, Any] = {"find_unused_parameters": unused, _BUFFERS: False}
        return DistributedDataParallel(module, bucket_cap_mb=bucket_mib or BUCKET_MIB, **options)


ALONE = World()
"""One process that computes everything itself."""


def summing(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Sums gradients among ranks in the `last` backward of a step alone; the others add up in each rank."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return cast(AbstractContextManager[None], module.no_sync())


def _kind(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


_ERRORS = {"input": InputError, "lost": LostRanksError, "run": RunError}


def _described(error: Exception) -> dict[str, Any]:
    """An exception as JSON."""
    if isinstance(error, Interrupted):
        return {"error": "interrupted", "words": [error.work, error.reason, error.step]}
    if isinstance(error, MaehpcError):
        kind = next((kind for kind, group in _ERRORS.items() if isinstance(error, group)), "run")
        return {"error": kind, "words": [str(error)]}
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _error(told: Mapping[str, Any]) -> MaehpcError:
    if told["error"] == "interrupted":
        return Interrupted(*told["words"])
    return _ERRORS[told["error"]](*told["words"])


class _Alive:
    """Exchanges signs of life while this rank works, until all ranks have finished."""

    def __init__(self, groups: _Groups) -> None:
        self._groups = groups
        self._finished = threading.Event()
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        assert self._groups.busy.acquire(blocking=False), "work among ranks cannot be nested"
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            return  # no Exception: it ends this process, and the others learn that from their connections
        self._finished.set()
        self._thread.join()
        self._groups.busy.release()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            busy = torch.ones(1, dtype=torch.int64)
            while busy:
                busy[0] = not self._finished.wait(TICK_S)
                dist.all_reduce(busy, dist.ReduceOp.MAX, group=self._groups.control)
        except RuntimeError as error:
            self._error = error


@contextmanager
def join(
    world: World,
    device: torch.device,
    meeting: Meeting,
    timeout_s: float = 600.0,
    interface: str | None = None,
    meet_s: float = 300.0,
) -> Iterator[World]:
    """Meets the other ranks and is one of them for the length of the block.

    Args:
        world: rank, size and local rank of this process; one of size 1 meets nobody.
        device: what this process computes on; CUDA devices exchange gradients over NCCL.
        meeting: how rank 0 is found.
        timeout_s: seconds without an answer after which a peer counts as dead; a network that is cut for less is
            survived.
        interface: name of the network interface to use; the one on the way to rank 0 where None.
        meet_s: seconds that the ranks have to find each other.

    Raises:
        LostRanksError: the ranks did not find each other, or one was lost.
        RunError: there is no such network interface.
    """
    rank, size = world.rank, world.size
    if size == 1:
        yield world
        return
    with _told(rank):
        store = _meet(rank, size, meeting, meet_s, interface)
        limit = timedelta(seconds=timeout_s)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.index is not None:
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        control, flags = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
        joined = replace(world, _groups=_Groups(control, flags))
        try:
            joined.barrier()
            yield joined
            joined.barrier()  # rank 0 holds the store and must be the last to let go
        except BaseException:
            _tear()
            raise
        dist.destroy_process_group()


def _tear() -> None:
    """Closes the connections without waiting for anybody, so that the other ranks learn of the end at once."""
    # What is under way would be waited for by the groups' destructors; closing every connection first ends it.
    ending = threading.Thread(target=_abort, daemon=True)
    ending.start()
    ending.join(5.0)


def _abort() -> None:
    with suppress(Exception):
        dist.distributed_c10d._abort_process_group()


@contextmanager
def _told(rank: int) -> Iterator[None]:
    """Turns what torch.distributed says of a lost peer into a sentence."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            reason = re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split())).split(". ")[0][:300]
            raise LostRanksError(
                f"rank {rank} lost the other ranks ({reason}); see the logs of the others for the first failure, then "
                f"run the same command again"
            ) from error
        raise


def _meet(rank: int, size: int, meeting: Meeting, meet_s: float, interface: str | None) -> Store:
    """The store that all ranks share, once all of them are there and know which interface to use."""
    deadline = time.monotonic() + meet_s
    store, address = _listen(meeting, meet_s, interface) if rank == 0 else _find(meeting, deadline, interface)
    store.set(f"rank {rank}", json.dumps({"host": _host(), "address": address}))
    # Rank 0 alone looks at every rank: all at all would be a million questions to one process among a thousand.
    if rank == 0:
        there = []
        for other in range(size):
            try:
                there.append(json.loads(_told_by(store, f"rank {other}", deadline)))
            except (dist.DistError, RuntimeError) as error:
                raise LostRanksError(
                    f"rank {other} of {size} did not come within {meet_s:.0f} s; its log tells why, or its host was "
                    f"slow to start"
                ) from error
        store.set(_ALL, json.dumps(there))
    else:
        try:
            there = json.loads(_told_by(store, _ALL, deadline))
        except (dist.DistError, RuntimeError) as error:
            raise LostRanksError(
                f"not all {size} ranks came within {meet_s:.0f} s; rank 0's log names the first that did not"
            ) from error
    _choose_interface(rank, there, interface)
    return store


def _told_by(store: Store, key: str, deadline: float) -> bytes:
    """What a rank put into the store under a key, once it has."""
    store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 1.0)))
    return store.get(key)


def _host() -> str:
    """Tells hosts apart, also those that share a kernel or a name."""
    facts = [platform.node()]
    with suppress(OSError):
        facts.append(str(Path("/proc/self/ns/net").readlink()))
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    return " ".join(facts)


def _listen(meeting: Meeting, meet_s: float, interface: str | None) -> tuple[Store, str]:
    """Listens where the other ranks can reach this process, and publishes it."""
    addresses = sorted(own_addresses(interface), key=far_first)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((addresses[0] if interface else "", 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        host = addresses[0] if interface else "127.0.0.1"
        store = TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=meet_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    token = secrets.token_hex(16)
    store.set("token", token)
    meeting.publish({"addresses": addresses, "port": port, "token": token})
    return store, ""


def _find(meeting: Meeting, deadline: float, interface: str | None) -> tuple[Store, str]:
    """Rank 0's store, and the address of rank 0 that answered."""
    pause, longest = _LOOK_S
    while True:
        facts = meeting.find()
        if facts is not None:
            for address in facts["addresses"]:
                store = _try(address, int(facts["port"]), facts["token"], interface, deadline)
                if store is not None:
                    return store, address
        if time.monotonic() > deadline:
            if facts is None:
                raise LostRanksError("rank 0 did not say where it listens; its log tells why, or its host was slow")
            raise LostRanksError(
                f"rank 0 answers at none of {', '.join(facts['addresses'])} (port {facts['port']}) from "
                f"{platform.node()}; name the network interface that joins the hosts in the profile"
            )
        time.sleep(pause)
        pause = min(1.5 * pause, longest)


def _try(address: str, port: int, token: str, interface: str | None, deadline: float) -> Store | None:
    """A connection to rank 0's store if it is what answers at that address."""
    try:
        with socket.create_connection((address, port), timeout=_TRY_S):
            pass
        limit = timedelta(seconds=_TRY_S)
        store = TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
        if store.get("token") != token.encode():
            return None
    except (OSError, RuntimeError):
        return None
    store.set_timeout(timedelta(seconds=max(deadline - time.monotonic(), 1.0)))
    return store


def _choose_interface(rank: int, there: Sequence[Mapping[str, str]], interface: str | None) -> None:
    """Names the interface that gloo and NCCL use, for many hosts resolve their own name to 127.0.1.1.

    On one host all use loopback. Among hosts each uses the interface on its way to rank 0: to the address at which the
    first rank of another host reached it.
    """
    own = own_addresses()
    reached = next((each["address"] for each in there if each["host"] != there[0]["host"]), None)
    name: str | None
    if interface is not None:
        name = interface
    elif reached is None:
        name = next((name for address, name in own.items() if ipaddress.ip_address(address).is_loopback), None)
    else:
        name = own.get(reached if there[rank]["host"] == there[0]["host"] else route_to(reached))
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
