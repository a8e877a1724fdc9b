"""Measurement of time, memory and kernel launches."""
import gc
import random
import statistics
import time
from typing import Callable, Dict, List, NamedTuple, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], None]


class Ratio(NamedTuple):
    """Ratio to the baseline over the rounds of a measurement.

    Attributes:
        median (float): Median of the ratio.
        low, high (float): Quartiles of the ratio.
    """
    median: float
    low: float
    high: float


def seconds(run: Run, repeats: int, device: torch.device) -> float:
    """Return the mean time of a run over several runs in a row."""
    if device.type == 'cuda':
        start, end = (
            torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def interleave(runs: Dict[str, Run],
               rounds: int,
               device: torch.device,
               least: float = 0.02,
               tell: Callable[[], None] = lambda: None
               ) -> Dict[str, List[float]]:
    """Time several functions in turn, in each of several rounds.

    If the machine is slow for a while, all functions of a round are slow, and
    their ratios stay correct. The order changes from round to round, so that
    no function always profits from the caches of the same predecessor.

    Args:
        runs (dict[str, callable]): Functions by name.
        rounds (int): Number of timings of each function, after two rounds of
            warm-up.
        device (torch.device): Device that the functions use.
        least (float): Minimum time of a measurement in seconds. Shorter
            functions are repeated in it.
        tell (callable): Progress callback, called after each round.

    Returns:
        dict[str, list[float]]: Seconds per run in each round.
    """
    order = list(runs)
    for _ in range(2):
        warm = {name: seconds(run, 1, device) for name, run in runs.items()}
    repeats = {
        name: max(1, round(least / max(t, 1e-9))) for name, t in warm.items()
    }
    found: Dict[str, List[float]] = {name: [] for name in runs}
    rng = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                found[name].append(
                    seconds(runs[name], repeats[name], device))
            tell()
    finally:
        gc.enable()
    return found


def ratio(times: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Return the ratio of two interleaved measurements, round by round."""
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(times, baseline)], n=4)
    return Ratio(median, low, high)


def peak_memory(run: Run, device: torch.device) -> int:
    """Return the peak of the bytes that a run allocates for tensors.

    Memory that was allocated before does not count. On a GPU the number comes
    from the allocator, on a CPU from the profiler's record of allocations.
    """
    run()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    now = peak = 0
    events = [
        event for event in record.profiler.kineto_results.events()
        if event.name() == '[memory]'
    ]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def launches(run: Run, device: torch.device) -> int:
    """Count the kernels of a run; on a CPU, the operators that compute."""
    run()
    kinds = [ProfilerActivity.CPU]
    if device.type == 'cuda':
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as record:
        run()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
    events = record.events()
    if device.type == 'cuda':
        return sum(
            event.device_type == torch.autograd.DeviceType.CUDA
            for event in events)
    return sum(
        event.name.startswith('aten::') and not event.cpu_children
        and event.name[6:] not in _VIEWS for event in events)


# Operators that do not read or write values.
_VIEWS = {
    'view', 'as_strided', 'expand', 'expand_as', 'transpose', 'permute', 't',
    'select', 'slice', 'narrow', 'unsqueeze', 'squeeze', 'detach', 'alias',
    'detach_', 'reshape', 'flatten', '_unsafe_view', 'empty', 'empty_like',
    'empty_strided', 'result_type', 'resolve_conj', 'resolve_neg', 'unbind',
    'split', 'chunk', '_reshape_alias', 'resize_', 'is_nonzero', 'numpy_T'
}
