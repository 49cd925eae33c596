"""The peak memory of the command line on a checkpoint that is larger than the limit.

    python benchmarks/memory.py [--json FILE] [--gigabytes 8] [--format safetensors|bin] [--matrix 8192x8192]

Writes a sharded float32 checkpoint of transformer-like blocks (hidden 1024, some of 2048, one of 4096), as Hugging Face
libraries lay it out, into a temporary folder that is removed at the end. `lrconvert analyze FOLDER --json` and
`lrconvert factorize FOLDER -o OUT --rank-ratio 0.25` then run as processes of their own. Their peak resident set size
is what the kernel reports when they end; memory the process asked for (anonymous) and pages of files it mapped are
sampled apart. A process that only imports torch is given for comparison.

This script imports torch only when all is measured: a child's reported peak is never below its parent's own size.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import environment, save, table

LIMIT_GB = 1.5
SHARD_BYTES = 1_000_000_000
FFN = {1024: 4096, 2048: 8192, 4096: 11008}
Shape = tuple[int, int]


def main() -> None:
    """Write the checkpoint, run both commands on it, print and save what they needed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--matrix", metavar="ROWSxCOLUMNS", help="add one matrix of this shape")
    options = parser.parse_args()
    extra = tuple(int(size) for size in options.matrix.split("x")) if options.matrix else None
    with tempfile.TemporaryDirectory(prefix="lrconvert-memory-") as scratch:
        source, output = Path(scratch, "checkpoint"), Path(scratch, "factorized")
        source.mkdir()
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(source, options.gigabytes * 1e9, options.format, extra)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit("the checkpoint could not be written")
        size = folder_size(source)
        files = [str(source), "-o", str(output)]
        commands = {
            "import torch": ["-c", "import torch"],
            "lrconvert analyze": ["-m", "lrconvert", "analyze", str(source), "--json"],
            "lrconvert factorize": ["-m", "lrconvert", "factorize", *files, "--rank-ratio", "0.25"],
        }
        rows = []
        for name, arguments in commands.items():
            rows.append({"command": name, **run_child([sys.executable, *arguments])})
        written = folder_size(output)
    record: dict[str, Any] = {
        "benchmark": "memory",
        "checkpoint_gb": size / 1e9,
        "written_gb": written / 1e9,
        "format": options.format,
        "extra_matrix": options.matrix,
        "limit_gb": LIMIT_GB,
        "own_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "rows": rows,
        "environment": environment(),
    }
    print(describe(record))
    save(record, options.json)


def shapes(total: float, extra: Shape | None) -> Iterator[tuple[str, Shape]]:
    """Name and shape of matrices, until they fill `total` bytes."""
    yield "embed_tokens.weight", (32000, 2048)
    used = 32000 * 2048 * 4
    if extra:
        yield "extra.weight", extra
        used += extra[0] * extra[1] * 4
    block = 0
    while True:
        hidden = 4096 if block == 0 else 2048 if block % 8 == 0 else 1024
        block_shapes = {
            **{f"attention.{part}": (hidden, hidden) for part in ("q", "k", "v", "o")},
            **{f"mlp.{part}": (FFN[hidden], hidden) for part in ("gate", "up")},
            "mlp.down": (hidden, FFN[hidden]),
        }
        for part, shape in block_shapes.items():
            used += shape[0] * shape[1] * 4
            if used > total:
                return
            yield f"layers.{block}.{part}.weight", shape
        block += 1


def write_checkpoint(folder: Path, total: float, file_format: str, extra: Shape | None) -> None:
    """Write config.json, shards of about a gigabyte, and their index; one shard is in memory at a time."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    groups: list[dict[str, Shape]] = [{}]
    for name, shape in shapes(total, extra):
        if sum(rows * columns * 4 for rows, columns in groups[-1].values()) > SHARD_BYTES:
            groups.append({})
        groups[-1][name] = shape
    stem, suffix = ("model", "safetensors") if file_format == "safetensors" else ("pytorch_model", "bin")
    weight_map, written = {}, 0
    for number, group in enumerate(groups, start=1):
        path = folder / f"{stem}-{number:05}-of-{len(groups):05}.{suffix}"
        tensors = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in group.items()}
        if suffix == "safetensors":
            save_file(tensors, path, metadata={"format": "pt"})
        else:
            torch.save(tensors, path)
        weight_map.update(dict.fromkeys(group, path.name))
        written += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "synthetic"}\n', encoding="utf-8")


def run_child(command: list[str]) -> dict[str, Any]:
    """Run `command` to its end: its seconds, peak resident size, and the largest samples of its two parts."""
    started = time.perf_counter()
    largest = {"RssAnon": 0, "RssFile": 0}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        for part, size in resident_parts(child.pid).items():
            largest[part] = max(largest[part], size)
        time.sleep(0.02)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command[1:4])} failed with exit code {child.returncode}")
    return {
        "seconds": time.perf_counter() - started,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "anonymous_gb": largest["RssAnon"] / 1e9,
        "mapped_gb": largest["RssFile"] / 1e9,
    }


def resident_parts(pid: int) -> dict[str, int]:
    """Bytes of memory a process asked for, and of files it mapped, that are resident now; empty if it just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {part: int(fields[part].split()[0]) * 1024 for part in ("RssAnon", "RssFile") if part in fields}


def folder_size(folder: Path) -> int:
    """Bytes of all the files directly in `folder`."""
    return sum(path.stat().st_size for path in folder.iterdir())


def describe(record: dict[str, Any]) -> str:
    """The record as text."""
    lines = []
    for row in record["rows"]:
        share = row["peak_gb"] / record["limit_gb"]
        lines.append(
            [
                row["command"],
                f"{row['seconds']:.1f} s",
                f"{row['peak_gb']:.2f} GB",
                f"{row['anonymous_gb']:.2f} GB",
                f"{row['mapped_gb']:.2f} GB",
                f"{share:.2f}× {'within' if share <= 1 else 'EXCEEDED'}",
            ]
        )
    extra = f", one matrix {record['extra_matrix']}" if record["extra_matrix"] else ""
    head = f"\n{record['checkpoint_gb']:.1f} GB of {record['format']} shards{extra}, n 1 for each command\n"
    limit = f"of the {record['limit_gb']} GB limit"
    return head + table(["", "time", "peak resident", "largest anonymous", "largest mapped", limit], lines)


if __name__ == "__main__":
    main()
