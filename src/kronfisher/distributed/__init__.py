"""Many processes: a group of ranks, what travels between them, who owns what, and each rank's part of the data."""

from kronfisher.distributed.owners import owners
from kronfisher.distributed.parcel import Parcel
from kronfisher.distributed.ranks import ProcessGroup, Ranks, ranks_of, warn_of_ranks
from kronfisher.distributed.sharding import Shard, shard, warn_of_padding

__all__ = [
    "Parcel",
    "ProcessGroup",
    "Ranks",
    "Shard",
    "owners",
    "ranks_of",
    "shard",
    "warn_of_padding",
    "warn_of_ranks",
]
