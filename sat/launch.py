"""Start a program with settings of glibc's allocator under which large tensors cost no page faults.

By default every tensor of some megabytes is mapped anew, cleared by the kernel and unmapped again,
which costs a training on the CPU up to 40 % of its time. glibc reads the settings before a program
begins, so it has to begin again.
"""

import os
import platform
import sys

TUNABLES = {
    "hugetlb": 1,  # ask for transparent huge pages
    "trim_threshold": 2_000_000_000,  # keep what is freed
    "mmap_threshold": 32 << 20,  # take up to this much from the heap (glibc's largest value)
    "top_pad": 64 << 20,  # grow the heap by this much at once
}


def with_allocator_settings() -> None:
    """Run this command line again with GLIBC_TUNABLES, in the same process.

    Returns where there is no glibc and where the variable is set already, for instance by us.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    settings = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": settings})


def is_main() -> bool:
    """Whether this process speaks and writes for all processes of a training."""
    return os.environ.get("RANK", "0") == "0"
