"""Measure asyncbucket and its peers: ``python -m benchmarks``, or ``make bench``."""

import sys

if __name__ == "__main__":
    try:
        # Loading all the peers takes seconds, in which Ctrl-C shall end it as quietly as later on.
        from benchmarks.run import main

        sys.exit(main())
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped: nothing is written before the end\n")
        sys.exit(130)
