"""Recipes: unknown keys, overrides, bases, and the files that come along."""

import pytest
import yaml

from lrconvert.errors import LrconvertError, UnknownNameError, UsageError
from lrconvert.recipe import Recipe, dump_recipe, load_recipe, make_recipe
from lrconvert.recipes import find_recipe, list_recipes

LEAST = {"model": "zoo/digits_cnn", "dataset": "digits", "epochs": 2, "batch_size": 8, "lr": 0.1}


def write(folder, text, name="recipe.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("epoch=3", "unknown key 'epoch': did you mean 'epochs'?"),
        ("low_rank={method: pufferfish, full_rank_epoch: 1}", "'low_rank.full_rank_epoch': did you mean 'full_rank_ep"),
        ("compression.metod=powersgd", "unknown key 'compression.metod': did you mean 'method'?"),
        ("lr=fast", "lr: Input should be a valid number"),
        ("lr=-1", "lr: Input should be greater than 0"),
        ("low_rank.method=pufferfisch", "low_rank: Input tag 'pufferfisch'"),
        ("low_rank={method: pufferfish, full_rank_epochs: 2}", "full_rank_epochs is 2, but the run has 2 epoch(s)"),
        ("low_rank={method: sifd, extra_norm: true}", "exclude each other"),
        ("model=null", "name a model"),
        ("lr", "write KEY=VALUE"),
        ("lr.x=1", "lr has no fields"),
        ("lr=[", "not YAML"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(override, complaint):
    with pytest.raises(UsageError) as caught:
        make_recipe(LEAST, [override])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_into_groups_and_are_read_as_yaml():
    recipe = make_recipe(LEAST, ["low_rank.method=sifd", "low_rank.rank_ratio=0.1", "lr=1e-3", "hflip=0.5"])
    assert (recipe.low_rank.method, recipe.low_rank.rank_ratio, recipe.lr, recipe.hflip) == ("sifd", 0.1, 1e-3, 0.5)


def test_a_recipe_overrules_its_base_and_a_new_method_replaces_the_old_ones_settings(tmp_path):
    base = {**LEAST, "low_rank": {"method": "pufferfish", "full_rank_epochs": 1, "rank_ratio": 0.5}}
    write(tmp_path, yaml.safe_dump(base), "_base.yaml")
    same = load_recipe(write(tmp_path, "base: _base.yaml\nlow_rank: {keep_first: 3}\nepochs: 5\n"))
    assert (same.epochs, same.low_rank.rank_ratio, same.low_rank.keep_first) == (5, 0.5, 3)
    other = load_recipe(write(tmp_path, "base: _base.yaml\nlow_rank: {method: cuttlefish}\n"))
    assert other.low_rank.method == "cuttlefish"


def test_what_is_written_reads_back_as_the_same_recipe(tmp_path):
    for each in list_recipes():
        recipe = load_recipe(each.path)
        assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lr: 1\nlr: 2\n", "'lr' is given twice"),
        ("- 1\n", "a mapping"),
        ("lr: [\n", "not YAML"),
        ("base: recipe.yaml\n", "builds on itself"),
        ("lr: !!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, complaint):
    with pytest.raises(UsageError, match=complaint):
        load_recipe(write(tmp_path, text))


def test_a_missing_recipe_says_where_to_look(tmp_path):
    with pytest.raises(LrconvertError, match="no such file"):
        find_recipe(str(tmp_path / "missing.yaml"))
    with pytest.raises(UnknownNameError, match="did you mean 'digits/cnn-cuttlefish'"):
        find_recipe("digits/cnn-cuttelfish")


def test_every_vision_row_of_the_papers_has_its_recipe():
    names = {each.name for each in list_recipes()}
    methods = ("dense", "pufferfish", "cuttlefish", "sifd")
    small = {f"{data}/{net}-{method}" for data in ("cifar10", "cifar100", "svhn") for net in ("resnet18", "vgg19")
             for method in methods}  # fmt: skip
    large = {f"imagenet/{net}-{method}" for net in ("resnet50", "wide_resnet50_2", "deit_base", "resmlp_s36")
             for method in methods[:3]}  # fmt: skip
    assert small | large <= names
    assert all(each.summary for each in list_recipes())


def test_every_field_is_documented():
    described = Recipe.__doc__ or ""
    assert [name for name in Recipe.model_fields if name not in described] == []
