"""``mvmoe-train train``, the default sub-command: trains a model on folders of images."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvmoe_deploy.cli.common import positive_int, progress_bar, read_split, share, thread_count, use_threads
from mvmoe_deploy.errors import ConfigError, DataError, as_text, first_line

if TYPE_CHECKING:
    from mvmoe_deploy.checkpoint import Superclasses
    from mvmoe_deploy.images import Preprocessing
    from mvmoe_deploy.models.registry import Architecture, ModelConfig
    from mvmoe_deploy.models.train.data import ImageSet
    from mvmoe_deploy.models.train.job import Job
    from mvmoe_deploy.models.train.recipe import Recipe

HELP = "train a dense model, or one whose router picks experts for each image or token"

EXAMPLES = """\
examples:
  mvmoe-train --data tiny-imagenet-32 --model vit_6x96 --epochs 20 --out dense.pt
  mvmoe-train --data tiny-imagenet-32 --model mvmoe_6x96 --superclasses superclasses.tsv \\
      --from dense.pt --epochs 20 --out moe.pt
  mvmoe-train --data tiny-imagenet-32 --model mvmoe_6x96 --router end-to-end --experts 10 --out e2e.pt
  mvmoe-train --data tiny-imagenet-32 --model vmoe_6x96 --experts 10 --placement last-2 --out vmoe.pt
  mvmoe-train --data photos --model timm:mobilenetv3_small_100 --image-size 160 --from weights.safetensors \\
      --superclasses superclasses.tsv --cut blocks.4 --own pointwise --out routed.pt
"""

SMALL = {"image_size": 32, "patch_size": 8}
"""This command's defaults, which suit small images; the defaults of the configs are the paper's."""

MEMORY_HELP = "decoded images that take more go into a temporary file (in TMPDIR), which is mapped into memory"
VAL_SHARE_HELP = "if --data has no val: validate on this share of each class, such as 0.1; image names decide on which"

RECIPE_FLAGS = [
    ("epochs", "--epochs", "passes over the training images"),
    ("batch", "--batch", "images per step"),
    ("learning_rate", "--lr", "peak learning rate"),
    ("weight_decay", "--weight-decay", "weight decay of matrices"),
    ("warmup_epochs", "--warmup-epochs", "epochs of linear warm-up"),
    ("label_smoothing", "--label-smoothing", "share of the target that is spread over all classes"),
    ("crop_padding", "--crop-padding", "pixels of padding before the random crop"),
    ("min_crop", "--min-crop", "instead of padding, crop a random part of at least this share of each image; 0 is off"),
    ("jitter", "--jitter", "change brightness, contrast and saturation by up to this share; 0 is off"),
    ("views", "--views", "augmentations of each image, used by the epochs in turn; with 0, every epoch draws new ones"),
    ("mixup", "--mixup", "alpha of mixup; 0 is off"),
    ("teacher_weight", "--teacher-weight", "share of the target that is the teacher's answer instead of the label"),
    ("router_weight", "--router-weight", "weight of the router loss"),
    ("auxiliary_weight", "--auxiliary-weight", "weight of the auxiliary loss of routers trained end to end"),
    ("expert_rate", "--expert-rate", "how much each expert learns from its own images, 0 to 1; with muon, the rest of "
     "its update comes from the images of all experts"),
    ("expert_pull", "--expert-pull", "share of the way to their mean that each step moves the experts; 0 is off"),
    ("clip", "--clip", "clip gradients to this norm"),
    ("learn", "--learn", "regular expression that finds the names of the weights that learn, such as "
     "'router|experts_of'; the others stay as they are (default: all learn)"),
    ("seed", "--seed", "seed of the weights, the order of the images and the augmentation"),
]  # fmt: skip


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    from mvmoe_deploy.models.train.recipe import OPTIMIZERS, PRECISIONS, ROUTERS, Recipe  # imports torch

    named = _named()
    defaults = Recipe()
    p.add_argument("--data", type=Path, required=True, metavar="DIR",
                   help="folder with train/ and val/ (CLASS/*.JPEG in each), or with train.zip and val.zip; with "
                   "--val-share, class folders alone will do; an optional classes.tsv names the classes")  # fmt: skip
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="checkpoint to write (.pt or .safetensors)")
    p.add_argument("--model", default="mvmoe_6x64",
                   help="name of a shape: " + ", ".join(dict.fromkeys(each.form for each in named)))  # fmt: skip
    p.add_argument("--from", dest="start_from", type=Path, metavar="CKPT",
                   help="start from this model, or from its dense baseline (upcycling); for a timm:NAME, also from "
                   "weights that timm published, in a local file")  # fmt: skip
    shape = p.add_argument_group("shape of the model")
    shape.add_argument("--image-size", type=positive_int, default=SMALL["image_size"], help="side of the input, pixels")
    for name, option in _shape_options(named).items():
        shape.add_argument(option.pop("flag"), dest=name, **option)
    router = p.add_argument_group("router of a model that routes images")
    router.add_argument("--superclasses", type=Path, metavar="TSV", help="class id and super-class name on each line")
    router.add_argument("--router", choices=ROUTERS, default=defaults.router,
                        help="what teaches the router: --superclasses, random super-classes of equal size, or (end to "
                        "end) its gates and the auxiliary losses")  # fmt: skip
    recipe = p.add_argument_group("recipe")
    recipe.add_argument("--teacher", type=Path, metavar="CKPT",
                        help="trained model whose answers are learnt; they are kept in memory")  # fmt: skip
    recipe.add_argument("--answers", type=Path, metavar="DIR",
                        help="keep the teacher's answers in this folder instead; runs with the same images, views and "
                        "teacher share them")  # fmt: skip
    for name, flag, text in RECIPE_FLAGS:
        default = getattr(defaults, name)
        recipe.add_argument(flag, dest=name, type=type(default), default=default, help=text)
    recipe.add_argument(
        "--optimizer", choices=OPTIMIZERS, default=defaults.optimizer, help="optimiser; muon learns faster"
    )
    recipe.add_argument(
        "--precision", choices=PRECISIONS, default=defaults.precision, help="bf16 trains faster on a GPU"
    )
    run_ = p.add_argument_group("running")
    run_.add_argument("--hold-out", type=int, default=0, metavar="N", help="training images per class to leave out")
    run_.add_argument("--val-share", type=share, default=0.0, metavar="SHARE", help=VAL_SHARE_HELP)
    run_.add_argument("--resume", action="store_true", help="go on after the last complete epoch, if there is one")
    run_.add_argument("--force", action="store_true", help="start again even if --out or its state file exists")
    run_.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    run_.add_argument("--memory-limit", type=float, default=4.0, metavar="GB", help=MEMORY_HELP)
    run_.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    run_.add_argument("--threads", type=thread_count, help="CPU threads (default: all)")


def _shape_options(named: list[Architecture]) -> dict[str, dict[str, Any]]:
    """An option for every config field that has a help text; fields of the same name share one option."""
    types: dict[type, Any] = {int: positive_int, float: float, str: str}
    options: dict[str, dict[str, Any]] = {}
    for name, field in ((name, field) for each in named for name, field in each.fields.items()):
        text = field.metadata.get("help")
        if not text or name in options:
            continue
        of = ", ".join(dict.fromkeys(re.split("[_:]", each.form)[0] for each in named if name in each.fields))
        default = "" if "(default" in text else f" (default: {SMALL.get(name, field.default)})"
        options[name] = {
            "flag": field.metadata["flag"] or f"--{name.replace('_', '-')}",
            "type": types[type(field.default)],
            "choices": field.metadata["choices"] or None,
            "help": f"{of}: {text}{default}",
        }
    return options


def run(args: argparse.Namespace) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    from mvmoe_deploy.models.registry import by_name
    from mvmoe_deploy.models.train.job import check_out, train
    from mvmoe_deploy.models.train.recipe import Recipe

    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)
                       if hasattr(args, field.name)})  # fmt: skip
    wanted = {name for name in _shape_options(_named()) if getattr(args, name) is not None}
    architecture, _ = by_name(args.model, wanted | ({"experts"} if args.superclasses else set()))
    _check_options(args, architecture)
    check_out(args.out, recipe.epochs, args.resume, args.force)  # before images are read, which takes longer
    use_threads(args.threads)
    job = _job(args, recipe, architecture)
    train(job, progress_bar, report=lambda line: print(_describe(line), flush=True), say=print)
    print(f"wrote {args.out}")


def _job(args: argparse.Namespace, recipe: Recipe, architecture: Architecture) -> Job:
    """The training run that the options describe. The validation images are read, the training images are not yet."""
    from mvmoe_deploy.images import Preprocessing
    from mvmoe_deploy.models.train.folders import read_class_names, read_superclasses
    from mvmoe_deploy.models.train.job import Job

    prepared = _config(args, architecture, 1, None).preparation()  # whatever the number of classes
    preprocessing = Preprocessing(size=args.image_size, **{**prepared, "crop": 1.0})  # training shows whole images
    val = _read(args, "val", preprocessing)
    superclasses = read_superclasses(args.superclasses, val.class_ids) if args.superclasses else None

    def read_train() -> ImageSet:
        images = _read(args, "train", preprocessing, val.class_ids, hold_out=args.hold_out)
        for split, found in (("train", images), ("val", val)):
            print(found.describe(split))
        return images

    notes = {"data": as_text(args.data.name), "held_out_per_class": args.hold_out}
    if args.val_share:
        notes["val_share"] = args.val_share
    return Job(
        config=_config(args, architecture, len(val.class_ids), superclasses),
        recipe=recipe,
        train=read_train,
        val=val,
        out=args.out,
        preprocessing=preprocessing,
        class_names=read_class_names(args.data, val.class_ids),
        superclasses=superclasses,
        start_from=args.start_from,
        teacher=args.teacher,
        answers=args.answers,
        notes=notes,
        device=_device(args.device),
        resume=args.resume,
        force=args.force,
    )


def _read(
    args: argparse.Namespace,
    split: str,
    preprocessing: Preprocessing,
    class_ids: list[str] | None = None,
    hold_out: int = 0,
) -> ImageSet:
    return read_split(
        args.data,
        split,
        preprocessing,
        class_ids,
        hold_out=hold_out,
        skip_unreadable=args.skip_unreadable,
        memory_limit=int(args.memory_limit * 1e9),
        val_share=args.val_share,
    )


def _check_options(args: argparse.Namespace, architecture: Architecture) -> None:
    """Refuses options that the model or the data have no use for, and a routed model without a number of experts."""
    from mvmoe_deploy.models.train.folders import has_split

    if args.val_share and has_split(args.data, "val"):
        raise DataError(f"--val-share {args.val_share}: {args.data} has a val split of its own")
    for name, option in _shape_options(_named()).items():
        if getattr(args, name) is not None and name not in architecture.fields:
            raise ConfigError(f"{option['flag']}: a {architecture.name} ({args.model}) has none")
    routes = architecture.config.routes
    if args.router != "super-class" and not (routes == "images" and args.experts and not args.superclasses):
        raise DataError(
            f"--router {args.router} is for a model that routes images, with --experts and without --superclasses"
        )
    if args.superclasses and routes != "images":
        raise DataError(f"--superclasses teach the router of a model that routes images; {args.model} has none")
    if routes is not None and not args.experts and not args.superclasses:
        files = " or --superclasses FILE.tsv (one expert each)" if routes == "images" else ""
        raise DataError(f"{args.model} is a routed model: give --experts N{files}")


def _named() -> list[Architecture]:
    from mvmoe_deploy.models.registry import architectures

    return [architecture for architecture in architectures().values() if architecture.form]


def _config(
    args: argparse.Namespace, architecture: Architecture, classes: int, superclasses: Superclasses | None
) -> ModelConfig:
    from mvmoe_deploy.models import config_from_name

    given = {name: getattr(args, name, None) for name in architecture.fields}
    small = {name: value for name, value in SMALL.items() if name in architecture.fields and given[name] is None}
    if "experts" in given and given["experts"] is None and superclasses is not None:
        small["experts"] = len(superclasses.names)
    return config_from_name(args.model, **{**given, **small, "classes": classes})


def _device(name: str | None) -> str:
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {device}: torch cannot use it ({first_line(error)})") from None
    return device


def _describe(line: dict[str, Any]) -> str:
    text = (
        f"epoch {line['epoch']:3d}  loss {line['loss']:.3f}  val top-1 {line['val_accuracy']:.2%}  "
        f"top-5 {line['val_top5']:.2%}  {line['images_per_second']:.0f} images/s"
    )
    if line["load"]:
        router = "" if line["router_accuracy"] is None else f"  router {line['router_accuracy']:.2%}"
        text += router + "  load " + " ".join(f"{share:.0%}" for share in line["load"])
    return text
