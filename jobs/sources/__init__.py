"""The data sets of `--dataset`: text files, tables, hubs and installed demo texts, as documents in order."""
