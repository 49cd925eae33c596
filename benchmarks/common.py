"""What the benchmarks share: interleaved timing, a description of the machine, peers, tables and records.

Torch is imported inside functions: a script that measures the memory of its children must itself stay small.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / ".peers"


def interleave(jobs: Mapping[str, Callable[[], object]], rounds: Mapping[str, int]) -> dict[str, list[float]]:
    """Seconds that each job took in each round, after one run of each that is not counted.

    A round runs every job once, so that all meet the same disturbances; every other round runs them backwards.

    Args:
        jobs: what to time, by name.
        rounds: by name, the number of rounds that a job takes part in, from the first on.
    """
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(max(rounds[name] for name in jobs)):
        for name in list(jobs)[:: -1 if number % 2 else 1]:
            if number < rounds[name]:
                started = time.perf_counter()
                jobs[name]()
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The number of values, their median, quartiles and extremes."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return {"n": len(values), "median": median, "quartiles": [low, high], "min": min(values), "max": max(values)}


def ratios(peer: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """How many times longer the peer took than we did, round by round, summarised."""
    return summary([theirs / mine for theirs, mine in zip(peer, ours, strict=False)])


def decaying(weight: Any) -> Any:
    """`weight` with its i-th singular value divided by i, scaled back to its norm: far from random, as trained ones."""
    import torch

    left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    steep = values / torch.arange(1, len(values) + 1)
    steep *= values.norm() / steep.norm()
    return (left * steep @ right).reshape(weight.shape)


def build_model(name: str, spectrum: str) -> Any:
    """A torchvision model with seeded random weights, as they are ("random") or with a "decaying" spectrum."""
    import torch
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval().requires_grad_(False)
    for parameter in (parameter for parameter in model.parameters() if parameter.dim() > 1):
        if not parameter.any():  # torchvision starts ViT's head at zero, which is no work for anybody
            parameter.normal_(std=0.02)
        if spectrum == "decaying":
            parameter.copy_(decaying(parameter))
    return model


def use_peer(name: str, *requirements: str) -> None:
    """Install a peer into a folder of its own, once, and import from there what is not installed already.

    Args:
        name: of the folder.
        requirements: everything to install; nothing that these depend on is installed with them.
    """
    folder, stamp = PEERS / name, PEERS / name / "requirements.txt"
    wanted = "\n".join(requirements)
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), *requirements], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    # At the end: torch and numpy stay those of the environment.
    sys.path.append(str(folder))


def environment(*packages: str) -> dict[str, Any]:
    """The hardware and the versions that a record was measured with."""
    import torch

    packages = ("lrconvert", "torch", "torchvision", "numpy", "safetensors", *packages)
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        **{package: version(package) for package in packages},
    }


def _cpu_name() -> str:
    """The processor, by vendor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    model = f"family {fields['cpu family'].strip()} model {fields['model'].strip()}" if "cpu family" in fields else ""
    widest = next((name for name in ("avx512f", "avx2") if name in fields.get("flags", "").split()), "")
    return ", ".join(part for part in (fields["model name"].strip(), model, widest) if part)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; the first is left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        [
            text.ljust(width) if not at else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (header, *rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def spread(numbers: Mapping[str, Any], unit: str = "", digits: int = 3) -> str:
    """A summary as text: "7.11× (6.90–7.42, n 9)"."""
    low, median, high = (f"{numbers[key]:.{digits}g}" for key in ("min", "median", "max"))
    return f"{median}{unit} ({low}–{high}, n {numbers['n']})"


def verdict(median: float, fastest: float, target: float) -> str:
    """Whether a ratio reaches its target, in words.

    Args:
        median: of the ratios of all rounds.
        fastest: the ratio of the fastest runs. Other work on the machine slows one side more than the other, so a
            target counts as reached only if this ratio reaches it too.
        target: the least ratio wanted.
    """
    return (
        f"{fastest:.3g}× fastest runs; target ≥{target:g}×: {'reached' if min(median, fastest) >= target else 'MISSED'}"
    )


def save(record: Mapping[str, Any], path: Path | None) -> None:
    """Print the environment and write the record as JSON, if a file was asked for."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in record["environment"].items()))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
