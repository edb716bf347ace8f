"""`ray job submit --working-dir . -- python jobs/lm.py …` runs `raypipe lm …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["lm", *sys.argv[1:]]))
