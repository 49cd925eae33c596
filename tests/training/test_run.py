"""Whole runs on the digits: what they leave behind, how they go on, and what stops them."""

import errno
import json

import pytest
import torch

import lrconvert
from lrconvert.api.validation import Validation
from lrconvert.checkpoints import open_checkpoint
from lrconvert.errors import (
    CheckpointError,
    LrconvertError,
    ModelError,
    NothingToCompressError,
    OutputExistsError,
    UsageError,
)
from lrconvert.images import ImagePreparation
from lrconvert.models import find_architecture
from lrconvert.network import open_network
from lrconvert.recipe import load_recipe, make_recipe
from lrconvert.recipes import list_recipes
from lrconvert.samples import read_samples
from lrconvert.surgery import plan_of
from lrconvert.training.events import Listener
from lrconvert.training.method import make_schedule
from lrconvert.training.optimizers import make_optimizer
from lrconvert.training.run import Run, run
from lrconvert.training.state import read_state

SMALL = {
    "model": "zoo/digits_cnn",
    "model_args": {"width": 8},
    "dataset": "digits",
    "epochs": 4,
    "batch_size": 128,
    "opt": "adamw",
    "lr": 0.01,
    "weight_decay": 1e-3,
    "sched": "cosine",
}
METHODS = {
    "dense": {"method": "dense"},
    "pufferfish": {"method": "pufferfish", "full_rank_epochs": 2, "extra_norm": True},
    "cuttlefish": {"method": "cuttlefish", "window": 1, "mean_of": 1, "epsilon": 9.0, "relax": [], "keep_first": 1},
    "sifd": {"method": "sifd", "rank_ratio": 0.25, "view": "spatial"},
}


def recipe(method="pufferfish", **fields):
    return make_recipe({**SMALL, "low_rank": METHODS[method], **fields})


def weights(folder):
    return read_state(folder / "state.pt")["engine"]["model"]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


class Stop(Exception):
    pass


class StopAfter(Listener):
    """Ends a run as a crash would, after so many epochs."""

    def __init__(self, epochs):
        self.left = epochs

    def epoch(self, metrics):
        self.left -= 1
        if not self.left:
            raise Stop


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_reports_and_leaves_a_loadable_file(tmp_path, method):
    record = run(recipe(method, epochs=6), tmp_path / "run")
    assert record.test_accuracy > 0.8  # guessing: 0.1
    assert len(record.history) == 6
    assert record == type(record).model_validate_json((tmp_path / "run" / "report.json").read_text())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(6))
    model = lrconvert.load(tmp_path / "run" / "best.safetensors")
    assert sum(parameter.numel() for parameter in model.parameters()) == record.num_params_after
    assert bool(plan_of(model).low_rank) == (method != "dense")
    if method == "dense":
        assert (record.switch_epoch, record.num_params_after) == (None, record.num_params_before)
    else:
        assert record.switch_epoch == sum(each.phase == "full-rank" for each in record.history)
        assert record.num_params_after < record.num_params_before
        assert record.macs_after < record.macs_before
    kept = lrconvert.evaluate(tmp_path / "run" / "best.safetensors", "digits", latency_runs=2)
    assert kept.accuracy == pytest.approx(record.test_accuracy)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe(method, epochs=6)


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("method", ["pufferfish", "cuttlefish", "sifd"])
def test_a_run_that_stopped_before_at_or_after_the_switch_goes_on_to_the_same_weights(tmp_path, method, stop):
    extra = {"model_ema": True, "model_ema_decay": 0.9, "clip_grad": 1.0, "lr_at_switch": "rewarm", "warmup_epochs": 1}
    whole = run(recipe(method, **extra), tmp_path / "whole")
    with pytest.raises(Stop):
        run(recipe(method, **extra), tmp_path / "cut", listener=StopAfter(stop))
    resumed = run(recipe(method, **extra), tmp_path / "cut", resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert resumed.curves == whole.curves
    assert resumed.test_accuracy == whole.test_accuracy
    measured = {"learning_rate", "loss", "accuracy", "validation_loss", "validation_accuracy", "switched", "phase"}
    assert [each.model_dump(include=measured) for each in resumed.history] == [
        each.model_dump(include=measured) for each in whole.history
    ]


def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path):
    settings = recipe(
        "cuttlefish", checkpoint_steps=3, crop_padding=1, hflip=0.5, mixup=0.2, model_args={"width": 8}, epochs=3
    )
    run(settings, tmp_path / "whole")

    written = Run._save
    saves = iter(range(100))

    def save_and_stop(self):
        written(self)
        if next(saves) == 6:  # one at the start, three and the end of epoch 0, then two inside epoch 1
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_save", save_and_stop)
        with pytest.raises(Stop):
            run(settings, tmp_path / "cut")
    progress = read_state(tmp_path / "cut" / "state.pt")["engine"]["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 6)
    run(settings, tmp_path / "cut", resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_accumulated_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    # Without BatchNorm, which sees each part alone.
    model = tmp_path / "net.py"
    model.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(),"
                     " nn.Linear(32, 10))\n")  # fmt: skip
    fields = {"model": f"{model}:net", "model_args": {}, "low_rank": {"method": "dense"}, "epochs": 1}
    run(recipe(**fields), tmp_path / "one")
    run(recipe(**fields, grad_accum_steps=4), tmp_path / "four")
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for key in one:
        torch.testing.assert_close(four[key], one[key], rtol=1e-4, atol=1e-6)


def test_a_folder_with_a_run_is_neither_overwritten_nor_mixed_up(tmp_path):
    folder = tmp_path / "run"
    run(recipe(epochs=3), folder)
    with pytest.raises(OutputExistsError, match="--resume"):
        run(recipe(epochs=3), folder)
    with pytest.raises(UsageError, match=r"lr 0\.01, this recipe 0\.1"):
        run(recipe(epochs=3, lr=0.1), folder, resume=True)
    with pytest.raises(UsageError, match="holds no run"):
        run(recipe(epochs=3), tmp_path / "other", resume=True)
    with pytest.raises(UsageError, match="choose one"):
        run(recipe(epochs=3), folder, resume=True, overwrite=True)
    again = run(recipe(epochs=3, lr=0.1), folder, overwrite=True)
    assert again.epochs == 3


def test_nothing_is_taken_away_before_it_is_known_that_a_run_can_start(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "report.json").write_text("somebody's own")
    with pytest.raises(OutputExistsError, match=r"holds a run \(report\.json\)"):
        run(recipe(epochs=3), folder)
    with pytest.raises(UsageError, match="batch size 4000"):
        run(recipe(epochs=3, batch_size=4000), folder, overwrite=True)
    assert [each.name for each in folder.iterdir()] == ["report.json"]
    with pytest.raises(UsageError, match="batch size 4000"):
        run(recipe(epochs=3, batch_size=4000), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_does_not_overwrite_what_it_starts_from(tmp_path):
    run(recipe("dense", epochs=1), tmp_path / "run")
    best = tmp_path / "run" / "best.safetensors"
    with pytest.raises(UsageError, match="is the run's checkpoint, and would be overwritten"):
        lrconvert.finetune(best, tmp_path / "run", dataset="digits", overwrite=True)
    with pytest.raises(UsageError, match="is the run's teacher"):
        run(recipe("dense", epochs=1, teacher=str(best)), tmp_path / "run", overwrite=True)
    assert best.exists()


def test_no_switch_comes_after_the_last_epoch(tmp_path):
    late = {**METHODS["cuttlefish"], "epsilon": 1e-9}
    with pytest.raises(UsageError, match="max_full_rank_epochs is 2, but the run has 2"):
        recipe(low_rank={**late, "max_full_rank_epochs": 2}, epochs=2)
    record = run(recipe(low_rank={**METHODS["cuttlefish"], "epsilon": 1e9}, epochs=1), tmp_path / "run")
    assert (record.switch_epoch, record.num_params_after) == (None, record.num_params_before)
    assert record.validation_accuracy > 0
    assert any("the whole training was at full rank" in note for note in record.notes)


def test_epsilon_is_relaxed_by_the_fewest_layers_left_whatever_the_order_in_a_recipe():
    for each in list_recipes():
        chosen = load_recipe(each.path)
        if chosen.low_rank.method == "cuttlefish" and chosen.low_rank.relax:
            model = find_architecture("zoo/digits_cnn").build("cpu")
            settings = chosen.low_rank.model_copy(update={"include": (), "exclude": (), "keep_first": 1})
            schedule = make_schedule(chosen.model_copy(update={"low_rank": settings}), model, (1, 8, 8))
            assert schedule.criterion.threshold(1) == pytest.approx(5 * schedule.criterion.epsilon), each.name


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model": "zoo/resnet18_cifar", "model_args": {"width": 8}}, "cannot take the 1×8×8 images of digits"),
        ({"model_args": {"width": 8, "num_classes": 100}}, r"returns \(1, 100\) for an image of digits, which has 10"),
    ],
)
def test_a_model_that_does_not_fit_the_images_is_refused(tmp_path, fields, complaint):
    with pytest.raises(ModelError, match=complaint):
        run(recipe("dense", **fields), tmp_path / "run")


def test_a_full_disk_is_one_line_and_leaves_the_last_state(tmp_path, monkeypatch):
    def full(content, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    run(recipe(epochs=3), tmp_path / "run")
    before = (tmp_path / "run" / "state.pt").read_bytes()
    monkeypatch.setattr("lrconvert.training.state.save_torch", full)
    with pytest.raises(CheckpointError, match=r"state\.pt: the disk is full"):
        run(recipe(epochs=3), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_a_run_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(recipe(epochs=3), tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


def test_vectors_are_not_decayed_however_they_are_stored():
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.ones(1, 1, 8))
    model.weight = torch.nn.Parameter(torch.ones(4, 4))
    model.position = torch.nn.Parameter(torch.ones(4, 4))
    model.no_weight_decay = lambda: {"position"}
    decayed, others = make_optimizer(model, recipe("dense")).param_groups
    assert [each.shape for each in decayed["params"]] == [(4, 4)]
    assert (decayed["weight_decay"], others["weight_decay"], len(others["params"])) == (1e-3, 0.0, 2)


def test_a_finished_run_that_is_resumed_reports_again(tmp_path):
    first = run(recipe(epochs=3), tmp_path / "run")
    again = run(recipe(epochs=3), tmp_path / "run", resume=True)
    assert (again.test_accuracy, again.history) == (first.test_accuracy, first.history)


def test_a_loss_that_is_no_number_stops_with_the_step_and_the_last_good_state(tmp_path):
    with pytest.raises(LrconvertError, match=r"epoch 0 before step \d+: lower lr.*state\.pt \(--resume goes on"):
        run(recipe("dense", lr=1e30), tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_too_little_memory_says_what_to_try(tmp_path, monkeypatch):
    from lrconvert.models.zoo.digits_cnn import DigitsCNN

    whole = DigitsCNN.forward

    def too_much(self, x):
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return whole(self, x)

    monkeypatch.setattr(DigitsCNN, "forward", too_much)
    with pytest.raises(LrconvertError, match="out of memory on cpu with 128 images at a time: try grad_accum_steps=2"):
        run(recipe("dense"), tmp_path / "run")


def test_a_network_without_layers_to_factorize_is_refused_before_training(tmp_path):
    with pytest.raises(NothingToCompressError):
        run(recipe(low_rank={**METHODS["pufferfish"], "exclude": ["*"]}), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"amp": "fp16"}, "fp16 needs a GPU"),
        ({"device": "tpu"}, "'tpu' is not auto, cpu"),
        ({"sync_bn": True}, "needs GPUs"),
        ({"batch_size": 4096}, "batch"),
        ({"dataset": "digitz"}, "did you mean 'digits'"),
        ({"dataset": "cifar10", "download": False}, "cifar"),
    ],
)
def test_what_cannot_be_done_here_is_one_line(tmp_path, fields, complaint):
    if torch.cuda.is_available():
        pytest.skip("these settings are good where there is a GPU")
    with pytest.raises(LrconvertError, match=complaint) as caught:
        run(recipe(**{"data_dir": str(tmp_path), **fields}), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_frobenius_decay_shrinks_the_product_of_the_factors(tmp_path):
    norms = {}
    for decay in (0.0, 1.0):
        run(recipe("sifd", weight_decay=decay, opt="sgd", lr=0.02, sched="constant"), tmp_path / str(decay))
        merged = lrconvert.merge(lrconvert.load(tmp_path / str(decay) / "best.safetensors"))
        norms[decay] = merged.conv4.weight.norm().item()
    assert norms[1.0] < 0.9 * norms[0.0]


def test_finetuning_with_a_teacher_recovers_accuracy(tmp_path):
    dense = run(recipe("dense", epochs=5), tmp_path / "dense")
    source, small = tmp_path / "dense" / "best.safetensors", tmp_path / "small.safetensors"
    lrconvert.factorize(source, "rank_ratio=0.15", output=small)
    before = lrconvert.evaluate(small, "digits", latency_runs=1)
    record = lrconvert.finetune(small, tmp_path / "ft", dataset="digits", teacher=str(source), overrides=["lr=5e-3"])
    assert record.switch_epoch is None
    assert record.num_params_after == before.num_params < dense.num_params_after
    assert record.test_accuracy > before.accuracy
    with pytest.raises(UsageError, match="a recipe says it all"):
        lrconvert.finetune(tmp_path / "x.yaml", tmp_path / "y", dataset="digits")


def test_what_images_were_prepared_like_stays_with_the_weights(tmp_path):
    """Evaluated, calibrated and fine-tuned later, in any form, without being told again."""
    prepared = {"img_size": 12, "mean": [0.3], "std": [0.4]}
    record = run(recipe("dense", epochs=1, **prepared), tmp_path / "run")
    best = tmp_path / "run" / "best.safetensors"
    assert lrconvert.evaluate(best, "digits").accuracy == record.test_accuracy
    lrconvert.factorize(best, "rank=4", output=tmp_path / "small.safetensors", keep_first=1)
    lrconvert.export(tmp_path / "small.safetensors", tmp_path / "merged.safetensors", "dense")
    for path in (best, tmp_path / "small.safetensors", tmp_path / "merged.safetensors"):
        found = lrconvert.evaluate(path, "digits").loss
        assert found == lrconvert.evaluate(path, "digits", **prepared).loss
        assert found != lrconvert.evaluate(path, "digits", mean=[0.0]).loss
        samples = read_samples("digits", open_network(path), count=8)
        pixels = samples.calls[0].args[0]
        assert pixels.shape == (8, 1, 12, 12)
        assert pixels.min() == pytest.approx((0 - 0.3) / 0.4)
    lrconvert.finetune(best, tmp_path / "tuned", dataset="digits", epochs=1)
    images = open_checkpoint(tmp_path / "tuned" / "best.safetensors").images
    assert images == ImagePreparation(img_size=12, mean=(0.3,), std=(0.4,))
    assert Validation("digits", "data", open_network(best)).dataset.input_shape == (1, 12, 12)
