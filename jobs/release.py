"""`ray job submit --working-dir . -- python jobs/release.py …` runs `raypipe release …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["release", *sys.argv[1:]]))
