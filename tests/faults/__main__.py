"""Run the whole programme, or a share of it: python tests/faults stress (or stress-long, or the names of parts)."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    sys.path[0] = str(TESTS)
    sys.path.insert(0, str(TESTS.parent))
    import conftest  # noqa: F401  the environment of all tests, before any library is imported

    os.environ["OMP_NUM_THREADS"] = "1"  # several runs at a time
    from faults.programme import main

    main(sys.argv[1:])
