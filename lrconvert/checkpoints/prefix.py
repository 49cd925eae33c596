"""Keys as the model names them: what wrappers put in front of them is taken off, and a model's own names settle it."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from lrconvert.checkpoints.checkpoint import Checkpoint

# Modules that torch wraps others in, at any depth; nobody's own attribute is called so.
_INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# What AveragedModel keeps beside the network.
_COUNTERS = {"n_averaged"}


def without_wrappers(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` without the names that wrappers insert, and without a likely prefix that every key has.

    `module.` may be the model's own attribute: it goes only where every key has it, and `fitted` brings it back.
    """
    if checkpoint.header is not None:
        # lrconvert wrote it, and its plan names the keys as they are.
        return checkpoint
    for part in _INSERTED:
        renamed = {key: _without(key, part) for key in checkpoint.tensors}
        changed = sum(key != new for key, new in renamed.items())
        if changed and len(set(renamed.values())) == len(renamed):
            every = all(key.startswith(part) for key in renamed)
            note = f"prefix '{part}' removed from every key" if every else f"'{part}' removed from {changed} keys"
            checkpoint = _renamed(checkpoint, renamed, note)
    for prefix in checkpoint.likely_prefixes * 2:
        keys = [key for key in checkpoint.tensors if key not in _COUNTERS]
        if keys and all(key.startswith(prefix) and len(key) > len(prefix) for key in keys):
            left = [key for key in checkpoint.tensors if key in _COUNTERS]
            note = f"prefix '{prefix}' removed from every key" + (f"; left behind: {', '.join(left)}" if left else "")
            checkpoint = _renamed(checkpoint, {key: key.removeprefix(prefix) for key in keys}, note)
            checkpoint = replace(checkpoint, prefix=checkpoint.prefix + prefix)
    return checkpoint


def fitted(checkpoint: Checkpoint, wanted: Collection[str]) -> Checkpoint:
    """`checkpoint` with one prefix added to its keys or taken off, if that makes more of them the model's.

    Args:
        checkpoint: a dense one; a factorized one comes back as it is.
        wanted: the keys of the model's state dict.
    """
    header = checkpoint.header
    if header is not None and header.plan is not None:
        return checkpoint
    wanted = set(wanted)
    have = set(checkpoint.tensors)
    best, most = "", len(wanted & have)
    for prefix in _candidates(have, wanted):
        found = len(wanted & _apply(have, prefix).keys())
        if found > most:
            best, most = prefix, found
    if not best or 2 * most < len(wanted):
        # Another network altogether: its own names are the ones to speak of.
        return checkpoint
    renamed = {old: new for new, old in _apply(have, best).items()}
    kept = {key: renamed[key] for key in checkpoint.tensors if key in renamed}
    if best.startswith("+"):
        return _renamed(checkpoint, kept, f"prefix '{best[1:]}' put before every key, as the model has it")
    left = [key for key in checkpoint.tensors if key not in kept]
    note = f"prefix '{best[1:]}' removed, as the model has no such part"
    if left:
        note += f"; {len(left)} keys without it left behind: {', '.join(left[:3])}{', …' if len(left) > 3 else ''}"
    return _renamed(checkpoint, kept, note)


def _candidates(have: Collection[str], wanted: Collection[str]) -> list[str]:
    """Prefixes that would make some key of one side one of the other: "+" to add, "-" to take off."""
    # Long keys tell most: "bias" ends every second one.
    probes = sorted(wanted, key=lambda key: (-key.count("."), key))[:4]
    taken = {"-" + key.removesuffix(probe) for probe in probes for key in have if key.endswith(f".{probe}")}
    probes = sorted(have, key=lambda key: (-key.count("."), key))[:4]
    added = {"+" + key.removesuffix(probe) for probe in probes for key in wanted if key.endswith(f".{probe}")}
    return sorted(added | taken)


def _apply(keys: Collection[str], change: str) -> dict[str, str]:
    """New key to old key after "+prefix" or "-prefix"; keys without a prefix to take off are left out."""
    sign, prefix = change[0], change[1:]
    if sign == "+":
        return {prefix + key: key for key in keys}
    return {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}


def _without(key: str, part: str) -> str:
    """`key` without a module's name wherever it stands as a whole."""
    return f".{key}".replace(f".{part}", ".")[1:]


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str], note: str) -> Checkpoint:
    """`checkpoint` with only the keys in `names`, under their new names."""
    tensors = {
        names[key]: replace(ref, alias_of=names.get(ref.alias_of)) if ref.alias_of else ref
        for key, ref in checkpoint.tensors.items()
        if key in names
    }
    files = {file: tuple(names[key] for key in keys if key in names) for file, keys in checkpoint.files.items()}
    return replace(checkpoint, tensors=tensors, files=files, notes=(*checkpoint.notes, note))
