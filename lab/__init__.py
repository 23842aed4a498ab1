"""The paper again: the tiny encoder pre-trained, many runs, claims, figures, report.

It needs the packages of requirements-dev.txt.
"""

import sys
from importlib.util import find_spec

if missing := [name for name in ("matplotlib", "markdown", "scipy") if find_spec(name) is None]:
    sys.exit(f"lab: error: no module named {missing[0]}; pip install -r requirements-dev.txt")
