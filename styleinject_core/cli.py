"""The command line: styleinject init | info | convert | demo | plot | train | dreambooth | distill | deadiff."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .adapter import Adapter
from .commands.convert import FORMS
from .commands.plot import KINDS
from .config import ROUTER_INPUTS, ROUTER_POOLS, STA_FORMS, TOKENS
from .files import AdapterFileError, load_adapter, save_adapter
from .hosts.architectures import ARCHITECTURES
from .layers import UnsupportedLayerError
from .methods import choices, kronecker
from .router.embedding import METHODS
from .router.plots import VIEWS
from .selector import SelectorError
from .summary import as_text, summarize
from .train.request import SIZES, AdapterRequest
from .train.run.saver import TrainingError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 1 with one line on stderr for a user's error."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that has no such letter gets a question mark, not an error
            stream.reconfigure(errors="replace")
    try:
        return options.run(options)
    except (
        AdapterFileError,
        SelectorError,
        UnsupportedLayerError,
        ValueError,
        OSError,
        ImportError,
        MemoryError,
        TrainingError,
    ) as error:
        print(f"styleinject {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstyleinject {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="styleinject", description="StyleInject adapters for text-to-image diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="write an untrained adapter, an exact identity, for a known architecture")
    init.add_argument("output", type=Path, metavar="OUT.safetensors")
    init.add_argument("--base", choices=ARCHITECTURES, required=True, help="the architecture; no weights are needed")
    init.add_argument(
        "--method", choices=choices(), default=AdapterRequest.method, help="what kind of adapter (default %(default)s)"
    )
    init.add_argument("--rank", type=int, default=SIZES[0][0], help="r (default %(default)s)")
    init.add_argument("--styles", type=int, default=SIZES[0][1], help="n, parallel down-projections (default %(default)s)")
    init.add_argument("--alpha", type=float, default=0.0, help="the low-rank part is scaled by alpha / rank (default: rank)")
    init.add_argument("--factors", default="64,4", metavar="A1,A2", help="kronecker: the sizes of A (default 64,4)")
    init.add_argument(
        "--targets", default="", help='layer selector, as in "to_q,to_v" or "attention,conv" (default: the method\'s paper\'s)'
    )
    init.add_argument("--router-pool", choices=ROUTER_POOLS, default="mean")
    init.add_argument("--router-input", choices=ROUTER_INPUTS, default="layer", help="what the router reads (default layer)")
    init.add_argument("--sta", choices=STA_FORMS, default="multiplicative", help="the AdaIN step (default multiplicative)")
    init.add_argument("--tokens", choices=TOKENS, default="image", help="what a transformer's layers look at (default image)")
    init.add_argument("--seed", type=int, default=0, help="for the down-projections (default 0)")
    init.add_argument("--force", action="store_true", help="replace an existing file")
    init.set_defaults(run=_init)

    info = commands.add_parser("info", help="show what an adapter file holds")
    info.add_argument("file", type=Path)
    info.add_argument("--json", action="store_true", help="machine-readable")
    info.set_defaults(run=_info)

    anew = commands.add_parser("convert", help="write an adapter of any program as this pack does, or as plain differences")
    anew.add_argument("file", type=Path)
    anew.add_argument("output", type=Path, metavar="OUT.safetensors")
    anew.add_argument(
        "--as", dest="form", choices=FORMS, default=FORMS[0],
        help="same: by its own method (default); lokr: DiffuseKronA as LoKr or not at all; difference: layers' whole changes",
    )  # fmt: skip
    anew.add_argument("--force", action="store_true", help="replace an existing file")
    anew.set_defaults(run=_convert)

    demo = commands.add_parser("demo", help="train an adapter on real images, sample with it, write pictures")
    demo.add_argument("--out", type=Path, default=Path("styleinject_demo"), help="folder for pictures and the adapter")
    demo.add_argument(
        "--style",
        default="openmoji-line",
        help='the drawing style to learn (default %(default)s), or "all" of them in one adapter',
    )
    demo.add_argument(
        "--steps", type=int, default=None, help="training steps (default 140, of all styles 400: about two minutes)"
    )
    demo.add_argument("--no-train", action="store_true", help="use the adapter that ships with the demo")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--reference", nargs="?", type=Path, const=True, metavar="IMAGE",
        help="instead, draw in the style of pictures, and of this one too; nothing is trained",
    )  # fmt: skip
    demo.set_defaults(run=_demo)

    plot = commands.add_parser("plot", help="draw what a router did, from saved traces")
    plot.add_argument("traces", type=Path, nargs="+", metavar="TRACE.safetensors", help="several share a map; two are compared")
    plot.add_argument("--out", type=Path, default=Path("styleinject_plots"), help="folder for the pictures")
    plot.add_argument("--kind", action="append", choices=KINDS, help="only this picture; may be given again (default: all)")
    plot.add_argument("--role", help='of this prompt only: "positive", "negative"')
    plot.add_argument("--image", type=int, help="of this image of the batch only, from 1")
    plot.add_argument("--layers", default="all", help='layer selector, as in "up & cross"')
    plot.add_argument("--view", choices=VIEWS, default=VIEWS[0], help="of the heat map")
    plot.add_argument("--method", choices=METHODS, default=METHODS[0], help="of the map")
    plot.set_defaults(run=_plot)

    deadiff = commands.add_parser("deadiff", help="style from a reference image: convert the authors' checkpoint, or train")
    actions = deadiff.add_subparsers(dest="action", required=True, metavar="ACTION")
    convert = actions.add_parser("convert", help="make a small .safetensors file of deadiff_v1.ckpt, for models/deadiff")
    convert.add_argument("checkpoint", type=Path, metavar="FILE.ckpt")
    convert.add_argument("output", type=Path, metavar="OUT.safetensors")
    convert.add_argument("--with-vision", action="store_true", help="take CLIP ViT-L/14 along, 0.58 GB more")
    convert.add_argument("--force", action="store_true", help="replace an existing file")
    convert.set_defaults(run=_convert_deadiff)
    learn = actions.add_parser("train", help="train one, from pictures sorted by style and named after what they show")
    learn.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml", help="its folder is where paths start")
    learn.add_argument("--template", action="store_true", help="print a config with every field, its default and meaning")
    learn.add_argument("--dry-run", action="store_true", help="print what it would train; write nothing")
    learn.set_defaults(run=_train_deadiff)

    for name, help_text in (
        ("train", "fine-tune an adapter on images and captions"),
        ("dreambooth", "learn one subject from a few images"),
        ("distill", "learn what another checkpoint does"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml", help="its folder is where paths start")
        command.add_argument("--template", action="store_true", help="print a config with every field, its default and meaning")
        command.add_argument("--dry-run", action="store_true", help="print layers, parameters, memory and time; write nothing")
        command.set_defaults(run=_train)
    return parser


def _init(options: argparse.Namespace) -> int:
    import torch

    if options.output.exists() and not options.force:
        raise FileExistsError(f"{options.output} exists: choose another name, or --force to replace it")
    if min(options.rank, options.styles) < 1:
        raise ValueError(f"--rank, --styles: expected 1 or more, found {options.rank} and {options.styles}")
    settings = AdapterRequest(
        method=options.method,
        rank=options.rank,
        styles=options.styles,
        alpha=options.alpha,
        targets=tuple(term.strip() for term in options.targets.split(",") if term.strip()),
        factors=kronecker.parse_factors(options.factors),
        router_pool=options.router_pool,
        router_input=options.router_input,
        sta=options.sta,
        tokens=options.tokens,
    )
    config = settings.config()
    torch.manual_seed(options.seed)
    architecture = ARCHITECTURES[options.base]
    metadata = {"modelspec.architecture": f"{architecture.modelspec}/{config.method}"}
    adapter = Adapter.create(architecture.shapes(), config, options.output.stem, metadata)
    save_adapter(adapter, options.output)
    print(f"{options.output}: {len(adapter.names)} layers of {architecture.title}, {adapter.parameter_count():,} parameters")
    return 0


def _info(options: argparse.Namespace) -> int:
    summary = summarize(load_adapter(options.file))
    print(json.dumps(summary, indent=2, ensure_ascii=False) if options.json else as_text(summary))
    return 0


def _convert_deadiff(options: argparse.Namespace) -> int:
    from .deadiff.convert import LICENSE, convert

    done = convert(options.checkpoint, options.output, options.with_vision, options.force)
    print(f"{options.output}: {done.tensors} tensors, {done.parameters:,} parameters, {done.size / 1e6:,.0f} MB as float16")
    print(f"  {done.unused} tensors of {options.checkpoint.name} were left out (Stable Diffusion and what nobody uses)")
    print("\n".join(f"  {line}" for line in (*done.notes, LICENSE)))
    return 0


def _train_deadiff(options: argparse.Namespace) -> int:
    from .commands import config_files, reference

    if options.template:
        print(config_files.template(reference.ReferenceConfig), end="")
        return 0
    if options.config is None:
        raise ValueError("expected a config file; write one with: styleinject deadiff train --template > my.toml")
    reference.run(options.config, options.dry_run)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from .commands.convert import convert

    if options.output.exists() and not options.force:
        raise FileExistsError(f"{options.output} exists: choose another name, or --force to replace it")
    done = convert(options.file, options.output, options.form)
    readers = "other programs read it too" if done.others_read_it else "only this pack reads it"
    print(f"{options.output}: {done.layers} layers, {done.parameters:,} numbers; {readers}")
    if done.left_out:
        more = f" and {len(done.left_out) - 3} more" if len(done.left_out) > 3 else ""
        print(f"  left out ({len(done.left_out)}): {', '.join(done.left_out[:3])}{more}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    if options.reference is not None:
        from .demo import references

        references.run(options.out, None if options.reference is True else options.reference, seed=options.seed)
        return 0
    from .demo.show import run

    run(options.out, options.style, steps=options.steps, train=not options.no_train, seed=options.seed)
    return 0


def _plot(options: argparse.Namespace) -> int:
    from .commands import plot

    written = plot.run(
        options.traces,
        options.out,
        options.kind or (),
        role=options.role,
        image=None if options.image is None else options.image - 1,
        layers=options.layers,
        view=options.view,
        method=options.method,
    )
    print("\n".join(map(str, written)))
    return 0


_LESS_MEMORY = (
    'What needs less memory: train.gradient_checkpointing = true, train.batch_size = 1, model.dtype = "bfloat16" (on a GPU), '
    "or a smaller data.resolution, adapter.rank or adapter.styles"
)


def _train(options: argparse.Namespace) -> int:
    from .commands.config_files import DistilConfig, DreamBoothConfig, TrainConfig, template
    from .commands.training import run

    kinds = {"train": TrainConfig, "dreambooth": DreamBoothConfig, "distill": DistilConfig}
    kind = kinds[options.command]
    if options.template:
        print(template(kind), end="")
        return 0
    if options.config is None:
        raise ValueError(f"expected a config file; write one with: styleinject {options.command} --template > my.toml")
    try:
        run(kind, options.config, options.dry_run)
    except RuntimeError as error:
        if re.search("out of memory|not enough memory|allocate memory", str(error)):
            raise MemoryError(f"{str(error).splitlines()[0]}\n{_LESS_MEMORY}") from None
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
