"""``python -m mvmoe_deploy.cli.train`` is ``mvmoe-train``."""

from mvmoe_deploy.cli.train import main

raise SystemExit(main())
