"""What two gloo processes do in tests of compressed communication; each leaves what it found in a file."""

import copy
import io
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lrconvert import factorize
from lrconvert.errors import UsageError
from lrconvert.models.zoo.resnet18_cifar import ResNet18Cifar
from lrconvert.training.communication import compress

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
