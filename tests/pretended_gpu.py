"""Run a command on a GPU that does not exist: torch's CUDA code is real, its kernels do nothing.

  python tests/pretended_gpu.py python bench.py --memory

Real: dispatch by device and type, autocast, autograd, the caching allocator, DDP and process
groups. So tensors on two devices are refused, and memory, launches and waits can be counted.
Every value is 0. Needs a torch built for CUDA, cc and nm. PRETENDED_GPUS (1), PRETENDED_GIB (80)
and PRETENDED_MAJOR (8: compute capability 8.0) tell which GPUs.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".c")
CALLS = r" U ((?:__cuda|cuda[A-Z]|cu[A-Z]|cublas|cudnn|nccl)\w+)"  # as nm lists those of torch


def missing():
    """Why no GPU can be pretended here, or None."""
    if not torch.backends.cuda.is_built():
        return "this torch is not built for CUDA"
    absent = [tool for tool in ("cc", "nm") if not shutil.which(tool)]
    return f"no {' and no '.join(absent)} here" if absent else None


def build(folder):
    """Compile the library -> its path. The calls that SOURCE lacks return 0."""
    libraries = map(str, (Path(torch.__file__).parent / "lib").glob("lib*.so"))
    listed = subprocess.run(["nm", "-D", "--undefined-only", *libraries], check=True,
                            capture_output=True, text=True).stdout
    written = SOURCE.read_text()
    others = [name for name in sorted(set(re.findall(CALLS, listed)))
              if not re.search(rf"\b{name}\b", written)]
    rest, library = Path(folder) / "rest.c", Path(folder) / "libcuda.so.1"
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in others))
    subprocess.run(["cc", "-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", SOURCE, rest,
                    "-o", library], check=True)
    return library


def environment(library, gpus=1):
    """Variables of a process that sees so many pretended GPUs."""
    return os.environ | {"LD_PRELOAD": str(library), "PRETENDED_GPUS": str(gpus),
                         "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}


def main():
    if missing():
        raise SystemExit(f"error: {missing()}")
    with tempfile.TemporaryDirectory() as folder:
        gpus = int(os.environ.get("PRETENDED_GPUS", 1))
        command = subprocess.run(sys.argv[1:], env=environment(build(folder), gpus))
    raise SystemExit(command.returncode)


if __name__ == "__main__":
    main()
