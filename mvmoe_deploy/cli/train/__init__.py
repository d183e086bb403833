"""``mvmoe-train``: train models, and study what was trained."""

from mvmoe_deploy.cli.common import command_group
from mvmoe_deploy.cli.train import analyse, capacity, compare, evaluate, superclasses, train

main = command_group(
    "Train a model on folders of images, or study trained ones.",
    {
        "train": train,
        "superclasses": superclasses,
        "evaluate": evaluate,
        "analyse": analyse,
        "compare": compare,
        "capacity": capacity,
    },
    default="train",
)
