"""The ways a run ends early that are no bug of fastvid."""


class InputError(ValueError):
    """Something the user can mend. The message is one line: what was found, where, and the remedy."""


class Interrupted(Exception):
    """The user asked to stop; everything was saved. The message says how to go on."""


class RankLost(Exception):
    """Another process of a job that torchrun started is gone. The message says how to go on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of the machine, of a GPU (torch.OutOfMemoryError), or on a CPU of torch's allocator or oneDNN, which have no classes of their own."""
    spoken = any(text in str(error) for text in ("DefaultCPUAllocator", "could not create a primitive", "could not create a memory"))
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or spoken
