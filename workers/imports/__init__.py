"""Routes returned by other engines, read as sequences and cut into rows for `store.write_capture`.

A format is one file here and one line in `formats.py`. Nothing is unpickled, and one sequence is in memory at a time.
"""
