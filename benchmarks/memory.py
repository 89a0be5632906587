"""Peak memory of a computation."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(function: Callable[[], Any], *, device: str = "cpu") -> int:
    """Measure by how much memory rises at most while a function runs.

    On CPU, what the allocator tells torch's profiler is added up, which gives the same number each time; the scratch
    memory of BLAS libraries does not go through it.

    Args:
        function: Takes no arguments. It is called once beforehand, for what is made only once.
        device: "cpu" or "cuda".

    Returns:
        Bytes.
    """
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events: Any = profiler.profiler
    changes = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        allocated += change.nbytes()
        peak = max(peak, allocated)
    return peak
