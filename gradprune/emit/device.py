"""Builds the CUDA device that is none (``fake_cuda.cpp``), once for each build of torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from gradprune.errors import GradpruneError

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
CAPABILITY = "GRADPRUNE_FAKE_CUDA"
"""Environment variable with the compute capability of the device, such as ``75``."""
CXX = ("g++", "clang++", "c++")


def build() -> Path:
    """The library that registers the device, built if there is none for the installed torch.

    Raises:
        GradpruneError: There is no C++ compiler, or it fails.
    """
    import torch

    from gradprune.support.files import replacing
    from gradprune.torch_compat.inductor import inductor_cache_dir

    root, source = Path(torch.__file__).parent, SOURCE.read_text(encoding="utf-8")
    new_abi = int(torch.compiled_with_cxx11_abi())
    key = hashlib.sha256(f"{source} {torch.__version__} {root} {new_abi}".encode()).hexdigest()[:16]
    library = Path(inductor_cache_dir()) / "gradprune" / f"fake-cuda-{key}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or next(filter(shutil.which, CXX), None)
    if compiler is None:
        raise GradpruneError(
            f"emit needs a C++ compiler and none of {', '.join(CXX)} was found: install one or set CXX"
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    with replacing(library) as temporary:
        command = [
            *(compiler, "-O0", "-std=c++20", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={new_abi}"),
            *(f"-I{root / 'include'}", str(SOURCE), "-o", str(temporary)),
            *(f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise GradpruneError(f"{compiler} cannot be run: {error.strerror or error}: set CXX") from error
        if done.returncode:
            raise GradpruneError(f"the device for torch {torch.__version__} does not compile: {done.stderr[-2000:]}")
    return library
