"""The `scaling` command: its verbs and their flags. Heavy imports wait until a verb runs."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from scaling import __version__, law_verbs, streams
from scaling.errors import UserError
from scaling.flag_types import amount, count, from_zero, path
from scaling.law_verbs import Verb
from scaling.overrides import FLAG, OVERRIDES
from scaling.processes import Stopped, stop_by_exception

# Verbs that print what they were asked for.
ANSWERS = ("models", "plan", "evaluate", "report", "law", "predict", "advise", "compare")

FORMER_FLAGS = {  # former flag -> what it is now
    "--run": "the run's folder without a flag, after the verb",
    "--family": "--name",
    "--guidance": "--guidance-scale",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0 done, 1 some runs failed, 2 bad input, 128 + n on signal n."""
    streams.secure()
    try:
        with stop_by_exception():
            return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Stopped as e:
        print(f"interrupted by {e}", file=sys.stderr)
        return 128 + e.signum


def _run(arguments: list[str]) -> int:
    """Runs one verb; returns the exit code.

    Raises:
        UserError: for bad input, or if the verb's answer could not be printed.
    """
    arguments, overrides = _split(arguments)
    for flag in (argument.partition("=")[0] for argument in arguments):
        if flag in FORMER_FLAGS:
            _parser().error(f"{flag}: is now {FORMER_FLAGS[flag]}")
    options = _parser().parse_args(arguments)
    if overrides and "config" not in vars(options):
        _parser().error(f"{FLAG}{overrides[0]}: {options.verb} takes no config")
    code: int = options.run(options, overrides) or 0
    if options.verb in ANSWERS and (reason := streams.lost()):
        raise UserError(f"stdout: could not be written ({reason}); free space, then run the same command")
    return code


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits off the overrides ("a.b=1"), which are written as --config.a.b=1 or --config.a.b 1."""
    rest: list[str] = []
    overrides: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith(FLAG):
            rest.append(argument)
        elif "=" in argument:
            overrides.append(argument.removeprefix(FLAG))
        else:
            overrides.append(f"{argument.removeprefix(FLAG)}={next(remaining, '')}")
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaling",
        description="Scaling studies of vision models: train, sample, evaluate, sweep, and fit scaling laws.",
        epilog="Each verb has its own --help. To start: scaling sweep experiments/mnist_dit --workdir runs/a",
    )
    parser.add_argument("--version", action="version", version=f"scaling {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name, help=text, description=text, epilog=f"Example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        added.set_defaults(run=run)
        return added

    _run_verbs(verb)
    _study_verbs(verb)
    law_verbs.add(verb)
    _weights_verbs(verb)
    return parser


def _run_verbs(verb: Verb) -> None:
    """Adds the verbs of one run: train, evaluate, sample and, for an autoencoder, encode."""
    sub = verb(
        "train", _train, "Train a run, or resume it: the same command continues from the newest checkpoint.",
        f"scaling train --config=configs/mnist_dit.py:F/7 --workdir=runs/f7\n\n{OVERRIDES}",
    )  # fmt: skip
    sub.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file of the run")
    sub.add_argument("--workdir", required=True, type=path, help="run folder to create or resume")

    sub = verb(
        "evaluate", _evaluate, "Evaluate a trained run with its config's evaluators.",
        "scaling evaluate runs/f7\n  scaling evaluate runs/f7 --watch    # beside training",
    )  # fmt: skip
    sub.add_argument("folder", metavar="RUN", type=path, help="run folder")
    which = sub.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint", type=from_zero, metavar="STEP", help="step to measure (default: the newest)"
    )
    which.add_argument(
        "--watch", action="store_true",
        help="measure each checkpoint until the run is done, by the evaluators with in_training=False",
    )  # fmt: skip
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = verb(
        "sample", _sample, "Generate images with a trained run. The same seed gives the same images.",
        "scaling sample runs/f7 --out=grid.png --npz=samples.npz --samples=64",
    )  # fmt: skip
    sub.add_argument("folder", metavar="RUN", type=path, help="run folder")
    sub.add_argument("--out", required=True, type=path, help="picture to write (PNG)")
    sub.add_argument("--npz", type=path, help="also write the uint8 images [N, H, W, C] and their labels [N]")
    sub.add_argument("--samples", type=count, default=64, metavar="N", help="number of images (default: 64)")
    sub.add_argument(
        "--batch-size", type=count, default=64, help="images per batch; it changes no image (default: 64)"
    )
    sub.add_argument("--seed", type=from_zero, help="noise seed (default: the config's)")
    sub.add_argument("--steps", type=count, help="number of integration steps (default: the config's)")
    sub.add_argument("--guidance-scale", type=amount, help="1 is no guidance (default: the config's)")

    sub = verb(
        "encode", _encode, "Encode a set of images to latents, with a trained autoencoder, to train on them.",
        "scaling encode runs/mnist_vae --config=configs/mnist_vae.py --out=runs/mnist_latents\n\n"
        "The images are those of the config's data. The same command resumes an interrupted one. To train\n"
        "on the folder, set data.name='latents' and data.data_dir.\n" + OVERRIDES,
    )  # fmt: skip
    sub.add_argument("folder", metavar="RUN", type=path, help="run folder of the autoencoder")
    sub.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config of the images")
    sub.add_argument("--out", required=True, type=path, help="folder to create or resume")
    sub.add_argument(
        "--batch-size", type=count, default=64, help="images per batch on each host (default: 64)"
    )


def _study_verbs(verb: Verb) -> None:
    """Adds the verbs of studies: sweep, report, plan; and models, which lists what can be trained."""
    sub = verb(
        "sweep", _sweep, "Run a study: every run of its sweep, then its table, laws, charts and report.",
        "scaling sweep experiments/mnist_dit --workdir=runs/mnist_dit --workers=2\n\n"
        "Finished runs are kept, interrupted ones resumed, failed ones listed (exit code 1).\n" + OVERRIDES,
    )  # fmt: skip
    sub.add_argument("study", type=path, help="folder with study.py, or the file")
    sub.add_argument("--workdir", required=True, type=path, help="study folder to create or resume")
    sub.add_argument("--workers", type=count, default=1, help="runs at a time on this machine (default: 1)")
    sub.set_defaults(config=None)

    sub = verb(
        "report", _report, "Fit a study's laws, and draw its charts and page, from its run folders.",
        "scaling report runs/mnist_dit",
    )  # fmt: skip
    sub.add_argument("workdir", metavar="WORKDIR", type=path, help="study folder")

    sub = verb(
        "plan", _plan, "Plan a run or a study for TPUs or GPUs elsewhere: memory, time and price.",
        "scaling plan --config=configs/dit.py:XL/2 --topology=v5e:8x8 --mesh=fsdp=64 --price=1.2\n\n"
        "The real step is compiled by the chip's own compiler (extra tpu or cuda), which gives memory and\n"
        "bytes; the time is a model's, and each of its terms is printed. Data that are not on this machine\n"
        "are assumed to have the model's shapes.\n"
        + OVERRIDES,
    )  # fmt: skip
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE[:VARIANT]", help="config file of the run")
    source.add_argument("--study", type=path, help="folder with study.py: every run of its sweep")
    sub.add_argument(
        "--topology", required=True, help="chips: v5e:4x4 (v4, v5p, v6e), h200:8 (a100, h100, b200)"
    )
    sub.add_argument("--global-batch", type=count, help="examples per step (default: the config's)")
    sub.add_argument("--mesh", help="sizes of the mesh, as data=2,fsdp=8 (default: the config's)")
    sub.add_argument("--search", action="store_true", help="try meshes, batches and remat; rank what fits")
    sub.add_argument(
        "--what",
        choices=("train", "evaluate", "sample"),
        default="train",
        help="program to plan (default: train)",
    )
    sub.add_argument("--examples", type=count, help="examples per epoch, if the data are not on this machine")
    sub.add_argument(
        "--side", type=count, help="side of the model's input, likewise: 64 for DiT at 512 pixels"
    )
    sub.add_argument("--price", type=amount, help="price of one chip-hour")
    sub.add_argument("--json", action="store_true", help="print a JSON object, or a list of them")

    sub = verb(
        "models", _models, "List every registered model: tokens, params, gmacs, gflops, published figures.",
        "scaling models --name=dit --json",
    )  # fmt: skip
    sub.add_argument("--name", help="family of models to list (default: all)")
    sub.add_argument("--json", action="store_true", help="print a JSON list of objects")


def _weights_verbs(verb: Verb) -> None:
    """Adds the verbs for other libraries' checkpoints: import, export."""
    sub = verb(
        "import", _import, "Create a run from another library's checkpoint, to evaluate or to train on.",
        "scaling import --format=huggingface --config=configs/vit.py:B/16 vit-base-patch16-224 --out=runs/b16"
        f"\n\n{OVERRIDES}",
    )  # fmt: skip
    sub.add_argument("source", type=path, help="checkpoint: a folder, or a file of tensors")
    sub.add_argument("--format", required=True, help="format of the checkpoint: huggingface, diffusers, ...")
    sub.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file of the run")
    sub.add_argument("--out", required=True, type=path, help="run folder to create")
    sub.add_argument(
        "--reinit", action="append", default=[], metavar="PATH",
        help="parameters to re-initialise, such as head if the classes differ",
    )  # fmt: skip

    sub = verb(
        "export", _export, "Write a run's weights for another library, or as a StableHLO function.",
        "scaling export --format=stablehlo runs/f7 --out=f7",
    )  # fmt: skip
    sub.add_argument("folder", metavar="RUN", type=path, help="run folder")
    sub.add_argument("--format", required=True, help="format: huggingface, diffusers, ..., or stablehlo")
    sub.add_argument("--out", required=True, type=path, help="folder to create")


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    import jax

    from scaling.parallel import distributed
    from scaling.training import config, loop

    cfg = config.load(options.config, overrides)
    distributed.join()
    try:
        loop.train(cfg, options.workdir)
    except loop.Interrupted as e:
        if jax.process_index() == 0:
            print(f"interrupted by {e}: saved; the same command resumes", file=sys.stderr)
        return 128 + e.signum
    return 0


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    import jax

    from scaling.parallel import distributed
    from scaling.training import evaluate, watch

    distributed.join()
    if options.watch:
        watch.watch(options.folder)
        return
    values = evaluate.evaluate(options.folder, options.checkpoint)
    if jax.process_index() == 0:
        print(json.dumps(values) if options.json else "\n".join(f"{k} {v:.6g}" for k, v in values.items()))


def _sample(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.parallel import distributed
    from scaling.training import evaluate

    distributed.join()
    keys = ("seed", "steps", "guidance_scale")
    sampling = {key: value for key in keys if (value := getattr(options, key)) is not None}
    evaluate.sample(options.folder, options.out, options.npz, options.samples, options.batch_size, sampling)


def _encode(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.parallel import distributed
    from scaling.training import config, encode

    cfg = config.load(options.config, overrides)
    distributed.join()
    latents = encode.encode(options.folder, cfg, options.out, options.batch_size)
    if latents is not None:
        splits = ", ".join(f"{name} {split.examples}" for name, split in latents.splits.items())
        print(f"latents: {options.out} ({splits}; {latents.shape}, scale {latents.scale:.5g})")


def _sweep(options: argparse.Namespace, overrides: list[str]) -> int:
    from scaling.study import launch

    return launch.sweep(options.study, options.workdir, options.workers, overrides)


def _report(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.study import report

    page = report.report(options.workdir)
    print(report.summary_table(options.workdir))
    print(f"report: {page}")


def _import(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.convert import transfer
    from scaling.training import config

    cfg = config.load(options.config, overrides)
    keys = [text.partition("=")[0] for text in overrides]
    for line in transfer.import_run(options.format, options.source, cfg, options.out, options.reinit, keys):
        print(line)
    print(f"run: {options.out}")


def _export(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.convert import stablehlo, transfer

    if options.format == "stablehlo":
        stablehlo.export_function(options.folder, options.out)
    else:
        for line in transfer.export_run(options.format, options.folder, options.out):
            print(line)
    print(f"folder: {options.out}")


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
    from scaling.plan import report, search
    from scaling.plan.compiler import Compiler, Request

    request = Request(
        options.config, options.topology, overrides, options.what, options.global_batch,
        options.examples, options.side,
    )  # fmt: skip
    if options.study and options.search:
        raise UserError("search: is of one run; give --config in place of --study")
    if options.mesh is not None:
        request = search.with_mesh(request, search.mesh_of(options.mesh))
    with Compiler(options.topology) as compiler:
        if options.study:
            rows = search.study(compiler, options.study, request)
            tables = [report.table(rows, options.price)]
            tables += [report.summed(rows, options.price)] if options.what == "train" else []
        elif options.search:
            rows = [(report.described(plan), plan) for plan in search.search(compiler, request)]
            tables = [report.table(rows, options.price)]
        else:
            print(f"compiling for {options.topology}: a large model takes minutes", file=sys.stderr)
            rows = [("", search.one(compiler, request))]
            tables = [report.text(rows[0][1], options.price)]
    if options.json:
        objects = report.as_json(rows)
        print(json.dumps(objects if options.study or options.search else objects[0], indent=1))
    else:
        print("\n".join(tables))
    return 0 if all(plan.fits for _, plan in rows) else 1


def _models(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.models import table

    rows = table.rows(options.name)
    print(json.dumps(rows, indent=1) if options.json else table.text(rows))
