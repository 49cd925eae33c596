"""Calls with texts, made into tokens by the tokenizer that lies beside the model's weights."""

import inspect
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.errors import LrconvertError, UsageError
from lrconvert.inputs import Call
from lrconvert.models.huggingface_inputs import positions_of
from lrconvert.network import Network
from lrconvert.samples.wanted import Found, Wanted

if TYPE_CHECKING:
    from lrconvert.onnx_graph.graph import Graph

# Any of them makes a tokenizer; without one, transformers makes up a tokenizer that knows no words.
_FILES = ("tokenizer.json", "vocab*", "*.model", "tekken.json")


def read_texts(path: Path, network: Network, wanted: Wanted, max_tokens: int) -> Found:
    """Texts from the different lines of a UTF-8 file, blank ones aside, those of a call padded to its longest.

    Texts of similar length share a call, since padding costs time and teaches nothing.

    Args:
        path: the file.
        network: of a model of transformers, in a folder that has its tokenizer; or a graph in it, or in one below.
        wanted: which lines.
        max_tokens: where a text is cut, if the model's limit is not below.

    Raises:
        UsageError: the network takes no text, or `max_tokens` is not positive.
        LrconvertError: the file cannot be read, or there is no tokenizer.
    """
    if max_tokens < 1:
        raise UsageError(f"max_tokens must be at least 1, not {max_tokens}")
    tokenizer = _tokenizer(network, path)
    length = _fixed_length(network)
    limit = length or min(max_tokens, tokenizer.model_max_length, _positions(network) or max_tokens)
    texts, n = _chosen(path, wanted)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=limit)["input_ids"]]
    ordered = [text for _, text in sorted(zip(lengths, texts, strict=True), key=lambda pair: pair[0])]
    calls = tuple(
        _call(tokenizer, ordered[start : start + wanted.batch_size], limit, "max_length" if length else True, network)
        for start in range(0, len(ordered), wanted.batch_size)
    )
    return Found(calls, f"{len(texts):,} texts of {path}, out of {n:,}: {sum(lengths):,} tokens")


def _call(tokenizer: Any, texts: Sequence[str], limit: int, padding: str | bool, network: Network) -> Call:
    encoded = tokenizer(texts, truncation=True, max_length=limit, padding=padding, return_tensors="pt")
    # A tokenizer may give more than its model takes.
    known = _names(network)
    return Call((), {name: tensor for name, tensor in encoded.items() if name in known}, len(texts))


def _graph(network: Network) -> "Graph | None":
    return network.checkpoint.graph if network.checkpoint is not None else None


def _names(network: Network) -> Collection[str]:
    """What the network can be given by name."""
    if (graph := _graph(network)) is not None:
        from lrconvert.onnx_graph.inputs import inputs_of

        return [each.name for each in inputs_of(graph)]
    return inspect.signature(network.module.forward).parameters if network.module is not None else ()


def _fixed_length(network: Network) -> int | None:
    """How many tokens every text must have: a graph may take no other number."""
    if (graph := _graph(network)) is None:
        return None
    from lrconvert.onnx_graph.inputs import fixed_length

    return fixed_length(graph)


def _chosen(path: Path, wanted: Wanted) -> tuple[list[str], int]:
    """(the wanted texts, how many there are). The file is read twice, and never held in memory as a whole."""
    try:
        n = sum(1 for _ in _texts(path))
        places = {number: place for place, number in enumerate(wanted.choose(n, str(path)).tolist())}
        texts = [""] * len(places)
        for number, text in enumerate(_texts(path)):
            if number in places:
                texts[places[number]] = text
    except OSError as error:
        raise LrconvertError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise LrconvertError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start:,}): give a text a line, a folder of images, "
            "or tensors in a .npz, .pt or .safetensors file"
        ) from error
    return texts, n


def _texts(path: Path) -> Iterator[str]:
    """The lines of a file, blank ones aside; each once, or texts to calibrate on could be met again in a test."""
    seen: set[int] = set()
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            text = line.strip()
            if text and hash(text) not in seen:
                seen.add(hash(text))
                yield text


def _tokenizer(network: Network, path: Path) -> Any:
    """The tokenizer in the network's folder."""
    folder = _folder(network, path)
    if folder is None:
        raise LrconvertError(
            f"{network.name} has no tokenizer{' beside it' if _graph(network) else ''}: put the model's tokenizer.json "
            "there, or give input_ids and attention_mask in a .npz file"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LrconvertError(f"{folder}: transformers cannot load its tokenizer ({reason})") from error
    if tokenizer.pad_token is None:
        # It is hidden by the mask: any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    # Positions are counted from the first token, and not every model takes them from the mask.
    tokenizer.padding_side = "right"
    return tokenizer


def _folder(network: Network, path: Path) -> Path | None:
    """Where the network's tokenizer is.

    Raises:
        UsageError: the network takes no text.
    """
    named = network.architecture.name if network.architecture else ""
    graph = _graph(network)
    if network.checkpoint is None or (graph is None and (network.module is None or not named.startswith("hf/"))):
        raise UsageError(
            f"{path} is text, which only a folder of transformers has a tokenizer for, and {network.name} is none: "
            "give tensors (.npz, .pt, .safetensors) or path/to/file.py:factory"
        )
    if graph is None and network.inputs and network.inputs[0].name != "input_ids":
        raise UsageError(f"{path} is text, but {network.name} takes {network.inputs[0].name}")
    if graph is not None and "input_ids" not in _names(network):
        raise UsageError(f"{path} is text, but {network.name} takes {', '.join(_names(network))}, not input_ids")
    place = network.checkpoint.path
    folders = [place if place.is_dir() else place.parent]
    if graph is not None:  # exporters put graphs into a folder of their own
        folders.append(place.absolute().parent.parent)
    return next((each for each in folders if any(any(each.glob(pattern)) for pattern in _FILES)), None)


def _positions(network: Network) -> int | None:
    config = getattr(network.module, "config", None)
    return positions_of(getattr(config, "text_config", None) or config)
