"""python -m bench.many_particles: the earlier name of bench.growth."""

import sys

from bench.growth import main

if __name__ == "__main__":
    sys.exit(main())
