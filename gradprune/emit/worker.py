"""The process that emits: ``python -m gradprune.emit.worker LIBRARY REQUEST RESULT`` loads the device, then torch."""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from pathlib import Path


def main(library: str, request: str, result: str) -> int:
    """Carry a request out.

    Args:
        library: What registers the device.
        request: A JSON file with the fields of a ``Request``.
        result: JSON file to write: an ``Emission``, or ``error`` and ``kind``. All else there is goes beside it.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the device has to be loaded before torch, which was imported already")
    ctypes.CDLL(library)
    from gradprune.errors import GradpruneError, OptionError
    from gradprune.support.files import write_json

    from .emission import emit_here
    from .record import Request

    fields = json.loads(Path(request).read_text(encoding="utf-8"))
    fields["disable"] = tuple(fields["disable"])
    try:
        emitted = emit_here(Request(**fields), Path(result).parent)
    except GradpruneError as error:
        kind = "option" if isinstance(error, OptionError) else "error"
        write_json(Path(result), {"error": str(error), "kind": kind})
    except Exception as error:
        traceback.print_exc()
        write_json(Path(result), {"error": f"{type(error).__name__}: {error}", "kind": "unforeseen"})
    else:
        write_json(Path(result), emitted)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
