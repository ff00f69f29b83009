"""The ways a run ends early that are no bug of fastvid."""


class InputError(ValueError):
    """Something the user can mend. The message is one line: what was found, where, and the remedy."""


class Interrupted(Exception):
    """The user asked to stop; everything was saved. The message says how to go on, unless another rank does; `number` is the signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class RankLost(Exception):
    """Another process of a job that torchrun started is gone. The message says how to go on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of the machine, of a GPU (torch.OutOfMemoryError), or as libraries say it that have no class for it; also behind a broken capture."""
    spoken = (
        "DefaultCPUAllocator",
        "could not create a primitive",
        "could not create a memory",
        "CUDA error: out of memory",
        "_ALLOC_FAILED",
    )
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(text in str(error) for text in spoken)
    ):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)
