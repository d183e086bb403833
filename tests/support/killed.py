"""Training that is killed after an epoch, as by a power failure."""

from __future__ import annotations

import pytest

from mvmoe_deploy.checkpoint import Checkpoint
from mvmoe_deploy.cli import train
from mvmoe_deploy.models.train.trainer import Trainer


class Killed(BaseException):
    pass


def kill_after(epoch: int, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ``mvmoe-train`` until this epoch's state is saved."""
    real = Trainer._save

    def stop(self: Trainer, checkpoint: Checkpoint) -> None:
        real(self, checkpoint)
        if self.epoch == epoch:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_save", stop)
        train.main(argv)
