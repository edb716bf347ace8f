"""`ray job submit --working-dir . -- python jobs/judge.py …` runs `raypipe judge …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["judge", *sys.argv[1:]]))
