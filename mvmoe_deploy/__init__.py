"""What a device needs: open a bundle, route an image, run the one expert it needs.

Examples:
    >>> import mvmoe_deploy
    >>> with mvmoe_deploy.load("birds.mvmoe", max_resident=2) as runtime:
    ...     runtime.predict("photo.jpg").label
"""

from mvmoe_deploy.errors import MvmoeError
from mvmoe_deploy.runtime import Prediction, RoutedBatch, Runtime, Score, Stats, load

__all__ = ["MvmoeError", "Prediction", "RoutedBatch", "Runtime", "Score", "Stats", "load"]
__version__ = "0.1.0"
"""This release's version; pyproject.toml reads it from here."""
