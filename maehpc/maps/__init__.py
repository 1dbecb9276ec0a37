"""Explanations on disk: one Zarr v3 group a data set, and the ledger that says which of it may be trusted.

MAPS/DATASET.zarr/
  zarr.json                   the group: what was explained, and how
  image/{zarr.json, c.0}      coordinate: the images' indices
  NAME/zarr.json              one array: dimension names, codecs
  NAME/c.3.0.0                shard 3 of that array
LEDGER/DATASET/
  store.json                  what the store is made from, and the bytes of every file above but the shards
  shard-00003.json            written last: shard 3 is whole, and these are its bytes

A process may die at any instant: what has no record does not exist, and what has one was on the disk before it.
"""

from maehpc.maps.layout import ArrayLayout, StoreLayout
from maehpc.maps.store import MapStore
from maehpc.maps.verify import Problem, discard, verify

__all__ = ["ArrayLayout", "MapStore", "Problem", "StoreLayout", "discard", "verify"]
