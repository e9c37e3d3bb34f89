"""Does the doctor name exactly the faults? 1,000 draws of true routes of each family, 100 of each fault.

Run by hand, two minutes: the same as `tests/analysis/test_doctor.py` does with a few draws.
"""

import json
import platform
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from routes_drawn import FAMILIES, PLANTED, capture_of, drawn  # noqa: E402

from analysis.doctor.examination import examine  # noqa: E402

TRUE, PLANTED_DRAWS = 1000, 100


def main() -> None:
    """Draw, examine, count, and write the result."""
    started = time.perf_counter()
    true, planted = {}, {}
    for family in FAMILIES:
        found: Counter[str] = Counter()
        for seed in range(TRUE):
            found.update({finding.fault for finding in examine(capture_of(drawn(family, seed)))})
        true[family] = {"draws": TRUE, "findings": dict(found)}
        for what, (fault, make) in PLANTED.items():
            right = 0
            for seed in range(PLANTED_DRAWS):
                arrays = drawn(family, 10_000 + seed)
                make(arrays)
                right += {finding.fault for finding in examine(capture_of(arrays))} == {fault}
            planted[f"{family}: {what}"] = {"draws": PLANTED_DRAWS, "named rightly and nothing else": right}
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, other work beside it",
        "seconds": round(time.perf_counter() - started),
        "tokens_a_draw": "about 1,100, of 24 documents",
        "true": true,
        "planted": planted,
    }
    path = Path(__file__).parent / "results" / "doctor.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
