"""The jobs: each module owns one job's config and its run."""
