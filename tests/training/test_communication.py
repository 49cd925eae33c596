"""Two gloo processes run every scenario once and leave their tensors in files; the tests compare those."""

import copy
import io
import os
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_close
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lrconvert import factorize
from lrconvert.errors import UnknownNameError, UsageError
from lrconvert.models.zoo.resnet18_cifar import ResNet18Cifar
from lrconvert.training.communication import compress
from lrconvert.training.optimizers import Signum
from lrconvert.training.signum import majority, pack_signs, signs

WORLD = 2
STEPS = 6
# One gradient a bucket, and so an order of buckets that changes after the first step.
SMALL_BUCKETS = {"bucket_cap_mb": 1e-4}


def network():
    """A kernel and a matrix that are worth compressing at rank 2, a smaller one that is not, and biases."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 16, 12), nn.Tanh(), nn.Linear(12, 6)
    )


def batch(rank, step, shape=(5, 3, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + rank))


def gradients_of(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def local_gradients(rank, step):
    """The gradient that one process has for itself, without any distribution."""
    model = network()
    loss(model, rank, step).backward()
    return gradients_of(model)


def loss(model, rank, step):
    return model(batch(rank, step)).square().mean()


def averaged(step):
    both = [local_gradients(rank, step) for rank in range(WORLD)]
    return {name: torch.stack([each[name] for each in both]).mean(0) for name in both[0]}


def wrap(model, method, **options):
    buckets = {key: options.pop(key) for key in list(options) if key == "bucket_cap_mb"}
    ddp = DistributedDataParallel(model, **buckets)
    return ddp, compress(ddp, method, **options)


# --- what the processes run -------------------------------------------------------------------------------------------


def reduced(rank, method, **options):
    """The gradients after each of a few steps on a model that stays as it is, and the traffic."""
    ddp, traffic = wrap(network(), method, **options)
    gradients = []
    for step in range(STEPS):
        ddp.zero_grad()
        loss(ddp, rank, step).backward()
        gradients.append(gradients_of(ddp.module))
    counts = {"sent": traffic.bytes_sent, "dense": traffic.bytes_dense, "steps": traffic.steps}
    return {"gradients": gradients, **counts, "per step": traffic.bytes_per_step}


def handed_over(rank, method, **options):
    """Bytes that really reach torch's collectives while a model trains."""
    originals = dist.all_reduce, dist.all_gather_into_tensor
    seen = 0

    def all_reduce(tensor, **rest):
        nonlocal seen
        seen += tensor.nbytes
        return originals[0](tensor, **rest)

    def all_gather_into_tensor(rows, tensor, **rest):
        nonlocal seen
        seen += tensor.nbytes
        return originals[1](rows, tensor, **rest)

    dist.all_reduce, dist.all_gather_into_tensor = all_reduce, all_gather_into_tensor
    try:
        counted = reduced(rank, method, **options)["sent"]
    finally:
        dist.all_reduce, dist.all_gather_into_tensor = originals
    return {"seen": seen, "counted": counted}


def beside_torch(rank):
    """The gradients of our PowerSGD and of torch's, from the same first Q, step by step."""
    ours, traffic = wrap(network(), "powersgd", start_step=2)
    theirs = DistributedDataParallel(network())
    first = traffic.state_dict()["compressor"]["qs"]
    names = {parameter: name for name, parameter in theirs.module.named_parameters()}

    def hook(state, bucket):
        if state.iter == 2:
            qs = [first[name] for name in (names[parameter] for parameter in bucket.parameters()) if name in first]
            state.q_memory_dict[0] = torch.cat([q.flatten() for q in qs])
            rows = sum(len(parameter) for parameter in bucket.parameters() if names[parameter] in first)
            state.p_memory_dict[0] = torch.empty(2 * rows)
        return powerSGD_hook(state, bucket)

    state = PowerSGDState(None, 2, start_powerSGD_iter=2)
    theirs.register_comm_hook(state, hook)
    results = []
    for step in range(STEPS):
        for ddp in (ours, theirs):
            ddp.zero_grad()
            loss(ddp, rank, step).backward()
        results.append((gradients_of(ours.module), gradients_of(theirs.module)))
    plain = 2 * 4 * sum(parameter.numel() for parameter in network().parameters())
    return {"steps": results, "sent": traffic.bytes_sent, "torch sent": plain + 4 * state.compression_stats()[2]}


def few_directions(rank):
    """A gradient of rank 4 (two samples in each process) sent at rank 4."""
    torch.manual_seed(0)
    ddp, _ = wrap(nn.Linear(64, 48), "powersgd", rank=4)
    ddp(batch(rank, 0, (2, 64))).square().sum().backward()
    return gradients_of(ddp.module)


def interrupted(rank, method, stop):
    """Weights after STEPS steps, with everything put into new objects after `stop` of them."""
    options = {**SMALL_BUCKETS, "start_step": 2}
    ddp, traffic = wrap(network(), method, **options)
    for step in range(STEPS):
        if step == stop:
            file = io.BytesIO()
            torch.save({"model": ddp.module.state_dict(), "traffic": traffic.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            ddp, traffic = wrap(network(), method, seed=1, **options)
            ddp.module.load_state_dict(saved["model"])
            traffic.load_state_dict(saved["traffic"])
        sgd = torch.optim.SGD(ddp.parameters(), lr=0.05)
        sgd.zero_grad()
        loss(ddp, rank, step).backward()
        sgd.step()
    counts = {"steps": traffic.steps, "sent": traffic.bytes_sent, "dense": traffic.bytes_dense}
    return {"weights": ddp.module.state_dict(), **counts}


def voted(gradients):
    """The gradient of a vector after a vote in which this process has these values."""
    model = nn.Module()
    model.p = nn.Parameter(torch.zeros(len(gradients)))
    model.forward = lambda x: (model.p * x).sum()
    ddp, traffic = wrap(model, "signum")
    ddp(gradients).backward()
    return {"vote": model.p.grad, "sent": traffic.bytes_sent}


def signum_run():
    """Weights after steps on the same data in both processes."""
    ddp, _ = wrap(network(), "signum")
    sgd = torch.optim.SGD(ddp.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        sgd.zero_grad()
        loss(ddp, 0, step).backward()
        sgd.step()
    return ddp.module.state_dict()


def sizes():
    """Bytes a step and parameters of a ResNet-18 of width 8 as it is, at low rank, and in bfloat16."""
    dense = ResNet18Cifar(width=8)
    low_rank = factorize(copy.deepcopy(dense), "rank_ratio=0.25", keep_first=3, exclude=["*.shortcut.*"])
    models = {"dense": dense, "low rank": low_rank, "bfloat16": copy.deepcopy(dense).bfloat16()}
    results = {}
    for name, model in models.items():
        ddp, traffic = wrap(model, "none")
        for _ in range(2):
            ddp(torch.randn(2, 3, 8, 8, dtype=next(model.parameters()).dtype)).float().sum().backward()
        results[name] = (traffic.bytes_per_step, sum(parameter.numel() for parameter in model.parameters()))
    return results


def without_synchronisation(rank):
    """Gradients and counts of two batches of which only the second communicates."""
    ddp, traffic = wrap(network(), "none")
    with ddp.no_sync():
        loss(ddp, rank, 0).backward()
    loss(ddp, rank, 1).backward()
    return {"gradients": gradients_of(ddp.module), "steps": traffic.steps, "sent": traffic.bytes_sent}


def refused():
    """The messages of what cannot be done."""
    _, powersgd = wrap(network(), "powersgd", rank=4)
    ddp = DistributedDataParallel(network())
    messages = []
    for bad in (
        lambda: compress(ddp, "signnum"),
        lambda: compress(ddp, "powersgd", rank=0),
        lambda: compress(ddp, "powersgd", start_step=-1),
        lambda: compress(ddp, "powersgd", rank=2).load_state_dict(powersgd.state_dict()),
    ):
        try:
            bad()
        except UsageError as error:
            messages.append((type(error), str(error)))
    return messages


def work(rank, folder):
    warnings.simplefilter("error")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch's PowerSGD synchronises a GPU it finds, on the CPU too
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    try:
        nine = torch.tensor([1.0, 1, 1, -1, -1, -1, 0, 1, -1])
        other = torch.tensor([2.0, -3, 1, -1, 1, -1, 0, 0, -9])
        results = {
            "none": reduced(rank, "none"),
            "powersgd": reduced(rank, "powersgd"),
            "powersgd, small buckets": reduced(rank, "powersgd", **SMALL_BUCKETS),
            "powersgd, later": reduced(rank, "powersgd", start_step=2, **SMALL_BUCKETS),
            "signum": reduced(rank, "signum"),
            "signum, small buckets": reduced(rank, "signum", **SMALL_BUCKETS),
            "handed over": {
                method: handed_over(rank, method, **SMALL_BUCKETS) for method in ("none", "powersgd", "signum")
            },
            "beside torch": beside_torch(rank),
            "few directions": few_directions(rank),
            "interrupted": {
                method: [interrupted(rank, method, stop) for stop in (None, 1, 2, 4)]
                for method in ("powersgd", "signum")
            },
            "voted": voted(other if rank else nine),
            "signum run": signum_run(),
            "sizes": sizes(),
            "no sync": without_synchronisation(rank),
            "refused": refused(),
        }
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process found, by rank."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


# --- what must hold ---------------------------------------------------------------------------------------------------

NUM_PARAMETERS = sum(parameter.numel() for parameter in network().parameters())


@pytest.mark.dist
def test_none_averages(results):
    for result in results:
        for step, gradients in enumerate(result["none"]["gradients"]):
            for name, want in averaged(step).items():
                assert_close(gradients[name], want)
        assert result["none"]["steps"] == STEPS
        assert result["none"]["sent"] == result["none"]["dense"] == STEPS * 4 * NUM_PARAMETERS


@pytest.mark.dist
def test_powersgd_sends_what_a_calculation_by_hand_says(results):
    # P and Q of rank 2 for the kernel (16, 27) and the matrix (12, 256). Those of the matrix (6, 12), 36 numbers,
    # would be just twice as small, which is not more: it goes whole, as all biases do.
    compressed = 2 * (16 + 27) + 2 * (12 + 256)
    whole = 6 * 12 + 16 + 12 + 6
    for result in results:
        assert result["powersgd"]["sent"] == STEPS * 4 * (compressed + whole)
        assert result["powersgd"]["per step"] == 4 * (compressed + whole)
        assert result["powersgd"]["dense"] == STEPS * 4 * NUM_PARAMETERS
        plain_first = 2 * NUM_PARAMETERS + (STEPS - 2) * (compressed + whole)
        assert result["powersgd, later"]["sent"] == 4 * plain_first


@pytest.mark.dist
@pytest.mark.parametrize("method", ["none", "powersgd", "signum"])
def test_counts_are_what_reaches_the_collectives(results, method):
    for result in results:
        handed = result["handed over"][method]
        assert handed["counted"] == handed["seen"] > 0


@pytest.mark.dist
def test_powersgd_is_exact_for_gradients_of_its_rank(results):
    torch.manual_seed(0)
    model = nn.Linear(64, 48)
    model(torch.cat([batch(rank, 0, (2, 64)) for rank in range(WORLD)])).square().sum().backward()
    assert torch.linalg.matrix_rank(model.weight.grad) == 4
    for result in results:
        for name, gradient in gradients_of(model).items():
            assert_close(result["few directions"][name], gradient / WORLD, 1e-4)


@pytest.mark.dist
def test_powersgd_computes_what_torch_does(results):
    for result in results:
        assert result["beside torch"]["sent"] == result["beside torch"]["torch sent"]
        for ours, theirs in result["beside torch"]["steps"]:
            for name, want in theirs.items():
                assert_close(ours[name], want, 1e-4)
        last = result["beside torch"]["steps"][-1][0]
        exact = averaged(STEPS - 1)
        assert (last["3.weight"] - exact["3.weight"]).norm() > 0.1 * exact["3.weight"].norm()


@pytest.mark.dist
def test_powersgd_makes_up_for_what_it_missed(results):
    # Sent = (gradient + error before) − error after, so that sums differ by one error only, not by one a step.
    sent = sum(gradients["3.weight"] for gradients in results[0]["powersgd"]["gradients"])
    exact = sum(averaged(step)["3.weight"] for step in range(STEPS))
    missed = [
        (gradients["3.weight"] - averaged(step)["3.weight"]).norm()
        for step, gradients in enumerate(results[0]["powersgd"]["gradients"])
    ]
    assert (sent - exact).norm() < 0.5 * sum(missed)


@pytest.mark.dist
def test_both_processes_end_with_the_same_gradients(results):
    for method in ("none", "powersgd", "signum"):
        for one, other in zip(*(result[method]["gradients"] for result in results), strict=True):
            for name, gradient in one.items():
                assert torch.equal(gradient, other[name])


@pytest.mark.dist
@pytest.mark.parametrize("method", ["powersgd", "signum"])
def test_buckets_do_not_change_gradients(results, method):
    for whole, split in zip(
        results[0][method]["gradients"], results[0][f"{method}, small buckets"]["gradients"], strict=True
    ):
        for name, gradient in whole.items():
            assert torch.equal(gradient, split[name]), name


@pytest.mark.dist
@pytest.mark.parametrize("method", ["powersgd", "signum"])
def test_a_resumed_run_ends_with_the_same_bits(results, method):
    for result in results:
        through, *resumed = result["interrupted"][method]
        for run in resumed:
            assert run["steps"] == through["steps"] == STEPS
            assert run["dense"] == through["dense"]
            # The buckets of a first step are others, and each rounds its bits up to whole bytes.
            assert abs(run["sent"] - through["sent"]) < (6 if method == "signum" else 1)
            for name, weight in through["weights"].items():
                assert torch.equal(run["weights"][name], weight), name


@pytest.mark.dist
def test_vote_by_hand(results):
    # 0 votes +1: with +1 it wins, and two zeros win.
    want = torch.tensor([1.0, 0, 1, -1, 0, -1, 1, 1, -1])
    for result in results:
        assert torch.equal(result["voted"]["vote"], want)
        assert result["voted"]["sent"] == 2  # nine bits


@pytest.mark.dist
def test_vote_is_on_the_momenta(results):
    momenta = [{}, {}]
    for step, gradients in enumerate(results[0]["signum"]["gradients"]):
        for rank, momentum in enumerate(momenta):
            for name, gradient in local_gradients(rank, step).items():
                momentum[name] = 0.9 * momentum.get(name, 0) + 0.1 * gradient
        for name, vote in gradients.items():
            assert torch.equal(vote, (momenta[0][name].sign() + momenta[1][name].sign()).sign())
            if step:
                now = [local_gradients(rank, step)[name].sign() for rank in range(WORLD)]
                assert name.endswith("bias") or not torch.equal(vote, sum(now).sign())
    assert results[0]["signum"]["sent"] == STEPS * -(-NUM_PARAMETERS // 8)


@pytest.mark.dist
def test_signum_optimizer_steps_as_processes_with_the_same_data_do(results):
    model = network()
    optimizer = Signum(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, 0, step).backward()
        optimizer.step()
    for name, weight in model.state_dict().items():
        assert torch.equal(results[0]["signum run"][name], weight)


@pytest.mark.dist
def test_bytes_are_those_of_the_trainable_parameters(results):
    for result in results:
        bytes_per_step, parameters = zip(*result["sizes"].values(), strict=True)
        assert bytes_per_step == (4 * parameters[0], 4 * parameters[1], 2 * parameters[2])
        assert parameters[1] < 0.4 * parameters[0]


@pytest.mark.dist
def test_accumulated_batches_communicate_once(results):
    for result in results:
        assert result["no sync"]["steps"] == 1
        assert result["no sync"]["sent"] == 4 * NUM_PARAMETERS
        for name, gradient in result["no sync"]["gradients"].items():
            assert_close(gradient, averaged(0)[name] + averaged(1)[name])


@pytest.mark.dist
def test_errors_name_the_fix(results):
    unknown, rank, start, other = results[0]["refused"]
    assert unknown[0] is UnknownNameError
    assert "did you mean 'signum'?" in unknown[1]
    assert "rank must be at least 1, not 0" in rank[1]
    assert "give 0 or more" in start[1]
    assert other[1] == (
        "the checkpoint's gradients were compressed by powersgd (rank 4, start_step 0), this run asks for powersgd "
        "(rank 2, start_step 0): resume with the checkpoint's settings"
    )


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 77])
@pytest.mark.parametrize("voters", [1, 2, 3, 300])
def test_votes_are_counted_from_bits(count, voters):
    momenta = torch.randn(voters, count)
    packed = torch.stack([pack_signs(momentum) for momentum in momenta])
    assert packed.shape == (voters, -(-count // 8))
    assert torch.equal(majority(packed, count), momenta.sign().sum(0).sign().int())


def test_the_first_element_is_the_lowest_bit_and_padding_is_zero():
    assert pack_signs(torch.tensor([1.0, -1, -1, -1, -1, -1, -1, 1, -1, 1])).tolist() == [0b10000001, 0b10]


def test_zero_counts_as_positive():
    assert signs(torch.tensor([-2.0, 0.0, 1e-30])).tolist() == [-1, 1, 1]


def test_signum_optimizer_by_hand():
    parameter = nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = Signum([parameter], lr=0.5, momentum=0.5, weight_decay=0.25)
    parameter.grad = torch.tensor([4.0, -4.0])
    optimizer.step()  # m = (2, −2): p − 0.5·((1, −1) + 0.25·p)
    assert parameter.tolist() == [1.25, -0.375]
    parameter.grad = torch.tensor([-1.0, 8.0])
    assert optimizer.step(lambda: 7.0) == 7.0  # m = (0.5, 3)
    assert parameter.tolist() == [0.59375, -0.828125]


def test_signum_optimizer_refuses_what_makes_no_sense():
    for bad in ({"lr": -1}, {"lr": 1, "momentum": 1}, {"lr": 1, "weight_decay": -1}):
        with pytest.raises(UsageError, match="Signum needs"):
            Signum([nn.Parameter(torch.zeros(1))], **bad)
