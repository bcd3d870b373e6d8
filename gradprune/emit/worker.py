"""The process that emits: ``python -m gradprune.emit.worker LIBRARY JOB RESULT`` loads the device, then torch."""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from pathlib import Path


def main(library: str, job: str, result: str) -> int:
    """Carry a job out.

    Args:
        library: What registers the device.
        job: A JSON file with the fields of a ``Request``, and arguments of ``check_here`` if it is to be checked.
        result: JSON file to write: an ``Emission`` or a ``CheckOutcome``, or else ``error`` and ``kind``. All else goes
            beside it.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the device has to be loaded before torch, which was imported already")
    ctypes.CDLL(library)
    from gradprune.errors import GradpruneError, OptionError
    from gradprune.support.files import write_json

    from .record import Request

    asked = json.loads(Path(job).read_text(encoding="utf-8"))
    request = Request(**{**asked["request"], "disable": tuple(asked["request"]["disable"])})
    try:
        if asked["check"] is None:
            from .emission import emit_here

            emitted = emit_here(request, Path(result).parent)
        else:
            from .check import check_here

            emitted = check_here(request, **asked["check"]).to_dict()
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
