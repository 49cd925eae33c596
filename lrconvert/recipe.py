"""A recipe: everything that a training run depends on, as plain data; read from YAML, checked, and written again.

Field names are timm's where timm has the field (https://github.com/huggingface/pytorch-image-models). A recipe may
build on another file (`base: common.yaml`), whose fields it overrules.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lrconvert.errors import LrconvertError, UsageError

Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base of everything in a recipe: unknown keys are errors, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DenseSettings(Settings):
    """Train the network as it is: the yardstick; or go on with one that is factorized already."""

    method: Literal["dense"] = "dense"
    frobenius_decay: bool = False


class PlanSettings(Settings):
    """Which layers become low rank; see `lrconvert.plan.PlanOptions` for what is not said here.

    Attributes:
        keep_first: K, leading layers that stay dense; None for the method's own choice.
        extra_norm: put a BatchNorm between the two factors (Cuttlefish section 4.1).
        frobenius_decay: decay ‖VU‖² of the factors instead of each factor, by `weight_decay`.
    """

    keep_first: Annotated[int, Field(ge=0)] | None = None
    keep_last: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    floor: Share = 0.0
    rank_multiple: Count = 1
    layer_ranks: dict[str, Count] = {}
    splits: dict[str, Count] = {}
    extra_norm: bool = False
    frobenius_decay: bool = False

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.extra_norm and self.frobenius_decay:
            raise ValueError("extra_norm and frobenius_decay exclude each other (Cuttlefish section 4.1): choose one")
        return self


class PufferfishSettings(PlanSettings):
    """Factorize after E epochs at rank ratio ρ, both by hand.

    Attributes:
        full_rank_epochs: E.
        rank_ratio: ρ, rank / full rank.
    """

    method: Literal["pufferfish"]
    full_rank_epochs: Annotated[int, Field(ge=0)]
    rank_ratio: Annotated[float, Field(gt=0, le=1)] = 0.25


class CuttlefishSettings(PlanSettings):
    """E from the rank curves, ranks from a rule at the switch, K from profiling unless `keep_first` gives it.

    Attributes:
        rule: chooses the ranks.
        window: N, the span of the moving average, and the epoch before which nothing is stable.
        mean_of: M, how many of the last slopes are averaged.
        epsilon: a rank curve is stable when its slope, in ranks an epoch, is at most this.
        relax: (layers left, factor) pairs: with at most so many layers not yet stable, ε is so many times larger.
        max_full_rank_epochs: switch then at the latest.
    """

    method: Literal["cuttlefish"]
    rule: str = "auto"
    window: Count = 15
    mean_of: Count = 11
    epsilon: Positive = 0.1
    relax: tuple[tuple[Count, Positive], ...] = ((1, 5.0), (2, 2.5))
    max_full_rank_epochs: Count | None = None


class SIFDSettings(PlanSettings):
    """Factorize the initial weights (spectral initialisation) and train with Frobenius decay (Khodak et al. 2021).

    Attributes:
        rank_ratio: ρ, rank / rows of the matrix view.
        view: "channel", the matrix (out, in·kh·kw); "spatial", (out·kh, in·kw), as the authors have it.
    """

    method: Literal["sifd"]
    rank_ratio: Annotated[float, Field(gt=0, le=1)] = 0.25
    view: Literal["channel", "spatial"] = "channel"
    frobenius_decay: bool = True


LowRank = Annotated[
    DenseSettings | PufferfishSettings | CuttlefishSettings | SIFDSettings, Field(discriminator="method")
]


class Compression(Settings):
    """How gradients are compressed between processes.

    Attributes:
        method: "none" or "powersgd" (Vogels et al. 2019); for signs of gradients choose `opt: signum`.
        rank: of PowerSGD's approximation of a gradient matrix.
        start_step: PowerSGD: steps of plain averaging first.
        phase: in which phase of the run.
    """

    method: Literal["none", "powersgd"] = "none"
    rank: Count = 2
    start_step: Annotated[int, Field(ge=0)] = 10
    phase: Literal["full-rank", "low-rank", "both"] = "both"


class Recipe(Settings):
    """One training run.

    Attributes:
        model, model_args: architecture by name, see `lrconvert.models`; not needed where `checkpoint` names its own.
        checkpoint: start from these weights, dense or factorized.
        teacher: a checkpoint whose outputs are imitated (knowledge distillation, Hinton et al. 2015).
        distill_weight: share of the imitation in the loss.
        distill_temperature: of both softmaxes.
        dataset, dataset_args: by name, see `lrconvert.training.data`, or file.py:factory.
        data_dir: folder that holds it, or receives its download.
        download: whether it may be downloaded.
        validation: share of the training images held out to watch the run; None for the data set's default.
        img_size, mean, std: of the input; None for the data set's own.
        crop_padding, hflip, scale, ratio, aa, reprob: augmentation, see `lrconvert.training.data.Augment`.
        mixup, cutmix, mixup_switch_prob: strengths α of mixing images, 0 for none; with both, how often it is cutmix.
        smoothing: label smoothing.
        low_rank: method and settings of low-rank training.
        epochs: of the whole run.
        batch_size: images an optimizer step, over all processes and accumulated batches together.
        grad_accum_steps: batches that a step is made of.
        opt: "sgd", "adamw" or "signum" (Bernstein et al. 2018; several processes vote on each sign).
        lr, momentum, nesterov, betas, weight_decay: of the optimizer; weights of one dimension are never decayed.
        sched: "constant", "multistep", "cosine" or "plateau".
        warmup_epochs, warmup_lr: linear warm-up, and the learning rate it begins at.
        decay_milestones: "multistep": epochs, or shares of the run if below 1, at which `decay_rate` multiplies.
        decay_rate: see `decay_milestones`; for "plateau", applied when validation accuracy does not improve.
        patience_epochs: "plateau": epochs without improvement before the learning rate falls.
        min_lr: "cosine" ends here, and "plateau" does not fall below.
        lr_at_switch: "keep" the schedule, "rewarm" from `warmup_lr` unless a milestone has passed, or "factor".
        lr_switch_factor: "factor": what the learning rate is multiplied by from the switch on.
        clip_grad: largest norm of the gradient; None for no limit.
        model_ema, model_ema_decay: evaluate and keep an exponential moving average of the weights.
        device: auto, cpu, cuda or cuda:N.
        amp: mixed precision, "no", "bf16" or "fp16".
        channels_last: memory format of images and convolutions.
        compile: run through torch.compile.
        workers: processes that read images.
        sync_bn: BatchNorm statistics over all processes (CUDA only).
        compression: of gradients between processes.
        seed: of everything random.
        checkpoint_steps: write the state of the run also every so many steps; None for every epoch only.
    """

    model: str | None = None
    model_args: dict[str, Any] = {}
    checkpoint: str | None = None
    teacher: str | None = None
    distill_weight: Share = 0.5
    distill_temperature: Positive = 2.0

    dataset: str
    dataset_args: dict[str, Any] = {}
    data_dir: str = "data"
    download: bool = True
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    img_size: Count | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    crop_padding: Annotated[int, Field(ge=0)] = 0
    hflip: Share = 0.0
    scale: tuple[Share, Share] | None = None
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    aa: str | None = None
    reprob: Share = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    mixup_switch_prob: Share = 0.5
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    low_rank: LowRank = DenseSettings()

    epochs: Count
    batch_size: Count
    grad_accum_steps: Count = 1
    opt: Literal["sgd", "adamw", "signum"] = "sgd"
    lr: Positive
    momentum: Share = 0.9
    nesterov: bool = False
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: NotNegative = 0.0
    sched: Literal["constant", "multistep", "cosine", "plateau"] = "constant"
    warmup_epochs: NotNegative = 0.0
    warmup_lr: NotNegative = 0.0
    decay_milestones: tuple[Positive, ...] = (0.5, 0.75)
    decay_rate: Annotated[float, Field(gt=0, lt=1)] = 0.1
    patience_epochs: Count = 10
    min_lr: NotNegative = 0.0
    lr_at_switch: Literal["keep", "rewarm", "factor"] = "keep"
    lr_switch_factor: Positive = 1.0
    clip_grad: Positive | None = None
    model_ema: bool = False
    model_ema_decay: Share = 0.9998

    device: str = "auto"
    amp: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    compile: bool = False
    workers: Annotated[int, Field(ge=0)] = 0
    sync_bn: bool = False
    compression: Compression = Compression()
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint_steps: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model is None and self.checkpoint is None:
            raise ValueError("name a model (torchvision/resnet18) or a checkpoint to start from")
        if self.opt == "signum" and (self.clip_grad or self.amp == "fp16" or self.low_rank.frobenius_decay):
            raise ValueError("opt: signum moves by signs, which clip_grad, amp: fp16 and frobenius_decay would change")
        for name in ("full_rank_epochs", "max_full_rank_epochs"):
            full_rank_epochs = getattr(self.low_rank, name, None) or 0
            if full_rank_epochs >= self.epochs:
                raise ValueError(f"low_rank.{name} is {full_rank_epochs}, but the run has {self.epochs} epoch(s)")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        if self.amp == "fp16" and self.compression.method == "powersgd":
            raise ValueError("compression: powersgd remembers errors, which an overflow under amp: fp16 would spoil")
        if self.lr_at_switch == "rewarm" and not self.warmup_epochs:
            raise ValueError("lr_at_switch: rewarm needs warmup_epochs above 0")
        if self.lr_at_switch == "factor" and self.lr_switch_factor == 1:
            raise ValueError("lr_at_switch: factor needs lr_switch_factor, another than 1")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: "key=value" or "group.key=value" texts that overrule the file; values are read as YAML.

    Raises:
        UsageError: a key is unknown or a value makes no sense; the message names it, and the nearest known key.
        LrconvertError: the file cannot be read.
    """
    return make_recipe(_read(Path(path)), overrides, str(path))


def make_recipe(fields: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """A recipe from plain data and overrides; see `load_recipe`."""
    fields = dict(fields)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{text}: write KEY=VALUE to overrule a field of the recipe")
        _set(fields, key.split("."), _yaml(value, text), text)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise UsageError(f"{where}: {_first(error)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a file over those of its base."""
    if path in above:
        raise UsageError(f"{path}: builds on itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LrconvertError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    fields = _yaml(text, str(path))
    if not isinstance(fields, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values")
    base = fields.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UsageError(f"{path}: base is a file name, not {base!r}")
    return fields if base is None else _merged(_read((path.parent / base).resolve(), (*above, path.resolve())), fields)


def _merged(below: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`below` with the entries of `over`; a group whose method changes is replaced as a whole."""
    merged = dict(below)
    for key, value in over.items():
        before = below.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and value.get("method") in (None, before.get("method")):
            value = _merged(before, value)
        merged[key] = value
    return merged


def _set(fields: dict[str, Any], path: list[str], value: Any, text: str) -> None:
    for key in path[:-1]:
        inner = fields.get(key) or {}
        if not isinstance(inner, dict):
            raise UsageError(f"{text}: {key} has no fields")
        fields[key] = fields = dict(inner)
    fields[path[-1]] = value


class _Loader(yaml.SafeLoader):
    """YAML without code, in which a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, after a look at its keys."""
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"'{twice}' is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{where}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None


def _first(error: ValidationError) -> str:
    """The first complaint in words: the key as one would write it, what is wrong, and the nearest known key."""
    # A misspelt key also leaves its right form missing: the misspelling is the one to name.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    tags = {"dense", "pufferfish", "cuttlefish", "sifd"}
    path = [str(part) for part in first["loc"] if str(part) not in tags]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        tag = next((str(part) for part in first["loc"] if str(part) in tags), None)
        known = _known(path, tag)
        near = difflib.get_close_matches(path[-1], known, n=1)
        return f"unknown key '{key}': " + (f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}")
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _known(path: list[str], tag: str | None) -> list[str]:
    groups: dict[str, type[Settings]] = {
        "dense": DenseSettings,
        "pufferfish": PufferfishSettings,
        "cuttlefish": CuttlefishSettings,
        "sifd": SIFDSettings,
    }
    if len(path) == 1:
        return list(Recipe.model_fields)
    return list((groups[tag] if tag else Compression).model_fields)
