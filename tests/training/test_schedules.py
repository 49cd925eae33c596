"""Schedules in a loop of one's own: when they switch, to what, on how many processes, and after a restart."""

import copy
import json

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import lrconvert
from lrconvert.errors import LrconvertError, NothingToCompressError, PatternError, UsageError, WeightError
from lrconvert.layers import low_rank_modules
from lrconvert.models.zoo.digits_cnn import INPUT_SHAPE, DigitsCNN
from lrconvert.models.zoo.resnet18_cifar import ResNet18Cifar
from lrconvert.profiling import Profile, StackTiming

QUICK = lrconvert.StabilityCriterion(window=1, mean_of=1, epsilon=1e9)  # settles after the first epoch
NEVER = lrconvert.StabilityCriterion(window=99, mean_of=1, epsilon=0.0)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


def train(model, optimizer, digits, epoch, batch=64):
    images, labels = digits
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
    for at in order.split(batch):
        optimizer.zero_grad()
        functional.cross_entropy(model(images[at]), labels[at]).backward()
        optimizer.step()


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def digits_cnn(width=16):
    torch.manual_seed(1)
    return DigitsCNN(width)


def disturb(model, seed=2):
    """Another state, as training would make."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def with_decay(model, layers, power):
    """Singular values times i⁻ᵖᵒʷᵉʳ: lower stable ranks, as training would make them."""
    with torch.no_grad():
        for name in layers:
            weight = model.get_parameter(f"{name}.weight")
            left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            values *= torch.arange(1, len(values) + 1) ** -power
            weight.copy_((left * values @ right).reshape(weight.shape))


def num_params(model):
    return sum(parameter.numel() for parameter in model.parameters())


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_three_lines_in_a_loop_of_ones_own(digits):
    model = digits_cnn()
    optimizer = sgd(model)
    criterion = lrconvert.StabilityCriterion(window=2, mean_of=2, epsilon=6.0)
    schedule = lrconvert.Cuttlefish(model, input_shape=INPUT_SHAPE, criterion=criterion, max_full_rank_epochs=5)
    switched = []
    for epoch in range(6):
        train(model, optimizer, digits, epoch)
        if schedule.step(epoch):
            switched.append(epoch)
            optimizer = sgd(model, lr=0.02)
    assert len(switched) == 1
    assert schedule.switch_epoch == switched[0] + 1 == schedule.curves.epochs
    assert schedule.phase == "low-rank"
    names = [name for name, _ in low_rank_modules(model)]
    assert names == [layer.name for layer in schedule.plan.low_rank]
    assert names
    images, labels = digits
    with torch.no_grad():
        assert float((model(images).argmax(1) == labels).float().mean()) > 0.9
    assert schedule.tracking_seconds > 0
    assert schedule.switch_seconds > 0
    assert schedule.profiling_seconds == 0


def test_the_switch_is_what_factorize_makes_of_the_same_plan(digits):
    model = digits_cnn()
    schedule = lrconvert.Cuttlefish(model, criterion=QUICK, rule="rank_ratio=0.3")
    disturb(model)
    dense = copy.deepcopy(model)
    assert schedule.step(0)
    assert schedule.plan == lrconvert.make_plan(dense, "rank_ratio=0.3")
    assert same(model, lrconvert.factorize(dense, schedule.plan))


def test_ranks_are_scaled_by_what_the_same_layer_had_at_initialisation(tmp_path):
    model = digits_cnn()
    for number, name in enumerate(("conv2", "conv3", "conv4")):
        with_decay(model, [name], 0.2 * number)  # an initial stable rank of its own, far from what its shape would give
    torch.save(model.state_dict(), tmp_path / "init.pt")
    schedule = lrconvert.Cuttlefish(model, criterion=QUICK, rule="scaled_stable_rank", input_shape=INPUT_SHAPE)
    initial = {name: curve[0] for name, curve in schedule.curves.ranks.items()}
    for name, rank in initial.items():
        values = torch.linalg.svdvals(model.get_submodule(name).weight.detach().flatten(1).double())
        assert rank == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-6)
    with_decay(model, initial, 0.7)
    dense = copy.deepcopy(model)
    assert schedule.step(0)
    assert len({layer.rank for layer in schedule.plan.low_rank}) > 2
    # make_plan reads the initial weights from a file, and computes ξ from all singular values
    assert schedule.plan == lrconvert.make_plan(
        dense, "scaled_stable_rank", init=tmp_path / "init.pt", input_shape=INPUT_SHAPE
    )


def test_exactly_the_layers_that_may_be_factorized_are_tracked():
    model = ResNet18Cifar(width=8)
    schedule = lrconvert.Cuttlefish(
        model, keep_first=5, exclude=["*.shortcut.*"], layer_ranks={"layer4.1.conv2": 64}, input_shape=(3, 32, 32)
    )
    stages = [f"layer{stage}.{block}.conv{conv}" for stage in (2, 3, 4) for block in (0, 1) for conv in (1, 2)]
    stages.remove("layer4.1.conv2")  # rank 64 of 64 cannot make it smaller
    assert list(schedule.curves.ranks) == stages
    assert schedule.keep_first == 5


def test_a_step_of_tracking_leaves_no_trace():
    model = digits_cnn()
    schedule = lrconvert.Cuttlefish(model, criterion=NEVER)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    assert not schedule.step(0)
    assert same(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(curve) for curve in schedule.curves.ranks.values()] == [2] * len(schedule.curves.ranks)


def test_pufferfish_has_the_papers_size():
    model = ResNet18Cifar()
    assert num_params(model) == 11_173_962
    schedule = lrconvert.Pufferfish(model, full_rank_epochs=2, keep_first=3, exclude=["*.shortcut.*"])
    assert [schedule.step(epoch) for epoch in range(4)] == [False, True, False, False]
    assert num_params(model) == 3_336_266
    assert (schedule.switch_epoch, schedule.keep_first) == (2, 3)


def test_no_full_rank_epochs_is_factorized_at_once():
    puffer, sifd = digits_cnn(), digits_cnn()
    dense = digits_cnn()
    schedule = lrconvert.Pufferfish(puffer, 0)
    assert (schedule.phase, schedule.switch_epoch, schedule.step(0)) == ("low-rank", 0, False)
    assert same(puffer, lrconvert.factorize(dense, "rank_ratio=0.25"))
    schedule = lrconvert.SIFD(sifd, 0.08)
    assert (schedule.phase, schedule.switch_epoch, schedule.step(0)) == ("low-rank", 0, False)
    # 0.08 · 32, 64, 64 and 32 is 2.56, 5.12, 5.12 and 2.56: to the nearest, not down
    ranks = {layer.name: layer.rank for layer in schedule.plan.low_rank}
    assert ranks == {"conv2": 3, "conv3": 5, "conv4": 5, "hidden": 3}


def test_dense_never_switches():
    model = digits_cnn()
    before = copy.deepcopy(model)
    schedule = lrconvert.Dense(model)
    assert not any(schedule.step(epoch) for epoch in range(3))
    schedule.finish()
    assert (schedule.phase, schedule.plan, schedule.notes) == ("full-rank", None, [])
    assert same(model, before)


def test_ranks_that_never_settle_are_said_loudly():
    model = digits_cnn()
    schedule = lrconvert.Cuttlefish(model, criterion=NEVER, max_full_rank_epochs=2, rule="rank_ratio=0.25")
    disturb(model, 3)
    assert not schedule.step(0)
    disturb(model, 4)
    with pytest.warns(UserWarning, match="of 4 layers had not settled after 2 epochs"):
        assert schedule.step(1)
    assert len(schedule.notes) == 1
    model = digits_cnn()
    schedule = lrconvert.Cuttlefish(model, criterion=NEVER)
    disturb(model, 3)
    assert not schedule.step(0)
    with pytest.warns(UserWarning, match=r"4 of 4 layers had not settled after 1 epochs .*set max_full_rank_epochs"):
        schedule.finish()


def test_where_nothing_would_shrink_training_goes_on():
    model = digits_cnn()
    schedule = lrconvert.Cuttlefish(model, criterion=QUICK, rule="rank=999")
    with pytest.warns(UserWarning, match="no layer would get smaller: training goes on at full rank"):
        assert not schedule.step(0)
    assert not schedule.step(1)  # and says so once
    assert schedule.phase == "full-rank"
    assert len(schedule.notes) == 1


def test_k_comes_from_profiling(monkeypatch):
    stacks = (StackTiming(("conv2",), 1.0, 1.0), StackTiming(("conv3",), 2.0, 1.0), StackTiming(("conv4",), 2.0, 1.0))
    calls = []

    def fake(model, layers, candidates, inputs, batch_size, **options):
        calls.append((batch_size, options))
        return Profile(stacks, 2, 1.5, 0.25, 66, 0.5)

    monkeypatch.setattr("lrconvert.training.schedules.cuttlefish.profile", fake)
    options = {"input_shape": INPUT_SHAPE, "batch_size": 32}
    schedule = lrconvert.Cuttlefish(digits_cnn(), autocast=torch.bfloat16, **options)
    assert calls == [(32, {"autocast": torch.bfloat16, "channels_last": False})]
    assert (schedule.keep_first, list(schedule.curves.ranks)) == (2, ["conv3", "conv4", "hidden"])
    assert schedule.profiling_seconds == 0.5
    state = json.loads(json.dumps(schedule.state_dict()))
    again = lrconvert.Cuttlefish(digits_cnn(), state=state, **options)
    assert (again.keep_first, again.profile, len(calls)) == (2, schedule.profile, 1)
    assert lrconvert.Cuttlefish(digits_cnn(), keep_first=3, **options).keep_first == 3  # by hand
    assert len(calls) == 1
    stacks = stacks[:1]
    with pytest.warns(UserWarning, match=r"no layer gets 1.5 times as fast .* \(the best 1.00 times\)"):
        schedule = lrconvert.Cuttlefish(digits_cnn(), **options)
    assert schedule.keep_first == 1


@pytest.mark.filterwarnings("ignore:no layer gets 1.5 times as fast")  # it depends on the machine
def test_profiling_for_real():
    schedule = lrconvert.Cuttlefish(digits_cnn(8), input_shape=INPUT_SHAPE, batch_size=4, keep_last=False)
    assert {name for stack in schedule.profile.stacks for name in stack.names} == {
        "conv2", "conv3", "conv4", "hidden", "classifier"
    }  # fmt: skip
    assert schedule.profile.iterations <= 22 * len(schedule.profile.stacks)
    assert schedule.profiling_seconds > 0


@pytest.mark.parametrize("stop", [1, 2, 3], ids=["before the switch", "at the switch", "after the switch"])
@pytest.mark.parametrize("kind", ["cuttlefish", "pufferfish", "sifd", "dense"])
def test_a_resumed_run_ends_with_the_same_model(digits, kind, stop, monkeypatch):
    criterion = lrconvert.StabilityCriterion(2, 1, 1e9)
    few = [each[:640] for each in digits]

    def make(model, state=None):
        if kind == "cuttlefish":
            return lrconvert.Cuttlefish(model, criterion=criterion, state=state)
        if kind == "pufferfish":
            return lrconvert.Pufferfish(model, 2, state=state)
        return lrconvert.SIFD(model, 0.2, state=state) if kind == "sifd" else lrconvert.Dense(model, state=state)

    def run(model, schedule, epochs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for epoch in epochs:
            train(model, optimizer, few, epoch)
            if schedule.step(epoch):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    whole, part, resumed = digits_cnn(), digits_cnn(), digits_cnn()
    schedule = make(whole)
    run(whole, schedule, range(4))
    earlier = make(part)
    run(part, earlier, range(stop))
    state, weights = json.loads(json.dumps(earlier.state_dict())), part.state_dict()
    with monkeypatch.context() as context:
        context.setattr("lrconvert.training.schedules.cuttlefish.stable_ranks", None)  # nothing is measured again
        later = make(resumed, state)
    assert later.state_dict() == earlier.state_dict()
    resumed.load_state_dict(weights)
    run(resumed, later, range(stop, 4))
    assert same(resumed, whole)
    assert (later.plan, later.curves, later.switch_epoch) == (schedule.plan, schedule.curves, schedule.switch_epoch)


def test_load_state_dict_after_the_constructor():
    first = digits_cnn()
    schedule = lrconvert.Pufferfish(first, 1)
    schedule.step(0)
    state = schedule.state_dict()
    second = digits_cnn()
    other = lrconvert.Pufferfish(second, 1)
    other.load_state_dict(state)
    second.load_state_dict(first.state_dict())
    assert same(first, second)
    assert other.state_dict() == state
    with pytest.raises(UsageError, match="state of Pufferfish, not of Cuttlefish"):
        lrconvert.Cuttlefish(digits_cnn(), state=state)
    with pytest.raises(UsageError, match="low rank already, by another plan"):
        lrconvert.Pufferfish(digits_cnn(), 0, 0.1).load_state_dict(state)
    state = lrconvert.Cuttlefish(digits_cnn()).state_dict()
    with pytest.raises(UsageError, match="tracks other layers"):
        lrconvert.Cuttlefish(digits_cnn(), exclude=["conv3"], state=state)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lrconvert.Cuttlefish(nn.DataParallel(digits_cnn())), UsageError, "bare model, not a DataParallel"),
        (lambda: lrconvert.Cuttlefish(torch.compile(digits_cnn())), UsageError, "bare model, not a OptimizedModule"),
        (lambda: lrconvert.Cuttlefish(nn.Linear(64, 64)), UsageError, "itself one layer"),
        (lambda: lrconvert.Cuttlefish(digits_cnn(), batch_size=8), UsageError, "no forward pass to profile"),
        (lambda: lrconvert.Cuttlefish(digits_cnn(), batch_size=0), UsageError, "batch_size must be 1 or more"),
        (lambda: lrconvert.Cuttlefish(digits_cnn(), max_full_rank_epochs=0), UsageError, "must be 1 or more, not 0"),
        (lambda: lrconvert.Pufferfish(digits_cnn(), -1), UsageError, "must be 0 or more, not -1"),
        (lambda: lrconvert.Pufferfish(digits_cnn(), 1, 2.0), UsageError, "at most 1"),
        (lambda: lrconvert.Pufferfish(digits_cnn(), 1, exclude=["no"]), PatternError, "'no' matches no layer"),
        (lambda: lrconvert.Pufferfish(digits_cnn(), 9, keep_first=9), NothingToCompressError, "no layer can become"),
        (lambda: lrconvert.SIFD(digits_cnn(), 1.0), NothingToCompressError, "no layer would get smaller"),
    ],
)
@pytest.mark.filterwarnings("ignore:at the ranks found")
def test_what_cannot_work_is_refused_before_training(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_weight_that_is_not_finite_is_named():
    model = digits_cnn()
    schedule = lrconvert.Cuttlefish(model)
    with torch.no_grad():
        model.conv3.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(WeightError, match="conv3: 1 of"):
        schedule.step(0)


def test_channels_last_survives_the_switch():
    model = digits_cnn().to(memory_format=torch.channels_last)
    lrconvert.SIFD(model, 0.2)
    for factor in (model.conv2.u, model.conv4.u):
        assert factor.weight.is_contiguous(memory_format=torch.channels_last)
        assert not factor.weight.is_contiguous()


def run_rank(rank, rendezvous, folder):
    """One of two processes whose weights are slightly apart, as rounding leaves them, and buffers quite."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        model = digits_cnn()
        schedule = lrconvert.Cuttlefish(model, criterion=QUICK, rule="scaled_stable_rank", floor=0.1)
        with_decay(model, schedule.curves.ranks, 0.7)
        with torch.no_grad():
            model.conv3.weight.mul_(1 + 1e-3 * rank)
            model.hidden.weight[0].add_(0.5 * rank)
            model.bn1.running_mean.fill_(rank)
        before = copy.deepcopy(model)
        assert schedule.step(0)
        torch.save((schedule.state_dict(), model.state_dict(), before), folder / f"{rank}.pt")
        fails_together(rank)
    finally:
        torch.distributed.destroy_process_group()


def fails_together(rank):
    model = digits_cnn()
    schedule = lrconvert.Cuttlefish(model, criterion=QUICK)
    if rank == 0:
        with torch.no_grad():
            model.conv3.weight.fill_(torch.nan)
    with pytest.raises(LrconvertError, match="conv3") as caught:
        schedule.step(0)
    assert caught.type is (LrconvertError if rank else WeightError)


@pytest.mark.dist
def test_two_processes_hold_the_same_model_after_the_switch(tmp_path):
    torch.multiprocessing.spawn(run_rank, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    (first, weights, before), (second, others, apart) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert not same(before, apart)
    assert first["plan"] == second["plan"]
    assert first["curves"] == second["curves"]
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    # and it is the model of rank 0
    expected = lrconvert.factorize(before, lrconvert.Plan.model_validate(first["plan"])).state_dict()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)
