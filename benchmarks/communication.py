"""How many bytes of gradients a process hands to collectives in a step of data-parallel training.

    python benchmarks/communication.py [--json FILE]

Pufferfish's networks for CIFAR-10, dense and with its ranks (a quarter of full rank), with plain all-reduce and with
the gradient compression that it is compared with: PowerSGD and Signum. Two gloo processes take one step of four images
each; but for the rounding of Signum's bits to bytes, every step sends as much, with any images and any number of
processes. Payload is counted, not what the backend makes of it on the wire: Signum's all-gather receives a payload
from every other process, all-reduce takes about twice its payload with any number of them.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import environment, save, table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lrconvert
from lrconvert.models.zoo.resnet18_cifar import ResNet18Cifar
from lrconvert.models.zoo.vgg19_bn_cifar import VGG19Cifar
from lrconvert.training.communication import compress

PROCESSES = 2
# The networks, with the layers that stay dense in Pufferfish's experiments.
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "ResNet-18": (ResNet18Cifar, {"keep_first": 3, "exclude": ["*.shortcut.*"]}),
    "VGG-19": (VGG19Cifar, {"keep_first": 9}),
}
METHODS: dict[str, dict[str, Any]] = {
    "all-reduce": {"method": "none"},
    "PowerSGD rank 2": {"method": "powersgd", "rank": 2},
    "PowerSGD rank 4": {"method": "powersgd", "rank": 4},
    "Signum": {"method": "signum"},
}


def main() -> None:
    """Count every case in two processes, print the bytes, and save the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lrconvert-communication-") as scratch:
        mp.spawn(work, (scratch,), PROCESSES)
        rows = json.loads(Path(scratch, "rows.json").read_text(encoding="utf-8"))
    print(describe(rows))
    record = {"benchmark": "communication", "processes": PROCESSES, "backend": "gloo", "rows": rows}
    save({**record, "environment": environment()}, options.json)


def work(rank: int, scratch: str) -> None:
    """Count every case together with the other process; the first one writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/meet", rank=rank, world_size=PROCESSES)
    try:
        rows = []
        for name, (build, stays_dense) in NETWORKS.items():
            torch.manual_seed(0)
            dense = build()
            low_rank = lrconvert.factorize(copy.deepcopy(dense), "rank_ratio=0.25", **stays_dense)
            for kind, model in (("dense", dense), ("Pufferfish", low_rank)):
                rows += [{"network": name, "kind": kind, "name": label, **count(model, label)} for label in METHODS]
        if rank == 0:
            Path(scratch, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def count(model: nn.Module, label: str) -> dict[str, Any]:
    """One step of a copy of `model`: its parameters, bytes sent, and bytes without compression."""
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    traffic = compress(wrapped, **METHODS[label])
    wrapped(torch.randn(4, 3, 32, 32)).sum().backward()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "bytes_per_step": traffic.bytes_per_step,
        "bytes_uncompressed": traffic.bytes_dense / traffic.steps,
    }


def describe(rows: list[dict[str, Any]]) -> str:
    """All cases as text, each beside the dense network with plain all-reduce."""
    lines = []
    for row in rows:
        dense = next(each for each in rows if each["network"] == row["network"])
        lines.append(
            [
                f"{row['network']} {row['kind']}, {row['name']}",
                f"{row['parameters']:,}",
                f"{row['bytes_per_step'] / 1e6:.3f} MB",
                f"{dense['bytes_per_step'] / row['bytes_per_step']:.2f}×",
            ]
        )
    return "\n" + table(["", "parameters", "a step", "less than dense"], lines)


if __name__ == "__main__":
    main()
