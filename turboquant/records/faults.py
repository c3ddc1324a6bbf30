"""Faults of the machine, as the libraries report them: no memory, no disk."""

import errno

UNMEASURED = (
    "The measurement of this run needed more memory than there is, so its figures are missing; both answers and what "
    "the caches held are kept."
)
"""A comparison's note where its answers fitted into memory and their measurement did not."""
NO_MEMORY = "the machine has too little free memory for this"
_MEMORY_WORDS = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "can't start new thread")


def out_of_memory(error: BaseException) -> bool:
    """Did the machine or the accelerator run out of memory? Several libraries say so on the CPU only in words."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS)


def out_of_disk(error: BaseException) -> bool:
    """Is the disk full, or the file or the quota as large as it may be?"""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
