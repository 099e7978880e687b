"""Several GPUs, or processes, on one long context: they compress it together, and may each keep a part of it."""

from .compression import compress
from .ranks import RankError, Ranks, join
from .sharded_memory import ShardedMemory

__all__ = ["RankError", "Ranks", "ShardedMemory", "compress", "join"]
