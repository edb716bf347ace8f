"""`ray job submit --working-dir . -- python jobs/online.py …` runs `raypipe online …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["online", *sys.argv[1:]]))
