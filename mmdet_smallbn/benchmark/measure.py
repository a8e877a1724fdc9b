"""Times and memory of several things, measured side by side."""
import gc
import random
import statistics
import time
from typing import Callable, Dict, List, NamedTuple, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], None]


class Ratio(NamedTuple):
    """A ratio to the baseline over the rounds of a measurement.

    Attributes:
        median (float): Its median.
        low, high (float): Its quartiles.
    """
    median: float
    low: float
    high: float


def seconds(run: Run, repeats: int, device: torch.device) -> float:
    """Time of one run, of several in a row."""
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
    """Time all of them in each round, one after the other.

    What slows the machine down for a while slows all of them down. The order
    changes from round to round: what one leaves in the caches is not always
    the same one's.

    Args:
        runs (dict[str, callable]): By name.
        rounds (int): How often each is timed, after two rounds of warm-up.
        device (torch.device): What they run on.
        least (float): Seconds that a measurement should last; shorter runs
            are repeated in it.
        tell (callable): Called after each round.

    Returns:
        dict[str, list[float]]: Seconds of a run, in each round.
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
    """Of two interleaved measurements, round by round."""
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(times, baseline)], n=4)
    return Ratio(median, low, high)


def peak_memory(run: Run, device: torch.device) -> int:
    """The most bytes of tensors that a run adds to what there was.

    From the device's allocator; on the CPU from the profiler's record of
    allocations.
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
    """Kernels that a run launches; operators that do work, on the CPU."""
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


# Operators that touch no values.
_VIEWS = {
    'view', 'as_strided', 'expand', 'expand_as', 'transpose', 'permute', 't',
    'select', 'slice', 'narrow', 'unsqueeze', 'squeeze', 'detach', 'alias',
    'detach_', 'reshape', 'flatten', '_unsafe_view', 'empty', 'empty_like',
    'empty_strided', 'result_type', 'resolve_conj', 'resolve_neg', 'unbind',
    'split', 'chunk', '_reshape_alias', 'resize_', 'is_nonzero', 'numpy_T'
}
