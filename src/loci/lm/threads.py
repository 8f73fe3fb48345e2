"""How many cores the model room's engines use."""

from __future__ import annotations

from loci.errors import BadInput


def use_threads(count: int | None) -> int:
    """Let torch, and every engine that is made from now on, use so many threads. None changes nothing.

    Returns:
        The threads in use.
    """
    import torch

    if count is not None:
        if count < 1:
            raise BadInput(f"threads is {count}; at least 1 is needed.")
        torch.set_num_threads(count)
    return torch.get_num_threads()
