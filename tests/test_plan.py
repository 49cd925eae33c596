"""Decisions: which layers stay dense and why, how ranks are rounded, and the plan's JSON."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrconvert.checkpoints.plan_file import load_plan, save_plan
from lrconvert.errors import OutputExistsError, PatternError, PlanError, UsageError
from lrconvert.layers import Layer
from lrconvert.plan import LayerPlan, Plan, PlanOptions, decide
from lrconvert.plan_check import check_plan
from lrconvert.ranks import parse_rule
from lrconvert.spectrum import spectrum_of
from lrconvert.views import with_norms


def linear(name, shape=(64, 64), **more):
    return Layer(name, f"{name}.weight", "linear", shape, **more)


LAYERS = [linear(name) for name in ("first", "a.one", "a.two", "b.one", "last")]


def plan_for(layers=LAYERS, rule="rank_ratio=0.25", **options):
    spectra = {layer.name: spectrum_of(torch.randn(layer.groups, *layer.matrix_shape), layer.name) for layer in layers}
    return decide(layers, spectra, PlanOptions(parse_rule(rule), **options))


def ranks(plan):
    return {layer.name: layer.rank for layer in plan.layers}


def reasons(plan):
    return {layer.name: layer.reason for layer in plan.layers if layer.rank is None}


def test_first_layer_and_last_classifier_stay_dense():
    plan = plan_for()
    assert reasons(plan) == {"first": "first layer", "last": "last classifier"}
    assert {layer.rank for layer in plan.low_rank} == {16}


def test_keep_first_and_keep_last():
    assert reasons(plan_for(keep_first=3, keep_last=False)) == dict.fromkeys(
        ("first", "a.one", "a.two"), "first 3 layers"
    )
    assert reasons(plan_for(keep_first=0, keep_last=False)) == {}
    assert len(plan_for(keep_first=99).low_rank) == 0


def test_a_last_convolution_is_no_classifier():
    layers = [*LAYERS[:4], Layer("last", "last.weight", "conv2d", (64, 64, 3, 3))]
    assert reasons(plan_for(layers)) == {"first": "first layer"}


def test_the_ends_are_factorized_where_nothing_else_could_be():
    assert ranks(plan_for([linear("only")])) == {"only": 16}
    recurrent = Layer("rnn", "rnn", "recurrent", (64, 64), dense_reason="recurrent: not supported yet")
    assert ranks(plan_for([recurrent, linear("only")])) == {"rnn": None, "only": 16}
    assert ranks(plan_for([linear("only")], keep_first=1)) == {"only": None}


def test_include_exclude_and_the_names_that_overrule_the_ends():
    assert reasons(plan_for(include=("a*",))) == {
        "first": "not included",
        "b.one": "not included",
        "last": "not included",
    }
    assert reasons(plan_for(include=("*",))) == {"first": "first layer", "last": "last classifier"}
    assert ranks(plan_for(include=("first", "a*")))["first"] == 16
    plan = plan_for(include=("a*",), exclude=("*.two",))
    assert reasons(plan)["a.two"] == "excluded by '*.two'"
    with pytest.raises(PatternError, match="--exclude 'c' matches no layer"):
        plan_for(exclude=("c",))


def test_a_guess_is_overruled_by_the_exact_name_only():
    guess = linear("emb", dense_reason="looks like an embedding", guess=True)
    certain = linear("tied", dense_reason="shared with head")
    layers = [*LAYERS, guess, certain]
    assert reasons(plan_for(layers, include=("*",)))["emb"] == "looks like an embedding"
    assert ranks(plan_for(layers, include=("emb",)))["emb"] == 16
    assert reasons(plan_for(layers, include=("tied", "a*")))["tied"] == "shared with head"


def test_a_layer_that_would_not_shrink_stays_dense_with_the_numbers():
    plan = plan_for(rule="rank=32")
    assert reasons(plan)["a.one"] == "would not shrink: rank 32, break-even 31"
    assert ranks(plan_for(rule="rank=31"))["a.one"] == 31


@given(st.integers(1, 60), st.integers(1, 60))
def test_break_even_is_the_largest_rank_that_shrinks(rows, columns):
    layer = linear("layer", (rows, columns))
    shrinking = [rank for rank in range(1, 61) if rank * (rows + columns) < rows * columns]
    assert layer.break_even_rank == max(shrinking, default=0)


def test_a_one_by_one_matrix_and_a_zero_weight_stay_dense():
    one = linear("one", (1, 1))
    plan = plan_for([*LAYERS, one], include=("one",))
    assert reasons(plan)["one"].startswith("would not shrink")
    zero = spectrum_of(torch.zeros(1, 64, 64), "zero")
    plan = decide([linear("zero")], {"zero": zero}, PlanOptions(parse_rule("rank=4")))
    assert reasons(plan) == {"zero": "all zero"}


@pytest.mark.parametrize(
    ("rank", "multiple", "expected"),
    [(16, 8, 16), (17, 8, 24), (30, 8, 24), (31, 8, 24), (1, 8, 8), (5, 1, 5), (3, 64, None), (25, 16, 16)],
)
def test_rank_multiple_rounds_up_where_that_shrinks_and_down_elsewhere(rank, multiple, expected):
    # break-even of 64×64 is 31
    assert ranks(plan_for(rule=f"rank={rank}", rank_multiple=multiple))["a.one"] == expected


def test_floor_and_layer_ranks():
    assert ranks(plan_for(rule="rank=2", floor=0.2))["a.one"] == 13
    plan = plan_for(layer_ranks=(("a.two", 5), ("a*", 7)))
    assert ranks(plan)["a.one"] == 7
    assert ranks(plan)["a.two"] == 5
    assert next(layer for layer in plan.layers if layer.name == "a.two").reason == "given"
    with pytest.raises(PatternError, match="--layer-rank 'x' matches no layer"):
        plan_for(layer_ranks=(("x", 5),))


@pytest.mark.parametrize(
    "options",
    [{"keep_first": -1}, {"rank_multiple": 0}, {"floor": 1.5}, {"layer_ranks": (("a", 0),)}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(UsageError):
        PlanOptions(parse_rule("auto"), **options)


def test_predicted_error_is_that_of_the_spectrum():
    matrix = torch.randn(1, 64, 64)
    spectrum = spectrum_of(matrix, "layer")
    plan = decide([linear("layer")], {"layer": spectrum}, PlanOptions(parse_rule("rank=10")))
    tail = torch.linalg.svdvals(matrix[0].double())[10:]
    assert plan.low_rank[0].error == pytest.approx(float(tail.norm() / matrix.norm()), abs=1e-6)


def test_a_norm_counts_when_a_layer_is_to_shrink():
    # 20·21 = 420 elements: 10 ranks of 20 + 21 are fewer, but not of 20 + 21 + 2
    plain = linear("a", (20, 21))
    (normed,) = with_norms([plain])
    assert plan_for([plain], "rank=10", keep_first=0, keep_last=False).low_rank[0].num_params_after == 410
    assert reasons(plan_for([normed], "rank=10", keep_first=0, keep_last=False)) == {
        "a": "would not shrink: rank 10, break-even 9"
    }
    (decision,) = plan_for([normed], "rank=9", keep_first=0, keep_last=False).low_rank
    assert decision.norm
    assert decision.num_params_after == 9 * 43
    assert decision.layer.low_rank_macs(7, 9) == 7 * 9 * 41


def test_plan_survives_a_file(tmp_path):
    plan = plan_for(keep_first=2, layer_ranks=(("b*", 3),))
    save_plan(plan, tmp_path / "plan.json")
    read = load_plan(str(tmp_path / "plan.json"))
    assert ranks(read) == ranks(plan)
    assert reasons(read) == reasons(plan)
    # an edited rank would have another error, so none is believed
    assert all(layer.error is None for layer in read.layers)
    with pytest.raises(OutputExistsError, match=r"plan\.json exists"):
        save_plan(plan, tmp_path / "plan.json")


@given(
    st.lists(
        st.builds(
            LayerPlan,
            name=st.text(max_size=8),
            weight=st.text(max_size=8),
            kind=st.sampled_from(["linear", "conv2d", "embedding"]),
            shape=st.lists(st.integers(1, 99), max_size=5).map(tuple),
            groups=st.integers(1, 9),
            rank=st.none() | st.integers(1, 99),
            reason=st.text(max_size=8),
            error=st.none() | st.floats(0, 1),
            evidence=st.sampled_from(["module", "shape"]),
            norm=st.booleans(),
            view=st.sampled_from(["channel", "spatial"]),
        ),
        max_size=4,
    )
)
def test_plan_json_round_trip(layers):
    plan = Plan(layers=tuple(layers))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert Plan.model_validate_json(plan.model_dump_json(exclude_defaults=True)) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan"),
        ("{}", "layers: Field required"),
        ('{"version": 9, "layers": []}', "version"),
        ('{"layers": [], "rang": 3}', "rang: Extra inputs"),
        (
            '{"layers": [{"name": "a", "weight": "a.weight", "kind": "linear", "shape": [4, 4], "rank": 0}]}',
            r"layers\.0\.rank: Input should be greater than or equal to 1",
        ),
        ('{"layers": [{"name": "a", "weight": "a.weight", "kind": "linear", "shape": "no"}]}', r"layers\.0\.shape"),
    ],
)
def test_broken_plans_name_the_field(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        load_plan(tmp_path / "plan.json")


def test_a_missing_plan_file_is_an_error(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": "other.weight"}, "names the weight 'other.weight', which is another"),
        ({"name": "gone", "weight": "gone.weight"}, "has no 'gone.weight'"),
        ({"kind": "conv2d"}, r"a weight of shape \(64, 64\) in 1 group\(s\) is no conv2d"),
        ({"groups": 5}, "does not divide into 5 groups"),
        ({"kind": "embedding", "groups": 2}, "in 2 group"),
        ({"shape": (64, 65)}, r"the plan says \(64, 65\), the checkpoint \(64, 64\)"),
        ({"kind": "norm"}, "kind 'norm' cannot be factorized"),
        ({"view": "spatial"}, "the spatial view is one of a conv2d in one group"),
        ({"kind": "conv2d", "view": "spatial", "shape": (64, 32, 3, 3), "groups": 2}, "the spatial view is one of"),
        ({"kind": "conv2d", "view": "spatial", "shape": (64, 64, 1, 1)}, "with a kernel above 1×1"),
        ({"kind": "lstm", "norm": True}, "no BatchNorm fits between the factors of this lstm; drop its norm"),
        ({"kind": "attention", "norm": True}, "no BatchNorm fits"),
        ({"kind": "embedding", "norm": True}, "no BatchNorm fits"),
        ({"kind": "conv1d", "shape": (64, 64, 3), "groups": 7}, "does not divide into 7 groups"),
        ({"rank": 65}, "rank 65 is not from 1 to full rank 64"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, message):
    layer = LayerPlan(name="a", weight="a.weight", kind="linear", shape=(64, 64), rank=8).model_copy(update=change)
    with pytest.raises(PlanError, match=message):
        check_plan(Plan(layers=(layer,)), {"a.weight": layer.shape if len(layer.shape) > 2 else (64, 64)})
    with pytest.raises(PlanError, match="two entries with the name"):
        check_plan(Plan(layers=(layer, layer)), {})
