"""``mvmoe-bench``: measures configurations against each other, here or on a device; also checks and reports."""

from __future__ import annotations

import sys

from mvmoe_deploy.cli.bench import (
    android,
    backbones,
    browser,
    compare,
    coreml,
    executorch,
    figures,
    layouts,
    measure,
    parity,
    report,
    scaling,
    training,
)
from mvmoe_deploy.cli.common import Parser, SubCommand, command_group

DEVICES: dict[str, SubCommand] = {"android": android, "browser": browser, "coreml": coreml}
"""Commands that do not measure on this machine's processor; each is a module of this folder.

``mvmoe-bench --device android …`` is ``mvmoe-bench android …``.
"""

COMMANDS: dict[str, SubCommand] = {
    "measure": measure,
    **DEVICES,
    "figures": figures,
    "parity": parity,
    "executorch": executorch,
    "backbones": backbones,
    "scaling": scaling,
    "layouts": layouts,
    "training": training,
    "report": report,
    "compare": compare,
}

_group = command_group(
    "Measure bundles and checkpoints: FLOPs, bytes, memory, latency, accuracy.", COMMANDS, default="measure"
)


def main(argv: list[str] | None = None) -> int:
    """Runs the sub-command that is named, else the one for ``--device``, else ``measure``."""
    argv = sys.argv[1:] if argv is None else argv
    named = argv[0] if argv and argv[0] in COMMANDS else None
    if named in (None, "measure"):
        device = Parser("mvmoe-bench", add_help=False)
        device.add_argument("--device", choices=["cpu", *DEVICES], default="cpu")
        found, others = device.parse_known_args(argv[1:] if named else argv)
        if found.device in DEVICES:
            argv = [found.device, *others]
    return _group(argv)
