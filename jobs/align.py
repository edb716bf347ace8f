"""`ray job submit --working-dir . -- python jobs/align.py …` runs `raypipe align …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["align", *sys.argv[1:]]))
