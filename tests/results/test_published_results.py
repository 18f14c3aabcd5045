"""What docs/published-results.md says of throughput and memory is what the committed records give."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from cpbench.folders import published_folder
from cpbench.hardware import load_hardware
from cpbench.model_config import PRESETS
from cpbench.published import load_published
from cpbench.report.load import load_runs
from cpbench.report.published import beside_published
from cpbench.report.series import arrange
from cpbench.units import GIB, parse_length

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "published-results.md").read_text(encoding="utf-8")
RUNS = ROOT / "results" / "cpu-2x-intel-r-xeon-r-processor"
Row = dict[str, str | float | int | bool | None]


@cache
def rows(run: str) -> dict[tuple[str, bool, int], Row]:
    """Cases beside published values, by method, whether it is the published scheme, and length."""
    found = beside_published(arrange(load_runs([RUNS / run]).entries), load_published(published_folder()))
    assert found is not None
    return {
        (str(row["method"]), "published=True" in str(row["options"]), int(str(row["seq_len"]))): row
        for row in found.table
    }


def test_ratios_of_throughput_are_those_of_the_records() -> None:
    """Every pair of ratios in the table, with FlashAttention-2's rates and with FlashAttention-3's."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| `") and " / " in line]
    checked = 0
    for line in lines:
        name, *cells = (cell.strip() for cell in line[1:-1].split("|"))
        method, published = name.split("`")[1], "scheme" in name
        for length, cell in zip(("128K", "256K", "512K", "1M", "2M", "3M", "4M", "5M"), cells, strict=True):
            said = re.findall(r"\d\.\d\d", cell)
            if not said:
                continue
            key = (method, published, parse_length(length))
            runs = ("untied-ulysses-llama3-8b", "untied-ulysses-llama3-8b-fa3-rates")
            assert said == [f"{rows(run)[key]['speed_ratio']:.2f}" for run in runs], (name, length)
            checked += 1
    assert checked == 31 + 8  # every published value; upipe has two rows


@pytest.mark.parametrize(
    ("method", "published", "length", "words"),
    [
        ("upipe", True, "128K", "`upipe` 128K, published scheme | 21.1 GiB |"),
        ("upipe", True, "3M", "`upipe` 3M, published scheme | 51.1 GiB |"),
        ("ulysses", False, "3M", "`ulysses` 3M | 64.6 GiB |"),
        ("upipe", False, "128K", "`upipe` 128K, default | |"),
        ("upipe", False, "3M", "`upipe` 3M, default | |"),
    ],
)
def test_peaks_are_those_of_the_records(method: str, published: bool, length: str, words: str) -> None:
    """Our peak and its ratio to the published one."""
    row = rows("untied-ulysses-llama3-8b")[method, published, parse_length(length)]

    assert f"| {words} {int(str(row['peak_bytes'])) / GIB:.1f} GiB | {row['peak_ratio']:.3f} |" in PAGE


def overheads_of_fpdt(seq_len: int) -> list[float]:
    """Seconds of a step that the published FPDT spends and the time model has not, as the page counts them.

    T = 64K tokens a chunk, N chunks, c a chunk's queries on a rank, D a rank's tokens at model width, both in two
    bytes; pairs of chunks that meet: N (N+1) / 2.
    """
    model, rates, ranks, chunk = PRESETS["llama3-8b"], load_hardware("h100-80g").rates, 8, 65536
    assert rates is not None
    memory = rates.memory_bytes_per_second * rates.memory_efficiency
    layers, local, chunks = model.num_layers, seq_len // ranks, seq_len // chunk
    pairs = chunks * (chunks + 1) // 2
    c = chunk * model.attention_dim // ranks * 2
    d = local * model.hidden_dim * 2
    ffn, head = 3 * model.hidden_dim * model.ffn_dim, model.hidden_dim * model.vocab_size
    return [
        3 * layers * (pairs + chunks) * 50e-6,
        layers * pairs * (2 * 19 + 9) * c / memory,
        layers * 12 * d / memory,
        layers * 2 * d / rates.copy_out_bytes_per_second,
        (layers * (local // 4096) * ffn * 12 + local // 256 * head * 16) / memory,
    ]


def fpdt_row(length: str) -> str:
    """What the page's table says of one length, from the records."""
    seq_len, found = parse_length(length), rows("untied-ulysses-llama3-8b-fa3-rates")
    ours, base = found["fpdt", False, seq_len], found.get(("ulysses", False, seq_len))
    if base is None or base["speed_ratio"] is None:
        base = found["upipe", True, seq_len]
    rates = [float(str(ours[f"{who}tokens_per_second_per_gpu"])) for who in ("published_", "")]
    published, modelled = (seq_len / 8 / rate for rate in rates)
    modelled *= float(str(base["speed_ratio"]))
    parts = overheads_of_fpdt(seq_len)
    left = published - modelled - sum(parts)
    each = left / PRESETS["llama3-8b"].num_layers / (seq_len // 65536)
    times = [published, modelled, published - modelled]
    return " | ".join(
        [*(f"{t:.1f}" for t in times), *(f"{t:.2f}" for t in parts), f"{left:.1f}", f"{each * 1e3:.0f} ms"]
    )


@pytest.mark.parametrize("length", ["128K", "256K", "512K", "1M", "2M", "3M", "4M"])
def test_what_fpdt_loses_is_computed_from_the_records(length: str) -> None:
    """Every row of the table of the published FPDT's overheads."""
    assert f"| {length} | {fpdt_row(length)} |" in PAGE
