"""Where users, items and events come from: logs, catalogues, public data sets and a synthetic one."""
