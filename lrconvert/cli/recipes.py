"""`lrconvert recipes`: list, show, copy, check."""

from pathlib import Path
from typing import Annotated

import typer

from lrconvert.cli import options

app = typer.Typer(help="Training recipes that come with lrconvert.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="RECIPE", help="A name from `lrconvert recipes list`, or a YAML file.")]


@app.command("list")
def list_all() -> None:
    """Names, and what each is."""
    from lrconvert.recipes import list_recipes

    recipes = list_recipes()
    width = max((len(each.name) for each in recipes), default=0)
    for each in recipes:
        print(f"{each.name:<{width}}  {each.summary}")


@app.command()
def show(recipe: Name, overrides: options.Overrides = None) -> None:
    """Print a recipe with everything that it leaves to defaults."""
    from lrconvert.recipe import dump_recipe, load_recipe
    from lrconvert.recipes import find_recipe

    print(dump_recipe(load_recipe(find_recipe(recipe), overrides or ())), end="")


@app.command()
def copy(
    recipe: Name,
    output: Annotated[Path, typer.Option("--output", "-o", help="The YAML file to write.")],
    overwrite: options.Overwrite = False,
) -> None:
    """Copy a recipe, complete, to edit it."""
    from lrconvert.checkpoints.atomic import atomic_path
    from lrconvert.recipe import dump_recipe, load_recipe
    from lrconvert.recipes import find_recipe

    text = dump_recipe(load_recipe(find_recipe(recipe)))
    with atomic_path(output, overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {output}")


@app.command()
def check(recipe: Name, overrides: options.Overrides = None) -> None:
    """Read a recipe and its overrides, and say what is wrong, if anything."""
    from lrconvert.recipe import load_recipe
    from lrconvert.recipes import find_recipe

    checked = load_recipe(find_recipe(recipe), overrides or ())
    what = f"{checked.low_rank.method} {checked.model or checked.checkpoint} on {checked.dataset}"
    print(f"{recipe}: good ({what}, {checked.epochs} epochs)")
