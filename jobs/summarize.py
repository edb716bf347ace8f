"""`ray job submit --working-dir . -- python jobs/summarize.py …` runs `raypipe summarize …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["summarize", *sys.argv[1:]]))
