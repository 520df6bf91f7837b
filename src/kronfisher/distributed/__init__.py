"""Many processes: a group of ranks, what travels between them, who owns what, and each rank's part of the data."""

from kronfisher.distributed.joined import Joined
from kronfisher.distributed.owners import owners
from kronfisher.distributed.parcel import Parcel, axes_by_stride
from kronfisher.distributed.ranks import ProcessGroup, Ranks, describe, raise_described, ranks_of, warn_of_ranks
from kronfisher.distributed.shard_pass import batches_trained_on, train_on_what_is_read
from kronfisher.distributed.sharding import OTHER_ORDERS, Shard, shard, warn_of_padding
from kronfisher.distributed.spread import Spread
from kronfisher.distributed.sums import Sum, buckets
from kronfisher.distributed.whole import whole

__all__ = [
    "OTHER_ORDERS",
    "Joined",
    "Parcel",
    "ProcessGroup",
    "Ranks",
    "Shard",
    "Spread",
    "Sum",
    "axes_by_stride",
    "batches_trained_on",
    "buckets",
    "describe",
    "owners",
    "raise_described",
    "ranks_of",
    "shard",
    "train_on_what_is_read",
    "warn_of_padding",
    "warn_of_ranks",
    "whole",
]
