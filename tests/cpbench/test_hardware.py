"""Machine profiles and whether a case fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpbench.case import Case
from cpbench.errors import UnknownName, UsageError
from cpbench.hardware import (
    HOST_MARGIN,
    HOST_PROCESS_BYTES,
    Hardware,
    fit,
    load_hardware,
    pinnable_bytes,
    profile_names,
)
from cpbench.model_config import PRESETS
from cpbench.units import GIB, MIB


def case() -> Case:
    return Case(
        method="upipe",
        model="llama3-8b",
        architecture=PRESETS["llama3-8b"],
        seq_len=1024,
        world_size=8,
        ulysses_degree=8,
        ring_degree=1,
        mode="estimate",
        device="cuda",
        hardware="h100-80g",
    )


@pytest.mark.parametrize("name", sorted(profile_names()))
def test_every_profile_loads_and_names_its_sources(name: str) -> None:
    """Each number of a built-in profile has a source."""
    profile = load_hardware(name)

    numbers = {key for key, value in profile if isinstance(value, int | float)}
    numbers |= {f"allocator.{key}" for key, _ in profile.allocator}
    assert profile.rates is not None
    numbers |= {key for key, value in profile.rates if isinstance(value, int | float)}
    numbers |= {f"attention.{kernel}" for kernel in profile.rates.attention}
    assert numbers == set(profile.sources)


def test_a_profile_without_rates_is_one_without_time(tmp_path: Path) -> None:
    """Rates may be left out of one's own profile; what is there must be whole."""
    text = (
        'gpu = "mine"\ngpus_per_node = 2\ndevice_memory_bytes = 1\nusable_memory_bytes = 1\nmargin = 0.0\n'
        "context_bytes = 0\ncommunicator_bytes = 0\nhost_memory_bytes = 1\n"
        "[allocator]\nrounding_bytes = 1\nsmall_segment_bytes = 0\nlarge_segment_bytes = 0\n"
        "workspace_bytes = 0\n"
        "{rates}[sources]\n"
    )
    path = tmp_path / "mine.toml"
    path.write_text(text.format(rates=""), encoding="utf-8")
    assert load_hardware(str(path)).rates is None

    path.write_text(text.format(rates="[rates]\nuncertainty = 0.1\n"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"mine\.toml: rates\.matmul_flops_per_second"):
        load_hardware(str(path))


def test_a_case_fits_until_margin_and_overheads_are_spent() -> None:
    """What programs can have holds context, communicators, segments and margin; the reason says what is short."""
    hardware = load_hardware("h100-80g")
    room = hardware.usable_memory_bytes - hardware.context_bytes - 2 * hardware.communicator_bytes
    room -= 4 * 22 * MIB + 32 * 4 * 14 * 512
    most = int(room / 1.03)

    assert fit(case(), hardware, peak_bytes=most, host_bytes=0).status == "ok"
    over = fit(case(), hardware, peak_bytes=most + GIB, host_bytes=0)
    assert over.status == "oom_device"
    assert "short by 1.03 GiB" in (over.reason or "")


def test_the_margin_and_the_segments_are_those_of_the_profile() -> None:
    """A profile that states none of them takes what is counted, and one that states more takes more."""
    real = load_hardware("h100-80g")
    none = real.allocator.model_copy(
        update={"rounding_bytes": 1, "small_segment_bytes": 0, "large_segment_bytes": 0}
    )
    bare = real.model_copy(
        update={"margin": 0.0, "allocator": none, "context_bytes": 0, "communicator_bytes": 0}
    )
    wide = bare.model_copy(update={"margin": 0.5})
    coarse = bare.model_copy(update={"allocator": none.model_copy(update={"large_segment_bytes": GIB})})

    def needed(hardware: Hardware) -> int:
        return fit(case(), hardware, peak_bytes=10 * GIB, host_bytes=0).device_needed_bytes

    assert needed(bare) - 10 * GIB < MIB
    assert needed(wide) - needed(bare) == 5 * GIB
    assert needed(coarse) - needed(bare) == 4 * GIB


@pytest.mark.parametrize("name", sorted(profile_names()))
def test_programs_cannot_have_all_of_a_device(name: str) -> None:
    """What the runtime gives out is some part of a percent less than what the driver reports."""
    profile = load_hardware(name)

    assert 0.95 < profile.usable_memory_bytes / profile.device_memory_bytes < 1


def test_host_memory_is_shared_by_the_ranks_of_a_node() -> None:
    """Eight ranks of 300 GiB each do not fit in 2 TiB."""
    hardware = load_hardware("h100-80g")

    assert fit(case(), hardware, peak_bytes=GIB, host_bytes=200 * GIB).status == "ok"
    assert fit(case(), hardware, peak_bytes=GIB, host_bytes=300 * GIB).status == "oom_host"


def test_host_memory_is_not_filled_to_the_last_byte() -> None:
    """A share of the node is the system's, and each rank's process takes some; the reason says so and by how much."""
    hardware = load_hardware("h100-80g")
    there = hardware.host_memory_bytes
    room = there - round(HOST_MARGIN * there) - 8 * HOST_PROCESS_BYTES
    assert pinnable_bytes(case(), hardware) == room

    full = fit(case(), hardware, peak_bytes=0, host_bytes=room // 8)
    over = fit(case(), hardware, peak_bytes=0, host_bytes=room // 8 + GIB)

    assert (full.status, full.host_needed_bytes) == ("ok", there - room % 8)
    assert over.status == "oom_host"
    for words in (
        "3% of it and 3.00 GiB a rank for system and processes",
        "2.00 TiB there",
        "short by 8.00 GiB",
    ):
        assert words in (over.reason or "")


@pytest.mark.parametrize(
    ("world_size", "nodes", "ranks"), [(8, 4, 2), (8, 1, 8), (16, 2, 8), (16, 1, 8), (2, 1, 2)]
)
def test_a_node_holds_its_own_ranks_only(world_size: int, nodes: int, ranks: int) -> None:
    """Those the case puts there, eight on four nodes are two a node; of a case that says nothing, all its GPUs'."""
    hardware = load_hardware("h100-80g")
    spread = case().model_copy(update={"world_size": world_size, "nodes": nodes})

    needed = fit(spread, hardware, peak_bytes=0, host_bytes=GIB).host_needed_bytes

    system = round(HOST_MARGIN * hardware.host_memory_bytes)
    assert needed == ranks * (GIB + HOST_PROCESS_BYTES) + system


def test_a_case_may_have_another_host_memory_than_the_profile() -> None:
    """It decides, in both directions, and the reason names it."""
    hardware = load_hardware("h100-80g")
    little = case().model_copy(update={"host_memory_bytes": 2**40})
    much = case().model_copy(update={"host_memory_bytes": 2**42})

    assert fit(case(), hardware, peak_bytes=0, host_bytes=200 * GIB).status == "ok"
    refused = fit(little, hardware, peak_bytes=0, host_bytes=200 * GIB)
    assert refused.status == "oom_host"
    assert "1.00 TiB there" in (refused.reason or "")
    assert fit(case(), hardware, peak_bytes=0, host_bytes=300 * GIB).status == "oom_host"
    assert fit(much, hardware, peak_bytes=0, host_bytes=300 * GIB).status == "ok"


def test_an_unknown_profile_offers_the_nearest() -> None:
    """A typo is met with the name that was meant."""
    with pytest.raises(UnknownName, match="did you mean 'h100-80g'"):
        load_hardware("h100-80")


@pytest.mark.parametrize("text", ["gpu = 1", "not toml", 'gpu = "x"\nsurprise = 2'])
def test_a_broken_profile_is_refused_by_name(tmp_path: Path, text: str) -> None:
    """A file that is no profile is named with what is wrong."""
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(UsageError, match=r"mine\.toml"):
        load_hardware(str(path))


def test_the_what_if_profile_differs_in_attention_only() -> None:
    """docs/profiles: the built-in H100, with FlashAttention-3's rates under the name of torch's kernel."""
    path = Path(__file__).resolve().parents[2] / "docs" / "profiles" / "h100-80g-fa3-rates.toml"

    what_if, real = load_hardware(str(path)), load_hardware("h100-80g")

    assert what_if.rates is not None
    assert real.rates is not None
    assert what_if.rates.attention == {"cuda-flash": real.rates.attention["flash-attn-3"]}
    same = {"rates": None, "sources": {}}
    assert what_if.model_copy(update=same) == real.model_copy(update=same)
    same = {"attention": {}}
    assert what_if.rates.model_copy(update=same) == real.rates.model_copy(update=same)


def test_a_misspelt_key_of_a_profile_is_named(tmp_path: Path) -> None:
    """The unknown key is in the message, with the nearest valid one, also inside the rates."""
    text = profile_names()["h100-80g"].read_text(encoding="utf-8")
    file = tmp_path / "mine.toml"
    for key in ("gpus_per_node", "link_latency_seconds"):
        assert f"\n{key} =" in text
        file.write_text(text.replace(f"\n{key} =", f"\n{key[:-1]} ="), encoding="utf-8")
        with pytest.raises(UsageError, match=f"unknown key '(rates.)?{key[:-1]}'; did you mean '{key}'"):
            load_hardware(str(file))
