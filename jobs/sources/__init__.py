"""What `--dataset` names: text files, tables, hubs, installed demo texts, as documents in order."""
