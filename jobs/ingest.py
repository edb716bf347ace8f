"""`ray job submit --working-dir . -- python jobs/ingest.py …` runs `raypipe ingest …` on the cluster."""

import sys

from raypipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
