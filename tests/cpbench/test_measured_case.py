"""A real sweep of every method under torchrun, and what its records must say."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cpbench import registry
from cpbench.case import AttentionBackend, Case
from cpbench.cli import app
from cpbench.record import Record, read_record
from cpbench.world.estimate import estimate_case

LAYERS = 2
SCENARIO = f"""
[run]
mode = "measure"
device = "cpu"
steps = 2
warmup = 0

[sweep]
method = ["single", "ring", "ulysses", "upipe"]
model = "small"
seq_len = 208
world_size = [1, 2]
dtype = "float32"
stack = ["checkpoint", "long"]

[models.small]
hidden_dim = 64
num_layers = {LAYERS}
num_heads = 8
num_kv_heads = 2
head_dim = 16
ffn_dim = 136
vocab_size = 251

[[exclude]]
method = ["ring", "ulysses", "upipe"]
world_size = 1

[[exclude]]
method = "single"
world_size = 2

[[exclude]]
method = ["single", "ring"]
stack = "long"

[[exclude]]
method = ["ulysses", "upipe"]
stack = "checkpoint"
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("measured")
    scenario = folder / "measured.toml"
    scenario.write_text(SCENARIO, encoding="utf-8")
    result = CliRunner().invoke(
        app, ["sweep", "--scenario", str(scenario), "--runs", str(folder / "runs"), "--name", "all"]
    )
    assert result.exit_code == 0, result.output
    return [read_record(path) for path in sorted((folder / "runs" / "all" / "cases").glob("*.json"))]


def case_of(record: Record) -> Case:
    backend: AttentionBackend = "auto"
    fields = {name: getattr(record, name) for name in Case.model_fields if hasattr(record, name)}
    return Case.model_validate(fields | {"stack": record.stack, "attention_backend": backend})


@pytest.mark.slow
def test_every_case_is_measured(records: list[Record]) -> None:
    """Four cases are ok, and each says what ran and what it needed, rank by rank."""
    assert len(records) == 4
    for record in records:
        assert (record.status, record.reason) == ("ok", None)
        assert record.mode == "measure"
        assert record.attention_backend == "cpu-flash"
        assert len(record.ranks) == record.world_size
        assert len(record.step_seconds_samples) == record.steps
        assert record.step_seconds is not None
        assert record.step_seconds > 0
        assert record.mfu is None  # the peak of a CPU is not known
        assert record.peak_reserved_bytes is None  # CUDA only
        assert record.host_rss_peak_bytes is not None
        assert record.host_rss_peak_bytes > (record.peak_allocated_bytes or 0)


@pytest.mark.slow
def test_categories_add_up_on_every_rank(records: list[Record]) -> None:
    """The split by category is a split: it adds up to the peak to the byte."""
    for rank in (rank for record in records for rank in record.ranks):
        assert sum(rank.memory.peak_by_category_bytes.values()) == rank.memory.peak_allocated_bytes
        assert max(rank.memory.peak_by_phase_bytes.values()) == rank.memory.peak_allocated_bytes


@pytest.mark.slow
def test_persistent_memory_is_the_parameters_share(records: list[Record]) -> None:
    """Sharded parameters are 4 bytes each and AdamW's states 8, spread over the ranks."""
    for record in records:
        params = sum(rank.memory.peak_by_category_bytes.get("sharded_parameters", 0) for rank in record.ranks)
        states = sum(rank.memory.peak_by_category_bytes.get("optimizer", 0) for rank in record.ranks)
        steps = 4 * (LAYERS * 9 + 3) * record.world_size  # AdamW's step counters, one float a parameter
        exact = 4 * record.architecture.num_params
        # FSDP pads the storage of uneven shards, so the parameters' sum may be a little above the exact one.
        assert exact <= params <= 1.05 * exact
        assert 2 * exact + steps <= states <= 1.05 * (2 * exact + steps)


@pytest.mark.slow
def test_methods_agree_on_losses_and_norms(records: list[Record]) -> None:
    """All methods and stacks train the same model: losses and gradient norms agree over all steps."""
    reference = next(record for record in records if record.method == "single")
    for record in records:
        for ours, theirs in ((record.losses, reference.losses), (record.grad_norms, reference.grad_norms)):
            assert len(ours) == len(theirs) == 4
            for a, b in zip(ours, theirs, strict=True):
                assert a is not None
                assert b is not None
                assert abs(a - b) <= 1e-5 * abs(b)


@pytest.mark.slow
def test_counted_collectives_equal_the_methods_formulas(records: list[Record]) -> None:
    """Per step, a checkpointed block runs its forward twice and its backward once; the bytes agree exactly."""
    checked = 0
    for record in records:
        costs = registry.load(record.method, record.options).costs(case_of(record))
        for kind in ("all_to_all", "send"):
            expected = LAYERS * (
                2 * costs.forward_collective_bytes.get(kind, 0) + costs.backward_collective_bytes.get(kind, 0)
            )
            assert record.collective_bytes.get(kind, 0) == expected
            checked += expected > 0
    assert checked == 3  # ring, ulysses and upipe


@pytest.mark.slow
def test_only_the_long_stack_uses_host_memory(records: list[Record]) -> None:
    """Offloaded block inputs are L x n x d x 4 bytes of host memory; upipe parks one block's parts there too."""
    tokens = 104 * 4  # bytes of a float32 for each token of a rank
    parts = tokens * (128 + 8 + 2 * 32)  # outputs, whose slabs dq takes after them; log-sum-exps; dk and dv
    for record in records:
        expected = LAYERS * tokens * 64 if record.offload == "inputs" else 0
        expected += parts if record.offload == "inputs" and record.method == "upipe" else 0
        assert record.host_pinned_peak_bytes == expected


@pytest.mark.slow
def test_the_estimate_equals_the_measurement(records: list[Record]) -> None:
    """Fake tensors give the allocator's peak within 1 %, category by category, and the same collectives."""
    for record in records:
        estimated = estimate_case(
            case_of(record).model_copy(update={"mode": "estimate"}),
            registry.load(record.method, record.options),
        ).ranks[0]
        # All ranks but the last hold equal shards.  gloo may free a buffer on a thread of its own, unseen, which only
        # ever adds to a trace, so the least of equal ranks is the clean one.
        measured = min(
            record.ranks[:-1] or record.ranks, key=lambda rank: rank.memory.peak_allocated_bytes or 0
        )
        wanted = measured.memory.peak_allocated_bytes or 0

        assert abs((estimated.memory.peak_allocated_bytes or 0) - wanted) <= 0.01 * wanted, record.case_id
        assert estimated.collective_bytes == measured.collective_bytes
        for name, size in estimated.memory.peak_by_category_bytes.items():
            assert abs(size - measured.memory.peak_by_category_bytes.get(name, 0)) <= 0.01 * wanted, name


@pytest.mark.slow
def test_an_estimate_of_another_case_does_not_pass_for_this_one(records: list[Record]) -> None:
    """The twin of the comparison: half the sequence is further off than the bar allows."""
    record = next(record for record in records if record.method == "ulysses")
    other = case_of(record).model_copy(update={"mode": "estimate", "seq_len": record.seq_len // 2})

    estimated = estimate_case(other, registry.load(record.method, record.options)).ranks[0]

    wanted = record.ranks[0].memory.peak_allocated_bytes or 0
    assert abs((estimated.memory.peak_allocated_bytes or 0) - wanted) > 0.01 * wanted
