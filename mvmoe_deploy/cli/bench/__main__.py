"""``python -m mvmoe_deploy.cli.bench``."""

from mvmoe_deploy.cli.bench import main

raise SystemExit(main())
