"""What all scripts share at the terminal: errors, signals, progress, tables, names of stores."""
