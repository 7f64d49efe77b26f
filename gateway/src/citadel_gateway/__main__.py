"""`python -m citadel_gateway`."""

import sys

from citadel_gateway.cli.main import main

sys.exit(main())
