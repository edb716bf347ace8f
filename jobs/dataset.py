"""`ray job submit --working-dir . -- python jobs/dataset.py …` runs `raypipe dataset …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["dataset", *sys.argv[1:]]))
