"""Sources of users, items and events: logs, catalogues, public data sets and a synthetic one."""
