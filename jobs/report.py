"""`ray job submit --working-dir . -- python jobs/report.py …` runs `raypipe report …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
