"""The suites are modules beside their tests: `nightly.py` runs them with larger numbers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
