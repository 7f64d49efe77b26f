"""`python -m citadel_gateway`."""

import sys

from citadel_gateway.cli import main

sys.exit(main())
