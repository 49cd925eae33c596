"""The training loop: epochs of steps, the switch to low rank between two of them, and evaluation."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lrconvert.errors import LrconvertError
from lrconvert.recipe import Recipe
from lrconvert.report.record_training import EpochMetrics, TrafficFigures
from lrconvert.training.communication import Traffic, compress
from lrconvert.training.data import Dataset, Loader, Source
from lrconvert.training.evaluation import evaluate_model, placed, split_loader
from lrconvert.training.events import Listener
from lrconvert.training.frobenius import FrobeniusDecay, factor_parameters
from lrconvert.training.learning_rate import LearningRate
from lrconvert.training.losses import DistillationLoss
from lrconvert.training.mixing import Mixer
from lrconvert.training.optimizers import make_optimizer
from lrconvert.training.processes import gathered, seed_step
from lrconvert.training.schedules import LowRankSchedule
from lrconvert.training.schedules.agreement import copy_from_first

# How often the loss is looked at; on a GPU each look waits for it.
_LOOK_SECONDS = 0.5
_TOGETHER_STEPS = 100


@dataclass
class Progress:
    """Where a run is, and what it has measured; plain data.

    Attributes:
        epoch, step: the next step to take.
        loss, correct, images: sums over the epoch so far.
        train_seconds: of the epoch so far.
        best_accuracy, best_epoch: on the validation images, in the current phase.
        history: finished epochs.
        traffic: by phase, what was sent between processes, as `TrafficFigures`; of finished phases.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: float = 0.0
    images: int = 0
    train_seconds: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = -1
    history: list[dict[str, Any]] = field(default_factory=list)
    traffic: list[dict[str, Any]] = field(default_factory=list)


class Engine:
    """Trains one model as a recipe says.

    Args:
        recipe: see `lrconvert.recipe.Recipe`.
        schedule: decides when `schedule.model`, the model to train, becomes low rank.
        dataset: images.
        accelerator: processes, device and precision.
        listener: hears of progress.
        teacher: imitated where there is one.

    Attributes:
        model: the model itself, without wrappers; `schedule.model`.
        progress: where the run is.
    """

    def __init__(
        self,
        recipe: Recipe,
        schedule: LowRankSchedule,
        dataset: Dataset,
        accelerator: Accelerator,
        listener: Listener,
        teacher: nn.Module | None = None,
    ) -> None:
        self.recipe, self.schedule, self.accelerator, self.listener = recipe, schedule, accelerator, listener
        self.dataset = dataset
        self.model = schedule.model
        self.teacher = teacher
        self.learning_rate = LearningRate(recipe)
        self.progress = Progress()
        self.traffic: Traffic | None = None
        self.loader = split_loader(dataset.train, recipe, accelerator)
        # One for each split: a loader keeps its worker processes.
        self._loaders: dict[int, Loader] = {}
        self._loss = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
        self._distill = DistillationLoss(recipe.distill_temperature, recipe.distill_weight) if teacher else None
        self._mixer = Mixer(dataset.num_classes, recipe.mixup, recipe.cutmix, recipe.mixup_switch_prob)
        self.rebuild()

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate and to keep: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def rebuild(self) -> None:
        """Make anew all that refers to the model's parameters, which the switch has replaced."""
        recipe, accelerator = self.recipe, self.accelerator
        accelerator.free_memory()
        if recipe.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        decays = recipe.low_rank.frobenius_decay and recipe.weight_decay > 0
        self.frobenius = FrobeniusDecay(self.model, recipe.weight_decay) if decays else None
        undecayed = factor_parameters(self.model) if decays else ()
        self.optimizer = accelerator.prepare_optimizer(
            make_optimizer(self.model, recipe, undecayed, accelerator.num_processes)
        )
        self.ema: AveragedModel | None = None
        if recipe.model_ema:
            average = get_ema_multi_avg_fn(recipe.model_ema_decay)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self._run: Callable[[Tensor], Tensor] = self.model
        self._ddp: nn.Module = self.model
        if accelerator.num_processes > 1:
            self._ddp = self._run = self._wrapped()
        if recipe.compile:
            self._run = torch.compile(self._run)

    def _wrapped(self) -> DistributedDataParallel:
        """The model inside DDP, its gradients compressed as this phase has it."""
        on_gpu = self.accelerator.device.type == "cuda"
        ddp = DistributedDataParallel(self.model, device_ids=[self.accelerator.device.index] if on_gpu else None)
        wanted = self.recipe.compression
        self.traffic = compress(ddp, self._compression(), rank=wanted.rank, start_step=wanted.start_step)
        return ddp

    def _compression(self) -> Literal["none", "powersgd", "signum"]:
        wanted = self.recipe.compression
        if self.recipe.opt == "signum":
            return "signum"
        return wanted.method if wanted.phase in (self.schedule.phase, "both") else "none"

    def train_epoch(self, every: int | None = None, save: Callable[[], None] | None = None) -> EpochMetrics:
        """Train one epoch, or what is left of it, evaluate, and switch to low rank if it is time.

        Args:
            every: call `save` after so many steps, besides.
            save: writes the state of the run.

        Raises:
            LrconvertError: the loss became NaN or infinite, or the device's memory is too small.
        """
        try:
            return self._train_epoch(every, save)
        except torch.OutOfMemoryError:
            raise LrconvertError(self._too_large()) from None

    def _train_epoch(self, every: int | None, save: Callable[[], None] | None) -> EpochMetrics:
        progress, schedule = self.progress, self.schedule
        epoch = progress.epoch
        first_rate = self.learning_rate.at(epoch)
        self.model.train()
        self.train_steps(every, save)
        started = time.perf_counter()
        # Running statistics differ between processes: each saw its own images.
        copy_from_first(self.model.buffers())
        copy_from_first(self.evaluated.buffers())
        validation = self.evaluate(self.dataset.validation)
        self._check(not math.isfinite(validation[0]))
        evaluated = time.perf_counter()
        self.learning_rate.epoch_ended(validation[1])
        phase, tracked, figures = schedule.phase, schedule.tracking_seconds, self.traffic_figures()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is in its notes
            # After the last epoch nothing could train the factors any more.
            switched = epoch + 1 < self.recipe.epochs and schedule.step(epoch)
        metrics = EpochMetrics(
            epoch=epoch,
            phase=phase,
            learning_rate=first_rate,
            loss=progress.loss / progress.images,
            accuracy=progress.correct / progress.images,
            validation_loss=validation[0],
            validation_accuracy=validation[1],
            images_per_second=progress.images / progress.train_seconds,
            train_seconds=progress.train_seconds,
            evaluation_seconds=evaluated - started,
            tracking_seconds=schedule.tracking_seconds - tracked,
            switched=switched,
        )
        if switched:
            self.learning_rate.switched(epoch + 1)
            # What the dense network reached is no yardstick for the one that is kept.
            progress.best_accuracy = -1.0
            progress.traffic = [each.model_dump() for each in figures]
            self.rebuild()
        progress.history.append(metrics.model_dump())
        progress.epoch, progress.step = epoch + 1, 0
        progress.loss = progress.correct = progress.train_seconds = 0.0
        progress.images = 0
        return metrics

    def train_steps(self, every: int | None = None, save: Callable[[], None] | None = None) -> None:
        """The steps that are left of the epoch; `progress` sums up whenever all processes stop to look together."""
        recipe, progress = self.recipe, self.progress
        epoch, steps, several = progress.epoch, self.loader.steps, self.accelerator.num_processes > 1
        batches = self.loader.epoch(epoch, progress.step)
        sums = torch.zeros(3, device=self.accelerator.device)  # loss, hits, and losses that are no numbers
        first, started, looked = progress.step, time.perf_counter(), time.perf_counter()
        while progress.step < steps:
            seed_step(recipe.seed, epoch, progress.step, self.accelerator.process_index)
            self._set_rate(self.learning_rate.at(epoch + progress.step / steps))
            for part in range(recipe.grad_accum_steps):
                last = part == recipe.grad_accum_steps - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self._ddp):
                    sums += self._backward(*next(batches))
            self._update()
            progress.step += 1
            done = progress.step - first
            saves = save is not None and every is not None and progress.step % every == 0 and progress.step < steps
            # Processes must look together, or one alone would stop for a NaN and leave the others waiting.
            if saves or progress.step == steps or (several and progress.step % _TOGETHER_STEPS == 0):
                loss, hits, bad = self.accelerator.reduce(sums, "sum").tolist()
                self._check(bool(bad))
                progress.loss, progress.correct = progress.loss + loss, progress.correct + hits
                progress.images += done * recipe.batch_size
                progress.train_seconds += time.perf_counter() - started
                if saves and save is not None:
                    save()
                sums.zero_()
                first, started = progress.step, time.perf_counter()
            elif time.perf_counter() - looked >= _LOOK_SECONDS:
                # At its own share: the others need not look at the same moment.
                loss, _, bad = sums.tolist()
                self._check(bool(bad) and not several)
                looked = time.perf_counter()
                images = done * recipe.batch_size
                loss *= self.accelerator.num_processes / images
                self.listener.step(epoch, progress.step, loss, images / (looked - started))

    def _check(self, bad: bool) -> None:
        """Raise LrconvertError if a loss was found to be NaN or infinite."""
        if bad:
            progress = self.progress
            raise LrconvertError(
                f"the loss is not a number any more, in epoch {progress.epoch} before step {progress.step}: "
                "lower lr, or add warmup_epochs or clip_grad"
            )

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward of one batch; (loss and hits summed over its images, whether the loss is no number)."""
        images, labels = (
            placed(images, self.recipe, self.accelerator),
            labels.to(self.accelerator.device, non_blocking=True),
        )
        targets = labels
        if self._mixer:
            images, targets = self._mixer(images, labels)
        with self.accelerator.autocast():
            logits = self._run(images)
        logits = logits.float()
        loss = self._loss(logits, targets)
        if self.teacher is not None and self._distill is not None:
            with torch.no_grad(), self.accelerator.autocast():
                wanted = self.teacher(images)
            loss = self._distill(loss, logits, wanted.float())
        self.accelerator.backward(loss / self.recipe.grad_accum_steps)
        with torch.no_grad():
            hits = (logits.argmax(1) == (targets.argmax(1) if targets.ndim > 1 else targets)).sum()
            value = loss.detach()
            return torch.stack((value * len(images), hits.float(), (~value.isfinite()).float()))

    def _update(self) -> None:
        if self.frobenius is not None or self.recipe.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        if self.recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        if self.frobenius is not None:  # after clipping, as weight decay is
            self.frobenius.add_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def evaluate(self, source: Source, model: nn.Module | None = None) -> tuple[float, float]:
        """(mean loss, accuracy) on `source` of the weights to keep, or of `model`; each image counts once."""
        loader = self._loaders.setdefault(id(source), split_loader(source, self.recipe, self.accelerator))
        return evaluate_model(model or self.evaluated, loader, self.recipe, self.accelerator)

    def _too_large(self) -> str:
        batch, parts = self.recipe.batch_size, self.recipe.grad_accum_steps
        at_a_time = batch // parts // self.accelerator.num_processes
        return (
            f"out of memory on {self.accelerator.device} with {at_a_time} images at a time: "
            f"try grad_accum_steps={parts * 2} (the same steps, but for BatchNorm), or batch_size={max(batch // 2, 1)}"
        )

    def traffic_figures(self) -> tuple[TrafficFigures, ...]:
        """What each phase so far sent between processes."""
        before = tuple(TrafficFigures(**each) for each in self.progress.traffic)
        if self.traffic is None or not self.traffic.steps:
            return before
        now = TrafficFigures(
            phase=self.schedule.phase,
            method=self._compression(),
            steps=self.traffic.steps,
            bytes_per_step=self.traffic.bytes_per_step,
            uncompressed_bytes_per_step=self.traffic.bytes_dense / self.traffic.steps,
        )
        return (*before, now)

    def state_dict(self) -> dict[str, Any]:
        """All that the run needs to go on exactly as if it had never stopped: tensors and plain data.

        To be called by every process: what each has of its own goes to the first one.
        """
        scaler = self.accelerator.scaler
        return {
            "progress": dict(vars(self.progress)),
            "schedule": self.schedule.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "traffic": gathered(None if self.traffic is None else self.traffic.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; `schedule` is in the phase that the state is of already."""
        self.progress = Progress(**state["progress"])
        self.learning_rate.load_state_dict(state["learning_rate"])
        self.model.load_state_dict(state["model"])
        self.rebuild()
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.traffic is not None:
            self.traffic.load_state_dict(state["traffic"][self.accelerator.process_index])
