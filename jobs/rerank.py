"""`ray job submit --working-dir . -- python jobs/rerank.py …` runs `raypipe rerank …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["rerank", *sys.argv[1:]]))
