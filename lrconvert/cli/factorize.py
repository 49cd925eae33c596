"""`lrconvert factorize`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lrconvert.cli import options
from lrconvert.cli.memory import return_freed_memory
from lrconvert.errors import UsageError

if TYPE_CHECKING:
    from lrconvert.network import Network


def factorize(
    checkpoint: options.Checkpoint,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .safetensors or .pt file; .onnx or a folder when CKPT is one."),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto",
            help="Cuttlefish: scaled stable rank, for linear layers and attention accumulative rank too.",
            rich_help_panel=options.RANKS,
        ),
    ] = False,
    rank_ratio: Annotated[
        float | None,
        typer.Option(
            "--rank-ratio",
            help="Rank / full rank, the same in every layer (Pufferfish's ρ).",
            rich_help_panel=options.RANKS,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="The same rank in every layer.", rich_help_panel=options.RANKS)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy", help="Share of the sum of squared singular values to keep.", rich_help_panel=options.RANKS
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            help="auto, stable_rank, scaled_stable_rank, effective_rank, hard_threshold, vbmf, accumulative=0.8, …",
            metavar="NAME[=NUMBER]",
            rich_help_panel=options.RANKS,
        ),
    ] = None,
    param_ratio: Annotated[
        float | None,
        typer.Option(
            "--param-ratio",
            help="Parameters of the whole network, compressed / original.",
            rich_help_panel=options.RANKS,
        ),
    ] = None,
    mac_ratio: Annotated[
        float | None,
        typer.Option(
            "--mac-ratio", help="MACs of the whole network, compressed / original.", rich_help_panel=options.RANKS
        ),
    ] = None,
    latency_ratio: Annotated[
        float | None,
        typer.Option(
            "--latency-ratio",
            help="Time of one call, compressed / original, measured on this device.",
            rich_help_panel=options.RANKS,
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            help="Largest ‖W − VU‖/‖W‖ of all factorizable layers together.",
            rich_help_panel=options.RANKS,
        ),
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(
            "--min-accuracy",
            help="Least accuracy on --evaluate DATASET, by the fewest parameters.",
            rich_help_panel=options.RANKS,
        ),
    ] = None,
    evaluate: options.Evaluate = None,
    allocator: Annotated[
        str | None,
        typer.Option(
            "--allocator",
            help="How a budget is distributed: relative_error, absolute_error, stable_rank or uniform; with "
            "--calibrate also output_error (the default) or sensitivity (of graphs).",
            metavar="NAME",
            rich_help_panel=options.RANKS,
        ),
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="speed: no layer that is not faster, measured, and budgets spent by time; both (--auto's own): none "
            "that is slower; or size.",
            metavar="GOAL",
            rich_help_panel=options.SPEED,
        ),
    ] = None,
    batch_size: options.TimedBatch = None,
    channels_last: options.ChannelsLast = False,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="Run a plan that --save-plan wrote.", metavar="FILE", rich_help_panel=options.RANKS
        ),
    ] = None,
    save_plan: Annotated[
        Path | None,
        typer.Option(
            "--save-plan",
            help="Write the plan as JSON, to edit or run again.",
            metavar="FILE",
            rich_help_panel=options.RANKS,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, write no checkpoint.", rich_help_panel=options.RANKS)
    ] = False,
    keep_first: options.KeepFirst = None,
    factorize_last: options.FactorizeLast = False,
    layer_rank: Annotated[
        list[str] | None,
        typer.Option(
            "--layer-rank",
            help="The rank of these layers, whatever the rule says.",
            metavar="PATTERN=RANK",
            rich_help_panel=options.RANKS,
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            "--split",
            help="Outputs in N parts, each factorized on its own ('*.qkv=3'); 1: gates, or q, k and v, jointly.",
            metavar="PATTERN=N",
            rich_help_panel=options.LAYERS,
        ),
    ] = None,
    include_embeddings: Annotated[
        bool,
        typer.Option(
            "--include-embeddings", help="Embeddings too; by default they stay dense.", rich_help_panel=options.LAYERS
        ),
    ] = False,
    extra_bn: Annotated[
        bool,
        typer.Option(
            "--extra-bn",
            help="A BatchNorm between the factors, for training on; Cuttlefish section 4.1.",
            rich_help_panel=options.LAYERS,
        ),
    ] = False,
    view: Annotated[
        str | None,
        typer.Option(
            "--view",
            help="channel, or spatial: 2-d convolutions become one across and one down.",
            rich_help_panel=options.LAYERS,
        ),
    ] = None,
    pivoted: Annotated[
        bool,
        typer.Option(
            "--pivoted",
            help="Leave out r² numbers that the factors of linear layers and 1×1 convolutions can do without: to store "
            "and run, not to train.",
            rich_help_panel=options.LAYERS,
        ),
    ] = False,
    rank_multiple: Annotated[
        str | None,
        typer.Option(
            "--rank-multiple",
            help="Round ranks to multiples of this; auto: what the device likes.",
            rich_help_panel=options.RANKS,
        ),
    ] = None,
    rank_floor: Annotated[
        float | None,
        typer.Option("--rank-floor", help="Smallest rank, as a share of full rank.", rich_help_panel=options.RANKS),
    ] = None,
    calibrate: options.Calibrate = None,
    examples: options.Examples = None,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="Then fit each layer on what the factorized layers before it give; takes longer.",
            rich_help_panel=options.EXAMPLES,
        ),
    ] = False,
    data_dir: options.DataDir = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    init: options.Init = None,
    checkpoint_key: options.CheckpointKey = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Replace layers by two thin ones, at ranks that a rule, a budget, a plan or --auto chooses.

    The plan is stored in the file that is written, so that lrconvert.load rebuilds the model from it.
    """
    settings = {
        "keep_first": keep_first,
        "keep_last": False if factorize_last else None,
        "include": include,
        "exclude": exclude,
        "floor": rank_floor,
        "rank_multiple": options.parse_multiple(rank_multiple),
        "layer_ranks": options.parse_numbers("--layer-rank", layer_rank) or None,
        "splits": options.parse_numbers("--split", split) or None,
        "include_embeddings": include_embeddings or None,
        "extra_norm": extra_bn or None,
        "view": view,
        "pivoted": pivoted or None,
        "init": init,
        "allocator": allocator,
        "goal": goal,
        "batch_size": batch_size,
        "channels_last": channels_last or None,
    }
    chosen = {name: value for name, value in settings.items() if value is not None}
    budgets = {
        "param_ratio": param_ratio,
        "mac_ratio": mac_ratio,
        "latency_ratio": latency_ratio,
        "max_error": max_error,
        "min_accuracy": min_accuracy,
    }
    budget = {name: value for name, value in budgets.items() if value is not None}
    wanted = _rule(auto, {"rank_ratio": rank_ratio, "rank": rank, "energy": energy}, rule, budget, plan)
    count = options.parse_examples(examples, calibrate)
    if calibrate is None and sequential:
        raise UsageError("--sequential fits layers on the examples of --calibrate DATA, which is missing")
    if sequential and min_accuracy is not None:
        raise UsageError("--sequential would change the accuracy that --min-accuracy measures: leave one of them out")
    if calibrate is None and evaluate is None and data_dir is not None:
        raise UsageError("--data-dir says more about --calibrate DATA or --evaluate DATASET, which are missing")
    if (min_accuracy is None) != (evaluate is None):
        raise UsageError("--min-accuracy and --evaluate DATASET, the labelled images to measure it on, go together")
    if output is None and not dry_run:
        raise UsageError("say where to write with -o FILE.safetensors, or look first with --dry-run")
    if plan is not None and chosen:
        names = ", ".join(_OPTIONS.get(name, "--" + name.replace("_", "-")) for name in chosen)
        raise UsageError(f"--plan has decided everything already: {names} would change nothing")

    import lrconvert
    from lrconvert.checkpoints import check_output, open_checkpoint
    from lrconvert.checkpoints.atomic import check_writable
    from lrconvert.cli.output import Sink
    from lrconvert.network import open_network

    return_freed_memory()
    sink = Sink(as_json, as_csv, quiet, verbose)
    network = open_network(
        open_checkpoint(checkpoint, checkpoint_key),
        model,
        options.parse_model_args(model_arg),
        options.parse_shape(input_shape),
    )
    if auto and not budget and _can_be_timed(network):
        chosen.setdefault("goal", "both")
    if sequential and network.checkpoint is not None and network.checkpoint.graph is not None:
        raise UsageError(f"{network.name} is a graph, whose layers are not fitted in turn: leave --sequential out")
    if output is not None and not dry_run:
        check_output(output, network.checkpoint, overwrite)
    if save_plan is not None:
        check_writable(save_plan, overwrite)
    with sink.progress() as progress:
        calibration, ready = None, lrconvert.load_plan(plan) if plan is not None else None
        if calibrate is not None:
            calibration = lrconvert.calibrate(
                network,
                calibrate,
                count=count,
                data_dir=data_dir or "data",
                splits={layer.name: layer.groups for layer in ready.low_rank}
                if ready
                else options.parse_numbers("--split", split),
                measure=_measured(allocator, bool(budget) or auto),
                device=device,
                progress=progress,
            )
        ready = ready or lrconvert.make_plan(
            network,
            wanted,
            **{**budget, **chosen},  # type: ignore[arg-type]
            calibration=calibration,
            evaluate=evaluate,
            data_dir=data_dir or "data",
            device=device,
            progress=progress,
        )
        if save_plan is not None:
            lrconvert.save_plan(ready, save_plan, overwrite=overwrite)
        record = lrconvert.factorize(
            network,
            ready,
            output=output,
            overwrite=overwrite,
            dry_run=dry_run,
            calibration=calibration,
            sequential=sequential,
            device=device,
            progress=progress,
        )
    sink.show(record)


# Settings whose option has another name.
_OPTIONS = {
    "keep_last": "--factorize-last",
    "floor": "--rank-floor",
    "layer_ranks": "--layer-rank",
    "splits": "--split",
    "extra_norm": "--extra-bn",
    "goal": "--for",
}


def _rule(
    auto: bool, shorthands: dict[str, float | None], rule: str | None, budget: dict[str, float], plan: Path | None
) -> str:
    """The one rule that the options name, as `lrconvert.make_plan` takes it; "auto" beside a budget or a plan."""
    rules = [f"{name}={value}" for name, value in shorthands.items() if value is not None]
    rules += [rule] if rule is not None else []
    budgets = [f"{name}={value}" for name, value in budget.items()]
    # Beside a budget, --auto leaves to the budget how it is distributed.
    rules += ["auto"] if auto and not budgets else []
    if plan is not None:
        if rules or budgets:
            name = [*rules, *budgets][0].partition("=")[0]
            raise UsageError(f"--plan and {name} both choose the ranks: give one of them")
        return "auto"
    if not rules and not budgets:
        raise UsageError(
            "say how to choose the ranks: --auto, --rank-ratio, --rank, --energy, --rule, a budget (--param-ratio, "
            "--mac-ratio, --latency-ratio, --max-error, --min-accuracy) or --plan"
        )
    if len(rules) + len(budgets) > 1:
        raise UsageError(f"one rank rule at a time, or one budget: {' and '.join([*rules, *budgets])} were given")
    return rules[0] if rules else "auto"


def _measured(allocator: str | None, is_distributed: bool) -> bool | None:
    """Whether calibration has to measure what low ranks of each layer do; None for its own default."""
    if allocator is None and is_distributed:
        return None
    return allocator == "sensitivity"


def _can_be_timed(network: "Network") -> bool:
    """Whether `network` can be run layer by layer; graphs of more than a message holds are not tried unasked."""
    if network.checkpoint is None or network.checkpoint.graph is None:
        return network.trace is not None
    from lrconvert.onnx_graph.save import INLINE_LIMIT

    return network.trace is not None and network.checkpoint.nbytes <= INLINE_LIMIT
