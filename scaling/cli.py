"""The `scaling` command: verbs, and nothing else. Heavy imports wait until a verb runs."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scaling import __version__
from scaling.errors import UserError

Verb = Callable[[str, Any, str, str], argparse.ArgumentParser]  # adds one: name, function, words, example
OVERRIDES = "--config.KEY=VALUE overrides any key of the config, e.g. --config.optimizer.learning_rate=3e-4"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0 done, 1 some runs failed, 2 bad input, 128 + n on signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments, overrides = _split(arguments)
    options = _parser().parse_args(arguments)
    if overrides and "config" not in vars(options):
        _parser().error(f"--config.{overrides[0]}: {options.verb} takes no config")
    try:
        return options.run(options, overrides) or 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments, and the overrides ("a.b=1") among them, given as --config.a.b=1 or --config.a.b 1."""
    rest: list[str] = []
    overrides: list[str] = []
    waiting = iter(arguments)
    for word in waiting:
        if not word.startswith("--config."):
            rest.append(word)
        elif "=" in word:
            overrides.append(word.removeprefix("--config."))
        else:
            overrides.append(f"{word.removeprefix('--config.')}={next(waiting, '')}")
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaling",
        description="Scaling studies of vision models: train, sample, measure, sweep, and fit laws.",
        epilog="Each verb has its own --help. To begin: scaling sweep experiments/mnist_dit --workdir runs/a",
    )
    parser.add_argument("--version", action="version", version=f"scaling {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, words: str, example: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name, help=words, description=words, epilog=f"Example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        added.set_defaults(run=run)
        return added

    _run_verbs(verb)
    _study_verbs(verb)
    _weights_verbs(verb)
    return parser


def _run_verbs(verb: Verb) -> None:
    """One run: train, evaluate, sample; and an autoencoder's: encode."""
    one = verb(
        "train", _train, "Train one run, or resume it: the same command goes on from the newest checkpoint.",
        f"scaling train --config=configs/mnist_dit.py:F/7 --workdir=runs/f7\n\n{OVERRIDES}",
    )  # fmt: skip
    one.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="the run's config file")
    one.add_argument("--workdir", required=True, type=Path, help="the run folder: made, or resumed")

    one = verb(
        "evaluate", _evaluate, "Measure a trained run with its config's evaluators.",
        "scaling evaluate --run=runs/f7",
    )  # fmt: skip
    one.add_argument("--run", dest="folder", required=True, type=Path, help="the run folder")
    one.add_argument("--json", action="store_true", help="print one JSON object")

    one = verb(
        "sample", _sample, "Generate images from a trained run. Fixed seeds give fixed images.",
        "scaling sample --run=runs/f7 --out=grid.png --npz=samples.npz --samples=64",
    )  # fmt: skip
    one.add_argument("--run", dest="folder", required=True, type=Path, help="the run folder")
    one.add_argument("--out", required=True, type=Path, help="the picture to write (PNG)")
    one.add_argument("--npz", type=Path, help="also write the uint8 images [N, H, W, C] and their labels [N]")
    one.add_argument("--samples", type=int, default=64, metavar="N", help="how many (default: 64)")
    one.add_argument(
        "--batch-size", type=int, default=64, help="images a call; changes no image (default: 64)"
    )
    one.add_argument("--seed", type=int, help="of the noise (default: the config's)")
    one.add_argument("--steps", type=int, help="integration steps (default: the config's)")
    one.add_argument("--guidance", type=float, help="scale; 1 is none (default: the config's)")

    one = verb(
        "encode", _encode, "Write the latents of a set of images, by a trained autoencoder, to train on.",
        "scaling encode --run=runs/mnist_vae --config=configs/mnist_vae.py --out=runs/mnist_latents\n\n"
        "The config says which images. Stopped, the same command goes on. To train on the folder, give\n"
        "data.name='latents' and data.data_dir.\n" + OVERRIDES,
    )  # fmt: skip
    one.add_argument("--run", dest="folder", required=True, type=Path, help="the autoencoder's run folder")
    one.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="its data are encoded")
    one.add_argument("--out", required=True, type=Path, help="the folder to make, or to go on with")
    one.add_argument("--batch-size", type=int, default=64, help="images a call, on each host (default: 64)")


def _study_verbs(verb: Verb) -> None:
    """Many runs: sweep, report; and what can be trained: models."""
    one = verb(
        "sweep", _sweep, "Run a study: every run of its sweep, then the table, laws, charts and report.",
        "scaling sweep experiments/mnist_dit --workdir=runs/mnist_dit --workers=2\n\n"
        "Done runs are kept, broken ones resumed, failed ones listed (and the exit code is 1).\n" + OVERRIDES,
    )  # fmt: skip
    one.add_argument("study", type=Path, help="a folder with study.py, or the file")
    one.add_argument("--workdir", required=True, type=Path, help="the study folder: made, or resumed")
    one.add_argument("--workers", type=int, default=1, help="runs at a time on this machine (default: 1)")
    one.set_defaults(config=None)

    one = verb(
        "report", _report, "Fit the laws and draw the charts and the page of a study, from its run folders.",
        "scaling report runs/mnist_dit",
    )  # fmt: skip
    one.add_argument("workdir", type=Path, help="the study folder")

    one = verb(
        "plan", _plan, "What a run or a study needs on TPUs or GPUs not here, and what it costs there.",
        "scaling plan --config=configs/dit.py:XL/2 --topology=v5e:8x8 --mesh=fsdp=64 --price=1.2\n\n"
        "The real step is compiled by the chip's own compiler (extra tpu or cuda): memory and bytes are its\n"
        "own, the time is a model's, each term shown. Data that are not here are as the model wants them.\n"
        + OVERRIDES,
    )  # fmt: skip
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE[:VARIANT]", help="the run's config file")
    what.add_argument("--study", type=Path, help="a folder with study.py: every run of its sweep")
    one.add_argument("--topology", required=True, help="v5e:4x4 (v4, v5p, v6e), h200:8 (a100, h100, b200)")
    one.add_argument("--global-batch", type=int, help="examples a step (default: the config's)")
    one.add_argument("--mesh", help="such as data=2,fsdp=8 (default: the config's)")
    one.add_argument("--search", action="store_true", help="try meshes, batches and remat; rank what fits")
    one.add_argument(
        "--what", choices=("train", "evaluate", "sample"), default="train", help="(default: train)"
    )
    one.add_argument("--examples", type=int, help="of an epoch, where the data are not here")
    one.add_argument("--side", type=int, help="of the model's input, likewise: 64 for DiT at 512 pixels")
    one.add_argument("--price", type=float, help="of a chip-hour")
    one.add_argument("--json", action="store_true", help="print an object, or a list of them")

    one = verb(
        "models", _models, "List every registered model: tokens, params, gmacs, gflops, published figures.",
        "scaling models --family=dit --json",
    )  # fmt: skip
    one.add_argument("--family", help="only this family")
    one.add_argument("--json", action="store_true", help="print a list of objects")


def _weights_verbs(verb: Verb) -> None:
    """Other libraries' checkpoints: import, export."""
    one = verb(
        "import", _import, "Make a run of another library's checkpoint; training it goes on from there.",
        "scaling import --format=huggingface --config=configs/vit.py:B/16 vit-base-patch16-224 --out=runs/b16"
        f"\n\n{OVERRIDES}",
    )  # fmt: skip
    one.add_argument("source", type=Path, help="the checkpoint: a folder, or a file of tensors")
    one.add_argument("--format", required=True, help="whose checkpoint: huggingface, diffusers, ...")
    one.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="the run's config file")
    one.add_argument("--out", required=True, type=Path, help="the run folder to make")
    one.add_argument(
        "--reinit", action="append", default=[], metavar="PATH",
        help="parameters that start afresh, such as head where the classes differ",
    )  # fmt: skip

    one = verb(
        "export", _export, "Write a run's weights for another library, or as a function of its own.",
        "scaling export --format=stablehlo runs/f7 --out=f7",
    )  # fmt: skip
    one.add_argument("folder", type=Path, help="the run folder")
    one.add_argument("--format", required=True, help="huggingface, diffusers, ..., or stablehlo")
    one.add_argument("--out", required=True, type=Path, help="the folder to make")


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    import jax

    from scaling.engine import config, processes, train

    cfg = config.load(options.config, overrides)
    processes.join()
    try:
        train.run(cfg, options.workdir)
    except train.Interrupted as e:
        if jax.process_index() == 0:
            print(f"interrupted by {e}: saved; the same command resumes", file=sys.stderr)
        return 128 + e.signum
    return 0


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    import jax

    from scaling.engine import measure, processes

    processes.join()
    values = measure.evaluate(options.folder)
    if jax.process_index() == 0:
        print(json.dumps(values) if options.json else "\n".join(f"{k} {v:.6g}" for k, v in values.items()))


def _sample(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.engine import measure, processes

    processes.join()
    chosen = {k: v for k in ("seed", "steps", "guidance") if (v := getattr(options, k)) is not None}
    measure.sample(options.folder, options.out, options.npz, options.samples, options.batch_size, chosen)


def _encode(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.engine import config, encode, processes

    cfg = config.load(options.config, overrides)
    processes.join()
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
    from scaling.engine import config

    cfg = config.load(options.config, overrides)
    given = [text.partition("=")[0] for text in overrides]
    for line in transfer.import_run(options.format, options.source, cfg, options.out, options.reinit, given):
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
    from scaling.study import plan, planning

    request = plan.Request(
        options.config, options.topology, overrides, options.what, options.global_batch,
        options.examples, options.side,
    )  # fmt: skip
    if options.price is not None and not options.price >= 0:
        raise UserError(f"price={options.price}: must be at least 0")
    if options.study and options.search:
        raise UserError("search: is of one run; give --config in place of --study")
    if options.mesh is not None:
        request = planning.with_mesh(request, planning.mesh_of(options.mesh))
    with plan.Compiler(options.topology) as compiler:
        if options.study:
            rows = planning.study(compiler, options.study, request)
            said = [planning.table(rows, options.price)]
            said += [planning.summed(rows, options.price)] if options.what == "train" else []
        elif options.search:
            rows = [(planning.described(made), made) for made in planning.search(compiler, request)]
            said = [planning.table(rows, options.price)]
        else:
            print(f"compiling for {options.topology}: a large model takes minutes", file=sys.stderr)
            rows = [("", planning.one(compiler, request))]
            said = [planning.text(rows[0][1], options.price)]
    if options.json:
        made = planning.as_json(rows)
        print(json.dumps(made if options.study or options.search else made[0], indent=1))
    else:
        print("\n".join(said))
    return 0 if all(made.fits for _, made in rows) else 1


def _models(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.models import table

    rows = table.rows(options.family)
    print(json.dumps(rows, indent=1) if options.json else table.text(rows))
