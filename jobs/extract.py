"""`ray job submit --working-dir . -- python jobs/extract.py …` runs `raypipe extract …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["extract", *sys.argv[1:]]))
