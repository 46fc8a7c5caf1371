"""Passes of fixed shape as CUDA graphs: the host launches one once, and not each of its hundreds of kernels.

`model.vit_cuda_graph` and `model.llm_cuda_graph` are made of this. Where CUDA refuses to capture a pass, one line says
why, and the run goes on without.
"""

import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MOST_GRAPHS = 4
"""Shapes of one pass that are captured, the first that came often enough; their graphs stay."""
OFTEN = 3
"""The call of one shape that captures it: the last batches of epochs come once."""


class CudaGraphs:
    """Captures passes for one switch, `key`, of the configuration."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.works = True
        """False after the first pass that CUDA refused."""

    def capture(
        self, function: Callable[[], Tensor], device: torch.device, pool: tuple[int, int] | None = None
    ) -> Callable[[], Tensor]:
        """What does the same on the same tensors; its result is overwritten by its next call.

        `function` runs once before it is captured, so it must not change what it reads. It is returned itself on a CPU,
        or if CUDA refuses. Graphs in one memory `pool` overwrite each other's results, too.
        """
        if device.type != "cuda" or not self.works:
            return function
        graph, keeps_casts = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights that autocast casts and keeps would not outlive its context
        try:
            with torch.cuda.device(device):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    function()  # libraries make their workspaces
                torch.cuda.current_stream().wait_stream(stream)
                # Of this thread alone: others load data and may allocate.
                with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                    result = function()
        except RuntimeError as error:
            self.works = False
            log.warning("%s: not captured, so the run goes on without (%s)", self.key, str(error).split("\n")[0])
            return function
        finally:
            torch.set_autocast_cache_enabled(keeps_casts)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class GraphedEncoder(CudaGraphs):
    """Calls a frozen encoder, by a graph for each shape of its input that comes often."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self._forget(0)

    def _forget(self, weights: int) -> None:
        self._weights, self._pool = weights, None
        self._calls: Counter[tuple] = Counter()
        self._graphs: dict[tuple, tuple[Tensor, Callable[[], Tensor]]] = {}

    def __call__(self, encoder: Callable[[Tensor], Tensor], image_B3SS: Tensor, weight: Tensor) -> Tensor:
        """`encoder(image)`, which must not depend on autocast or mode. `weight`: one of its own, by whose address it is
        known whether they moved."""
        if not self.works or image_B3SS.device.type != "cuda":
            return encoder(image_B3SS)
        if weight.data_ptr() != self._weights:  # graphs read weights where they were
            self._forget(weight.data_ptr())
        key = (image_B3SS.shape, image_B3SS.dtype)
        if key not in self._graphs:
            self._calls[key] += 1
            if self._calls[key] < OFTEN or len(self._graphs) >= MOST_GRAPHS:
                return encoder(image_B3SS)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.inference_mode(False), torch.no_grad():  # or nobody outside of it could write into the buffer
                buffer = image_B3SS.clone()
                self._graphs[key] = buffer, self.capture(lambda: encoder(buffer), buffer.device, self._pool)
        buffer, replay = self._graphs[key]
        buffer.copy_(image_B3SS)
        return replay().clone()
