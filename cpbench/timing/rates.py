"""How long one operation takes on a machine: its work over the rates of the machine's profile.

    matrix product   the longer of FLOPs over the achievable rate and bytes over the memory's
    attention        FLOPs over a rate that grows with the keys a query meets, R t / (t + t_half), and that the last
                     wave of thread blocks may lower when there are few
    everything else  bytes over the memory's rate
    collective       bytes over the link's rate, or over the network's for what leaves a node, and a latency a hop
    copy             bytes over the host link's rate in its direction

No kernel is shorter than the profile's shortest.
"""

from __future__ import annotations

from math import ceil

from cpbench.errors import Unsupported
from cpbench.hardware import AttentionRates, Rates
from cpbench.timing.operation import Operation

BLOCK_QUERIES = 128
"""Queries of one thread block of the attention kernels."""


def seconds(operation: Operation, rates: Rates, kernel: str) -> float:
    """Return the duration of an operation, all its repetitions included.

    Args:
        operation: what to do.
        rates: of the machine.
        kernel: the attention backend.

    Raises:
        Unsupported: the profile has no rates for the kernel.
    """
    return operation.times * _once(operation, rates, kernel)


def attention_rate(operation: Operation, rates: AttentionRates, multiprocessors: int) -> float:
    """Return FLOP/s of an attention operation."""
    b, queries, keys, heads, _ = operation.shape
    backward = operation.name == "attention_backward"
    highest = rates.backward_flops_per_second if backward else rates.forward_flops_per_second
    half = rates.backward_half_keys if backward else rates.forward_half_keys
    blocks = b * heads * ceil((keys if backward else queries) / BLOCK_QUERIES)
    waves = blocks / multiprocessors
    return highest * keys / (keys + half) * waves / ceil(waves)


def _once(operation: Operation, rates: Rates, kernel: str) -> float:
    if operation.work == "collective":
        return _collective(operation, rates)
    if operation.work == "copy":
        out = operation.name == "copy_out"
        rate = rates.copy_out_bytes_per_second if out else rates.copy_in_bytes_per_second
        return max(operation.size / rate, rates.kernel_seconds)
    duration = operation.size / (rates.memory_bytes_per_second * rates.memory_efficiency)
    if operation.work == "matmul":
        duration = max(duration, operation.flops / (rates.matmul_flops_per_second * rates.matmul_efficiency))
    elif operation.work == "attention":
        of_kernel = rates.attention.get(kernel)
        if of_kernel is None:
            raise Unsupported(f"the hardware profile has no rates for attention kernel {kernel}")
        duration = operation.flops / attention_rate(operation, of_kernel, rates.multiprocessors)
    return max(duration, rates.kernel_seconds)


def _collective(operation: Operation, rates: Rates) -> float:
    """Time of a collective; what stays on a node and what leaves it move at the same time.

    With r of n ranks on a node, (n - r) / (n - 1) of what a rank sends in an all-to-all leaves the node, by the rank's
    own network port.  Rings (all-gather, reduce-scatter, all-reduce) cross a node's border once for all its ranks, and
    use all their ports.  A ring of sends is as slow as its slowest hop.
    """
    n, r = operation.ranks, operation.ranks_on_node
    hops = {"all_to_all": 1, "send": 1, "all_reduce": 2 * (n - 1)}.get(operation.name, n - 1)
    latency = hops * rates.link_latency_seconds
    inside = operation.size / rates.link_bytes_per_second
    if n == r:
        return latency + inside
    latency += (2 if operation.name == "all_reduce" else 1) * ceil(n / r - 1) * rates.network_latency_seconds
    network = rates.network_bytes_per_second
    if operation.name == "send":
        return latency + operation.size / network
    leaving = operation.size * (n - r) / (n - 1)
    if operation.name == "all_to_all":
        return latency + max((operation.size - leaving) / rates.link_bytes_per_second, leaving / network)
    return latency + max(inside, leaving / (r * network))
