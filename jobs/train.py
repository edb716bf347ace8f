"""`ray job submit --working-dir . -- python jobs/train.py …` runs `raypipe train …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
