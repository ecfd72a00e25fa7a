"""How long calls take: by the clock on a CPU, by device events or CUDA graphs on a GPU; and how much memory they take.

A call is timed several times in a row, each time on the next of several copies of its inputs, so that no call finds its
operands in the cache (the copies together are larger than the caches that count, see ``machine.cold_mib``).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
TIMINGS = ("device", "host", "graph", "queue")
QUEUED_CALLS = 32
SAMPLE_MS = 0.5  # a sample is at least this long on a GPU, so that the clock's steps (0.5 us) do not show
SAMPLE_MS_CPU = 2.0  # and this long on a CPU, so that a wake-up of a thread does not fill it
MAX_CALLS = 256
SLEEP_CYCLES_PER_US = 2000  # at least a GPU's clock in MHz: the wait before the first kernel is long enough


class Stopwatch:
    """Milliseconds of one call, from one sample of several.

    Args:
        device: "cpu" or "cuda".
        timing: GPU only. "device": the host runs ahead, so that launches cost nothing; "host": as a user sees it,
            launches included; "graph": the calls as one CUDA graph; "queue": until the host is free again.
    """

    def __init__(self, device: str, timing: str = "device") -> None:
        if timing not in TIMINGS:
            raise ValueError(f"timing is {timing!r}; allowed: {', '.join(TIMINGS)}")
        self.device, self.timing = device, timing
        self._graphs: dict[int, Any] = {}

    def calls_per_sample(self, ms: float, available: int, prepared: bool) -> int:
        """How many calls of about ``ms`` make a sample; ``prepared`` calls can run once each, ``available`` are there."""
        if self.timing == "graph":
            return available
        if self.timing == "queue":
            return QUEUED_CALLS
        wanted = (SAMPLE_MS if self.device == "cuda" else SAMPLE_MS_CPU) / max(ms, 1e-4)
        return max(1, min(int(wanted) + 1, available if prepared else MAX_CALLS))

    def sample(self, calls: Sequence[Call], host_us: float) -> float:
        """Milliseconds per call, the calls made one after the other. ``host_us``: what the host needs for one."""
        if self.device == "cpu" or self.timing == "queue":
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) * 1e3 / len(calls)
        if self.timing == "graph":
            return self._graph_sample(calls)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if self.timing == "device":  # a busy GPU while the host queues the calls: at most 50 ms
            torch.cuda._sleep(int(min(2 * host_us * len(calls) + 20, 50_000) * SLEEP_CYCLES_PER_US))
        begin.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / len(calls)

    def _graph_sample(self, calls: Sequence[Call]) -> float:
        """Replays all calls as one graph, captured the first time (they were warmed up before)."""
        key = id(calls)
        if key not in self._graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for call in calls:
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
            graph.replay()
            self._graphs[key] = graph
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        self._graphs[key].replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / len(calls)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clocked(call: Call, device: str) -> tuple[float, float]:
    """One call by the host's clock: (milliseconds until the device is done, microseconds until the host is free)."""
    synchronize(device)
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    synchronize(device)
    return (time.perf_counter() - start) * 1e3, host * 1e6


def peak_mib(call: Call, device: str) -> tuple[float | None, str]:
    """Most memory in use during the call above what was in use before, and why it is not known if it is None.

    CPU: growth of the resident set to its high-water mark, after freed memory was given back to the system, so that the
    allocator's own cache does not hide it; whole pages, scratch memory of libraries included.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20, ""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again from here
        before = _status_kib("VmRSS")
        call()
        return max(0, _status_kib("VmHWM") - before) / 1024, ""
    except (OSError, AttributeError) as error:
        return None, f"peak memory not known: {error}"


def _status_kib(name: str) -> int:
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name + ":")).split()[1])


def kept_mib(forward: Call, own: Sequence[torch.Tensor]) -> float:
    """MiB of distinct storages that autograd keeps for backward, those of ``own`` (parameters, inputs) not counted."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again

    # Nothing unpacks. A hook that returned a node's own output would tie the graph to itself, and nothing would be freed.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in kept.values()) / 2**20
