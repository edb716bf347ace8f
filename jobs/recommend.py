"""`ray job submit --working-dir . -- python jobs/recommend.py …` runs `raypipe recommend …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["recommend", *sys.argv[1:]]))
