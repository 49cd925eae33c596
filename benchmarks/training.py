"""Images a second of the built-in trainer beside a bare PyTorch loop with the same batches and settings.

    python benchmarks/training.py --data-dir DIR [--device cuda --width 64 --batch-size 1024] [--json FILE]

Both train a ResNet-18 on Fashion-MNIST, epoch by epoch in turn, each on the same images in the same order. What the
trainer does besides (learning rate, accuracy, checks for NaN, seeds) is inside its time; validation is in neither.
"""

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common


def first_images(dataset: Any, number: int) -> Any:
    """`dataset` with the first images of its training split alone."""
    images = dataset.train.images
    images = replace(images, pixels=images.pixels[:number], labels=images.labels[:number])
    train = copy.copy(dataset.train)
    train.images = images
    return replace(dataset, train=train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="where Fashion-MNIST lies")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each")
    parser.add_argument("--steps", type=int, default=40, help="steps of an epoch")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()

    import torch
    from torch import nn

    from lrconvert.models import find_architecture
    from lrconvert.recipe import make_recipe
    from lrconvert.training.build import dataset_of
    from lrconvert.training.engine import Engine
    from lrconvert.training.events import Listener
    from lrconvert.training.processes import accelerated
    from lrconvert.training.schedules import Dense

    recipe = make_recipe(
        {
            "model": "zoo/resnet18_cifar",
            "model_args": {"width": options.width, "in_channels": 1, "stem_stride": 2},
            "dataset": "fashion-mnist",
            "data_dir": options.data_dir,
            "epochs": options.rounds + 1,
            "batch_size": options.batch_size,
            "lr": 0.1,
            "weight_decay": 5e-4,
            "amp": options.amp,
            "channels_last": True,
            "crop_padding": 2,
            "hflip": 0.5,
            "device": options.device,
        }
    )
    dataset = first_images(dataset_of(recipe), options.steps * options.batch_size)

    def model() -> nn.Module:
        torch.manual_seed(0)
        built = find_architecture(recipe.model, recipe.model_args).build("cpu").train()
        return built.to(options.device).to(memory_format=torch.channels_last)

    def synchronized() -> float:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    with accelerated(recipe) as accelerator:
        engine = Engine(recipe, Dense(model()), dataset, accelerator, Listener())
        bare = model()
        decayed = [parameter for parameter in bare.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in bare.parameters() if parameter.ndim <= 1]
        optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": 5e-4}, {"params": others}], lr=0.1, momentum=0.9
        )

        def bare_epoch(epoch: int) -> None:
            bare.train()
            batches = engine.loader.epoch(epoch)
            for _ in range(engine.loader.steps):
                images, labels = next(batches)
                images = images.to(options.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
                labels = labels.to(options.device, non_blocking=True)
                with torch.autocast(options.device.partition(":")[0], torch.bfloat16, enabled=options.amp == "bf16"):
                    logits = bare(images)
                nn.functional.cross_entropy(logits.float(), labels).backward()
                optimizer.step()
                optimizer.zero_grad()

        seconds: dict[str, list[float]] = {"trainer": [], "bare loop": []}
        for number in range(options.rounds + 1):
            for name in list(seconds)[:: -1 if number % 2 else 1]:
                started = synchronized()
                if name == "trainer":
                    engine.train_steps()
                    engine.progress.epoch, engine.progress.step = number + 1, 0
                else:
                    bare_epoch(number)
                if number:  # the first round warms up
                    seconds[name].append(synchronized() - started)
        same = all(
            torch.equal(one, other) for one, other in zip(engine.model.parameters(), bare.parameters(), strict=True)
        )

    images = engine.loader.steps * options.batch_size
    ratio = common.ratios(seconds["bare loop"], seconds["trainer"])
    fastest = min(seconds["bare loop"]) / min(seconds["trainer"])
    rows = [
        [name, common.spread(common.summary([images / each for each in times]), digits=4)]
        for name, times in seconds.items()
    ]
    print(common.table(["", "images a second"], rows))
    print(f"\nsame weights afterwards: {same}")
    print(f"trainer / bare loop: {common.spread(ratio, '×')}; {common.verdict(ratio['median'], fastest, 0.97)}")
    record = {
        "environment": common.environment("accelerate"),
        "settings": {key: str(value) for key, value in vars(options).items() if key not in ("json", "data_dir")},
        "same_weights": same,
        "images_per_second": {
            name: common.summary([images / each for each in times]) for name, times in seconds.items()
        },
        "ratio": ratio,
        "ratio_of_fastest": fastest,
    }
    common.save(record, options.json)


if __name__ == "__main__":
    main()
