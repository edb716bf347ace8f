"""`ray job submit --working-dir . -- python jobs/nightly.py …` runs `raypipe nightly …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["nightly", *sys.argv[1:]]))
