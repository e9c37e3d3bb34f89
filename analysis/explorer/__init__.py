"""The explorer: what is looked up, the pages, and one file for offline reading."""
