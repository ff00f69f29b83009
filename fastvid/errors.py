"""The ways a run ends early that are no bug of fastvid."""


class InputError(ValueError):
    """Something the user can mend. The message is one line: what was found, where, and the remedy."""


class Interrupted(Exception):
    """The user asked to stop; everything was saved. The message says how to go on."""


class RankLost(Exception):
    """Another process of a job that torchrun started is gone. The message says how to go on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of the machine, of a GPU (torch.OutOfMemoryError), or of torch's allocator on the CPU, which has no class of its own."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
