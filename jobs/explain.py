"""`ray job submit --working-dir . -- python jobs/explain.py …` runs `raypipe explain …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["explain", *sys.argv[1:]]))
