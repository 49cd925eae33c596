"""Two gloo processes run every scenario once and leave their tensors in files; the tests compare those."""

import pytest
import torch
import torch.multiprocessing as mp
from communicating import STEPS, WORLD, averaged, batch, gradients_of, local_gradients, loss, network, work
from helpers import assert_close
from torch import nn

from lrconvert.errors import UnknownNameError
from lrconvert.training.optimizers import Signum


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process found, by rank."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


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
