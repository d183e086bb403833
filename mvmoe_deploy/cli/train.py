"""``mvmoe-train``: train a dense ViT, a Mobile V-MoE or a V-MoE on folders of images."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvmoe_deploy.cli.common import command, parser, positive_int, progress_bar, read_split, thread_count
from mvmoe_deploy.errors import DataError, first_line

if TYPE_CHECKING:
    from mvmoe_deploy.models.train.data import ImageSet

EXAMPLES = """\
examples:
  mvmoe-train --data tiny-imagenet-32 --model vit_6x96 --patch 8 --epochs 20 --out dense.pt
  mvmoe-train --data tiny-imagenet-32 --model mvmoe_6x96 --patch 8 --superclasses superclasses.tsv \\
      --from dense.pt --epochs 20 --out moe.pt
  mvmoe-train --data tiny-imagenet-32 --model mvmoe_6x96 --patch 8 --router end-to-end --experts 10 --out e2e.pt
  mvmoe-train --data tiny-imagenet-32 --model vmoe_6x96 --patch 8 --experts 10 --placement last-2 --out vmoe.pt

more commands, each with its own --help:
  mvmoe-train superclasses   groups classes by what a dense model confuses
  mvmoe-train evaluate       accuracy, router accuracy and load on validation images
  mvmoe-train analyse        what a router does: heat map, load, accuracy per expert, gates, margins
  mvmoe-train compare        trained models side by side, with paired intervals and what each needs on a device
  mvmoe-train capacity       a V-MoE's accuracy against the capacity its experts are given
"""

COMMANDS = ("superclasses", "evaluate", "analyse", "compare", "capacity")


def build_parser() -> argparse.ArgumentParser:
    p = parser("Train a dense ViT, a Mobile V-MoE or a V-MoE on folders of images.", EXAMPLES)
    p.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with train/ and val/ (CLASS/*.JPEG inside), or train.zip and val.zip; or, with --val-share, with "
        "class folders alone; classes.tsv names classes",
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="checkpoint to write (.pt or .safetensors)")
    p.add_argument("--model", default="mvmoe_6x64", help="vit_DEPTHxWIDTH, mvmoe_…, vmoe_… or resnet_BLOCKSxWIDTH")
    p.add_argument("--image-size", type=positive_int, default=32, help="side of the model's input, in pixels")
    p.add_argument("--patch", type=positive_int, default=8, help="side of a patch, in pixels")
    p.add_argument("--heads", type=positive_int, help="attention heads (default: the paper's for this scale)")
    experts = p.add_argument_group("experts (Mobile V-MoE and V-MoE)")
    experts.add_argument("--experts", type=positive_int, help="experts E (default: as many as super-classes)")
    experts.add_argument("-k", type=positive_int, default=1, help="experts per image, or of a V-MoE per token")
    experts.add_argument(
        "--from",
        dest="init",
        type=Path,
        metavar="CKPT",
        help="start from a dense checkpoint (upcycling) or from this model",
    )
    moe = p.add_argument_group("Mobile V-MoE")
    moe.add_argument("--moe-layers", type=positive_int, default=2, help="MoE layers L, at the end of the model")
    moe.add_argument("--router-input", choices=["class_token", "mean"], default="class_token")
    moe.add_argument("--superclasses", type=Path, metavar="TSV", help="class id and super-class name on each line")
    moe.add_argument(
        "--router",
        choices=["super-class", "random", "end-to-end"],
        default="super-class",
        help="what teaches the router: --superclasses, random ones of equal size, or the auxiliary losses",
    )
    vmoe = p.add_argument_group("V-MoE")
    vmoe.add_argument("--placement", help="MoE layers: last-N (of every second block) or every-N (default: last-2)")
    vmoe.add_argument("--capacity-factor", type=float, help="places of all experts for each choice (default: 1.05)")
    vmoe.add_argument("--order", choices=["vanilla", "bpr"], help="who gets the places (default: vanilla)")
    recipe = p.add_argument_group("recipe")
    recipe.add_argument(
        "--teacher",
        type=Path,
        metavar="CKPT",
        help="a trained model whose answers are learnt; --views of them are kept in memory",
    )
    recipe.add_argument(
        "--answers",
        type=Path,
        metavar="DIR",
        help="keep the teacher's answers there instead; runs with the same images, views and teacher share them",
    )
    for name, flag, help_text in RECIPE_FLAGS:
        default = getattr(_recipe_defaults(), name)
        recipe.add_argument(flag, dest=name, type=type(default), default=default, help=help_text)
    recipe.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon learns faster")
    recipe.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is faster on a GPU")
    run = p.add_argument_group("running")
    run.add_argument("--hold-out", type=int, default=0, metavar="N", help="training images per class to leave unused")
    run.add_argument("--val-share", type=float, default=0.0, metavar="SHARE", help=VAL_SHARE_HELP)
    run.add_argument("--resume", action="store_true", help="go on after the last whole epoch, if there was one")
    run.add_argument("--force", action="store_true", help="start again although --out or a state of it exists")
    run.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    run.add_argument("--memory-limit", type=float, default=4.0, metavar="GB", help=MEMORY_HELP)
    run.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    run.add_argument("--threads", type=thread_count, help="CPU threads (default: all)")
    return p


MEMORY_HELP = "decoded images that take more go into a temporary file (in TMPDIR) that is mapped into memory"
VAL_SHARE_HELP = "where --data has no val: validate on this share of each class, chosen by the images' names (0.1)"
RECIPE_FLAGS = [
    ("epochs", "--epochs", "passes over the training images"),
    ("batch", "--batch", "images per step"),
    ("learning_rate", "--lr", "peak learning rate"),
    ("weight_decay", "--weight-decay", "of matrices"),
    ("warmup_epochs", "--warmup-epochs", "epochs of linear warm-up"),
    ("label_smoothing", "--label-smoothing", "share of the target spread over all classes"),
    ("crop_padding", "--crop-padding", "pixels of padding before the random crop"),
    ("min_crop", "--min-crop", "crop a random part of at least this share of each image instead; 0 is off"),
    ("jitter", "--jitter", "change brightness, contrast and saturation by up to this share; 0 is off"),
    ("views", "--views", "different augmentations of each image, which epochs take in turn; 0 is no end of them"),
    ("mixup", "--mixup", "alpha of mixup; 0 is off"),
    ("teacher_weight", "--teacher-weight", "share of the target that is the teacher's answer instead of the label"),
    ("router_weight", "--router-weight", "weight of the router loss"),
    ("auxiliary_weight", "--auxiliary-weight", "weight of the auxiliary losses, of routers trained end to end"),
    ("expert_rate", "--expert-rate", "how fast experts learn each for itself; muon: and 1 minus it, in common"),
    ("expert_pull", "--expert-pull", "pull experts towards their mean at each step by this share; 0 is off"),
    ("clip", "--clip", "largest gradient norm"),
    ("seed", "--seed", "of weights, order and augmentation"),
]


def _recipe_defaults() -> Any:
    from mvmoe_deploy.models.train.trainer import Recipe  # imports torch; --help waits for it, nothing else does

    return Recipe()


def main(argv: list[str] | None = None) -> int:
    """Entry point; each of :data:`COMMANDS` as the first argument is a command of its own."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return import_module(f"mvmoe_deploy.cli.{argv[0]}").main(argv[1:])
    return train(argv)


@command
def train(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    import torch
    from torch import nn

    from mvmoe_deploy import checkpoint as checkpoints
    from mvmoe_deploy import models
    from mvmoe_deploy.bundle import sha256
    from mvmoe_deploy.checkpoint import Header, Superclasses
    from mvmoe_deploy.images import Preprocessing
    from mvmoe_deploy.models.architectures.vit import ViTConfig
    from mvmoe_deploy.models.study.superclasses import random_groups
    from mvmoe_deploy.models.train.folders import has_split, read_class_names, read_superclasses
    from mvmoe_deploy.models.train.teacher import ResNet, ResNetConfig, Teacher, load_teacher, resnet_config_from_name
    from mvmoe_deploy.models.train.trainer import Recipe, Trainer

    if args.out.suffix not in (".pt", ".safetensors"):
        raise DataError(f"--out {args.out}: a checkpoint's name ends in .pt or .safetensors")
    state = args.out.with_name(args.out.name + ".state")
    if (args.out.exists() or state.exists()) and not (args.resume or args.force):
        raise DataError(f"{args.out}: exists already; --resume goes on, --force starts again")
    if args.force and not args.resume:
        state.unlink(missing_ok=True)
    if args.resume and args.out.exists() and not state.exists():
        done = checkpoints.load(args.out).header.training.get("epochs_done", 0)
        if done >= args.epochs:
            print(f"{args.out}: has all {done} epochs already; --force without --resume starts again")
            return
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {device}: torch cannot use it ({first_line(error)})") from None
    preprocessing = Preprocessing(size=args.image_size)
    recipe = Recipe(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe) if hasattr(args, field.name)}
    )

    def read(split: str, class_ids: list[str] | None = None, hold_out: int = 0) -> ImageSet:
        return read_split(
            args.data,
            split,
            preprocessing,
            class_ids,
            skip_unreadable=args.skip_unreadable,
            memory_limit=int(args.memory_limit * 1e9),
            val_share=args.val_share,
            hold_out=hold_out,
        )

    def origin(path: Path, header: Header) -> dict[str, Any]:
        """What the new checkpoint records of one that it comes from, which must know the same classes."""
        if header.class_ids != class_ids:
            raise DataError(f"{path}: was trained on other classes than {args.data}")
        return {"file": path.name, "sha256": sha256(path), "training": header.training}

    if args.val_share and has_split(args.data, "val"):
        raise DataError(f"--val-share {args.val_share}: {args.data} has a val split of its own")
    if not 0 <= args.val_share < 1:
        raise DataError(f"--val-share {args.val_share}: expected a share of at least 0 and below 1")
    val = read("val")
    class_ids = val.class_ids
    moe = args.model.startswith("mvmoe")
    if args.router != "super-class" and not (moe and args.experts and not args.superclasses):
        raise DataError(f"--router {args.router} is for a Mobile V-MoE with --experts and without --superclasses")
    superclasses = read_superclasses(args.superclasses, class_ids) if args.superclasses else None
    if args.router == "random":
        groups = random_groups(len(class_ids), args.experts, recipe.seed).tolist()
        superclasses = Superclasses([f"random {index}" for index in range(args.experts)], groups)
    shape: dict[str, Any] = {
        "image_size": args.image_size,
        "patch_size": args.patch,
        "heads": args.heads,
        "classes": len(class_ids),
    }
    if moe:
        shape |= {
            "experts": args.experts or (len(superclasses.names) if superclasses else 1),
            "moe_layers": args.moe_layers,
            "k": args.k,
            "router_input": args.router_input,
        }
    elif args.model.startswith("vmoe"):
        shape |= {
            "experts": args.experts,
            "placement": args.placement,
            "k": args.k,
            "capacity_factor": args.capacity_factor,
            "order": args.order,
        }
    torch.manual_seed(recipe.seed)
    training: dict[str, Any] = {"data": args.data.name, "held_out_per_class": args.hold_out}
    if args.val_share:
        training["val_share"] = args.val_share
    model: nn.Module
    config: ViTConfig | ResNetConfig
    if args.model.startswith("resnet"):
        config = resnet_config_from_name(args.model, args.image_size, len(class_ids))
        model = ResNet(config)
    else:
        config = models.config_from_name(args.model, **shape)
        model = models.build(config)
    if args.init:
        source, of_source = load_teacher(args.init)
        training["started_from"] = origin(args.init, of_source)
        if source.config == config:
            model.load_state_dict(source.state_dict())
        elif type(source) is models.ViT and isinstance(config, ViTConfig) and type(model) is not models.ViT:
            model = models.from_dense(source, config)
        else:
            raise DataError(f"{args.init}: is a {source.config}, cannot start a {config} from it")
    if args.answers and not (args.teacher and recipe.views):
        raise DataError("--answers keeps what a --teacher says of a number of --views: give both")
    teacher = None
    if args.teacher:
        teaching, of_teacher = load_teacher(args.teacher)
        training["teacher"] = origin(args.teacher, of_teacher)
        if of_teacher.preprocessing != preprocessing:
            raise DataError(
                f"{args.teacher}: takes images as {of_teacher.preprocessing}, this model as {preprocessing}; "
                "both see the same view of an image"
            )
        # it answers as it was trained, whatever its student is trained in
        precision = of_teacher.training.get("recipe", {}).get("precision", "fp32")
        teacher = Teacher(teaching.to(device), precision, args.answers)
    images = read("train", class_ids, args.hold_out)
    header = checkpoints.new_header(
        config.to_dict(), class_ids, read_class_names(args.data, class_ids), preprocessing, superclasses, training
    )
    trainer = Trainer(model, header, images, val, recipe, args.out, device, teacher)
    for split, found in (("train", images), ("val", val)):
        print(found.describe(split))
    if args.resume and trainer.resume():
        print(f"resuming after epoch {trainer.epoch}")
    trainer.run(progress_bar, report=lambda line: print(_describe(line), flush=True))
    print(f"wrote {args.out}")


def _describe(line: dict[str, Any]) -> str:
    text = (
        f"epoch {line['epoch']:3d}  loss {line['loss']:.3f}  val top-1 {line['val_accuracy']:.2%}  "
        f"top-5 {line['val_top5']:.2%}  {line['images_per_second']:.0f} images/s"
    )
    if line["load"]:
        router = "" if line["router_accuracy"] is None else f"  router {line['router_accuracy']:.2%}"
        text += router + "  load " + " ".join(f"{share:.0%}" for share in line["load"])
    return text


if __name__ == "__main__":
    raise SystemExit(main())
