"""Probes of single operations: on CPU, with small sizes; and the line of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpbench.rate_probe import RateProbe, RateProbes
from cpbench.timing.probe_rates import Prober, main
from cpbench.units import MIB
from tests.cpbench.timing.test_rates import RATES

TINY = ["--device", "cpu", "--scale", "64"]


def test_every_probe_runs_on_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has each probe, and a line of it is printed; nothing is modelled, and nothing of the host is copied."""
    out = tmp_path / "rates.json"

    assert main([*TINY, "--out", str(out)]) == 0

    probes = RateProbes.validate_json(out.read_bytes())
    assert capsys.readouterr().out.splitlines() == [probe.line for probe in probes]
    assert {probe.name for probe in probes} == {
        "matmul",
        "attention_forward",
        "attention_backward",
        "copy on device",
        "kernel of one element",
    }
    assert all(probe.seconds > 0 for probe in probes)
    assert {(p.modelled_seconds, p.inner_bytes, p.stated_inner_bytes) for p in probes} == {(None, None, None)}


def test_work_is_counted_by_hand() -> None:
    """Two FLOPs a product; both passes of attention, causal and not; a copy reads and writes."""
    prober = Prober(torch.device("cpu"), None, 64)

    assert [p.flops for p in prober.products()] == [
        2 * 256 * rows * columns for rows, columns in ((64, 64), (64, 224), (224, 64))
    ]
    attention = list(prober.attention())
    by_shape = {(p.name, p.shape): p.flops for p in attention}
    causal, whole = "cpu-flash, 32/8 heads, 32 x 32 causal", "cpu-flash, 32/8 heads, 128 x 256"
    assert by_shape["attention_forward", causal] == 4 * 32 * 32 * 32 * 128 // 2
    assert by_shape["attention_forward", whole] == 4 * 32 * 128 * 256 * 128
    assert by_shape["attention_backward", whole] == 10 * 32 * 128 * 256 * 128
    assert [p.bytes for p in prober.elementwise()] == [2 * 4 * 2**18, 0]


def test_what_the_model_says_stands_beside_what_was_measured() -> None:
    """A product by the rates of a profile: 500 FLOPs a second; a kernel of one element takes the shortest."""
    prober = Prober(torch.device("cpu"), RATES, 64)

    first = next(prober.products())
    _, one = prober.elementwise()

    assert first.modelled_seconds == first.flops / 500
    assert one.modelled_seconds == 0.125
    assert f"model / measured {first.modelled_seconds / first.seconds:.2f}" in first.line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "matmul  2 x 2  2 ms"),
        ({"flops": 4 * 10**11}, "matmul  2 x 2  2 ms  200 TFLOP/s"),
        ({"bytes": 5 * 10**6}, "matmul  2 x 2  2 ms  2.5 GB/s"),
        ({"modelled_seconds": 0.001}, "matmul  2 x 2  2 ms  model / measured 0.50"),
        (
            {"inner_bytes": 3 * MIB, "stated_inner_bytes": 0},
            "matmul  2 x 2  2 ms  inside 3.00 MiB, stated 0 B",
        ),
        ({"inner_bytes": 0, "stated_inner_bytes": MIB}, "matmul  2 x 2  2 ms  inside 0 B, stated 1.00 MiB"),
        ({"inner_bytes": 3 * MIB}, "matmul  2 x 2  2 ms"),
        (
            {
                "flops": 4 * 10**11,
                "modelled_seconds": 0.003,
                "inner_bytes": MIB,
                "stated_inner_bytes": MIB,
            },
            "matmul  2 x 2  2 ms  200 TFLOP/s  model / measured 1.50  inside 1.00 MiB, stated 1.00 MiB",
        ),
    ],
)
def test_a_line_says_what_is_known(changes: dict[str, float], line: str) -> None:
    """What is not known leaves no gap; what is zero is said."""
    probe = RateProbe.model_validate({"name": "matmul", "shape": "2 x 2", "seconds": 0.002} | changes)
    assert probe.line == line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu", "--scale", "0"], "--scale 0 is not a number from 1 to 64"),
        (["--device", "cpu", "--scale", "65"], "--scale 65 is not a number from 1 to 64"),
        (["--device", "cuda"], "there is no CUDA device"),
    ],
)
def test_what_cannot_be_probed_is_refused_in_words(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one sentence; nothing runs."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
