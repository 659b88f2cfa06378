"""The command line: flags in, one typed configuration out.

structlog imports rich where it finds it, for tracebacks in colour: 5 MB and 60 ms that an agent does not need. Commands for
people import it themselves.
"""

import sys

if "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog as structlog
    finally:
        del sys.modules["rich"]
