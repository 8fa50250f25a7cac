"""Items made ahead in a thread, so that the consumer never waits for the next one."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def prefetched(plans: Iterable[Any], build: Callable[[Any], Any], depth: int = 1) -> Iterator[Any]:
    """`build(plan)` for each of `plans` in order, up to `depth` of them built ahead in a thread.

    An error of `build` is raised where its item would have come. To stop early, close the generator or drop it: items
    not yet started are never built. `build` must draw no random numbers, for their order would be chance.
    """
    ahead = collections.deque()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        try:
            for plan in plans:
                ahead.append(thread.submit(build, plan))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
