"""Closed forms against counts over fake tensors: every method that states its peaks, over shapes, ranks and devices.

Tiles of a fixed size are left out of the forms, so blocks are long: a tensor of all local query heads has at least
4 GiB, and a tile's temporaries are below 1 % of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
from torch import Tensor

from cpbench import registry
from cpbench.block_count import BlockCount, count_block
from cpbench.case import STACKS, Case, OptionValue
from cpbench.method import AttentionWeights, Costs, Method, representative_ranks
from cpbench.model_config import ModelConfig
from cpbench.resolve import resolve
from cpbench.runtime.attention_block import Produce, Saved, attention_block
from cpbench.runtime.collectives import all_to_all_heads
from cpbench.runtime.context import AttentionContext
from cpbench.runtime.projection import Which
from cpbench.runtime.ulysses_core import UlyssesCore
from methods.ulysses import Ulysses

Options = dict[str, OptionValue]

FULL_WIDTH = 2**32
"""Least bytes of a tensor of all local query heads."""

SHAPES: dict[str, dict[str, object]] = {
    "MHA": {"world": 4, "heads": 16, "kv": 16, "head_dim": 128},
    "4 to 1": {"world": 8, "heads": 32, "kv": 8, "head_dim": 128},
    "8 to 1, fewer KV heads than ranks": {"world": 16, "heads": 64, "kv": 8, "head_dim": 128},
    "narrow heads, a batch": {"world": 2, "heads": 16, "kv": 4, "head_dim": 64, "batch": 2},
    "24 heads, a batch": {"world": 4, "heads": 24, "kv": 3, "head_dim": 128, "batch": 2},
    "a head a rank, one KV head": {"world": 8, "heads": 8, "kv": 1, "head_dim": 64, "batch": 2},
    "40 heads, a ring of two": {"world": 16, "heads": 40, "kv": 8, "head_dim": 128},
    "one rank": {"world": 1, "heads": 8, "kv": 2, "head_dim": 128},
    "normalised queries": {
        "world": 2,
        "heads": 16,
        "kv": 4,
        "head_dim": 128,
        "qk_norm": True,
        "biases": True,
    },
    "cpu": {"world": 4, "heads": 24, "kv": 6, "head_dim": 128, "device": "cpu"},
    "cpu, MHA, a batch": {
        "world": 2,
        "heads": 8,
        "kv": 8,
        "head_dim": 64,
        "batch": 2,
        "device": "cpu",
        "biases": True,
    },
    "cpu, one rank": {"world": 1, "heads": 6, "kv": 2, "head_dim": 64, "device": "cpu"},
}

THOROUGH = ("MHA", "24 heads, a batch", "one rank", "cpu")
"""Shapes at which every option set is counted; at the others the first alone, so that the test stays quick."""

OPTIONS: dict[str, Callable[[Case], tuple[Options, ...]]] = {
    "fpdt": lambda case: ({"chunk_tokens": case.seq_len // 4}, {"chunk_tokens": 0}),
    "upipe": lambda case: ({},),
}
"""Counted instead of the defaults and the option sets that a method declares: chunks of 64K would be many and slow, and
the options of upipe are counted by `test_upipe.py`."""


def request(
    *,
    world: int,
    heads: int,
    kv: int,
    head_dim: int,
    batch: int = 1,
    device: str = "cuda",
    qk_norm: bool = False,
    biases: bool = False,
) -> Case:
    # In bfloat16 torch's CPU kernel holds more than the forms say.
    dtype = "bfloat16" if device == "cuda" else "float32"
    model = ModelConfig(
        hidden_dim=heads * head_dim // 2,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        ffn_dim=64,
        vocab_size=64,
        qk_norm=qk_norm,
        attention_bias=biases,
    )
    row = batch * heads * head_dim * (2 if dtype == "bfloat16" else 4)
    tokens = 2 ** ((FULL_WIDTH // row).bit_length())
    return Case.model_validate(
        {
            "method": "single",
            "model": "shape",
            "architecture": model,
            "seq_len": tokens * world,
            "batch_size": batch,
            "world_size": world,
            "stack": STACKS["checkpoint"],
            "mode": "estimate",
            "device": device,
            "dtype": dtype,
        }
    )


def runnable(name: str) -> Iterator[tuple[Case, Method]]:
    """Every case of a method that it can run: all shapes, and at some of them all options."""
    declared = registry.verify_options(registry.method_files()[name])
    for title, shape in SHAPES.items():
        asked = request(**shape)  # type: ignore[arg-type]  # a table of keyword arguments
        sets = OPTIONS[name](asked) if name in OPTIONS else declared
        for options in sets if title in THOROUGH else sets[:1]:
            case, unsupported = resolve(asked.model_copy(update={"method": name, "options": options}), [])
            if unsupported is None:
                yield case, registry.load(name, case.options)


def differences(case: Case, method: Method) -> list[str]:
    """What is counted and not stated, in words; ranks of a ring differ, and the largest is what is stated."""
    stated = method.costs(case)
    ranks = {0, *representative_ranks(partial(method.layout, case))}
    if method.layout(case, 0).ring_degree > 1:
        ranks.add(case.world_size - 1)
    counts = [count_block(case, method, rank=rank) for rank in sorted(ranks)]
    found = [text for count in counts for text in wrong_bytes(count, stated)]
    for phase in ("forward", "backward"):
        counted = max(getattr(count, f"{phase}_peak_bytes") for count in counts)
        said = getattr(stated, f"{phase}_peak_bytes")
        if abs(counted - said) > 0.01 * counted:
            found.append(f"{phase} peak: counted {counted}, stated {said} ({said / counted:.4f} of it)")
    return [f"{case.method} {case.options}: {text}" for text in found]


def wrong_bytes(count: BlockCount, stated: Costs) -> list[str]:
    found = [f"not counted: {name}" for name in count.forward.unknown + count.backward.unknown]
    for phase in ("forward", "backward"):
        counted, said = getattr(count, phase).bytes, getattr(stated, f"{phase}_collective_bytes")
        if counted != said:
            found.append(f"{phase} sends {counted}, stated {said}")
    return found


@pytest.mark.parametrize("name", registry.method_files())
def test_counts_equal_the_closed_forms(name: str) -> None:
    """Bytes sent are exact and peaks within 1 %, whatever the heads, ranks, batch, device and options."""
    cases = list(runnable(name))
    assert cases

    found = [text for case, method in cases for text in differences(case, method)]

    assert found == []


def test_every_method_states_its_peaks() -> None:
    """A peak of 0 would say that a method holds nothing."""
    for name in registry.method_files():
        case, method = next(runnable(name))

        assert method.costs(case).forward_peak_bytes > 0, name
        assert method.costs(case).backward_peak_bytes > 0, name


@dataclass(frozen=True, slots=True)
class LateCore(UlyssesCore):
    """Keeps the queries of this rank's tokens after they are sent."""

    def inputs(self, produce: Produce, saved: Saved) -> None:
        def produce_and_keep(which: Which) -> Tensor:
            t = produce(which)
            if which == "q":
                saved["kept"] = t
            return t

        UlyssesCore.inputs(self, produce_and_keep, saved)


@dataclass(frozen=True, slots=True)
class TalkativeCore(UlyssesCore):
    """Sends the output there and back once more."""

    def output(self, saved: Saved) -> None:
        UlyssesCore.output(self, saved)
        group, recorder = self.ctx.ulysses, self.ctx.recorder
        saved["out"] = all_to_all_heads(saved.pop("out"), group, recorder)
        UlyssesCore.output(self, saved)


@dataclass(frozen=True, kw_only=True)
class Twin(Ulysses):
    """Ulysses with another core."""

    core: type[UlyssesCore]

    def attention(self, x: Tensor, weights: AttentionWeights, ctx: AttentionContext) -> Tensor:
        return attention_block(x, weights, ctx, self.core(ctx))


@pytest.mark.parametrize(
    ("core", "wrong"),
    [(UlyssesCore, []), (LateCore, ["forward peak", "backward peak"]), (TalkativeCore, ["forward sends"])],
)
def test_a_method_that_keeps_or_sends_too_much_is_found(core: type[UlyssesCore], wrong: list[str]) -> None:
    """One tensor kept too long shows in both peaks, one exchange too many in what is sent."""
    asked = request(**SHAPES["4 to 1"])  # type: ignore[arg-type]  # a table of keyword arguments
    case, _ = resolve(asked.model_copy(update={"method": "ulysses"}), [])

    found = differences(case, Twin(core=core))

    assert len(wrong) == len(found), found
    for text, start in zip(found, wrong, strict=True):
        assert start in text
