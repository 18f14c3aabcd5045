"""Scenarios: the product, exclude rules, option axes, and every way a file can be wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.errors import CpbenchError, ScenarioError, UnknownName
from cpbench.folders import scenario_folders
from cpbench.model_config import PRESETS
from cpbench.scenario import Scenario, build_scenario, load_scenario, parse_scenario

NAMES = st.sampled_from(["single", "ring", "ulysses", "upipe"])


def cases_of(text: str) -> list[tuple[str, int, int]]:
    scenario = parse_scenario(text, name="test")
    cases = scenario.expand(mode="measure", device="cpu")
    return [(case.method, case.seq_len, case.world_size) for case in cases]


def test_lists_multiply_and_rules_exclude() -> None:
    """The sweep is the product of its lists, less what matches every key of a rule."""
    text = """
    [sweep]
    method = ["single", "ring"]
    model = "tiny"
    seq_len = ["1K", 2048]
    world_size = [1, 4]
    [[exclude]]
    method = "single"
    world_size = [2, 4]
    [[exclude]]
    method = "ring"
    world_size = 1
    seq_len = "2K"
    """
    expected = [
        ("single", 1024, 1),
        ("single", 2048, 1),
        ("ring", 1024, 1),
        ("ring", 1024, 4),
        ("ring", 2048, 4),
    ]
    assert cases_of(text) == expected


def test_option_lists_are_axes_of_their_method() -> None:
    """Several values of an option give a case each, for that method only."""
    text = """
    [sweep]
    method = ["ring", "upipe"]
    model = "tiny"
    [options.upipe]
    stage_heads = [4, 8]
    """
    scenario = parse_scenario(text, name="test")
    cases = scenario.expand(mode="measure", device="cpu")
    assert [(case.method, case.options) for case in cases] == [
        ("ring", {}),
        ("upipe", {"stage_heads": 4}),
        ("upipe", {"stage_heads": 8}),
    ]


def test_stack_changes_apply_to_every_preset() -> None:
    """[stack] overrides single fields of the presets that the sweep names."""
    text = '[sweep]\nmodel = "tiny"\nstack = ["plain", "long"]\n[stack]\ntile_loss = false\n'
    cases = parse_scenario(text, name="test").expand(mode="measure", device="cpu")
    assert [(case.stack.checkpoint, case.stack.tile_mlp, case.stack.tile_loss) for case in cases] == [
        ("none", False, False),
        ("full", True, False),
    ]


def test_equal_cases_run_once() -> None:
    """A value given twice does not repeat a case."""
    assert len(cases_of('[sweep]\nmodel = "tiny"\nseq_len = ["1K", 1024]\n')) == 1


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("[sweep", "not valid TOML"),
        ("[sweeep]\nmethod = 'ring'", "did you mean 'sweep'"),
        ("[sweep]\nmetod = 'ring'", "did you mean 'method'"),
        ("[run]\nstep = 3", "did you mean 'steps'"),
        ("[stack]\ntile_mpl = true", "did you mean 'tile_mlp'"),
        ("[[exclude]]\nworld = 1", "did you mean 'world_size'"),
        ("[models.m]\nhidden = 3", "did you mean 'hidden_dim'"),
        ("[sweep]\nmethod = 3", "sweep.method"),
        ("[sweep]\nmethod = []", "sweep.method"),
        ("[sweep]\nseq_len = 'long'", "'long' is not a positive number"),
        ("[sweep]\nseq_len = 0", "at least 1"),
        ("[sweep]\nseq_len = -4", "not a positive number"),
        ("[sweep]\nworld_size = 0", "greater than 0"),
        ("[sweep]\nworld_size = '4'", "sweep.world_size"),
        ("[sweep]\ndtype = 'float16'", "sweep.dtype"),
        ("[run]\nsteps = 3.5", "run.steps"),
        ("[run]\nsteps = 0", "run.steps"),
        (
            "[run]\nmode = 'fast'",
            "run.mode must be 'measure', 'emulate', 'estimate' or 'auto' (given: 'fast')",
        ),
        ("[run]\nmode = 'mesure'", "did you mean 'measure'?"),
        ("[run]\ndevice = 'gpu'", "run.device must be 'cpu' or 'cuda' (given: 'gpu'); did you mean 'cuda'?"),
        (
            "[stack]\nsave_attention = 'all'",
            "stack.save_attention must be a whole number or 'auto' (given: 'all')",
        ),
        ("[stack]\nsave_attention = -1", "stack.save_attention must be at least 0 or 'auto' (given: -1)"),
        ("[[exclude]]\nmethd = 'ring'", "[[exclude]] rule 1: methd'; did you mean 'method'?"),
        ("[[exclude]]\nmodel = 'm'\n[[exclude]]\nworld_size = 'x'", "[[exclude]] rule 2: world_size must be"),
        ("[models.m]\nhidden_dim = 64", "models.m.num_layers is missing"),
        ("[run]\ntimeout_seconds = 0.0", "run.timeout_seconds"),
        ("[stack]\ntile_mlp = 1", "stack.tile_mlp"),
        ("[options.ring]\norder = [[1]]", "options.ring.order"),
        ("name = 'mine'", "name is the file name"),
    ],
)
def test_a_wrong_file_is_refused_by_the_key(text: str, phrase: str) -> None:
    """Malformed TOML, unknown keys and wrong values are each named, with the nearest valid key."""
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(text, name="test")
    assert phrase in str(caught.value)
    assert "'test'" in str(caught.value)


def test_heads_that_do_not_divide_are_refused() -> None:
    """A model of the scenario must have query heads that are a multiple of the KV heads."""
    text = (
        "[models.m]\nhidden_dim = 64\nnum_layers = 1\nnum_heads = 6\nnum_kv_heads = 4\n"
        "head_dim = 8\nffn_dim = 64\nvocab_size = 64\n"
    )
    with pytest.raises(ScenarioError, match="num_heads=6 is not a multiple of num_kv_heads=4"):
        parse_scenario(text, name="test")


def test_rules_that_leave_nothing_are_refused() -> None:
    """A sweep without cases is a mistake, not an empty success."""
    with pytest.raises(ScenarioError, match="leave no case"):
        cases_of("[sweep]\nmethod = 'ring'\nmodel = 'tiny'\n[[exclude]]\nmethod = 'ring'\n")


def test_unknown_model_and_scenario_offer_the_nearest(tmp_path: Path) -> None:
    """Names are looked up in presets and folders; a miss offers what is close."""
    with pytest.raises(UnknownName, match="did you mean 'tiny'"):
        cases_of("[sweep]\nmodel = 'tyny'\n")
    (tmp_path / "smoke.toml").write_text("", encoding="utf-8")
    with pytest.raises(UnknownName, match="did you mean 'smoke'"):
        load_scenario("smok", folders=[tmp_path])


def test_unreadable_files_are_one_sentence(tmp_path: Path) -> None:
    """A missing file, a folder and a file that is no text are refused without a traceback."""
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.toml").mkdir()
    for path in (tmp_path / "missing.toml", binary, tmp_path / "folder.toml"):
        with pytest.raises(ScenarioError, match="cannot be read"):
            load_scenario(str(path), folders=[])


def scenario_or_sentence(raw: dict[str, Any]) -> Scenario | str:
    try:
        return build_scenario(raw)
    except CpbenchError as error:
        return str(error)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["sweep", "run", "stack", "method", "seq_len", "exclude", "x"]), inner
            )
        ),
        max_leaves=8,
    ).filter(lambda value: isinstance(value, dict))
)
def test_any_document_is_a_scenario_or_a_sentence(raw: dict[str, Any]) -> None:
    """Untrusted input never ends in anything but a scenario or an error of ours."""
    found = scenario_or_sentence({**raw, "name": "fuzz"})

    if isinstance(found, Scenario):
        assert build_scenario(found.model_dump(exclude_none=True)) == found
    else:
        assert found


@given(
    methods=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    lengths=st.lists(st.integers(1, 2**24), min_size=1, max_size=3, unique=True),
    worlds=st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True),
    excluded=st.none() | NAMES,
)
def test_a_scenario_survives_json(
    methods: list[str], lengths: list[int], worlds: list[int], excluded: str | None
) -> None:
    """A scenario written to run.json gives the same cases when it is read back."""
    raw: dict[str, Any] = {
        "sweep": {"method": methods, "model": "tiny", "seq_len": lengths, "world_size": worlds}
    }
    if excluded is not None and methods != [excluded]:
        raw["exclude"] = [{"method": excluded}]
    scenario = build_scenario({**raw, "name": "test"})
    back = Scenario.model_validate_json(scenario.model_dump_json(exclude_none=True))
    assert back == scenario
    assert build_scenario(scenario.model_dump(exclude_none=True)) == scenario
    assert back.expand(mode="measure", device="cpu") == scenario.expand(mode="measure", device="cpu")


FILES = [file for folder in scenario_folders() for file in sorted(folder.glob("*.toml"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_scenarios_ask_a_question_and_expand(file: Path) -> None:
    """Every shipped scenario starts with its question and gives cases."""
    text = file.read_text(encoding="utf-8")
    assert text.splitlines()[0].startswith("# ")
    assert text.splitlines()[0].endswith("?")
    assert tomllib.loads(text)
    assert load_scenario(str(file), folders=[]).expand(mode="measure", device="cpu")


def test_smoke_has_twelve_cases() -> None:
    """smoke: the reference on one process, three methods on four, three lengths, with more heads than KV heads."""
    cases = load_scenario("smoke", folders=scenario_folders()).expand(mode="measure", device="cpu")
    assert len(cases) == 12
    assert {(case.method, case.world_size) for case in cases} == {
        ("single", 1),
        ("ring", 4),
        ("ulysses", 4),
        ("upipe", 4),
    }
    assert all(case.architecture.num_heads > case.architecture.num_kv_heads for case in cases)


def test_few_layers_of_every_model() -> None:
    """The shape has the layers that run, and the case says of how many; a model with no more than that is whole."""
    raw: dict[str, Any] = {"sweep": {"model": ["tiny", "llama3-8b"]}, "run": {"layers": 2, "rank": 3}}
    found = build_scenario(raw | {"name": "few"}).expand(mode="emulate", device="cpu")
    there = PRESETS["tiny"].num_layers
    assert [(c.architecture.num_layers, c.model_layers) for c in found] == [(2, there), (2, 32)]
    assert {case.rank for case in found} == {3}
    raw["run"] = {"layers": 32}
    raw["sweep"] = {"model": "llama3-8b"}
    (whole,) = build_scenario(raw | {"name": "all"}).expand(mode="emulate", device="cpu")
    assert (whole.architecture, whole.model_layers) == (PRESETS["llama3-8b"], None)


def test_more_layers_than_a_model_has_are_refused() -> None:
    """The message says how many there are."""
    raw = {"name": "many", "sweep": {"model": "llama3-8b"}, "run": {"layers": 33}}
    with pytest.raises(ScenarioError, match="layers=33, but model llama3-8b has 32"):
        build_scenario(raw).expand(mode="emulate", device="cpu")
