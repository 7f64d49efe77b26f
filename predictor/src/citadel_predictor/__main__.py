"""`python -m citadel_predictor`."""

import sys

from citadel_predictor.cli.main import main

sys.exit(main())
