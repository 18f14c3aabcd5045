"""Durations of single operations, held against arithmetic by hand."""

from __future__ import annotations

import pytest

from cpbench.errors import Unsupported
from cpbench.hardware import AttentionRates, Rates, load_hardware, profile_names
from cpbench.timing.operation import Operation
from cpbench.timing.rates import attention_rate, seconds

RATES = Rates(
    uncertainty=0.5,
    matmul_flops_per_second=1000.0,
    matmul_efficiency=0.5,
    memory_bytes_per_second=100.0,
    memory_efficiency=0.8,
    multiprocessors=4,
    kernel_seconds=0.125,
    link_bytes_per_second=10.0,
    link_latency_seconds=0.25,
    network_bytes_per_second=2.0,
    network_latency_seconds=1.0,
    copy_out_bytes_per_second=5.0,
    copy_in_bytes_per_second=4.0,
    attention={
        "kernel": AttentionRates(
            forward_flops_per_second=300.0,
            forward_half_keys=128.0,
            backward_flops_per_second=200.0,
            backward_half_keys=384.0,
        )
    },
)


def compute(work: str, *, flops: int = 0, size: int = 0, name: str = "op", times: int = 1) -> Operation:
    return Operation(name, work, "compute", (), flops=flops, size=size, times=times)  # type: ignore[arg-type]


def collective(kind: str, size: int, ranks: int, on_node: int) -> Operation:
    return Operation(kind, "collective", "communication", (), size=size, ranks=ranks, ranks_on_node=on_node)


def attention(name: str, queries: int, keys: int, heads: int) -> Operation:
    return Operation(name, "attention", "compute", (), flops=6000, shape=(1, queries, keys, heads, 64))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (compute("matmul", flops=1000, size=80), 2.0),  # 1000 FLOPs at 500 a second; 80 bytes would take 1
        (compute("matmul", flops=100, size=800), 10.0),  # 800 bytes at 80 a second
        (compute("memory", size=160), 2.0),
        (compute("memory", size=1), 0.125),  # the shortest kernel
        (compute("memory", size=160, times=5), 10.0),
        (Operation("copy_out", "copy", "copy_out", (), size=20), 4.0),
        (Operation("copy_in", "copy", "copy_in", (), size=20), 5.0),
        (collective("all_to_all", 70, 8, 8), 0.25 + 7),
        (collective("all_gather", 70, 8, 8), 7 * 0.25 + 7),
        (collective("all_reduce", 70, 8, 8), 14 * 0.25 + 7),
        (collective("send", 70, 8, 8), 0.25 + 7),
        # 2 nodes of 4: of 70 bytes, 40 leave the node through the rank's own port
        (collective("all_to_all", 70, 8, 4), 0.25 + 1 + 20),
        # a ring leaves the node once, through the ports of all 4 ranks
        (collective("all_gather", 70, 8, 4), 7 * 0.25 + 1 + 7),
        (collective("reduce_scatter", 700, 8, 1), 7 * 0.25 + 7 + 350),
        (collective("send", 70, 8, 4), 0.25 + 1 + 35),
    ],
)
def test_durations(operation: Operation, expected: float) -> None:
    """Each kind of work takes its FLOPs or bytes over the rate that limits it."""
    assert seconds(operation, RATES, "kernel") == pytest.approx(expected)


def test_attention_saturates_with_keys_and_fills_its_last_wave() -> None:
    """Half of the rate at the half point; 5 blocks on 4 multiprocessors take two waves."""
    rates = RATES.attention["kernel"]

    assert attention_rate(attention("attention_forward", 512, 128, 1), rates, 4) == pytest.approx(150)
    assert attention_rate(attention("attention_forward", 512, 384, 1), rates, 4) == pytest.approx(225)
    assert attention_rate(attention("attention_forward", 640, 128, 1), rates, 4) == pytest.approx(150 * 5 / 8)
    assert attention_rate(attention("attention_forward", 128, 128, 8), rates, 4) == pytest.approx(150)
    # backward has its blocks over the keys
    assert attention_rate(attention("attention_backward", 128, 384, 4), rates, 4) == pytest.approx(
        100 * 12 / 12
    )
    assert seconds(attention("attention_forward", 512, 128, 1), RATES, "kernel") == pytest.approx(40)


def test_a_kernel_without_rates_is_refused() -> None:
    """No other kernel's rate stands in."""
    with pytest.raises(Unsupported, match="no rates for attention kernel other"):
        seconds(attention("attention_forward", 512, 128, 1), RATES, "other")


@pytest.mark.parametrize("name", sorted(profile_names()))
def test_profiles_agree_with_themselves(name: str) -> None:
    """No kernel is faster than the matrix units, no link faster than memory, and torch's own kernel has rates."""
    rates = load_hardware(name).rates

    assert rates is not None
    assert "cuda-flash" in rates.attention
    for kernel in rates.attention.values():
        assert kernel.backward_flops_per_second <= kernel.forward_flops_per_second
        assert kernel.forward_flops_per_second < rates.matmul_flops_per_second
    assert rates.network_bytes_per_second <= rates.link_bytes_per_second < rates.memory_bytes_per_second


def test_the_h100_curve_passes_through_the_published_points() -> None:
    """FlashAttention-2 on H100 as published: 335 TFLOP/s at 16k keys and 191 at 512, with many heads."""
    rates = load_hardware("h100-80g").rates
    assert rates is not None
    kernel = rates.attention["cuda-flash"]

    def tflops(keys: int) -> float:
        return attention_rate(attention("attention_forward", keys, keys, 132 * 64), kernel, 132) / 1e12

    assert tflops(16_384) == pytest.approx(335, rel=0.01)
    assert tflops(2048) == pytest.approx(298, rel=0.05)
    assert tflops(512) == pytest.approx(191, rel=0.01)
