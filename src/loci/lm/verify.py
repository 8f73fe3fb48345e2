"""Checking a draft so that nothing changes but the speed.

Source  greedy: the usual walk. Match: at each node that is reached, one token is drawn from the model's own
        distribution; a child that carries it is taken, else the token ends the walk. For proposals that are fixed by
        the past no exact rule accepts more.
Ours    one draw per *node*, with noise keyed by the position. A draw per path gives a node that several paths share
        several chances, which biases the output. The output equals plain sampling with the same seed, token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loci.lm.draft import TokenTree


def walk(tree: TokenTree, choose: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Walk from the root: yield each node that is reached and the token chosen there.

    The walk is lazy: whoever stops taking pairs (at an end token, a stop string) draws no further.

    Args:
        choose: the token after a node: its argmax when greedy, the draw at its position when sampling.
    """
    node: int | None = 0
    while node is not None:
        token = choose(node)
        yield node, token
        node = tree.child(node, token)
