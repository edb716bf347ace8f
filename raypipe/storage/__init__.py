"""Everything that lasts: the workspace, its tables, the ledger of runs, locks, models and nights."""
