"""`python -m multilora`: the `multilora` command."""

import sys

from multilora.app.cli import main

sys.exit(main())
