"""Timing and memory that can be compared: one clock, warm, synchronised, candidates taking turns.

A laptop's clock speed drifts by more than most optimizations gain. So candidates are timed alternately in one run
(`compare`) and only ratios from the same run are reported; medians and percentiles stand in for a mean that one
interruption would spoil. `matmul_ceiling` and `copy_ceiling` measure what this machine can do at best, so that a
table can state how far from it a layer is. Left out: energy, and several devices at once.
"""

import gc
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.autograd.profiler import profile


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one call, over `runs` calls, and the memory of one."""

    median: float
    p10: float
    p90: float
    runs: int
    peak_bytes: int | None = None  # see `peak_memory`; None: not measured

    @property
    def ms(self) -> float:
        """The median in milliseconds."""
        return self.median * 1e3

    def speedup_over(self, other: "Timing") -> float:
        """How many times faster than `other` this is; below 1 for a slowdown. Both must come from one `compare`."""
        return other.median / self.median


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU. The only place that chooses a device nobody asked for."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_device(name: str | None) -> torch.device:
    """The device a user named, or the default. Raises ValueError for an unknown name or a device that is not there."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name} cannot be used here ({reason}); use cpu, or cuda where there is a GPU"
        ) from None
    return device


def seed_everything(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Seed torch's and Python's global generators, and return a generator on `device` for explicit draws."""
    random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator(device).manual_seed(seed)


def environment(device: torch.device | str) -> dict[str, str | int | None]:
    """What a reader needs to judge a number: machine, software, code and day. No host name, path or user."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit_hash(Path(__file__).resolve().parent),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):  # absent on ARM
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit_hash(root: Path) -> str | None:
    """The commit checked out in `root`, with `-dirty` if its code was edited since; None where git knows of none."""
    # The ceiling keeps git from answering with the hash of a repository that merely contains an unpacked copy of ours.
    environ = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    # What a run writes is not code: the second of two experiments must not call the first one's results a change.
    edited = ["git", "status", "--porcelain", "--", ".", ":(exclude)results", ":(exclude)README.md"]
    head = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        commit, changes = (
            subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, check=False)
            for command in (head, edited)
        )
    except FileNotFoundError:  # git is not installed
        return None
    if commit.returncode or changes.returncode:
        return None
    return commit.stdout.strip() + ("-dirty" if changes.stdout else "")


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has done all it was asked. Raises ValueError for a device that is neither CPU nor CUDA."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}: only cpu and cuda can be measured")
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(fn: Callable[[], object], device: torch.device | str) -> int:
    """Bytes that one call of `fn` needs on `device` beyond what was live before it (weights, inputs, caches).

    Counts what torch's allocator hands out, results and the temporaries inside fused kernels included; not what
    numpy or a library's private scratch takes. Call `fn` once before: a first call also compiles and fills caches.
    A replayed CUDA graph allocates nothing, for its pool is already live.
    """
    synchronize(device)
    gc.collect()  # garbage freed in the middle of the call would be taken off its peak
    return _peak_of_one_call(fn, device)


def _peak_of_one_call(fn: Callable[[], object], device: torch.device | str) -> int:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU allocator keeps no statistics, but tells the profiler of every allocation and release, in order.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the profiler's first use, which else chats on stderr
    with profile(profile_memory=True) as record:
        fn()
    live = peak = 0
    for event in record.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def measure(
    fn: Callable[[], object],
    *,
    device: torch.device | str,
    warmup: int = 2,
    min_runs: int = 5,
    min_seconds: float = 0.5,
    memory: bool = True,
) -> Timing:
    """Time one function as `compare` does. The ratio of two such timings is not fair: for that use `compare`."""
    timings = compare(
        {"fn": fn}, device=device, warmup=warmup, min_runs=min_runs, min_seconds=min_seconds, memory=memory
    )
    return timings["fn"]


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str,
    warmup: int = 2,
    min_runs: int = 5,
    min_seconds: float = 0.5,
    memory: bool = True,
) -> dict[str, Timing]:
    """Time candidates in turns, so that drift of the machine hits all alike; then measure the memory of each.

    Every call is synchronised, at the shape that is timed, under whatever grad or autocast mode the caller set.
    `warmup` rounds are thrown away (compilation, caches, autotuning). Rounds then go on until each candidate has had
    `min_runs` calls and all together took `min_seconds`. An error of a candidate (out of memory, say) is passed on.
    Raises ValueError for no candidates, fewer than one run, or a device that cannot be synchronised.
    """
    if not functions:
        raise ValueError("functions is empty: expected at least one candidate to time")
    if min_runs < 1 or warmup < 0:
        raise ValueError(f"min_runs is {min_runs} and warmup {warmup}: expected at least 1 and 0")
    for _ in range(warmup):
        for fn in functions.values():
            fn()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    total, rounds = 0.0, 0
    while rounds < min_runs or total < min_seconds:
        for name, fn in functions.items():
            synchronize(device)
            start = time.perf_counter()
            fn()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            total += seconds[name][-1]
        rounds += 1
    if memory:
        gc.collect()  # once for all: it takes as long as many a call
    peaks = {name: _peak_of_one_call(fn, device) if memory else None for name, fn in functions.items()}
    return {name: _summary(seconds[name], peaks[name]) for name in functions}


def _summary(seconds: list[float], peak_bytes: int | None) -> Timing:
    marks = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    median, p10, p90 = torch.tensor(seconds, dtype=torch.float64).quantile(marks).tolist()
    return Timing(median, p10, p90, runs=len(seconds), peak_bytes=peak_bytes)


def matmul_ceiling(device: torch.device | str, dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """FLOP/s of a square matrix product in `dtype` (under the caller's TF32 setting): the compute ceiling.

    Without a `size`, it is doubled from 256 until one product takes 10 ms: enough to be bound by arithmetic on a GPU,
    and still quick where a dtype is emulated (float16 on most CPUs).
    """
    generator = torch.Generator().manual_seed(0)

    def product_seconds(size: int, min_runs: int, min_seconds: float) -> float:
        # Random, because a GPU multiplies zeros at a higher clock than anything real.
        a, b = torch.randn(2, size, size, generator=generator).to(device, dtype)
        timing = measure(
            lambda: a @ b, device=device, warmup=1, min_runs=min_runs, min_seconds=min_seconds, memory=False
        )
        return timing.p10  # a ceiling is what the machine does undisturbed, hence not the median

    if size is None:
        size = 256
        while product_seconds(size, min_runs=1, min_seconds=0) < 0.01:
            size *= 2
    return 2 * size**3 / product_seconds(size, min_runs=5, min_seconds=0.2)


def copy_ceiling(device: torch.device | str, num_bytes: int | None = None) -> float:
    """Bytes/s, read and written, of copying a buffer of `num_bytes` that no cache holds: the bandwidth ceiling.

    Default: 128 MiB on a CPU, 1 GiB on CUDA (and as much again for the copy).
    """
    num_bytes = num_bytes or (2**30 if torch.device(device).type == "cuda" else 2**27)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device=device, warmup=1, min_seconds=0.2, memory=False)
    return 2 * num_bytes / timing.p10
