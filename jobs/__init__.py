"""The scripts that a user runs; their implementation is in the folders next to them."""
