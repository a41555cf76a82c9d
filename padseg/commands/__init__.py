"""The commands, one a file; each file's `command` is what `padseg <name>` runs and returns its exit code."""
