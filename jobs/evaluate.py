"""`ray job submit --working-dir . -- python jobs/evaluate.py …` runs `raypipe evaluate …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
