"""How many times as many examples as `make test` draws: `EXAMPLES=50 pytest tests/test_fuzz.py`; `make chaos`: 20."""

import os

MORE = int(os.environ.get("EXAMPLES", "1"))
